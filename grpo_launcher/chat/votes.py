"""Blind votes between two checkpoints: one line each in a file, and how often which of a pair was liked better."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

FILE = "votes.jsonl"
VOTES = ("A", "B", "tie")


@dataclass(frozen=True)
class Standing:
    """How one checkpoint did against another."""

    name: str
    other: str
    won: int
    lost: int
    tied: int

    @property
    def rate(self) -> float | None:
        """The share of decided votes that `name` won. Ties are left out: half a win each would narrow the interval by votes that decided nothing."""
        return self.won / (self.won + self.lost) if self.won + self.lost else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval."""
        return wilson(self.won, self.won + self.lost) if self.won + self.lost else None


def append(path: Path, vote: dict) -> None:
    """Add a vote as one line in one write, so that two pages that vote at once do not mix their lines."""
    line = json.dumps(vote, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    with open(path, "ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else b"\n" + line  # what an editor or a full disk cut off stays a line of its own
        file.write(line)


def read(path: Path) -> tuple[list[dict], list[int]]:
    """The votes of a file, and the numbers of the lines that are none."""
    votes, bad = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            vote = json.loads(line)
            good = isinstance(vote["A"], str) and isinstance(vote["B"], str) and vote["vote"] in VOTES
        except (ValueError, KeyError, TypeError):
            good = False
        if good:
            votes.append(vote)
        else:
            bad.append(number)
    return votes, bad


def standings(votes: list[dict]) -> list[Standing]:
    """One for every pair that was voted on; of the two the one that comes later in the alphabet stands first (final over base)."""
    counted = Counter()
    for vote in votes:
        other, name = sorted((vote["A"], vote["B"]))
        winner = vote.get(vote["vote"])
        counted[name, other, {name: "won", other: "lost"}.get(winner, "tied")] += 1
    pairs = sorted({(name, other) for name, other, _ in counted})
    return [Standing(name, other, *(counted[name, other, end] for end in ("won", "lost", "tied"))) for name, other in pairs]


def wilson(won: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share after E. B. Wilson (1927): it stays inside 0 and 1 and holds with few votes too."""
    z = NormalDist().inv_cdf(0.975)
    share, weight = won / of, z * z / of
    middle = (share + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * math.sqrt(share * (1 - share) / of + weight / (4 * of))
    return max(0.0, middle - reach), min(1.0, middle + reach)
