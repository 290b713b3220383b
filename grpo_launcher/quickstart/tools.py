"""Make what the small recipes with tools need, once: a model that calls two tools, sums, and questions with a corpus.

python -m grpo_launcher.quickstart.tools [--output data] [--seed N] [--overwrite]

data/quickstart-tool-model   calls a calculator and a search tool, often wrongly or not at all. That of seed 0 comes
                             with the package; another takes two to five minutes on two cores
data/quickstart_calculator   sums
data/quickstart_search_qa    questions, and corpus.jsonl, which answers them
"""

import itertools
import json
import random
import sys
import tempfile
from pathlib import Path

from grpo_launcher.datasets import calculator as calculator_dataset
from grpo_launcher.datasets import search_qa as search_dataset
from grpo_launcher.quickstart import Task, build
from grpo_launcher.quickstart.corpus import GRAMMAR
from grpo_launcher.tools import calculator, search

STEPS = 250
PAIRS = 1000  # of a sum and a question, in pre-training
DRILL_PAIRS = 2600
SHARES = [50, 25, 25]  # of dialogues with a right call, with a wrong one, and without any
PROMPT_WEIGHT = 0.1  # most of what the assistant does not write are the tools' schemas, which never change


def make_model(folder: Path, seed: int) -> None:
    """Pre-train the model: first on bare questions with right calls, then on right calls, wrong ones and guesses.

    In the first part a call repeats the question and an answer the result, so it learns to copy. In the second one
    dialogue in four has a tool's schema in its prompt: it is long and always the same, so little is learned from it.
    """
    from grpo_launcher.quickstart.pretrain import Dialogue, pretrain

    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus.jsonl"
        corpus.write_text(json.dumps({"text": "nothing"}), encoding="utf-8")
        search_tool = search(corpus=str(corpus))  # for its schema: what it finds is made up
        rng = random.Random(seed)
        drill = [
            Dialogue(messages, prompt_weight=0.0)
            for row in make_sums(DRILL_PAIRS, seed + 1)
            for messages in (_sum_dialogue(row, rng, [1, 0, 0]), _question_dialogue(rng, [1, 0, 0]))
        ]
        rng = random.Random(seed)
        dialogues = []
        for number, row in enumerate(make_sums(PAIRS, seed)):
            for system, tool, messages in (
                (calculator_dataset.SYSTEM, calculator, _sum_dialogue(row, rng, SHARES)),
                (search_dataset.SYSTEM, search_tool, _question_dialogue(rng, SHARES)),
            ):
                tools = (tool,) if number % 4 == 0 else ()
                dialogues.append(Dialogue([{"role": "system", "content": system}, *messages], PROMPT_WEIGHT, tools))
        pretrain(dialogues, folder, seed, STEPS, drill)


def make_sums(count: int, seed: int) -> list[dict]:
    """Return sums in GSM8K's columns: two operations on numbers of one digit, with a value of one digit."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        first, second, third = rng.choices(range(1, 10), k=3)
        text = f"{first} {rng.choice('+-')} {second} {rng.choice('+-')} {third}"
        value = calculator(text)
        if 0 <= int(value) <= 9:
            rows.append({"question": f"What is {text}?", "answer": f"#### {value}"})
    return rows


def make_questions(seed: int) -> list[dict]:
    """Return 300 questions in SQuAD's columns, each answered by a context of one sentence: who keeps what where."""
    rng = random.Random(seed)
    rows = []
    for pronoun, thing in itertools.product(("she", "he"), GRAMMAR["things"]):
        for name in GRAMMAR["names"][pronoun]:
            place = rng.choice(GRAMMAR["places"])
            context, question = _fact(name, pronoun, thing, place)
            rows.append({"context": context, "question": question, "answers": {"text": [place]}})
    rng.shuffle(rows)
    return rows


def _fact(name: str, pronoun: str, thing: str, place: str) -> tuple[str, str]:
    """Return a fact, and the question that it answers."""
    their = {"she": "her", "he": "his"}[pronoun]
    return f"{name} keeps {their} {thing} in the {place}.", f"Where does {name} keep {their} {thing}?"


def _sum_dialogue(row: dict, rng: random.Random, shares: list[int]) -> list[dict]:
    """Answer a sum by a right call, by a call in words, which fails, and a guess, or by a guess alone."""
    expression = row["question"].removeprefix("What is ").removesuffix("?")
    guess = str(rng.randint(0, 9))
    right = (expression, row["answer"].removeprefix("#### "))
    wrong = (expression.replace("+", "plus").replace("-", "minus"), guess)
    call, answer = rng.choices([right, wrong, (None, guess)], shares)[0]
    turn = []
    if call:
        try:
            result = calculator(call)
        except ValueError as error:
            result = str({"error": str(error)})  # as TRL writes it
        turn = _turn("calculator", {"expression": call}, result)
    return _dialogue(row["question"], turn, f"The answer is {answer}.")


def _question_dialogue(rng: random.Random, shares: list[int]) -> list[dict]:
    """Answer a question by a query that finds the fact, by one that finds another's, or by a guess."""
    pronoun = rng.choice(["she", "he"])
    name, other_name = rng.sample(GRAMMAR["names"][pronoun], 2)
    thing = rng.choice(GRAMMAR["things"])
    place, other_place = rng.sample(GRAMMAR["places"], 2)
    fact, question = _fact(name, pronoun, thing, place)
    query = question.removesuffix("?")
    right = (query, fact, place)
    wrong = (query.replace(name, pronoun), _fact(other_name, pronoun, thing, other_place)[0], other_place)
    query, passage, answer = rng.choices([right, wrong, (None, None, other_place)], shares)[0]
    turn = _turn("search", {"query": query}, f"[{rng.randint(1, 300)}] {passage}") if query else []
    return _dialogue(question, turn, f"<answer>the {answer}</answer>")


def _turn(tool: str, arguments: dict, result: str) -> list[dict]:
    """Return a call and its result, as TRL writes both."""
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": tool, "content": result},
    ]


def _dialogue(question: str, turn: list[dict], answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, *turn, {"role": "assistant", "content": answer}]


TASKS = {
    "quickstart_calculator": Task("calculator", lambda seed: {"train": make_sums(400, seed + 1_000_000)}),
    "quickstart_search_qa": Task("search_qa", lambda seed: {"train": make_questions(seed)}),
}


if __name__ == "__main__":
    build(sys.argv[1:], __doc__, {"tool-model": make_model}, TASKS)
