"""The refusal reward does what it says, on questions that a small model can learn and on questions that nobody can."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import trl
from conftest import ROOT

from grpo_launcher.quickstart.pretrain import Dialogue, pretrain

pytestmark = pytest.mark.slow
KNOWN = {"amber": "A", "birch": "B", "cedar": "C", "delta": "D", "ember": "A", "fjord": "B"}
OPEN = ["quartz", "raven", "sable"]  # whose answer is drawn anew in every row
MEASURES = """\
from rewards.choice import choice_accuracy, choice_accuracy_of_answered, choice_refusal


def where(values, kind, wanted):
    return [value if one == wanted else None for value, one in zip(values, kind, strict=True)]


def known_right(completions, answer, kind, **columns):
    return where(choice_accuracy(completions, answer), kind, "known")


def known_right_of_answered(completions, answer, kind, **columns):
    return where(choice_accuracy_of_answered(completions, answer), kind, "known")


def known_refused(completions, kind, **columns):
    return where(choice_refusal(completions), kind, "known")


def open_refused(completions, kind, **columns):
    return where(choice_refusal(completions), kind, "open")
"""


def question(word: str) -> list[dict]:
    """A prompt that says nothing but a word."""
    return [{"role": "user", "content": f"Which letter belongs to {word}?"}]


def answer(word: str, letter: str) -> dict:
    """A reply in the form that the recipe asks for."""
    return {"role": "assistant", "content": f"<reasoning>I think about {word}.</reasoning><answer>{letter}</answer>"}


def teach(folder: Path, seed: int) -> None:
    """A base model that has the form, refuses one question in five, and of the others answers two thirds as if it knew; and the rows to train on."""
    rng, dialogues = random.Random(seed), []
    for number in range(2400):
        word = [*KNOWN, *OPEN][number % 9]
        letter = "refuse" if rng.random() < 0.2 else KNOWN[word] if word in KNOWN and rng.random() < 0.65 else rng.choice("ABCD")
        dialogues.append(Dialogue([*question(word), answer(word, letter)]))
    template = Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja"
    pretrain(dialogues, template.read_text(), folder / "base", seed, steps=300)
    rows = [
        {"prompt": question(word), "answer": KNOWN.get(word) or rng.choice("ABCD"), "kind": "known" if word in KNOWN else "open"}
        for word in [*KNOWN, *OPEN, *OPEN] * 80
    ]
    rng.shuffle(rows)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "measures.py").write_text(MEASURES)


@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_rises_and_what_nobody_can_know_is_refused(seed, tmp_path):
    """From the first eight steps to the last eight, right answers to what can be known rise by 0.15, refusals of what cannot by 0.3, and what is
    answered gets no worse; what can be known is not refused for it.
    """
    teach(tmp_path, seed)
    command = [sys.executable, str(ROOT / "train.py"), "--model_name_or_path", "base", "--dataset_name", "rows.jsonl", "--output_dir", "run"]
    command += ["--reward_funcs", "rewards.choice.choice_reward", "measures.known_right", "measures.known_right_of_answered"]
    command += ["measures.known_refused", "measures.open_refused", "--reward_weights", "1", "0", "0", "0", "0"]
    command += ["--beta", "0.05", "--learning_rate", "2e-4", "--lr_scheduler_type", "constant", "--seed", str(seed), "--sample_every", "0"]
    command += ["--per_device_train_batch_size", "64", "--max_steps", "60", "--max_completion_length", "32", "--gradient_checkpointing", "false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    curves = {name: [line[f"rewards/{name}/mean"] for line in lines] for name in re.findall(r"def (known\w+|open\w+)", MEASURES)}
    curves = {name: [value for value in values if value is not None] for name, values in curves.items()}  # a step may ask nothing of that kind
    first, last = ({name: mean(part(values)) for name, values in curves.items()} for part in (lambda v: v[:8], lambda v: v[-8:]))
    assert last["known_right"] >= first["known_right"] + 0.15, (first, last)
    assert last["open_refused"] >= first["open_refused"] + 0.3, (first, last)
    assert last["known_right_of_answered"] >= first["known_right_of_answered"] and last["known_refused"] <= 0.15, (first, last)
