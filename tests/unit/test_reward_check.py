"""`python -m grpo_launcher.reward_check`: list, try, and check, which finds planted faults and passes our rewards."""

import os
import re
import subprocess
import sys

import pytest

from grpo_launcher.reward_check import library, main

HEAD = "from grpo_launcher.messages import last_reply\n"
# What a reward returns for `completions`, or its whole module; what must be printed; the exit status.
FAULTS = {
    "too few scores": ("[1.0]", "1 scores for 5 completions", 1),
    "no **columns": ("def planted(completions):\n    return [0.0] * len(completions)", "takes no further keywords", 2),
    "nan": ("[float('nan')] * len(completions)", "nan for completion 0", 1),
    "infinite for an empty completion": (
        "[0.0 if last_reply(c) else float('inf') for c in completions]",
        "inf for",
        1,
    ),
    "divides by zero": ("[1 / len(last_reply(c)) for c in completions]", "ZeroDivisionError: ", 1),
    "counts messages for characters": ("[len(c) for c in completions]", "FAIL  chat   all completions score alike", 1),
    "text taken for granted": ("[float('moon' in c.lower()) for c in completions]", "AttributeError: 'list'", 1),
    "chat taken for granted": ("[len(c[0]['content']) for c in completions]", "warn  text   the error above", 0),
    "the first message for the last": (
        "[len(c[0].get('content')) for c in completions]",
        "warn  tools  all comple",
        0,
    ),
    "the first row for all": (
        "[float(len(columns['gold'][0])) for c in completions]",
        "FAIL  chat   in another order",
        1,
    ),
    "better than the others": (
        "[len(last_reply(c)) - max(len(last_reply(d)) for d in completions) for c in completions]",
        "warn  chat   one at a time",
        0,
    ),
    "strings": ("['1.0' for _ in completions]", "'1.0' for completion 0", 1),
    "one number for all": ("1.0", "reward planted: 1.0 of type float", 1),
    "a table of one column": ("__import__('numpy').ones((len(completions), 1))", "of type ndarray", 1),
    "scores by index": ("{i: 0.5 for i in range(len(completions))}", "of type dict", 1),
    "a set": ("set(range(len(completions)))", "of type set", 1),
    "text": ("'1' * len(completions)", "of type str", 1),
    "a list of lists": ("[[len(last_reply(c))] for c in completions]", "] for completion 0", 1),
    "too large for 32 bits": ("[10 ** len(last_reply(c)) for c in completions]", "for completion 0", 1),
    "noise": ("[__import__('random').random() for _ in completions]", "warn  chat   the same batch again", 0),
    "an async reward that failed": (
        "async def planted(completions, **columns):\n    return [None] * len(completions)",
        "warn  chat   None for every completion",
        0,
    ),
    "a server that is not there": (
        "def planted(completions, **columns): ...\ndef lost():\n    raise ValueError('nobody')\nplanted.ready = lost",
        "nobody",
        2,
    ),
}


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Return a function that writes a module of a user's own into the folder that the user stands in."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "planted.py") -> str:
        (tmp_path / name).write_text(HEAD + text)
        return name

    return write


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_the_fault(fault, write_module, capsys):
    """A warning alone does not fail; an error inside the reward is shown with its file and line."""
    text, expected, status = FAULTS[fault]
    if "def " not in text:
        text = f"def planted(completions, **columns):\n    return {text}"
    argv = ["check", f"{write_module(text)}:planted", "--column", "gold=ab", "--column", "gold=a"]
    assert main(argv) == status
    captured = capsys.readouterr()
    assert expected in captured.out + captured.err
    if "Error: " in expected and "float" not in expected:
        assert re.search(r'planted\.py", line 3, in ', captured.err), captured.err


COLUMNS = {
    "rouge_reward": ["reference=The moon is far."],
    "length_similarity_reward": ["reference=The moon is far."],
    "choice_reward": ["answer=A", "answer=C"],
    "choice_accuracy": ["answer=A"],
    "choice_accuracy_of_answered": ["answer=A"],
    "calculation_reward": ["answer=72", "answer=42"],
    "calculation_accuracy": ["answer=72"],
    "math_reward": ["answer=72"],
    "answer_match_reward": ['answers=["moon"]', "answers=[]"],
    "answer_exact": ['answers=["moon"]'],
    "answer_f1": ['answers=["moon"]'],
}


