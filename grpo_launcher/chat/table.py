"""A comparison as it is read: in the terminal, in Markdown and as JSON."""

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_launcher.chat.statistics import LEVEL


def show(result: dict, console: Console) -> None:
    """A table a split: the checkpoints of a metric below each other, so that any number of them fits 80 columns."""
    for split, of in result["splits"].items():
        table = Table(box=None, padding=(0, 1), title=f"{escape(split)}: {of['prompts']} prompts, {escape(result['drawn'])}", title_justify="left")
        table.add_column("", overflow="fold")
        for heading in ("mean", "95 % interval", "difference", "p"):
            table.add_column(heading, justify="right", no_wrap=True)
        for metric, figures in of["metrics"].items():
            table.add_row(f"[bold]{escape(metric)}[/]")
            digits = _digits(figures)
            for name, one in figures.items():
                difference = _form(one.get("difference"), digits, "+")
                style = "" if _differs(one) else "dim"
                table.add_row(
                    f"  {escape(name)}", _form(one["mean"], digits), _interval(one, "", digits), difference, _p(one), style=style if difference else ""
                )
        console.print(table)
        console.print()
    for line in (result["method"], *result["notes"]):
        console.print(escape(line), style="dim" if line == result["method"] else "")


def markdown(result: dict) -> str:
    """The same with a column a checkpoint, and intervals of the differences too."""
    lines = []
    for split, of in result["splits"].items():
        names = list(dict.fromkeys(name for figures in of["metrics"].values() for name in figures))
        lines += [f"## {split}: {of['prompts']} prompts, {result['drawn']}", ""]
        lines += ["| | " + " | ".join(name.replace("|", "\\|") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
        for metric, figures in of["metrics"].items():
            digits, cells = _digits(figures), []
            for name in names:
                one = figures.get(name)
                cell = f"{_form(one['mean'], digits)} ({_interval(one, '', digits)})" if one else ""
                if one and one.get("difference") is not None:
                    cell += f"<br>{_form(one['difference'], digits, '+')} ({_interval(one, 'difference_', digits, '+')}), p {_p(one).strip()}"
                cells.append(cell.replace("*", "\\*"))
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        result["method"].replace("*", "\\*"),
        "",
        *(f"- {note}" for note in result["notes"]),
        *(f"- Not compared: {why}" for why in result["failed"].values()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def as_json(result: dict) -> str:
    """All figures, unrounded."""
    return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _digits(figures: dict[str, dict]) -> int:
    """Decimals, the same for all of a metric."""
    largest = max((abs(one["mean"]) for one in figures.values() if one["mean"] is not None), default=0)
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def _form(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


def _interval(one: dict, prefix: str, digits: int, sign: str = "") -> str:
    low, high = one[f"{prefix}low"], one[f"{prefix}high"]
    return "" if low is None else f"{_form(low, digits, sign)} … {_form(high, digits, sign)}"


def _differs(one: dict) -> bool:
    return one.get("p_holm") is not None and one["p_holm"] < LEVEL


def _p(one: dict) -> str:
    if one.get("p_holm") is None:
        return ""
    p = f"{one['p_holm']:.3f}" if one["p_holm"] >= 0.001 else "<0.001"
    return f"{p} *" if _differs(one) else f"{p}  "
