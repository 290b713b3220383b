"""Reward the number that a completion ends on, and the calculator calls on the way to it."""

import math
import re
import unicodedata
from typing import NamedTuple

from grpo_launcher.messages import ToolCall, gold_value, last_reply, tool_calls, without_marks

MAX_FAILED = 3  # failed calls that cost: more of them are no reason to stop trying
_SIGNS = dict(zip("−–\u2010\u2011\u2012\ufe63\u207b⁄٫٬٪", "-------/.,%", strict=True))
_SUPERSCRIPTS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_CURRENCY, _CODES = "$€£¥₹₩₽", "USD|EUR|GBP|JPY|CNY|RMB|KRW|INR"
_SPACES = "\u00a0\u2000-\u200a\u202f\u205f\u3000"  # but for the plain one, which stands between two numbers as well
_FRAC = r"\\(?:[dtcs]|nice)?frac"
_ARGUMENT = r"\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))"
_REWRITES = [  # what LaTeX and Unicode write in a number, and how it is read here
    (r"\\(?:!|(?:left|right|displaystyle)(?![A-Za-z]))", ""),
    (r"\\([$%])", r"\1"),
    (r"\{,\}(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"\\[,;: ]|~", "\u2009"),
    (rf"(?<=\d)(?<!\d{{4}})[{_SPACES}'’](?=\d{{3}}(?!\d))", ""),
    (rf"[{_SPACES}]", " "),
    (r"\^\s*\{?\s*\\circ\b\s*\}?|\\degree\b", "°"),
    (r"(?<=\d)\s*(?:\\times|\\cdot|[×·*xX])\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?\d+)\s*\}|([+-]?\d+))", r"e\1\2"),
    (rf"(?<=\d)\s*(?={_FRAC})", " "),
    (_FRAC + 2 * _ARGUMENT, r"\1\2/\3\4"),
    (r"([={$])[ ]*-[ ]+(?=[\d.])", r"\1-"),
    (r"(?<![^\s*])(_{1,3})([^_\n]+)\1(?![\w{])", r"\2"),  # Markdown's marks
    (r"([_^])\s*(?:\{[^{}]*\}|\([^()]*\)|[+-]?\d+(?:\.\d+)?)", r"\1"),  # an index or exponent is no number
    (r"^\s*\(([^(),]*)\)\s*$", r"\1"),
    (r"^\s*-?\d{1,3}(?: \d{3})+\s*$", lambda match: match[0].replace(" ", "")),
]
# Three digits behind a comma are thousands, but for those behind 0; (1,2) is a point.
_DECIMAL_COMMA = re.compile(r"(?<![\w.,(\[])(?<!\\\{)(\d+(?:\.\d{3})*),(?:(?<=\b0,)|(?!\d{3}(?!\d)))(\d+)(?![.,]?\d)")
_SIZE = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![\w)%^])- (?:[A-Z]{{0,3}}[{_CURRENCY}][ ]?)? )?  # a minus right behind a digit subtracts
    (?<![\w^])(?<![_^]\{{)                                        # no digit of a word, index or exponent: CO2, m^2
    (?: (?P<whole>\d+)[ ]+(?=\d+/) )? (?P<size>{_SIZE}) (?: [ ]?/[ ]?(?P<below>{_SIZE}) )?
    (?P<percent> [ ]?(?:%|percent\b) )?
    """,
    re.ASCII | re.VERBOSE,
)
# What makes a number a part of something that is not read here: \sqrt{2}, 2^{10}, 3π, 1/-2, 1,2,3, 5 million.
_PART_BEHIND = re.compile(r"(?:√|\\[A-Za-z]+(?:\[[^][]*\])?(?:\{[^{}]*\})*\{[^{}]*|\\sqrt|/)\s*$|\d[.,]$")
_SCALE = (
    r"(?:hundred|thousand|million|billion|trillion|lakh|crore|hal[fv]|third|(?:four|fif|six|ten)th)"
    r"|[十百万萬亿億半]|[千兆](?![克米瓦])"
)
_PART_BEFORE = re.compile(rf"\s*(?:\^|[√π]|\\(?:sqrt|pi)(?![A-Za-z]))|[ $*-]*(?:{_SCALE})", re.I)
# What may stand around the number of a whole answer: x =, a currency, a unit, marks.
_MARKS = r"[\s$*`\"'“”‘’]*"
_LABEL = r"\\?[A-Za-z\u4e00-\u9fff]+\s*[=:]"
_BEFORE = re.compile(rf"{_MARKS}(?:{_LABEL})?\s*\+?(?:[A-Z]{{0,3}}[{_CURRENCY}]|(?:{_CODES})\s)?{_MARKS}")
_UNIT = r"\s+(?:[A-Za-zµμΩ./]{2,}|[mgshLNVKWJΩ])(?:\^|[23])?|\s*[\u4e00-\u9fff\uac00-\ud7af]"
_SIGN = rf"[{_CURRENCY}℃℉]|°\s*[CF]?|(?:[kcmµμ]m(?:/[hs])?|kg)(?:\^|[23])?"  # no letters that may be a product: 2mg
_AFTER = re.compile(rf"{_MARKS}(?:{_SIGN})?(?:{_UNIT})*\.?{_MARKS}")
# In running text dozens may be what is asked for, and quarters are coins.
_OTHER = re.compile(
    rf"\b{_SCALE}|\b(?:dozen|quarter)|\b(?:and|or|to|plus|minus|times|over|pi|squared|base|mod)\b", re.I
)


class Number(NamedTuple):
    """A number as it is written: 50% is 50 with a percent sign."""

    value: float
    percent: bool


def last_number(text: str, whole: bool = False) -> Number | None:
    r"""Return the last number of a text: 72, 1,234.5, -3, -$5.50, 3/4, 1 1/2, 1½, \frac{3}{4}, 2e3, 50%.

    None where it is only a part of something else, such as \sqrt{2}. With `whole` nothing but a unit may stand beside
    it; for GSM8K what stands behind #### counts.
    """
    text = in_ascii(text.rpartition("####")[2] if whole else text)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    if not whole:  # a whole 1,2 may be a list
        text = _DECIMAL_COMMA.sub(lambda match: f"{match[1].replace('.', '')}.{match[2]}", text)
    text = without_marks(text)
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    before, after = text[: match.start()], text[match.end() :]
    units, size, below = (float((match[part] or "0").replace(",", "")) for part in ("whole", "size", "below"))
    if _PART_BEHIND.search(before[-200:]) or _PART_BEFORE.match(after) or (match["below"] and not below):
        return None
    is_mixed = size < below  # 1 1/2 is 1.5, but "2 10/5" are two numbers
    is_alone = _BEFORE.fullmatch(before) and _AFTER.fullmatch(after) and (is_mixed or not match["whole"])
    if whole and (not is_alone or _OTHER.search(after)):
        return None
    value = size / below if below else size
    if is_mixed:
        value += units
    if match["sign"] and (is_mixed or not units):
        value = -value
    return Number(value, bool(match["percent"])) if math.isfinite(value) else None


def in_ascii(text: str) -> str:
    r"""Write digits of any alphabet, signs and full-width characters in ASCII, ½ as \frac{1}{2} and ² as ^{2}."""
    text = re.sub("[⁺⁻]?[⁰¹²³⁴-⁹]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    return "".join(map(_to_ascii, text))


def _to_ascii(char: str) -> str:
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    plain = unicodedata.normalize("NFKC", char)
    above, _, below = plain.partition("⁄")
    if above and below:
        return rf"\frac{{{above}}}{{{below}}}"
    return plain if "！" <= char <= "￦" else _SIGNS.get(char, char)  # the full-width ones


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
) -> list[float | None]:
    """Reward ending on the right number, and using a tool well on the way.

    Args:
        answer: B numbers, or texts that are one: "72", "1,234", "3/4", "$5.50", "72 km", "x = 3", LaTeX; others
            are refused. 50% is right for 50 and for 0.5.
        right: for ending on the answer, which may be off by `tolerance` of its size.
        called: added once if a tool call succeeded.
        failed: added for each failed call, at most 3 times.
        without_tool: added where no tool was called although the row needs one (column `needs_tool`, by default all).

    Returns:
        B rewards, in [-0.3, 1.1] by default; None for a row without an answer.
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
        is_right, calls = _is_right(completion, gold, tolerance), tool_calls(completion)
        score = right * bool(is_right) + without_tool * (bool(needed) and not calls)
        score += called * any(map(_succeeded, calls)) + failed * min(MAX_FAILED, sum(call.failed for call in calls))
        scores.append(None if is_right is None else score)
    return scores


def calculation_accuracy(completions, answer, *, tolerance: float = 1e-6, **columns) -> list[float | None]:
    """Measure: 1 for a completion that ends on the right number, as in `calculation_reward`, else 0."""
    results = [_is_right(completion, gold, tolerance) for completion, gold in zip(completions, answer, strict=True)]
    return [None if is_right is None else float(is_right) for is_right in results]


def tool_success(completions, **columns) -> list[float]:
    """Measure: 1 where a tool was called and every call succeeded, else 0."""
    episodes = [tool_calls(completion) for completion in completions]
    return [float(bool(calls) and all(map(_succeeded, calls))) for calls in episodes]


def _succeeded(call: ToolCall) -> bool:
    return call.result is not None and not call.failed


def _gold_number(gold: str | float | None) -> Number | None:
    wanted = "one number, such as 72, 1,234, 3/4, 50% or \\frac{1}{2}, with a unit or none"
    return gold_value(gold, "calculation: answer", wanted, lambda value: last_number(str(value), whole=True))


calculation_reward.check_gold = calculation_accuracy.check_gold = _gold_number


def _is_right(completion, gold: str | float | None, tolerance: float) -> bool | None:
    """Whether a completion ends on the answer of its row; None where the row has none."""
    expected, actual = _gold_number(gold), last_number(last_reply(completion))
    if expected is None:
        return None
    return actual is not None and is_same_number(actual, expected, tolerance)


def is_same_number(actual: Number, expected: Number, tolerance: float = 1e-6) -> bool:
    """Whether two numbers are equal. A percent sign on one side only is a unit, or means hundredths."""
    scale = {(True, False): 0.01, (False, True): 100.0}.get((actual.percent, expected.percent), 1.0)
    values = (actual.value, actual.value * scale)
    return any(abs(value - expected.value) <= tolerance * abs(expected.value) for value in values)
