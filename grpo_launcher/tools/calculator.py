"""Arithmetic that a model may call: exact, bounded in time and memory, and without `eval`.

No number leaves 1e-30 to 1e30. The answer is plain text with 10 decimals, or 10 significant digits below 0.1, rounded half away from
zero, as `round` rounds here. A comma separates thousands ("1,234") where no function is called, and arguments where one is: "max(1,234)"
could mean either and is refused, "max(1, 234)" is not.
"""

import ast
import math
import re
from fractions import Fraction
from operator import add, floordiv, mod, mul, sub, truediv

LENGTH, OPERATIONS, DIGITS, DECIMALS, FINEST = 500, 100, 30, 10, 10**100
SIGNS = str.maketrans({chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)} | {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"})
NUMBER = r"(?a:(?<![\w.])(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?(?![\w.]))"
SIGN = r"\b(?:abs|ceil|floor|max|min|round|sqrt)\b|\*\*|//|[-+*/(]|%(?=\s*[\w.(])"  # "20% + 5" means no remainder
CAN = "write numbers, + - * / // % (remainder) ** ( ), abs, ceil, floor, max, min, round and sqrt only; 20 percent is 20 / 100"


class CalculatorError(ValueError):
    """What cannot be calculated, in words that a model can learn from."""


def calculator(expression: str) -> str:
    """Calculate an arithmetic expression exactly.

    Args:
        expression: Numbers with + - * / // % ** ( ), abs, ceil, floor, max, min, round and sqrt, such as "(48 + 24 / 2) * 1.5".

    """
    if not isinstance(expression, str) or not expression.strip() or len(expression) > LENGTH:
        raise CalculatorError(f"the expression has to be text of 1 to {LENGTH} characters, such as '2 * (3 + 4)'")
    text = " ".join(expression.translate(SIGNS).lower().split())
    if unknown := re.sub(rf"{NUMBER}|{SIGN}|[),]", " ", text).split():
        raise CalculatorError(f"cannot read {unknown[0]!r:.40}; {CAN}")
    if len(re.findall(SIGN, text)) > OPERATIONS:
        raise CalculatorError(f"more than {OPERATIONS} operations and brackets; calculate it in parts")
    if re.search("[a-z]{2}", text) and any("," in number for number in re.findall(NUMBER, text)):
        raise CalculatorError("beside a function write thousands without commas, and put a space behind a comma between numbers: max(1234, 567)")
    text = re.sub(NUMBER, lambda number: number[0].replace(",", ""), text)
    try:
        value = _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ZeroDivisionError) as error:
        raise CalculatorError(f"cannot calculate {text:.60}: {getattr(error, 'msg', 'division by zero')}") from None
    places = DECIMALS - 1 + len(str(value.denominator // (abs(value.numerator) or 1)))
    whole, part = divmod(abs(_round(value, places)), 1)
    return f"{'-' if value < 0 else ''}{whole}.{int(part * 10**places):0{places}}".rstrip("0").rstrip(".")


def _value(node: ast.AST, text: str) -> Fraction:
    match node:
        case ast.Constant():  # from the text: the node holds 0.1 as a binary float, and 0.1 + 0.2 is to be 0.3
            return _bounded(Fraction(text[node.col_offset : node.end_col_offset]))
        case ast.UnaryOp():
            return _value(node.operand, text) * (-1 if isinstance(node.op, ast.USub) else 1)
        case ast.BinOp():
            return _bounded(BINARY[type(node.op)](_value(node.left, text), _value(node.right, text)))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if len(node.args) in COUNTS.get(name, (1,)):
            return _bounded(FUNCTIONS[name](*(_value(argument, text) for argument in node.args)))
    raise CalculatorError(f"cannot read {text[node.col_offset : node.end_col_offset]:.60}; write one expression, such as 1,000 * 2 or max(2, 3)")


def _bounded(value: Fraction | int) -> Fraction:
    if value and not 1 <= abs(value) * 10**DIGITS <= 100**DIGITS:
        raise CalculatorError(f"a number on the way is {'larger than 1e' if abs(value) > 1 else 'nearer to 0 than 1e-'}{DIGITS}")
    return Fraction(value) if value.denominator < FINEST else Fraction(round(value * FINEST), FINEST)


def _power(base: Fraction, exponent: Fraction = Fraction(1, 2)) -> Fraction:
    base, exponent = (1 / base, -exponent) if exponent < 0 else (base, exponent)
    if exponent.denominator > 2 or (exponent.denominator == 2 and base < 0):
        raise CalculatorError("an exponent is whole, or ends in .5 over a base of at least 0; so does sqrt")
    power = Fraction(math.isqrt(base.numerator * base.denominator * FINEST**2), base.denominator * FINEST) if exponent.denominator == 2 else Fraction(1)
    whole = Fraction(1)
    for bit in f"{int(exponent):b}":  # each is a lower power, so that none is refused where the result is not
        whole = _bounded(whole * whole * (base if bit == "1" else 1))
    return whole * power


def _round(value: Fraction, places: Fraction | int = 0) -> Fraction:
    if places.denominator > 1 or abs(places) > 2 * DIGITS:
        raise CalculatorError(f"round(number, places) takes whole places, {2 * DIGITS} at most")
    scale = Fraction(10) ** int(places)
    return math.floor(abs(value) * scale + Fraction(1, 2)) / scale * (-1 if value < 0 else 1)


BINARY = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.FloorDiv: floordiv, ast.Mod: mod, ast.Pow: _power}
FUNCTIONS = {"abs": abs, "ceil": math.ceil, "floor": math.floor, "max": max, "min": min, "round": _round, "sqrt": _power}
COUNTS = {"max": range(2, 100), "min": range(2, 100), "round": (1, 2)}  # of arguments; the others take one
