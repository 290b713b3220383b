"""Sums for a model with a calculator: word problems (openai/gsm8k, or files in its form), or made ones."""

import operator
import random
import re

from grpo_launcher.datasets import DatasetSpec, Request, SkipRow, chat_prompt, read_source, text_of

SYSTEM = (
    "Solve the user's problem. Use the calculator tool for every sum, however small. End with: The answer is NUMBER."
)
OPERATORS = {  # sign: what it does, and how tightly it binds
    "+": (operator.add, 0),
    "-": (operator.sub, 0),
    "*": (operator.mul, 1),
    "/": (operator.floordiv, 1),
}
NUMBER = re.compile(r"(-?)\$?((?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)", re.ASCII)
ROWS = 1000
LARGEST = 999_999


def load(request: Request) -> tuple[dict, dict]:
    """Make sums of `steps` operations, or read a source in GSM8K's columns."""
    if not request.steps:
        return read_source(request), {}
    return {"train": make_sums(request.steps, request.limit or ROWS, request.seed)}, {}


def make_sums(steps: int, count: int, seed: int) -> list[dict]:
    """Return `count` distinct sums of `steps` operations in GSM8K's columns. The same seed gives the same list.

    Numbers are whole, 1 to 99. No part of a sum is negative or a fraction. Its value is 0 to 999,999.
    Raises ValueError where there are not so many different ones.
    """
    rng = random.Random(seed)
    sums = {}
    for _ in range(20 * count):
        text, value, _ = _make_sum(rng, steps)
        if value <= LARGEST:
            sums[text] = value
        if len(sums) == count:
            return [{"question": f"What is {text}?", "answer": f"#### {value}"} for text, value in sums.items()]
    raise ValueError(f"only {len(sums)} different sums of {steps} operations found; give a smaller --limit")


def to_row(raw: dict) -> dict:
    """Turn a worked problem into {"prompt": [system, user], "answer": number, "needs_tool": True}.

    The number stands behind the last ####. It becomes a plain one, without $ and thousands separators.
    """
    prompt = chat_prompt(SYSTEM, text_of(raw, "question"))
    _, mark, answer = text_of(raw, "answer").rpartition("####")
    if not mark:
        raise SkipRow("no #### before the answer")
    number = NUMBER.fullmatch(answer.strip())
    if not number:
        raise SkipRow("the answer is no number")
    return {"prompt": prompt, "answer": number[1] + number[2].replace(",", ""), "needs_tool": True}


def _make_sum(rng: random.Random, steps: int) -> tuple[str, int, int]:
    """Return a sum as text, its value, and how tightly its outermost operator binds (2: a number)."""
    if not steps:
        number = rng.randint(1, 99)
        return str(number), number, 2
    sign = rng.choice("++--**/")
    compute, binding = OPERATORS[sign]
    steps_left = steps - 1 if sign == "/" else rng.randrange(steps)
    left = _make_sum(rng, steps_left)
    right = _make_sum(rng, steps - 1 - steps_left)
    if sign == "/":
        divisor = rng.choice([number for number in range(2, 100) if left[1] % number == 0] or [1])
        right = (str(divisor), divisor, 2)
    elif sign == "-" and left[1] < right[1]:
        left, right = right, left
    left_text = f"({left[0]})" if left[2] < binding else left[0]
    needs_brackets = right[2] < binding or (right[2] == binding and sign in "-/")
    right_text = f"({right[0]})" if needs_brackets else right[0]
    return f"{left_text} {sign} {right_text}", compute(left[1], right[1]), binding


DATASET = DatasetSpec(
    to_row,
    tokenizer="Qwen/Qwen2.5-3B-Instruct",
    max_prompt_length=512,  # without the tool's schema, which the chat template renders in 150 to 200 tokens more
    columns={"answer": "string", "needs_tool": "bool"},
    source="openai/gsm8k",
    config="main",
    load=load,
)
