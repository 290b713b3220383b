"""The refusal reward does what it says: what can be known is answered, what nobody can know is refused."""

import json
import random
from pathlib import Path

import pytest
from helpers import ROOT, means, read_metrics, run_python

from grpo_launcher.quickstart.pretrain import Dialogue, pretrain

KNOWN = {"amber": "A", "birch": "B", "cedar": "C", "delta": "D", "ember": "A", "fjord": "B"}
OPEN = ["quartz", "raven", "sable"]  # their answer is drawn anew in every row
MEASURES = """
from rewards.choice import choice_accuracy, choice_refusal


def only(values, kind, wanted):
    return [value if name == wanted else None for value, name in zip(values, kind, strict=True)]


def known_right(completions, answer, kind, **kwargs):
    return only(choice_accuracy(completions, answer), kind, "known")


def known_refused(completions, kind, **kwargs):
    return only(choice_refusal(completions), kind, "known")


def open_refused(completions, kind, **kwargs):
    return only(choice_refusal(completions), kind, "open")
"""


def question(word: str) -> list[dict]:
    """A prompt that says nothing but a word."""
    return [{"role": "user", "content": f"Which letter belongs to {word}?"}]


def answer(word: str, letter: str) -> dict:
    """A completion in the form that the recipe asks for."""
    return {"role": "assistant", "content": f"<reasoning>I think about {word}.</reasoning><answer>{letter}</answer>"}


@pytest.fixture
def task(tmp_path) -> Path:
    """A base model that knows the form, refuses one question in five and knows two thirds of the answers; and rows."""
    rng = random.Random(0)
    dialogues = []
    for number in range(2400):
        word = [*KNOWN, *OPEN][number % 9]
        letter = rng.choice("ABCD")
        if word in KNOWN and rng.random() < 0.65:
            letter = KNOWN[word]
        if rng.random() < 0.2:
            letter = "refuse"
        dialogues.append(Dialogue([*question(word), answer(word, letter)]))
    pretrain(dialogues, tmp_path / "base", 0, steps=300)
    words = [*KNOWN, *OPEN, *OPEN] * 80
    rng.shuffle(words)
    rows = [
        {
            "prompt": question(word),
            "answer": KNOWN.get(word) or rng.choice("ABCD"),
            "kind": "known" if word in KNOWN else "open",
        }
        for word in words
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "measures.py").write_text(MEASURES)
    return tmp_path


def test_accuracy_rises_and_what_nobody_can_know_is_refused(task):
    """From the first four steps to the last eight. What can be known is not refused for it."""
    command = [
        ROOT / "train.py",
        "--model_name_or_path",
        "base",
        "--dataset_name",
        "rows.jsonl",
        "--output_dir",
        "run",
    ]
    command += ["--reward_funcs", "rewards.choice.choice_reward", "measures.py:known_right"]
    command += ["measures.py:known_refused", "measures.py:open_refused", "--reward_weights", "1", "0", "0", "0"]
    command += ["--beta", "0.05", "--learning_rate", "4e-4", "--lr_scheduler_type", "constant", "--sample_every", "0"]
    command += ["--per_device_train_batch_size", "64", "--max_steps", "36", "--max_completion_length", "32"]
    run_python(*command, "--gradient_checkpointing", "false", cwd=task, OMP_NUM_THREADS=1)
    lines = read_metrics(task / "run")
    first, last = means(lines, "rewards/known_right/mean", 4, 8)
    assert last >= first + 0.18, (first, last)
    first, last = means(lines, "rewards/open_refused/mean", 4, 8)
    assert last >= first + 0.3, (first, last)
    assert means(lines, "rewards/known_refused/mean", 4, 8)[1] <= 0.15
