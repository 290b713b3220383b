"""Time calls of the calculator, beside the parser that it uses and on hostile text: `python benchmarks/tools.py`."""

import ast
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/unit"))

from test_calculator import HOSTILE

from grpo_launcher.tools import calculator


def expressions(choose: random.Random, count: int) -> list[str]:
    """Texts such as a word problem asks for: two to seven numbers, some in brackets."""
    found = []
    for _ in range(count):
        text = str(choose.randint(1, 999))
        for _ in range(choose.randint(1, 6)):
            text = f"({text})" if choose.random() < 0.3 else text
            text += (
                f" {choose.choice('+-*/')} {choose.choice([choose.randint(1, 99), round(choose.uniform(0.5, 50), 2)])}"
            )
        found.append(text)
    return found


def milliseconds(function: Callable, given) -> float:
    """What a call took of this process's CPU time, the best of three; a refusal is a result."""
    tries = []
    for _ in range(3):
        start = time.process_time_ns()
        with contextlib.suppress(ValueError):
            function(given)
        tries.append((time.process_time_ns() - start) / 1e6)
    return min(tries)


def show(what: str, took: dict) -> float:
    """A line of the table; its median."""
    worst = max(took, key=took.get)
    median = statistics.median(took.values())
    print(f"{what:<38}{len(took):>7}{median:>12.4f}{took[worst]:>12.4f}   {worst:.40}")
    return median


def main() -> None:
    """On one core: random expressions through the calculator, and through ast.parse alone; then hostile text."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(f"{'milliseconds of CPU a call':<38}{'calls':>7}{'median':>12}{'worst':>12}   the worst")
    texts = expressions(random.Random(0), 3000)
    ours = show("calculator, random expressions", {text: milliseconds(calculator, text) for text in texts})
    peer = show(
        "ast.parse alone, the same",
        {text: milliseconds(lambda one: ast.parse(one, mode="eval"), text) for text in texts},
    )
    show("calculator, hostile", {name: milliseconds(calculator, text) for name, text in HOSTILE.items()})
    print(f"ratio of the medians to ast.parse alone: {ours / peer:.1f}")


if __name__ == "__main__":
    main()
