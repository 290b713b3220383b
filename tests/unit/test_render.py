"""render.py: layouts that nothing in a completion can break, and reports in every form."""

import io
import json
import re

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console

from grpo_launcher import render
from grpo_launcher.chat.backends import Completion, Turn
from grpo_launcher.errors import UserError
from grpo_launcher.render import Report, side_by_side

COMMANDS = "\x1b[31mred\x1b[2J\r\x07 [bold]x[/bold] \ud83d"


def printed(renderable, width: int) -> str:
    """Return what a console of that width shows."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(renderable(console))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize("text", ["今天天气很好，我们去公园。" * 9, "a" * 200, COMMANDS, "🙂 one\ttwo\n\nthree"])
def test_no_completion_breaks_the_layout(text, width):
    """Every line is as wide as the console, and nothing in a completion commands it or is read as markup."""
    completions = {
        "base": Completion(text),
        "最后": Completion("short", rewards={"r": None}),
        "b": Completion(text),
        "c": Completion(),
    }
    shown = printed(lambda console: side_by_side(completions, console), width)
    assert {cell_len(line) for line in shown.splitlines()} == {width} and "\x1b" not in shown
    assert ("[bold]" in shown) == ("[bold]" in text)
    assert shown.count("╭") == (4 if width == 60 else 1), "narrow columns stand one below the other"


def test_of_a_long_completion_the_end_is_shown_while_it_grows():
    """In columns and one below the other, within the height of the console."""
    completions = {name: Completion("begin " + "word " * 500 + "end", error="gone") for name in ("a", "b")}
    for width in (50, 100):
        shown = printed(lambda console: side_by_side(completions, console, height=30), width)
        assert shown.count("end") == 2 and "begin" not in shown and len(shown.splitlines()) <= 30


def test_figures_of_a_completion():
    """Length, rewards, seconds and how it ended."""
    completion = Completion(
        "Hello.", tokens=3, truncated=True, seconds=1.23, rewards={"length_reward": -12.0, "judge": None}
    )
    expected = ["6 characters, 3 tokens", "length_reward −12.00", "judge none", "1.2 s, truncated"]
    assert render.figures(completion) == expected
    assert render.figures(Completion()) == [] and render.figures(Completion("x", stopped=True)) == [
        "1 characters",
        "stopped",
    ]


def report() -> Report:
    """Return a report whose texts try to be markup."""
    evil = "<b>a</b> | *b* `c` [d](e) $x$ #1"
    summary = {
        "split": "test",
        "metric": "reward",
        "checkpoint": ["base", evil],
        "n": 4,
        "mean": [-120.0, 3.0],
        "low": [-130.0, 2.0],
    }
    summary |= {
        "high": [-110.0, 4.0],
        "difference": [None, 123.0],
        "difference_low": [None, 1.0],
        "difference_high": [None, 2.0],
    }
    summary |= {"p": [None, 0.0002], "p_holm": [None, 0.0004]}
    turn = Turn([{"role": "system", "content": "S"}, {"role": "user", "content": evil}], {}, {"reference": evil})
    turn.completions = {"base": Completion(evil, tokens=3), evil: Completion("part", error="the server went away")}
    facts = [f"base: {evil}", "greedy, at most 24 tokens"]
    return Report(
        "A report", facts, [turn], pd.DataFrame(summary), notes=["A note."], failed={"bad": "no such folder"}
    )


def test_markdown_and_html_show_text_as_it_is(tmp_path):
    """Tags, pipes and stars do not become markup; the page fetches nothing."""
    for suffix in (".md", ".html"):
        render.write(report(), tmp_path / f"it{suffix}")
        text = (tmp_path / f"it{suffix}").read_text()
        assert "<b>" not in text and "&lt;b&gt;" in text and "the server went away" in text and "A note." in text
        assert not re.search(r"(src|href|url)[=(]", text)
    rows = [line for line in (tmp_path / "it.md").read_text().split("\n") if line.startswith("|")]
    pipes = {line.count("|") - line.count(r"\|") for line in rows}
    assert pipes == {3, 7} and "| +123.0 | &lt;0.001 \\* |" in "\n".join(rows)


def test_json_holds_everything_unrounded(tmp_path):
    """What is not a number is left out."""
    render.write(report(), tmp_path / "it.json")
    content = json.loads((tmp_path / "it.json").read_text())
    base, other = content["splits"]["test"]["metrics"]["reward"].values()
    assert base == {"n": 4, "mean": -120.0, "low": -130.0, "high": -110.0} and other["p_holm"] == 0.0004
    assert content["splits"]["test"]["prompts"] == 4 and content["failed"] == {"bad": "no such folder"}
    assert content["turns"][0]["completions"]["base"]["tokens"] == 3


def test_a_picture_of_the_console_fetches_nothing(tmp_path):
    """It uses the fonts that a reader has."""
    render.write(report(), tmp_path / "it.svg")
    text = (tmp_path / "it.svg").read_text()
    assert text.startswith("<svg") and "url(http" not in text and "@font-face" not in text and "base" in text


def test_the_table_fits_80_columns_and_marks_differences():
    """A checkpoint a line, with the mean, its interval, the difference and a star."""
    console = Console(width=80, file=io.StringIO(), color_system=None)
    render.show(
        Report("", ["greedy"], summary=report().summary.replace({"checkpoint": {report().facts[0][6:]: "final"}})),
        console,
    )
    lines = console.file.getvalue().splitlines()
    assert "test: 4 prompts, greedy" in lines[0] and max(map(len, lines)) <= 80
    assert re.search(r"final +3\.0 +2\.0 … 4\.0 +\+123\.0 +<0\.001 \*", "\n".join(lines))


def test_outputs_are_refused_before_anything_is_generated(tmp_path):
    """An unknown suffix, a file that is there, and a place where no file can be."""
    (tmp_path / "a.md").touch()
    with pytest.raises(UserError, match="exists already"):
        render.check_outputs([tmp_path / "a.md"], overwrite=False)
    render.check_outputs([tmp_path / "a.md"], overwrite=True)
    with pytest.raises(UserError, match="cannot be made or written: Not a directory"):
        render.check_outputs([tmp_path / "a.md/b.md"], overwrite=True)
    with pytest.raises(UserError, match="unknown kind of file"):
        render.check_outputs([tmp_path / "a.docx"], overwrite=True)
