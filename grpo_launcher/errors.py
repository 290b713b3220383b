"""The one exception that commands catch, and what its messages are made of. Standard library only."""

import difflib
from collections.abc import Iterable

EXIT_REFUSED = 2  # exit status of a command that refused what it was asked
EXIT_GUARD = 3  # exit status of a run that a guard stopped
EXIT_LOST = 69  # exit status of a run that lost a process or hung, so that --resume may help: EX_UNAVAILABLE
EXIT_RESUME = 75  # exit status of a run that TERM has stopped behind a checkpoint: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """Something that the user can mend.

    Args:
        field: recipe field, flag, file or checkpoint that the problem is about.
        problem: what is wrong, without a full stop.
        fix: what to do, without a full stop. "" where the problem says it all.
    """

    def __init__(self, field: str, problem: str, fix: str = ""):
        self.field, self.problem, self.fix = field, problem.rstrip(". "), fix.rstrip(". ")
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.field}: {self.problem}."
        if not self.fix:
            return text
        end = "" if self.fix.endswith("?") else "."
        return f"{text} Fix: {self.fix}{end}"

    def __reduce__(self):
        return type(self), (self.field, self.problem, self.fix)


def closest_match(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like `name`, or "" where none is."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return matches[0] if matches else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the fix for a mistyped name: the nearest known one, or else the list of a few."""
    known = list(known)
    match = closest_match(name, known)
    if match:
        return f"did you mean {match}?"
    return f"use one of {', '.join(known)}" if 0 < len(known) <= 30 else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; its type where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(". ") if lines else type(error).__name__
