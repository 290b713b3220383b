"""Reward the number that a reply ends on, and the calls of a calculator on the way to it."""

import math
import re
from typing import NamedTuple

from grpo_launcher.messages import last_reply, tool_calls

COUNTED = 3  # failed calls that cost: more of them are no reason to stop trying
_WRITTEN = str.maketrans(dict(zip("０１２３４５６７８９．－／％＄￥−–", "0123456789.-/%$¥--", strict=True)) | {"½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
_SIZE = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_SIGN = r"(?<![\w)%])-(?:[A-Z]{0,3}\\?[$€£¥₹] ?)?"
_NUMBER = re.compile(rf"(?P<sign>{_SIGN})?(?<![\w^])(?:(?P<whole>\d+) +(?=\d+/))?(?P<size>{_SIZE})(?: ?/ ?(?P<below>{_SIZE}))?(?P<percent> ?\\?%)?", re.ASCII)


class Number(NamedTuple):
    """A number as it is written: 50% is 50 with a percent sign."""

    value: float
    percent: bool


def last_number(text: str) -> Number | None:
    """The last number of a text, None without one.

    Read are 72, 1,234.5, -3, −3, -$5.50, 3/4, 1 1/2, 1½, 2e3, 50% and full-width digits, with any word behind. A minus right behind a
    digit subtracts; a digit in a word or behind ^ (CO2, m^2) is no number.
    """
    numbers = list(_NUMBER.finditer(text.translate(_WRITTEN)))
    if not numbers:
        return None
    found = numbers[-1]
    whole, size, below = (float((found[part] or "0").replace(",", "")) for part in ("whole", "size", "below"))
    mixed = whole if size < below else 0.0
    value = mixed + (size / below if below else size)
    return Number(-value if found["sign"] and mixed == whole else value, bool(found["percent"]))


def calculation_reward(
    completions, answer, *, right: float = 1.0, tolerance: float = 1e-6, called: float = 0.1, failed: float = -0.1, without_tool: float = -0.2, **columns
) -> list[float]:
    """`right` for ending on the answer, `called` once if a tool call succeeded, `failed` for each of at most 3 failed calls: −0.3 to 1.1 by default.

    `without_tool` is added where a row needs a tool and none was called: the column needs_tool, B bools, says so; without it every row does.
    The last number of the reply counts; it may be off by `tolerance` of the answer's size. A percent sign on one side only is a unit or
    means hundredths: 50% is right for 50 and for 0.5. completions: B replies, as text or as chat messages; answer: B texts with a number,
    such as "72", "1,234", "3/4", "$5.50". Returns B floats. Raises ValueError for an answer without a number, and for options with which a
    right answer might pay no more than a wrong one.
    """
    if not (max(failed, without_tool) <= 0 <= min(called, tolerance) and called < right + min(COUNTED * failed, without_tool)):
        raise ValueError(
            f"calculation_reward: failed {failed} and without_tool {without_tool} have to be at most 0, called {called} and tolerance {tolerance} at least 0, "
            f"and called smaller than right {right} with {COUNTED} × failed or with without_tool"
        )
    scores = []
    for completion, gold, needed in zip(completions, answer, columns.get("needs_tool") or [True] * len(completions), strict=True):
        calls = tool_calls(completion)
        score = right * _is_right("calculation_reward", completion, gold, tolerance)
        score += called * any(_succeeded(call) for call in calls) + failed * min(COUNTED, sum(call.failed for call in calls))
        scores.append(score + without_tool * (bool(needed) and not calls))
    return scores


def calculation_accuracy(completions, answer, *, tolerance: float = 1e-6, **columns) -> list[float]:
    """1 for a reply that ends on the answer, as calculation_reward reads it, else 0. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages; answer: B texts with a number. Returns B floats. Raises ValueError for an
    answer without a number.
    """
    return [_is_right("calculation_accuracy", completion, gold, tolerance) for completion, gold in zip(completions, answer, strict=True)]


def tool_success(completions, **columns) -> list[float]:
    """1 where a tool was called and every call succeeded, else 0. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages. Returns B floats.
    """
    return [float(bool(calls) and all(map(_succeeded, calls))) for calls in map(tool_calls, completions)]


def _succeeded(call) -> bool:
    return call.result is not None and not call.failed


def _is_right(reward: str, completion, gold: str, tolerance: float) -> float:
    wanted, given = last_number(str(gold)), last_number(last_reply(completion))
    if wanted is None or not math.isfinite(wanted.value):
        raise ValueError(f"{reward}: answer is {gold!r}, and has to hold a number, such as 72, 1,234, 3/4 or 50%")
    if given is None:
        return 0.0
    values = {given.value, given.value * (1 if given.percent == wanted.percent else 0.01 if given.percent else 100)}
    return float(any(abs(value - wanted.value) <= tolerance * abs(wanted.value) for value in values))
