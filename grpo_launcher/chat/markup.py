"""What the page shows, as HTML. What users and models say passes through html.escape here, so that nothing in it is read as markup."""

import html

from grpo_launcher.chat.columns import Reply
from grpo_launcher.chat.layout import figures
from grpo_launcher.chat.votes import Standing

HEADS = ("", "against", "won", "lost", "tied", "win rate without ties", "95 % interval (Wilson)")


def column(name: str, turns: list[tuple[str, Reply | None]], named: bool) -> str:
    """A checkpoint's column: its name, and every prompt with the reply to it, None where it is still to come.

    named: with rewards and seconds; before a blind vote they would speak for one side, and only the length is told.
    """
    said = "".join(_part("asked", prompt) + (_reply(reply, named) if reply else "") for prompt, reply in turns)
    return f'<div class="said">{_part("name", name)}{said}</div>'


def _reply(reply: Reply, named: bool) -> str:
    known = ["stopped"] * reply.stopped if reply.seconds is None else figures(reply)
    below = " · ".join(known if named else known[:1])
    return _part("reply", reply.text) + _part("problem", " ".join((reply.problem or "").split())) + _part("note", below)


def standings(rows: list[Standing], wrong: str) -> str:
    """The win rates as a table, and a line about what is wrong with the file of votes."""
    lines = []
    for one in rows:
        share, interval = ("–", "–") if one.rate is None else (f"{one.rate:.0%}", "{:.0%} to {:.0%}".format(*one.interval))
        lines.append((one.name, one.other, one.won, one.lost, one.tied, share, interval))
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in line)}</tr>" for line in lines)
    table = f"<table><tr>{''.join(f'<th>{head}</th>' for head in HEADS)}</tr>{body}</table>" if rows else ""
    return table + _part("problem", wrong)


def _part(kind: str, text: str) -> str:
    return f'<div class="{kind}">{html.escape(text)}</div>' if text else ""
