"""Tools in chat and comparison: a call's result goes back to the model, which goes on, as in training; what it drew is scripted, all else is real."""

import io
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compared import Compare
from pyarrow import parquet
from rich.console import Console
from test_web import Lengths, shown
from tiny_models import SYSTEM, make_model, make_run
from transformers.utils import get_json_schema

import demo_in_chat
from grpo_launcher.chat.columns import draw
from grpo_launcher.chat.engine import Engine
from grpo_launcher.chat.gather import gather
from grpo_launcher.chat.kept import COLUMNS
from grpo_launcher.chat.layout import figures
from grpo_launcher.chat.page import Page
from grpo_launcher.chat.scores import Scores
from grpo_launcher.chat.terminal import Chat

MINE = '''
import threading

HOLD = threading.Event()


def calculator(expression: str) -> str:
    """Calculate.

    Args:
        expression: A sum.
    """
    if "plus" in expression:
        raise ValueError("unknown name plus")
    if expression == "hold":
        HOLD.wait(60)
    return str(sum(map(int, expression.split(" + "))))


async def later(city: str) -> str:
    """Say what the weather is.

    Args:
        city: A city.
    """
    return f"rain in {city}"


def made(*, unit: str = "C"):
    def weather(city: str) -> str:
        """Say what the weather is.

        Args:
            city: A city.
        """
        return f"20 {unit}"

    return weather


def results(completions, **columns):
    return [float(sum(message["role"] == "tool" for message in one)) for one in completions]
'''


