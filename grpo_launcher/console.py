"""What a person sees of a command: colours on a terminal, plain text in a file or a pipe. Standard library only."""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from grpo_launcher.errors import EXIT_REFUSED, UserError

# What stands out in a line, and the number of its colour or weight (ECMA-48, SGR).
STYLES = {
    r"^step +\d+/\d+|^evaluation at step \d+:": 1,  # bold
    r"^(Plan for|Run:|Report of:|Machine:|Rehearsal:)": 1,
    r"\d+:\d\d:\d\d left$": 2,  # faint
    r"^Warning:|^Verdict on step \d+:": 33,  # yellow
    r"^error:|^Stopped by": 31,  # red
    r"^Saved .*": 32,  # green
}


def coloured(text: str, stream: TextIO) -> str:
    """Return the text with colours if the stream is a terminal that shows them (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    for pattern, style in STYLES.items():
        text = re.sub(f"(?m){pattern}", rf"\033[{style}m\g<0>\033[0m", text)
    return text


def print_errors(*problems: object) -> None:
    """Print what is refused, a line each."""
    print(coloured("\n".join(f"error: {problem}" for problem in problems), sys.stderr), file=sys.stderr)


def end_with(command: Callable[..., int | None], *arguments) -> NoReturn:
    """Run a command and end this process with its status. A reader that has gone (COMMAND | head) is no failure."""
    status = 0
    try:
        status = exit_status(command, *arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def exit_status(command: Callable[..., int | None], *arguments) -> int:
    """Run a command. Returns its own exit status, or EXIT_REFUSED behind the message of a UserError."""
    try:
        return command(*arguments) or 0
    except UserError as error:
        print_errors(error)
        return EXIT_REFUSED
