"""Completions side by side and tables of a comparison: for the console, as Markdown, HTML, SVG and JSON."""

import html
import io
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from grpo_launcher.chat.backends import Completion, Prompt, Turn
from grpo_launcher.errors import UserError
from grpo_launcher.evaluate import LEVEL, METHOD
from grpo_launcher.messages import last_reply, printable
from grpo_launcher.runs import check_new_file

MIN_COLUMN = 28  # cells. Narrower columns stand one below the other
PIPE_WIDTH = 120  # cells of a console that is a file or a pipe
SUFFIXES = (".md", ".html", ".json", ".svg")
HTML_HEAD = """<!DOCTYPE html>
<meta charset="utf-8">
<style>body { font: 15px/1.4 system-ui, sans-serif; margin: 2em } table { border-collapse: collapse }
th, td { border: 1px solid #ccc; padding: .4em .6em; text-align: left; vertical-align: top }</style>
"""
HEADINGS = ["checkpoint", "mean", "95 % interval", "difference", "p"]


@dataclass
class Report:
    """What a command or a chat shows and writes.

    Attributes:
        facts: models and settings, one a line.
        summary: of evaluate.summarize.
        failed: models that completed nothing, and why.
    """

    title: str
    facts: list[str]
    turns: list[Turn] = field(default_factory=list)
    summary: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def make_console() -> Console:
    """Return the console of a chat or a report."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def turns_of(frame: pd.DataFrame) -> list[Turn]:
    """Return the turns of a frame of evaluate.evaluate."""
    turns = []
    for _, rows in frame.groupby(["split", "row"], sort=False):
        completions = dict(zip(rows["checkpoint"], rows["completion"], strict=True))
        turns.append(Turn(rows["prompt"].iloc[0], completions, rows["columns"].iloc[0]))
    return turns


def show(report: Report, console: Console, limit: int | None = None) -> None:
    """Print the first turns side by side, the summary and the notes."""
    for turn in report.turns[:limit]:
        console.print(Text(f"> {printable(prompt_text(turn.prompt))}", "bold"))
        console.print(side_by_side(turn.completions, console))
    if report.summary is not None:
        for split, summary in report.summary.groupby("split", sort=False):
            console.print(Text(f"{split}: {_prompts(summary)} prompts, {report.facts[-1]}", "bold"))
            console.print(_summary_table(summary))
        console.print(Text(METHOD, "dim"))
    for note in report.notes:
        console.print(Text(note, "yellow"))


def side_by_side(completions: dict[str, Completion], console: Console, height: int | None = None):
    """Lay completions out in columns, or one below the other where the console is narrow.

    Of completions that need more than `height` lines the end is shown.
    """
    count = len(completions)
    if count > 1 and console.width // count < MIN_COLUMN:
        share = height // count if height else None
        return Group(*(side_by_side({name: each}, console, share) for name, each in completions.items()))
    figures = [_figures_text(completion) for completion in completions.values()]
    texts = [Text(printable(completion.text)) for completion in completions.values()]
    if height:
        room = max(3, height - 6 - max(len(text.plain.split("\n")) for text in figures))
        texts = [Text("\n").join(text.wrap(console, console.width // count - 4)[-room:]) for text in texts]
    table = Table(box=box.ROUNDED, border_style="dim", expand=True, show_lines=True)
    for name in completions:
        table.add_column(Text(name, "bold cyan"), ratio=1, overflow="fold")
    table.add_row(*texts)
    table.add_row(*figures)
    return table


def figures(completion: Completion) -> list[str]:
    """Return what is known of a completion beside its text: length, rewards, seconds and how it ended."""
    if completion.tokens is None and not completion.text and not completion.stopped:
        return []
    tokens = [] if completion.tokens is None else [f"{completion.tokens} tokens"]
    rewards = [f"{name} {_number(score, 2)}" for name, score in completion.rewards.items()]
    ends = {
        "truncated": completion.truncated,
        "stopped": completion.stopped,
        "ended on a tool call": "tool_calls" in completion.as_messages()[-1],
    }
    ended = [f"{completion.seconds:.1f} s"] if completion.seconds is not None else []
    ended += [word for word, happened in ends.items() if happened]
    characters = len(last_reply(completion.as_messages()))
    lines = [", ".join([f"{characters} characters", *tokens]), *rewards, ", ".join(ended)]
    return [line for line in lines if line]


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt without its system message, with the roles where there is more than one message."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in prompt if message["role"] != "system"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def check_outputs(paths: list[Path], overwrite: bool) -> None:
    """Refuse outputs whose form is unknown, that are there already, or that cannot be written."""
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UserError(str(path), "unknown kind of file", f"end its name in {', '.join(SUFFIXES)}")
        check_new_file(path, overwrite)


def write(report: Report, path: Path) -> None:
    """Write a report in the form that the suffix names."""
    if path.suffix == ".md":
        text = markdown(report)
    elif path.suffix == ".json":
        text = as_json(report)
    elif path.suffix == ".html":
        text = HTML_HEAD + MarkdownIt().enable("table").render(markdown(report))
    else:  # rich's own form fetches a font from the network
        columns = max((len(turn.completions) for turn in report.turns), default=1)
        console = Console(record=True, width=max(80, 34 * columns), file=io.StringIO(), highlight=False)
        show(report, console)
        text = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=report.title), flags=re.DOTALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")


def markdown(report: Report) -> str:
    """Return a report as Markdown. Nothing in a completion is read as markup."""
    parts = [f"# {_cell(report.title)}", "", *(f"- {_cell(line)}" for line in [*report.facts, *report.notes])]
    if report.summary is not None:
        for split, summary in report.summary.groupby("split", sort=False):
            parts += ["", f"## {_cell(split)}: {_prompts(summary)} prompts", ""]
            rows = [
                [metric, *row]
                for metric, group in summary.groupby("metric", sort=False)
                for row in _summary_rows(group)
            ]
            parts += _markdown_table([["metric", *HEADINGS], *rows])
        parts += ["", _cell(METHOD)]
    for number, turn in enumerate(report.turns, start=1):
        parts += ["", f"## Prompt {number}", "", f"> {_cell(prompt_text(turn.prompt))}", ""]
        parts += [f"{_cell(name)}: {_cell(str(value))}\n" for name, value in turn.columns.items()]
        completions = turn.completions.values()
        texts = [f"{each.text}\n[{each.error}]" if each.error else each.text for each in completions]
        parts += _markdown_table([list(turn.completions), texts, ["\n".join(figures(each)) for each in completions]])
    return "\n".join(parts) + "\n"


def as_json(report: Report) -> str:
    """Return everything, unrounded. What is not a number is left out."""
    content = asdict(report)
    del content["summary"]
    if report.summary is not None:
        content |= {"method": METHOD, "splits": {}}
        for split, summary in report.summary.groupby("split", sort=False):
            metrics = {}
            for row in summary.to_dict("records"):
                numbers = {name: value for name, value in list(row.items())[3:] if not pd.isna(value)}
                metrics.setdefault(row["metric"], {})[row["checkpoint"]] = numbers
            content["splits"][split] = {"prompts": _prompts(summary), "metrics": metrics}
    return json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"


def _prompts(summary: pd.DataFrame) -> int:
    return int(summary["n"].max())


def _summary_rows(group: pd.DataFrame) -> list[list[str]]:
    """Return a metric's rows under HEADINGS, with the same number of decimals."""
    largest = group["mean"].abs().max()
    digits = 3
    if largest >= 10:
        digits = 2
    if largest >= 100:
        digits = 1
    rows = []
    for row in group.to_dict("records"):
        interval = f"{_number(row['low'], digits)} … {_number(row['high'], digits)}" if row["n"] > 1 else ""
        cells = [row["checkpoint"], _number(row["mean"], digits), interval, "", ""]
        p = row.get("p_holm")
        if p is not None and not pd.isna(p):
            star = " *" if p < LEVEL else ""
            cells[3:] = [_number(row["difference"], digits, "+"), f"{'<0.001' if p < 0.001 else f'{p:.3f}'}{star}"]
        rows.append(cells)
    return rows


def _summary_table(summary: pd.DataFrame) -> Table:
    """Lay the checkpoints of a metric out below each other, so that any number of them fits 80 columns."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("", overflow="fold")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for metric, group in summary.groupby("metric", sort=False):
        table.add_row(Text(metric, "bold"))
        for name, *cells in _summary_rows(group):
            table.add_row(Text(f"  {name}"), *cells, style="" if cells[-1].endswith("*") or not cells[-1] else "dim")
    return table


def _figures_text(completion: Completion) -> Text:
    lines = figures(completion)
    text = Text("\n".join(lines) or "…", "dim")
    if completion.error:
        text = Text("\n".join([*lines, ""]), "dim").append(printable(completion.error), "not dim red")
    return text


def _number(value: float | None, digits: int, sign: str = "") -> str:
    if value is None or pd.isna(value):
        return "none"
    return f"{value:{sign}z.{digits}f}".replace("-", "−")


def _markdown_table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _cell(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(printable(text), quote=False))
    return escaped.replace("\n", "<br>")