def call(expression: str, tool: str = "calculator", name: str = "expression") -> str:
    """A call as Qwen2.5 writes it."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': {name: expression}})}\n</tool_call>"


SCRIPT = {  # a prompt's last word → the model's turns
    "sum": ["I calculate.\n" + call("2 + 3"), "The answer is 5."],
    "fail": [call("2 plus 3"), call("2 + 3"), "The answer is 5."],
    "crash": [call("two"), "I do not know."],
    "nothing": [call("3", "search"), "I do not know."],
    "weather": [call("Paris", "later", "city"), "It rains."],
    "forever": [call("1 + 1")] * 9,
    "hold": [call("hold"), "Held."],
    "plain": ["Hello."],
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A run with tools and one whole checkpoint, stood in; what the model is asked stands in `asked`, decoded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mine", None)
    (tmp_path / "mine.py").write_text(MINE)
    make_model(tmp_path / "base", 0, context=6000)
    fields = {"tools": ["mine.calculator", "mine.later"], "reward_funcs": "mine.results", "max_tool_calling_iterations": 3, "max_completion_length": 600}
    make_run(tmp_path / "trainOutput/sums/1", "base", **fields)
    make_model(tmp_path / "trainOutput/sums/1/final-checkpoint", 1, context=6000)
    rows = [{"prompt": [{"role": "user", "content": f"Make a {word}"}], "reference": "The answer is 5."} for word in ("sum", "fail", "plain")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = []

    def generate(engine, checkpoint, prompts, manner, seed, streamer=None, stopping_criteria=None):
        tokenizer, said = engine.tokenizer(checkpoint), []
        for prompt in prompts:
            text = tokenizer.decode(prompt)
            asked.append(text)
            question = text.rpartition("<|im_start|>user\nMake a ")[2]
            turns = SCRIPT[question.partition("<|im_end|>")[0]]
            ids = tokenizer(turns[question.count("<|im_start|>assistant") - 1])["input_ids"] + [tokenizer.eos_token_id]
            said.append(ids[: manner.max_new_tokens])
        if streamer:
            for ids in (*prompts, *([token] for token in said[0])):
                streamer.put(torch.tensor(ids))
            streamer.end()
        return said

    monkeypatch.setattr(Engine, "_generate", generate)
    return SimpleNamespace(folder=tmp_path, asked=asked, run=Path("trainOutput/sums/1"))


def column(there, **changes):
    """(the final checkpoint's column, how it is asked)."""
    columns, _, manner, _ = gather([str(there.run / "final-checkpoint")], None, [], 4)
    return columns[0], replace(manner, **changes)


def said(there, word: str, **changes):
    """The whole reply to a word of SCRIPT."""
    local, manner = column(there, **changes)
    *_, reply = draw(local, [{"role": "user", "content": f"Make a {word}"}], manner)
    return reply


SHOWN = {
    "sum": 'I calculate.\n→ calculator(expression="2 + 3")\n← 5\nThe answer is 5.',
    "fail": "→ calculator(expression=\"2 plus 3\")\n← {'error': 'unknown name plus'}\n→ calculator(expression=\"2 + 3\")\n← 5\nThe answer is 5.",
    "crash": "→ calculator(expression=\"two\")\n← {'error': \"invalid literal for int() with base 10: 'two'\"}\nI do not know.",
    "nothing": "→ search(expression=\"3\")\n← {'error': 'Tool search not found.'}\nI do not know.",
    "weather": '→ later(city="Paris")\n← rain in Paris\nIt rains.',
    "forever": "\n← 2\n".join(['→ calculator(expression="1 + 1")'] * 4),
    "plain": "Hello.",
}


@pytest.mark.parametrize("word", SHOWN)
def test_a_call_is_run_and_the_model_goes_on(there, word):
    """Until it calls no more, or has gone on as often as the recipe allows; an error of a tool is told to the model."""
    reply = said(there, word)
    assert (reply.problem, reply.text) == (None, SHOWN[word])
    assert get_json_schema(__import__("mine").calculator)["function"]["description"] in there.asked[0]
    assert len(there.asked) == 1 + SHOWN[word].count("←")
    for before, after, message in zip(there.asked, there.asked[1:], reply.messages[1::2], strict=False):
        assert after.startswith(before) and f"<tool_response>\n{message['content']}\n</tool_response>" in after[len(before) :]
    tokenizer = column(there)[0].engine.tokenizer(column(there)[0].checkpoint)
    assert reply.tokens == sum(len(tokenizer(turn)["input_ids"]) + 1 for turn in SCRIPT[word][: len(there.asked)])
    assert len(reply.ids) - reply.tokens >= 20 * SHOWN[word].count("←") and not reply.cut_off


def test_results_are_shown_while_the_model_goes_on(there):
    """Between what it drew before and after."""
    local, manner = column(there)
    seen = [reply.text for reply in draw(local, [{"role": "user", "content": "Make a sum"}], manner)]
    assert any(text.endswith("</tool_call>\n← 5\n") for text in seen) and any("← 5\nThe ans" in text and "5." not in text for text in seen)


def test_all_turns_and_results_share_the_replys_tokens(there):
    """A result for which there is no room is left out; a turn is cut where the tokens end."""
    whole = said(there, "sum")
    (first,) = (len(one) for one in [column(there)[0].engine.tokenizer(column(there)[0].checkpoint)(SCRIPT["sum"][0])["input_ids"]])
    short = said(there, "sum", max_new_tokens=first + 5)
    assert short.text == SHOWN["sum"].partition("\n←")[0] and len(there.asked) == 3
    assert figures(short)[-1].endswith(" s, ended on a call") and figures(whole)[-1].endswith(" s")
    cut = said(there, "sum", max_new_tokens=len(whole.ids) - 4)
    assert cut.cut_off and len(cut.ids) == len(whole.ids) - 4 and "← 5\nThe answer" in cut.text and "5." not in cut.text


def test_a_tool_that_hangs_can_be_left(there):
    """Ctrl-C ends the wait, the column says why, and the next reply comes."""
    local, manner = column(there)
    stop = threading.Event()
    threading.Timer(1, stop.set).start()
    began = time.monotonic()
    *_, reply = draw(local, [{"role": "user", "content": "Make a hold"}], manner, stop)
    assert reply.stopped and "a tool was at work" in reply.problem and "hold" in reply.text and time.monotonic() - began < 20
    __import__("mine").HOLD.set()
    assert said(there, "plain").text == "Hello."


def test_a_tool_that_cannot_be_bound_is_a_columns_problem(there):
    """In the recipe's words."""
    assert "mine.gone" in said(there, "sum", tools=["mine.gone"]).problem
    assert "no setting `units`; did you mean unit?" in said(there, "sum", tools=["mine.made"], tool_kwargs={"made": {"units": "F"}}).problem


def test_a_corpus_is_found_from_any_folder(there, monkeypatch):
    """A setting that names a file was written where the run was started."""
    (there.folder / "corpus.jsonl").write_text('{"text": "nothing"}')
    make_run(there.folder / "trainOutput/search/1", "base", tools="grpo_launcher.tools.search.search", tool_kwargs='{"search": {"corpus": "corpus.jsonl", "k": 2}}')
    make_model(there.folder / "trainOutput/search/1/final-checkpoint", 1)
    (there.folder / "elsewhere").mkdir()
    monkeypatch.chdir(there.folder / "elsewhere")
    _, _, manner, _ = gather([str(there.folder / "trainOutput/search/1")], None, [], 4)
    assert manner.tool_kwargs == {"search": {"corpus": str(there.folder / "corpus.jsonl"), "k": 2}}


def test_the_report_shows_the_transcript(there, capsys):
    """On the console, in Markdown, HTML and JSON; the reward saw the results, and the length is that of what was said at last."""
    names = [str(there.run / "final-checkpoint"), "base"]
    assert demo_in_chat.main([*names, "--prompt", "Make a sum", "--output", "it"]) == 0
    assert "← 5" in capsys.readouterr().out
    told = json.loads(Path("it.json").read_text())
    for reply in told["rows"][0]["replies"]:
        assert reply["text"] == SHOWN["sum"] and reply["rewards"] == {"results": 1.0} and [one["role"] for one in reply["messages"]][1] == "tool"
    for form in (".md", ".html"):
        page = Path("it").with_suffix(form).read_text()
        assert page.count("← 5") == 2 and f"{len('The answer is 5.')} characters" in page and "mine" in page


def test_a_chat_goes_on_from_calls_and_results(there):
    """In the terminal and on the page the next prompt holds them as the model saw them."""
    columns, run, manner, _ = gather([str(there.run / "final-checkpoint")], None, [], 4)
    chat = Chat(columns, Scores(run), manner, Console(file=io.StringIO()), {"title": "", "columns": {}, "seed": None, "notes": []})
    assert "tools: calculator, later" in chat._introduction()
    page = Page(columns, Lengths(), manner, there.run)
    page.blocks()
    talk = page._fresh(False)
    for ask in (chat.turn, lambda prompt: [*page.send(prompt, False, SYSTEM, 0.5, talk, SimpleNamespace(session_hash="one"))]):
        there.asked.clear()
        ask("Make a sum")
        last = ask("Make a plain")
        assert len(there.asked) == 3 and there.asked[2].startswith(there.asked[1] + "The answer is 5.<|im_end|>")
    assert chat.turns[0].replies[0].rewards == {"results": 1.0} and "← 5" in chat.console.file.getvalue()
    assert "→ calculator(expression=&quot;2 + 3&quot;)\n← 5" in shown(page, last[-1])


def test_a_comparison_scores_all_messages(there, capfd, monkeypatch):
    """Replies are kept with theirs and drawn once, in batches; other tools draw anew; a file that was kept before there were tools still counts."""
    compare = Compare(there.folder, capfd)
    asked = [str(there.run / "final-checkpoint"), "base", "--data", "rows", "--max_new_tokens", "600", "--output", "out", "--overwrite"]
    status, told = compare(*asked)
    assert status == 0 and "by transformers, with calculator, later" in " ".join(told.split()), told
    metrics = json.loads(Path("out/comparison.json").read_text())["splits"]["test"]["metrics"]
    for means in ({name: metrics[name]["base"]["mean"] for name in metrics}, {name: metrics[name]["final"]["mean"] for name in metrics}):
        assert means["results"] == means["tool calls"] == 1 and means["tool calls that failed"] == pytest.approx(1 / 3)
        assert means["length, characters"] == pytest.approx((16 + 16 + 6) / 3) and means["ROUGE-1"] == pytest.approx(2 / 3)
        assert means["cut off"] == 0
    kept = {json.loads(row["prompt"])[-1]["content"]: row for row in compare.kept()}
    assert kept["Make a fail"]["reply"] == SHOWN["fail"] and json.loads(kept["Make a fail"]["messages"])[1]["content"] == "{'error': 'unknown name plus'}"
    tokens = sum(row["tokens"] for row in compare.kept() if row["checkpoint"] == "base") / 3
    assert metrics["length, tokens"]["base"]["mean"] == pytest.approx(tokens) and len(kept["Make a fail"]["reply_ids"]) > kept["Make a fail"]["tokens"]

    assert "0 replies to draw, 6 are kept" in compare(*asked)[1]
    recipe = there.run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_tool_calling_iterations: 3", "max_tool_calling_iterations: 1"))
    assert "6 replies to draw, 0 are kept" in compare(*asked)[1]
    status, told = compare(*asked, "--engine", "vllm")
    assert (status != 0 and "--engine vllm: it draws one turn" in told) or "vLLM is not installed here" in told


def test_replies_kept_before_there_were_tools_still_count(there, capfd):
    """Their file has two columns less."""
    compare = Compare(there.folder, capfd)
    asked = ["base", "--data", "rows", "--rewards", "--max_new_tokens", "60"]
    assert compare(*asked)[0] == 0
    path = there.folder / "trainOutput/completions.parquet"
    old = parquet.read_table(path).select([name for name in COLUMNS.names if name not in ("messages", "tokens")])
    parquet.write_table(old, path)
    assert "0 replies to draw, 3 are kept" in compare(*asked)[1] and compare(*asked, "--seed", "1")[0] == 0
    assert len(compare.kept()) == 6
