"""The calculator: right to the digit, quick, and harmless whatever a model writes into it."""

import json
import math
import operator
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_launcher.tools import calculator

RIGHT = {
    "a sum": ("48 + 24", "72"),
    "decimals without a binary rest": ("0.1 + 0.2", "0.3"),
    "a third and back": ("1 / 3 * 3", "1"),
    "ten decimals": ("10 / 3", "3.3333333333"),
    "rounded away from zero": ("-20 / 3", "-6.6666666667"),
    "ten digits of a small number": ("1 / 3000000", "0.0000003333333333"),
    "a large number in full": ("2 ** 99", "633825300114114700748351602688"),
    "products before sums": ("2 + 3 * 4 - 10 / 5", "12"),
    "from left to right": ("100 - 50 - 30 / 2 / 5", "47"),
    "powers from right to left": ("2 ** 3 ** 2", "512"),
    "a minus is weaker than a power": ("-2 ** 2", "-4"),
    "a caret is a power": ("2^10", "1024"),
    "brackets": ("(48 + 24 / 2) * 1.5", "90"),
    "signs": ("--5 + -+2", "3"),
    "whole quotient downwards": ("-7 // 2", "-4"),
    "remainder": ("17 % 5", "2"),
    "a negative power": ("2 ** -2", "0.25"),
    "compound interest": ("1000 * 1.05 ** 20", "2653.2977051444"),
    "interest by the day": ("(1 + 0.05 / 365) ** (365 * 30)", "4.4812286885"),
    "a root": ("sqrt(2)", "1.4142135624"),
    "a root that is exact": ("floor(sqrt(0.0625) * 4)", "1"),
    "a third root": ("8 ** (1 / 3)", "2"),
    "zero to the power of zero": ("0 ** 0", "1"),
    "a power of a half": ("4 ** -1.5", "0.125"),
    "half up, as at school": ("round(2.5)", "3"),
    "half down below zero": ("round(-1.005, 2)", "-1.01"),
    "to hundreds": ("round(1250, -2)", "1300"),
    "up and down": ("ceil(-1.5) + floor(-1.5)", "-3"),
    "functions in each other": ("max(1, abs(-7), min(9, 8))", "8"),
    "function names in capitals": ("MAX(1, 2)", "2"),
    "signs of print": ("3 × 4 ÷ 2 − 1", "5"),
    "full-width": ("（１＋２）＊３．５", "10.5"),
    "thousands": ("1,234,567.5 * 2", "2469135"),
    "a comma without a space between short numbers": ("max(1,2)", "2"),
    "a comma with a space in a function": ("max(1, 234)", "234"),
    "an exponent": ("1.5e3 + 2E-1", "1500.2"),
    "over several lines": ("1 +\n\t2", "3"),
    "no negative zero": ("-0.0", "0"),
}


@pytest.mark.parametrize(("expression", "result"), RIGHT.values(), ids=RIGHT)
def test_the_result_is_exact(expression, result):
    """As on paper, and in plain digits."""
    assert calculator(expression) == result


REFUSED = {
    "division by zero": ("3 / (2 - 2)", "division by zero"),
    "remainder of a division by zero": ("5 % 0", "division by zero"),
    "zero to a negative power": ("0 ** -1", "division by zero"),
    "a name": ("x * 2", r"cannot read 'x'; write numbers"),
    "a product without a sign": ("2x", r"cannot read '2x"),
    "a unit": ("$5 * 3", r"cannot read '\$5"),
    "percent": ("20% of 50", "20 percent is 20 / 100"),
    "percent before a sign": ("20% + 5", "20 percent is 20 / 100"),
    "an equation": ("2 + 2 =", r"cannot read '2 \+ 2 ="),
    "thousands or two numbers": ("max(1,234)", "thousands without commas"),
    "groups of another size": ("12,34", r"cannot read '12,34"),
    "two expressions": ("1, 2", r"cannot read '1, 2"),
    "two numbers": ("1 2", r"cannot read '1 2"),
    "an open bracket": ("(1 + 2", r"cannot read '\(1"),
    "a function without numbers": ("max()", r"cannot read 'max\(\)"),
    "a function with one too many": ("abs(1, 2)", r"cannot read 'abs\(1, 2\)"),
    "two stars": ("max(1, 2, **3)", "cannot read 'max"),
    "too long": ("1" + "+1" * 250, "1 to 500 characters"),
    "too large": ("10 ** 31", "larger than 1e30"),
    "too small": ("10 ** -31", r"closer to 0 than 1e-30"),
    "a root of a negative number": ("(-1) ** 0.5", r"it has no value"),
    "half a place": ("round(1, 0.5)", r"it has no value"),
    "nothing": ("  ", "1 to 500 characters"),
    "a number for a text": (5, r"must be text"),
}


