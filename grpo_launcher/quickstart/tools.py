"""Make what configs/quickstart_calculator.yaml needs, and the same for a search tool, once: python -m grpo_launcher.quickstart.tools [--output data] [--seed N]

data/quickstart-tool-model, a small language model that calls a calculator and a search tool, often wrongly or not at all; data/quickstart_calculator, sums;
data/quickstart_search_qa, questions and the corpus that answers them. Needs no network.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

from grpo_launcher.datasets import calculator as sums
from grpo_launcher.datasets import search_qa
from process_dataset import process
from grpo_launcher.quickstart.corpus import NAMES, PLACES, THINGS
from grpo_launcher.quickstart.pretrain import Dialogue, make_base
from grpo_launcher.tools.calculator import calculator
from grpo_launcher.tools.search import search

TAUGHT, DRILLED, TRAINED = 1000, 2600, 400  # dialogues of each kind that teach the base model and that drill it; sums for GRPO
STEPS = 250
SHARES = [50, 25, 25]  # of dialogues with a right call, with a wrong one, and without any
WEIGHT = 0.1  # of what the assistant does not say: mostly the tools' schemas, which never change


def main(argv: list[str]) -> None:
    """Write the three folders where they are missing; a folder appears only when it is whole."""
    parser = argparse.ArgumentParser(prog="python -m grpo_launcher.quickstart.tools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for all three (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="of the dialogues, the data and the model (default: 0)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    model = args.output / "quickstart-tool-model"
    if not model.exists():
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.jsonl"
            corpus.write_text(json.dumps({"text": "nothing"}), encoding="utf-8")
            look_up = search(corpus=str(corpus))  # its schema is wanted, not what it finds
            make_base(lessons(args.seed, look_up), model, args.seed, STEPS, drill(args.seed, look_up))
    for name, rows in {"calculator": easy_sums(TRAINED, args.seed + 1_000_000), "search_qa": facts(args.seed)}.items():
        data = args.output / f"quickstart_{name}"
        if not data.exists():
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "rows.jsonl"
                source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
                process(name, str(source), data, str(model), 1024, None, args.seed)


def drill(seed: int, look_up: Callable) -> list[Dialogue]:
    """Sums and questions asked bare and answered by right calls: a call repeats what was asked and an answer what came back, and little else stands between."""
    rng = random.Random(seed)
    told = [turns for row in easy_sums(DRILLED, seed + 1) for turns in (_sum(row, rng, [1, 0, 0]), _question(rng, look_up, [1, 0, 0]))]
    return [Dialogue(turns, weight=0.0) for turns in told]


def lessons(seed: int, look_up: Callable) -> list[Dialogue]:
    """Sums, and questions to `look_up`, one a dialogue: half by a right call, a quarter by a wrong one, a quarter by a guess without any.

    Three in four have no tools in their prompt: their schemas are most of it and always the same, so little is learned from them.
    """
    rng = random.Random(seed)
    told = []
    for number, row in enumerate(easy_sums(TAUGHT, seed)):
        for recipe, tool, turns in ((sums, calculator, _sum(row, rng, SHARES)), (search_qa, look_up, _question(rng, look_up, SHARES))):
            told.append(Dialogue([{"role": "system", "content": recipe.SYSTEM}, *turns], WEIGHT, () if number % 4 else (tool,)))
    return told


def easy_sums(count: int, seed: int) -> list[dict]:
    """`count` sums of two operations in GSM8K's columns, of one-digit numbers and with a one-digit value."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        first, second, third = rng.choices(range(1, 10), k=3)
        text = f"{first} {rng.choice('+-')} {second} {rng.choice('+-')} {third}"
        if 0 <= int(value := calculator(text)) <= 9:
            rows.append({"question": f"What is {text}?", "answer": f"#### {value}"})
    return rows


def facts(seed: int) -> list[dict]:
    """300 questions in SQuAD's columns, each answered by a context of one sentence: who keeps what where, drawn anew with each seed."""
    rng, rows = random.Random(seed), []
    for they, thing in product(("she", "he"), THINGS):
        for name in NAMES[they]:
            place = rng.choice(PLACES)
            context, question = _fact(name, they, thing, place)
            answers = {"text": [place], "answer_start": [context.index(place)]}
            rows.append({"id": str(len(rows)), "title": "", "context": context, "question": question, "answers": answers})
    rng.shuffle(rows)
    return rows


def _fact(name: str, they: str, thing: str, place: str) -> tuple[str, str]:
    their = {"she": "her", "he": "his"}[they]
    return f"{name} keeps {their} {thing} in the {place}.", f"Where does {name} keep {their} {thing}?"


def _sum(row: dict, rng: random.Random, shares: list[int]) -> list[dict]:
    """A sum by a right call, by one in words, which fails and is followed by a guess, or by a guess alone."""
    asked, gold = row["question"], row["answer"].removeprefix("#### ")
    expression = asked.removeprefix("What is ").removesuffix("?")
    guess = str(rng.randint(0, 9))
    tries = [(expression, gold), (expression.replace("+", "plus").replace("-", "minus"), guess), (None, guess)]
    call, answer = rng.choices(tries, shares)[0]
    turns = _turn(calculator, {"expression": call}) if call else []
    return [_ask(asked), *turns, _say(f"The answer is {answer}.")]


def _question(rng: random.Random, look_up: Callable, shares: list[int]) -> list[dict]:
    """A question by a query that finds the fact, by one that finds another's, or by a guess."""
    they = rng.choice(["she", "he"])
    name, other = rng.sample(NAMES[they], 2)
    thing, place, elsewhere = rng.choice(THINGS), *rng.sample(PLACES, 2)
    fact, question = _fact(name, they, thing, place)
    wrong, _ = _fact(other, they, thing, elsewhere)
    query = question.removesuffix("?")
    query, found, answer = rng.choices([(query, fact, place), (query.replace(name, they), wrong, elsewhere), (None, None, elsewhere)], shares)[0]
    turns = _turn(look_up, {"query": query}, f"[{rng.randint(1, 300)}] {found}") if query else []
    return [_ask(question), *turns, _say(f"<answer>the {answer}</answer>")]


def _turn(tool: Callable, arguments: dict, result: str | None = None) -> list[dict]:
    """A call and its result, as TRL writes both."""
    try:
        result = result or tool(**arguments)
    except ValueError as error:
        result = str({"error": str(error)})
    call = {"type": "function", "function": {"name": tool.__name__, "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "name": tool.__name__, "content": result}]


def _ask(text: str) -> dict:
    return {"role": "user", "content": text}


def _say(text: str) -> dict:
    return {"role": "assistant", "content": text}


if __name__ == "__main__":
    main(sys.argv[1:])
