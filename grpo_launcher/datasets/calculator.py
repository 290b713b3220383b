"""Sums for a model with a calculator: grade-school word problems (openai/gsm8k, or files in its form: question, answer), or generated ones."""

import random
import re
from operator import add, floordiv, mul, sub

from datasets import Dataset, DatasetDict

from grpo_launcher.tools.calculator import calculator

SOURCE = "openai/gsm8k"
CONFIG = "main"
TOKENIZER = "Qwen/Qwen2.5-3B-Instruct"
MAX_PROMPT_LENGTH = 512  # tokens, without the tool's schema: with tools the template renders 150 to 200 more into every prompt
SYSTEM = "Solve the user's problem. Use the calculator tool for every sum, however small. End with: The answer is NUMBER."
OPERATORS = {"+": (add, 0), "-": (sub, 0), "*": (mul, 1), "/": (floordiv, 1)}  # what each does, and how tightly it binds
ROWS = 1000
LARGEST = 999_999


def sums(steps: int, limit: int | None, seed: int) -> DatasetDict:
    """Distinct sums of `steps` operations in GSM8K's form, `limit` of them (1,000), as the split train; one seed, one list.

    Numbers are whole, 1 to 99; no part of a sum is negative or a fraction, and its value is 0 to 999,999. Raises ValueError where so many different
    ones are not found.
    """
    rng, made, limit = random.Random(seed), {}, limit or ROWS
    for _ in range(20 * limit):
        text, value, _ = _sum(rng, steps)
        if value <= LARGEST and text not in made:
            made[text] = calculator(text)
        if len(made) == limit:
            rows = [{"question": f"What is {text}?", "answer": f"#### {gold}"} for text, gold in made.items()]
            return DatasetDict(train=Dataset.from_list(rows))
    raise ValueError(f"only {len(made)} different sums found; give a smaller --limit")


def to_row(raw: dict) -> dict | str:
    """One problem → {"prompt": [system, user], "answer": the number behind the last ####, "needs_tool": True}, or the cause why it is left out.

    The number is a plain one: 1234, -2 or 0.5, without thousands separators or $.
    """
    question, worked = raw.get("question"), raw.get("answer")
    if not isinstance(question, str) or not isinstance(worked, str):
        return "malformed: question and answer must be text"
    if not question.strip():
        return "empty question"
    if "####" not in worked:
        return "no #### before the answer"
    answer = re.fullmatch(r"(-?)\$?((?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)", worked.rpartition("####")[2].strip(), re.ASCII)
    if not answer:
        return "the answer is no number"
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.strip()}]
    return {"prompt": prompt, "answer": answer[1] + answer[2].replace(",", ""), "needs_tool": True}


def _sum(rng: random.Random, steps: int) -> tuple[str, int, int]:
    """A sum as text, its value, and how tightly its outermost operator binds (2: a number)."""
    if not steps:
        number = rng.randint(1, 99)
        return str(number), number, 2
    operator = rng.choice("++--**/")
    work, binds = OPERATORS[operator]
    before = steps - 1 if operator == "/" else rng.randrange(steps)
    left, right = _sum(rng, before), _sum(rng, steps - 1 - before)
    if operator == "/":
        divisor = rng.choice([number for number in range(2, 100) if left[1] % number == 0] or [1])
        right = str(divisor), divisor, 2
    elif operator == "-" and left[1] < right[1]:
        left, right = right, left
    a = f"({left[0]})" if left[2] < binds else left[0]
    b = f"({right[0]})" if right[2] < binds or (right[2] == binds and operator in "-/") else right[0]
    return f"{a} {operator} {b}", work(left[1], right[1]), binds