@pytest.mark.parametrize(("expression", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_to_write(expression, said):
    """A model reads the message and tries again."""
    with pytest.raises(ValueError, match=said):
        calculator(expression)


HOSTILE = {
    "import": "__import__('os').system('touch /tmp/calculator')",
    "open": "open('/etc/passwd').read()",
    "eval": "eval('1+1')",
    "exec by bytes": "exec(bytes([112,97,115,115]))",
    "subclasses": "().__class__.__bases__[0].__subclasses__()",
    "attribute of a number": "(1).__class__",
    "attribute of a function": "max.__self__",
    "lambda": "(lambda: 1)()",
    "lambda that calls itself": "(lambda f: f(f))(lambda f: f(f))",
    "walrus": "(x := 9) * x",
    "comprehension": "[i for i in range(10**9)]",
    "generator": "max(i for i in (1, 2))",
    "f-string": "f'{9**9**9}'",
    "text times a number": "'a' * 10**9",
    "bytes": "b'a' * 10**9",
    "list times a number": "[0] * 10**10",
    "star": "max(*(1, 2))",
    "two stars": "max(**1)",
    "keyword": "round(1, ndigits=2)",
    "a function as a number": "max + 1",
    "a call of a call": "abs(1)(2)",
    "a call of a number": "2(3)",
    "conditional": "1 if 1 else 2",
    "digit right before a keyword": "1if 1else 2",
    "comparison": "1 < 2",
    "boolean": "True + True",
    "shift": "1 << 10**9",
    "statement": "import os; 1",
    "tower of powers": "9**9**9**9",
    "power of powers": "(97**89)**(73**61)",
    "power of a large negative": "9**-9**9",
    "long product": "*".join(["9" * 30] * 15),
    "power without end": "+".join(["0.999999999999999**9e15"] * 19),
    "ones to the power": "1**" + "9" * 30,
    "roots in each other": "sqrt(" * 49 + "2" + ")" * 49,
    "many brackets": "(" * 10**5 + "1" + ")" * 10**5,
    "brackets that fit": "(" * 99 + "1" + ")" * 99,
    "open brackets": "(" * 500,
    "many pluses": "1" + "+1" * 10**6,
    "many minuses": "-" * 499 + "1",
    "many digits": "9" * 5000,
    "many decimals": "0." + "3" * 498,
    "large exponent": "1e999999999",
    "large float": "1e308 * 10",
    "huge places": "round(1.5, 10**29)",
    "negative places": "round(1.5, -10**29)",
    "hexadecimal": "0xFFFF",
    "binary": "0b11",
    "underscores": "1_000",
    "imaginary": "1j * 1j",
    "nan": "nan",
    "infinity": "-inf + inf",
    "NUL": "1\0+1",
    "surrogate": "\ud800 + 1",
    "surrogates in a row": "\ud800" * 500,
    "digits of another script": "٣ + ४",
    "superscript": "3²",
    "a fraction in one sign": "1½",
    "comment": "1 # + 1",
    "backslash": "1 \\\n + 1",
    "form feed": "1\f+\v1",
    "bidirectional marks": "1\u202e+1",
    "a letter that grows in lower case": "İ" * 500,
    "none": None,
    "whole number": 5,
    "not a number": math.nan,
    "a list": ["1 + 1"],
    "raw bytes": b"1 + 1",
    "a mapping": {"expression": "1"},
}
# Run apart: with every event of Python's audit from the first call on, with warnings as errors, and with an end.
CHILD = """
import json, os, sys
sys.path[:0] = sys.argv[1:]
from test_calculator import HOSTILE
from grpo_launcher.tools import calculator

events, outcomes = [], {}
sys.addaudithook(lambda event, args: events.append(event))
for name, expression in HOSTILE.items():
    try:
        outcomes[name] = ["result", calculator(expression)]
    except BaseException as error:
        outcomes[name] = [type(error).__name__, str(error)]
calls = sorted(set(events))
open(os.devnull).close()
print(json.dumps([outcomes, calls, sorted(set(events) - set(calls))]))
"""


@pytest.fixture(scope="module")
def hostile():
    """Name → (kind, text), the audit's events meanwhile, and those of opening a file."""
    command = [sys.executable, "-W", "error", "-c", CHILD, str(Path(__file__).parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def is_plain(result: str) -> bool:
    """A number in digits, of bounded length, without zeros at its end."""
    return bool(re.fullmatch(r"-?\d{1,31}(\.\d{0,40}[1-9])?", result))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_gives_a_number_or_a_short_refusal(name, hostile):
    """Nothing else is raised, such as RecursionError, and nothing takes long."""
    kind, text = hostile[0][name]
    assert (is_plain(text) if kind == "result" else kind == "ValueError") and len(text) < 250, (kind, text)


def test_hostile_text_touches_nothing(hostile):
    """No import, file, process or socket: Python's audit sees ast.parse alone, and does see an opened file."""
    outcomes, seen, at_open = hostile
    assert len(outcomes) >= 50 and set(seen) <= {"compile"} and at_open == ["open"]


NUMBERS = st.integers(0, 12).map(str) | st.decimals(0, 2000, places=2).map(str)
BINARY = {
    "+": (1, operator.add),
    "−": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
    "%": (2, operator.mod),
    "^": (4, operator.pow),
}
FUNCTIONS = {
    "max": max,
    "min": min,
    "floor": lambda value, _: math.floor(value),
    "ceil": lambda value, _: math.ceil(value),
    "abs": lambda value, _: abs(value),
}


def grown(pieces):
    """Return a tree, (sign or function, left, right), or a number, of pieces (number, how it is joined, where)."""
    trees = [number for number, _, _ in pieces]
    for _, kind, at in pieces[1:]:
        first = at % (len(trees) - 1)
        left, right = trees[first : first + 2]
        trees[first : first + 2] = [(kind, left, str(at) if kind == "^" else right)]
    return trees[0]


def written(tree) -> tuple[str, int]:
    """A tree as text with as few brackets as can be, and how strongly it binds."""
    if isinstance(tree, str):
        return tree, 5
    kind, left, right = tree
    (before, strong), (behind, stronger) = written(left), written(right)
    if kind in FUNCTIONS:
        return f"{kind}({before}, {behind})" if kind in ("max", "min") else f"{kind}({before})", 5
    if kind == "minus":
        return f"-({before})" if strong < 3 else f"-{before}", 3
    own = BINARY[kind][0]
    before = f"({before})" if strong < own or own == strong == 4 else before
    return f"{before} {kind} " + (f"({behind})" if stronger <= own or behind[0] == "-" else behind), own


def exact_value(tree) -> Fraction:
    """What it comes to; ArithmeticError where that is undefined or leaves the calculator's range on the way."""
    if isinstance(tree, str):
        return Fraction(tree)
    kind, left, right = tree
    if kind == "minus":
        return -exact_value(left)
    first = exact_value(left)
    second = exact_value(right) if kind in BINARY or kind in ("max", "min") else None
    if kind in ("//", "%"):
        check_range(first / second)
    result = FUNCTIONS[kind](first, second) if kind in FUNCTIONS else BINARY[kind][1](first, second)
    check_range(result)
    return Fraction(result)


def check_range(number: Fraction) -> None:
    """Raise OverflowError for a number that the calculator refuses."""
    if number and not Fraction(1, 10**30) <= abs(number) < 10**31:
        raise OverflowError


PIECES = st.tuples(NUMBERS, st.sampled_from([*BINARY, *FUNCTIONS, "minus"]), st.integers(0, 7))
TREES = st.lists(PIECES, min_size=2, max_size=8).map(grown)
WORDS = [
    "1",
    "0",
    "9e9",
    "1,000",
    ".5",
    "(",
    ")",
    ",",
    " ",
    "**",
    "^",
    "//",
    "%",
    "-",
    "×",
    "max(",
    "sqrt(",
    "round(",
    "x",
    "'",
    "[",
    "__",
    "if",
    "=",
    "\n",
]
JUNK = (
    st.text(min_size=1, max_size=40)
    | st.lists(st.sampled_from(WORDS), min_size=3, max_size=20).map("".join)
    | st.text("12.,()+-*/%^e", min_size=3)
)


@given(tree=TREES, junk=JUNK)
@settings(deadline=None, database=None, max_examples=200, derandomize=True)
def test_any_expression_is_right_or_refused(tree, junk):
    """A tree comes to what fractions make of it, to the last digit shown; junk to a number or a refusal."""
    try:
        exact = exact_value(tree)
    except ArithmeticError:
        with pytest.raises(ValueError):
            calculator(written(tree)[0])
    else:
        text = written(tree)[0]
        shown = calculator(text)
        assert is_plain(shown)
        tolerance = Fraction(5, 10**11) if abs(exact) >= 0.1 else abs(exact) * Fraction(5, 10**10)
        assert abs(Fraction(shown) - exact) <= tolerance, (text, shown)
    try:
        assert is_plain(calculator(junk))
    except ValueError as error:
        assert len(str(error)) < 250