@pytest.mark.parametrize("name", [name for name in library() if not re.search(r"\.(judge|perplexity|rubric)\.", name)])
def test_our_rewards_hold(name, capsys):
    """Every reward and measure that needs neither a server nor a model, by its short name."""
    name = name.rpartition(".")[2]
    columns = [argument for column in COLUMNS.get(name, []) for argument in ("--column", column)]
    assert main(["check", name, *columns]) == 0, capsys.readouterr()
    assert re.search("ok    chat .*ok    text .*ok    tools", capsys.readouterr().out, re.DOTALL)


def test_check_takes_columns_and_options(write_module, capsys):
    """A column given twice differs between the two prompts; a mistyped option is named."""
    text = "def near(completions, gold, *, scale=1.0, **columns):\n    return [scale * g for g in gold]"
    name = write_module(text) + ":near"
    assert main(["check", name, "--column", "gold=2", "--column", "gold=3", "--scale", "10"]) == 0
    assert "20, 20, 20, 30, 30" in capsys.readouterr().out
    assert main(["check", name, "--column", "gold=2", "--skale", "10"]) == 2
    assert "did you mean scale?" in capsys.readouterr().err


def test_two_of_one_name_clash(write_module, capsys):
    """They would share one metric."""
    text = "def same(completions, **columns):\n    return [0.0] * len(completions)"
    names = [f"{write_module(text, file)}:same" for file in ("one.py", "other.py")]
    assert main(["check", *names]) == 2
    assert "two rewards are called same" in capsys.readouterr().err


def test_try_scores_one_text(write_module, capsys):
    """By a short name, with an option; a user's own with a column, options in YAML, and what it logs."""
    assert main(["try", "length_reward", "--target", "60", "a" * 22]) == 0
    assert capsys.readouterr().out == "length_reward: -38.0\n"
    text = (
        "async def mine(completions, gold, reference, *, scale=1, words=(), log_metric, **columns):\n"
        "    log_metric('words', len(words))\n    return [scale * g + len(r) for g, r in zip(gold, reference)]"
    )
    argv = ["try", f"{write_module(text)}:mine", "-- no", "--column", "gold=3", "--column", "reference=abcd"]
    assert main([*argv, "--words", "[a, b]", "--scale=-2"]) == 0
    assert capsys.readouterr().out == "mine: -2.0\n  logged words: 2\n"


def test_an_error_of_the_reward_passes_through_try():
    """With its traceback whole."""
    with pytest.raises(TypeError):
        main(["try", "length_reward", "a", "--target", "[1]"])


MISTAKES = {
    "mistyped option": (["length_reward", "a", "--taget", "5"], "did you mean target?"),
    "mistyped name": (["lenght_reward", "a"], "did you mean length_reward?"),
    "mistyped function": (["rewards.length.lenght_reward", "a"], "did you mean length_reward?"),
    "file that is not there": (["nowhere.py:mine", "a"], "nowhere.py"),
    "reward model": (["owner/model", "a"], "owner/model is a reward model"),
    "missing column": (["rouge_reward", "a"], "--column reference=VALUE"),
    "option without a value": (["length_reward", "a", "--target"], "--target: expected one argument"),
    "option that is no YAML": (["length_reward", "a", "--target", "["], "--target: '[' is not valid YAML"),
    "column without a value": (["length_reward", "a", "--column", "gold"], "'gold' is not NAME=VALUE"),
}


@pytest.mark.parametrize(("argv", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(argv, expected, capsys):
    """With exit status 2."""
    try:
        status = main(["try", *argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2 and expected in capsys.readouterr().err


def test_list_has_measures_options_and_columns(capsys):
    """And nothing heavy is imported for it."""
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "rewards.length.length_reward\n    Reward a completion" in printed and "options: target=200" in printed
    assert "rewards.choice.choice_accuracy\n    Measure: 1" in printed and "columns: reference" in printed


def test_a_real_process_is_quick_and_takes_nothing_from_the_folder(tmp_path):
    """-X importtime names what is imported; a user may call files as he likes."""
    for name in ("rewards.py", "datasets.py", "tools.py"):
        (tmp_path / name).write_text("raise RuntimeError('a file of the user')")
    command = [sys.executable, "-X", "importtime", "-m", "grpo_launcher.reward_check", "list"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "length_reward" in done.stdout
    assert not re.search(r"\| +(torch|trl|transformers|openai|rouge_score)$", done.stderr, re.MULTILINE)
