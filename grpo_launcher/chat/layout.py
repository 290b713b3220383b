"""Replies side by side on a console of any width."""

import sys
import unicodedata

from rich import box
from rich.console import Console, Group
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from grpo_launcher.chat.columns import Reply

NARROWEST = 28  # cells; where a column would have fewer they stand one below the other
WIDTH = 120  # of a console that is a file or a pipe


def console() -> Console:
    """The console of a chat or report."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def fits(columns: int, width: int) -> bool:
    """Whether so many columns can stand beside each other."""
    return width // columns >= NARROWEST


def side_by_side(replies: list[Reply], console: Console, cropped: bool = False):
    """Replies in columns, or one below the other where the console is narrow. cropped: no higher than the console, the ends of the texts shown."""
    if not fits(len(replies), console.width) and len(replies) > 1:
        return Group(*(side_by_side([reply], console, cropped) for reply in replies))
    below = [_below(reply) for reply in replies]
    texts = [Text(printable(reply.text)) for reply in replies]
    if cropped:
        room = console.height - 6 - max(len(text.plain.split("\n")) for text in below)
        texts = [_Tail(text, max(3, room)) for text in texts]
    table = Table(box=box.ROUNDED, border_style="dim", expand=True, show_lines=True)
    for reply in replies:
        table.add_column(Text(reply.column, "bold cyan"), ratio=1, overflow="fold")
    table.add_row(*texts)
    table.add_row(*below)
    return table


def printable(text: str) -> str:
    """A reply as a terminal may show it: what would move its cursor or change its colours becomes a mark."""
    return "".join(char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd" for char in text)


def figures(reply: Reply) -> list[str]:
    """What is known of a reply: its length, rewards and seconds."""
    if reply.seconds is None:
        return []
    length = f"{reply.characters} characters" + (f", {reply.tokens} tokens" if reply.tokens is not None else "")
    rewards = [f"{name} {number(value)}" for name, value in reply.rewards.items()]
    ended = ", ended on a call" * ("tool_calls" in reply.said[-1])  # none was left of its turns, or no room for the result
    return [length, *rewards, f"{reply.seconds:.1f} s" + ", cut off" * reply.cut_off + ", stopped" * reply.stopped + ended]


def number(value: float | None, digits: int = 2) -> str:
    """A figure as it is shown."""
    return "none" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def _below(reply: Reply) -> Text:
    lines = figures(reply)
    if not lines and not reply.problem:
        return Text("…", "dim")
    text = Text("\n".join(lines), "dim")
    return text.append("\n" * bool(lines) + printable(reply.problem), "not dim red") if reply.problem else text


class _Tail:
    """The last lines of a text, as many as there is room for."""

    def __init__(self, text: Text, lines: int):
        self.text, self.lines = text, lines

    def __rich_console__(self, console, options):
        for line in console.render_lines(self.text, options.update(height=None), pad=False)[-self.lines :]:
            yield from line
            yield Segment.line()
