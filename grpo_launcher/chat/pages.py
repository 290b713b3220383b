"""What some columns said, as Markdown, HTML, JSON, or a picture of the console that showed it."""

import html
import io
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from rich import box
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_launcher.chat.checkpoints import Manner
from grpo_launcher.chat.columns import Reply
from grpo_launcher.chat.layout import figures, number, printable, side_by_side

SHOWN = 3  # prompts on the console; all stand in the files
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 2rem; table-layout: fixed }
th, td { border: 1px solid #ccc; padding: .4rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
td, .prompt { white-space: pre-wrap } .prompt { background: #f4f4f4; padding: .6rem } small { color: #666 } .problem { color: #a00 }
"""


@dataclass
class Turn:
    """One prompt and what every column said to it."""

    prompt: str | list[dict]
    replies: list[Reply]
    columns: dict = field(default_factory=dict)  # what the row held beside the prompt


def write(paths: list[Path], turns: list[Turn], manner: Manner, about: dict) -> None:
    """Write each path in the form that its suffix names; `check` says beforehand whether that can be.

    about: title, columns (name → source), seed, and notes.
    """
    check(paths)
    for path in paths:
        text = FORMS[path.suffix](turns, manner, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8", errors="replace") as file:
            file.write(text)


def check(paths: list[Path]) -> None:
    """Raise ValueError where a suffix is unknown, and FileExistsError where a file is there: nothing is replaced."""
    for path in paths:
        if path.suffix not in FORMS:
            raise ValueError(f"{path}: the name must end in {', '.join(FORMS)}.")
        if path.exists():
            raise FileExistsError(f"{path} is there already, and nothing is replaced; choose another name.")


def show(turns: list[Turn], notes: list[str], console: Console, most: int = SHOWN) -> None:
    """The first prompts side by side, and where there are several the means of all."""
    for turn in turns[:most]:
        console.print(Text(f"> {printable(asked(turn.prompt))}", "bold"))
        console.print(side_by_side(turn.replies, console))
    if len(turns) > 1:
        headings, rows = summary(turns)
        table = Table(box=box.SIMPLE_HEAD, title=f"Means over {len(turns)} prompts", title_justify="left")
        for place, heading in enumerate(headings):
            table.add_column(Text(heading), justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in notes:
        console.print(Text(note, "yellow"))


def summary(turns: list[Turn]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for every column: means over the prompts that it answered."""
    names = list(dict.fromkeys(name for turn in turns for reply in turn.replies for name in reply.rewards))
    rows = []
    for replies in zip(*(turn.replies for turn in turns), strict=True):
        good = [reply for reply in replies if not reply.problem]
        row = [replies[0].column, f"{len(good)} of {len(turns)}", _mean((reply.characters for reply in good), 1), _mean((reply.tokens for reply in good), 1)]
        row += [_mean((reply.rewards.get(name) for reply in good), 2) for name in names]
        rows.append([*row, str(sum(reply.cut_off for reply in good)), _mean((reply.seconds for reply in good), 1)])
    return ["checkpoint", "answered", "characters", "tokens", *names, "cut off", "seconds"], rows


def asked(prompt: str | list[dict]) -> str:
    """A prompt as one reads it: without the system message, and with who spoke where there is more than one message."""
    if isinstance(prompt, str):
        return prompt
    said = [message for message in prompt if message["role"] != "system"]
    return said[0]["content"] if len(said) == 1 else "\n".join(f"{message['role']}: {message['content']}" for message in said)


def markdown(turns: list[Turn], manner: Manner, about: dict) -> str:
    """A table a prompt, the replies beside each other; nothing in a reply is read as markup."""
    parts = [f"# {_cell(about['title'])}", "", *(f"- {_cell(line)}" for line in _facts(manner, about))]
    if len(turns) > 1:
        headings, rows = summary(turns)
        parts += ["", *_table([headings, *rows])]
    for place, turn in enumerate(turns, start=1):
        parts += ["", f"## Prompt {place}", "", f"> {_cell(asked(turn.prompt))}", ""]
        parts += [f"{name}: {_cell(str(value))}\n" for name, value in turn.columns.items()]
        cells = [[reply.column for reply in turn.replies], [_text(reply) for reply in turn.replies], ["\n".join(figures(reply)) for reply in turn.replies]]
        parts += _table(cells)
    return "\n".join(parts) + "\n"


def page(turns: list[Turn], manner: Manner, about: dict) -> str:
    """One HTML file that needs no other."""
    esc = html.escape
    parts = [f"<h1>{esc(about['title'])}</h1><ul>", *(f"<li>{esc(line)}</li>" for line in _facts(manner, about)), "</ul>"]
    if len(turns) > 1:
        headings, rows = summary(turns)
        parts.append(_rows([[f"<th>{esc(heading)}</th>" for heading in headings], *([f"<td>{esc(cell)}</td>" for cell in row] for row in rows)]))
    for turn in turns:
        parts.append(f'<div class="prompt">{esc(asked(turn.prompt))}</div>')
        parts += [f"<p>{esc(name)}: {esc(str(value))}</p>" for name, value in turn.columns.items()]
        heads = [f"<th>{esc(reply.column)}</th>" for reply in turn.replies]
        texts = [f"<td{' class=problem' * bool(reply.problem)}>{esc(_text(reply))}</td>" for reply in turn.replies]
        below = [f"<td><small>{esc(chr(10).join(figures(reply)))}</small></td>" for reply in turn.replies]
        parts.append(_rows([heads, texts, below]))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{esc(about["title"])}</title><style>{STYLE}</style>'
    return f"<!DOCTYPE html>\n<html><head>{head}</head>\n<body>{chr(10).join(parts)}</body></html>\n"


def as_json(turns: list[Turn], manner: Manner, about: dict) -> str:
    """Everything, for a program."""
    rows = [{"prompt": turn.prompt, "columns": turn.columns, "replies": [asdict(reply) for reply in turn.replies]} for turn in turns]
    return json.dumps({**about, "manner": asdict(manner), "rows": rows}, ensure_ascii=False, indent=1, default=str) + "\n"


def _facts(manner: Manner, about: dict) -> list[str]:
    drawn = "greedy" if manner.temperature == 0 else f"temperature {manner.temperature:g}, top_p {manner.top_p:g}, top_k {manner.top_k}"
    seed = "" if about["seed"] is None else f", seed {about['seed']}"
    tools = f", tools: {', '.join(manner.tools)}" if manner.tools else ""
    columns = [f"{name}: {source}" for name, source in about["columns"].items()]
    return [*columns, f"{drawn}{seed}, at most {manner.max_new_tokens} tokens{tools}", f"system prompt: {manner.system_prompt or 'none'}", *about["notes"]]


def _text(reply: Reply) -> str:
    return f"{reply.text}\n[{reply.problem}]".strip() if reply.problem else reply.text


def _mean(values, digits: int) -> str:
    values = [value for value in values if value is not None]
    return number(mean(values) if values else None, digits)


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _cell(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(printable(text), quote=False))
    return escaped.replace("\n", "<br>")


def _rows(rows: list[list[str]]) -> str:
    return "<table>" + "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows) + "</table>"


def _svg(turns: list[Turn], manner: Manner, about: dict) -> str:
    """The turns as a console shows them, in fonts that the reader has: rich's own form fetches one from the network."""
    console = Console(record=True, width=max(80, 30 * len(turns[0].replies)), file=io.StringIO(), highlight=False)
    show(turns, [], console, len(turns))
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title=about["title"], code_format=form)


FORMS = {".md": markdown, ".html": page, ".json": as_json, ".svg": _svg}
