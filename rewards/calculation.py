"""Reward the number that a completion ends on, and the calculator calls on the way to it."""

import math
import re
from typing import NamedTuple

from grpo_launcher.messages import ToolCall, last_reply, tool_calls

MAX_FAILED = 3  # failed calls that cost: more of them are no reason to stop trying
_WIDE = str.maketrans("０１２３４５６７８９．－／％＄￥−–", "0123456789.-/%$¥--")
_HALVES = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
_SIZE = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![\w)%])- (?:[A-Z]{{0,3}}\\?[$€£¥₹][ ]?)? )?   # a minus right behind a digit subtracts
    (?<![\w^])                                                  # no digit of a word or an exponent: CO2, m^2
    (?: (?P<whole>\d+)[ ]+(?=\d+/) )? (?P<size>{_SIZE}) (?: [ ]?/[ ]?(?P<below>{_SIZE}) )?
    (?P<percent> [ ]?\\?% )?
    """,
    re.ASCII | re.VERBOSE,
)


class Number(NamedTuple):
    """A number as it is written: 50% is 50 with a percent sign."""

    value: float
    percent: bool


def last_number(text: str) -> Number | None:
    """Return the last number of a text: 72, 1,234.5, -3, -$5.50, 3/4, 1 1/2, 1½, 2e3, 50%, full-width digits."""
    matches = list(_NUMBER.finditer(text.translate(_WIDE).translate(_HALVES)))
    if not matches:
        return None
    match = matches[-1]
    whole, size, below = (float((match[part] or "0").replace(",", "")) for part in ("whole", "size", "below"))
    value = size / below if below else size
    is_mixed = size < below  # 1 1/2 is 1.5, but "2 10/5" are two numbers
    if is_mixed:
        value += whole
    if match["sign"] and (is_mixed or not whole):
        value = -value
    return Number(value, bool(match["percent"]))


def calculation_reward(
    completions,
    answer,
    *,
    right: float = 1.0,
    tolerance: float = 1e-6,
    called: float = 0.1,
    failed: float = -0.1,
    without_tool: float = -0.2,
    **columns,
) -> list[float]:
    """Reward ending on the right number, and using a tool well on the way.

    Args:
        answer: B texts with a number, such as "72", "1,234", "3/4", "$5.50". 50% is right for 50 and for 0.5.
        right: for ending on the answer, which may be off by `tolerance` of its size.
        called: added once if a tool call succeeded.
        failed: added for each failed call, at most 3 times.
        without_tool: added where no tool was called although the row needs one (column `needs_tool`, by default all).

    Returns:
        B rewards, in [-0.3, 1.1] by default.
    """
    worst = min(MAX_FAILED * failed, without_tool)
    if max(failed, without_tool) > 0 or min(called, tolerance) < 0 or called >= right + worst:
        raise ValueError(
            f"calculation_reward: failed {failed} and without_tool {without_tool} must be at most 0, called {called} "
            f"and tolerance {tolerance} at least 0, and called below right {right} plus the worst penalty {worst}"
        )
    needs_tool = columns.get("needs_tool") or [True] * len(completions)
    scores = []
    for completion, gold, needed in zip(completions, answer, needs_tool, strict=True):
        calls = tool_calls(completion)
        score = right * _is_right(completion, gold, tolerance)
        score += called * any(map(_succeeded, calls)) + failed * min(MAX_FAILED, sum(call.failed for call in calls))
        scores.append(score + without_tool * (bool(needed) and not calls))
    return scores


def calculation_accuracy(completions, answer, *, tolerance: float = 1e-6, **columns) -> list[float]:
    """Measure: 1 for a completion that ends on the right number, as in `calculation_reward`, else 0."""
    return [
        float(_is_right(completion, gold, tolerance)) for completion, gold in zip(completions, answer, strict=True)
    ]


def tool_success(completions, **columns) -> list[float]:
    """Measure: 1 where a tool was called and every call succeeded, else 0."""
    episodes = [tool_calls(completion) for completion in completions]
    return [float(bool(calls) and all(map(_succeeded, calls))) for calls in episodes]


def _succeeded(call: ToolCall) -> bool:
    return call.result is not None and not call.failed


def _is_right(completion, gold: str, tolerance: float) -> bool:
    expected = last_number(str(gold))
    actual = last_number(last_reply(completion))
    if expected is None or not math.isfinite(expected.value):
        raise ValueError(f"calculation: answer is {gold!r} and must hold a number, such as 72, 1,234, 3/4 or 50%")
    if actual is None:
        return False
    # A percent sign on one side only is a unit, or means hundredths.
    scale = {(True, False): 0.01, (False, True): 100.0}.get((actual.percent, expected.percent), 1.0)
    values = (actual.value, actual.value * scale)
    return any(abs(value - expected.value) <= tolerance * abs(expected.value) for value in values)
