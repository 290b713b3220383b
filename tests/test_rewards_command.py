"""`python -m grpo_launcher.rewards_command`: list, try, and check, which must find the planted faults and pass the library."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from grpo_launcher.rewards_command import PASSED, library, main

NEEDS_A_MODEL = ("rewards.judge.", "rewards.perplexity.")
# What a reward returns, or its whole module; what the table must show, with any space for its gaps; the exit status: 1 where a run would break.
FAULTS = {
    "too few scores": ("[1.0]", "chat batch 1 scores for 4 completions; return one each.*FAIL", 1),
    "another count than the batch's": ("[1.0] * 6", "chat batch 6 scores for 4 completions.*FAIL", 1),
    "no **columns": ("def planted(completions):\n    return [0.0] * len(completions)", r"keywords .*must end in \*\*columns.*FAIL", 1),
    "nan": ("[float('nan')] * len(completions)", "chat batch nan for completion 0.*FAIL", 1),
    "infinite for an empty reply": ("[-1.0 if reply(c) else -float('inf') for c in completions]", "empty reply -inf for completion 0.*FAIL", 1),
    "too large for float32": ("[1e39] * len(completions)", r"chat batch 1e\+39 is infinite in TRL's float32 FAIL", 1),
    "divides by zero on an empty reply": (
        "[1 / len(reply(c)) for c in completions]",
        r"empty reply planted_\w+\.py:3: ZeroDivisionError: .*, on \[\{'role': 'assistant', 'content': ''\}\] FAIL",
        1,
    ),
    "counts messages for characters": ("[len(c) for c in completions]", r"plain batch 58, 3, \d+, \d+; the same replies as chat: 1, 1, 1, 1 FAIL", 1),
    "text taken for granted": ("[float('moon' in c.lower()) for c in completions]", r"chat batch planted_\w+\.py:3: AttributeError: 'list' object.*FAIL", 1),
    "chat taken for granted": ("[len(c[0]['content']) for c in completions]", r"plain batch planted_\w+\.py:3: TypeError: .*with plain-text rows\) warn", 0),
    "the first message for the reply": ("[len(c[0].get('content') or '') for c in completions]", "tool messages 0 for an answer after a call.*warn", 0),
    "a column that is not there": ("[float(g) for g in columns['gold']]", "KeyError: 'gold' FAIL → If gold is a column: check with --column gold=VALUE", 1),
    "a column of another kind": (
        "def planted(completions, steps, **columns):\n    return [float(n) for n in steps]",
        "columns needs `steps`, filled here with 'x' warn → Check with its real content: --column steps=VALUE",
        1,
    ),
    "the first row for all": (
        "def planted(completions, reference, **columns):\n    return [float(len(reference[0])) for c in completions]",
        "two prompts .*warn → Alone each half gets",
        0,
    ),
    "strings": ("['1.0' for _ in completions]", "chat batch '1.0' for completion 0 is no number. FAIL → Return a list with one float", 1),
    "one number for all": ("1.0", "chat batch it returned no list of numbers: 'float' object is not iterable FAIL", 1),
    "booleans": ("['moon' in reply(c) for c in completions]", "chat batch 1, 0, 0, 1 warn → Return plain floats, no bool", 0),
    "a table of one column": ("__import__('torch').zeros(len(completions), 1)", "chat batch 0, 0, 0, 0 warn → Return plain floats, no Tensor", 0),
    "changes the batch": ("[float(bool(columns['another_column'].append(1))) for c in completions]", "inputs it changes another_column warn", 0),
    "noise": ("[__import__('random').random() for _ in completions]", "same batch twice .* then .*warn", 0),
    "slow": ("[__import__('time').sleep(0.02) or 0.0 for _ in completions]", r"64: \d+\.\d+ s, 768: about \d+ s; \d+ ms a completion warn", 0),
    "async, and failed": (
        "async def planted(completions, **columns):\n    return [None] * len(completions)",
        r"async awaited together.* ok chat batch None, None.*counts as failed\) warn",
        0,
    ),
    "a server that is not there": (
        "def planted(completions, **columns): ...\ndef lost():\n    raise ValueError('nobody answers')\nplanted.ready = lost",
        "ready nobody answers FAIL → A run would not start",
        1,
    ),
}


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """A function that writes a module of a user's own, into the folder that the user stands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")

    def write(text: str) -> str:
        name = f"planted_{re.sub(r'[^a-z0-9]', '', tmp_path.name)}_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_the_fault(fault, write_module, capsys):
    """Names the case, what was seen and the verdict; a warning alone does not fail."""
    text, said, status = FAULTS[fault]
    if "def " not in text:
        text = f"from grpo_launcher.messages import reply\ndef planted(completions, **columns):\n    return {text}"
    assert main(["check", f"{write_module(text)}.planted"]) == status
    shown = capsys.readouterr().out
    assert re.search(said, " ".join(shown.split())), shown


@pytest.mark.parametrize("name", [name for name in library() if not name.startswith(NEEDS_A_MODEL)])
def test_the_library_holds(name, monkeypatch, capsys):
    """Every reward that needs neither a network nor a model."""
    monkeypatch.setenv("COLUMNS", "1000")
    answers = {
        "choice_reward": ["answer=A", "answer=C"],
        "calculation_reward": ["answer=72", "answer=5"],
        "answer_match_reward": ['answers=["moon"]', "answers=[]"],
    }
    columns = [part for given in answers.get(name.split(".")[-1], []) for part in ("--column", given)]
    assert main(["check", name, *columns]) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    assert "empty reply" in shown and re.search(r"same batch twice\s+same scores", shown), shown


def test_check_takes_columns_and_options(write_module, capsys):
    """A column given twice differs between the two prompts; a misspelt option is no finding but a mistake."""
    name = write_module("def near(completions, gold, *, scale=1.0, **columns):\n    return [scale * g for g in gold]") + ".near"
    assert main(["check", name, "--column", "gold=2", "--column", "gold=3", "--scale", "10"]) == 0
    assert "20, 20, 20, 20, 30, 30, 30, 30" in capsys.readouterr().out
    assert main(["check", name, "--skale", "10"]) == 2 and "did you mean scale?" in capsys.readouterr().err


def test_two_of_one_name_clash(write_module, capsys):
    """They would share one metric."""
    one, two = (write_module("def same(completions, **columns):\n    return [0.0] * len(completions)") for _ in range(2))
    assert main(["check", f"{one}.same", f"{two}.same"]) == 1
    assert "two rewards are called same" in capsys.readouterr().out


def test_try_scores_one_reply(write_module, capsys):
    """By its short name, with an option; a user's own with a column, options in YAML, and what it logs."""
    assert main(["try", "length_reward", "--target", "60", "a" * 22]) == 0
    assert capsys.readouterr().out == "length_reward: -38.0\n"
    mine = write_module(
        "async def mine(completions, gold, reference, *, scale=1, words=(), log_metric, **columns):\n"
        "    log_metric('words', len(words))\n    return [scale * g + len(r) for g, r in zip(gold, reference)]"
    )
    assert main(["try", f"{mine}.mine", "-- no", "--column", "gold=3", "--words", "[a, b]", "--scale=-2", "--reference", "1234"]) == 0
    assert capsys.readouterr().out == "mine: -2\n  logged words: 2\n"


WRONG = {
    "misspelt option": (["length_reward", "a", "--taget", "5"], "has no option `taget`; did you mean target?"),
    "misspelt name": (["lenght_reward", "a"], "there is no reward lenght_reward; did you mean length_reward?"),
    "misspelt function": (["rewards.length.lenght_reward", "a"], "did you mean length_reward?"),
    "reward model": (["owner/model", "a"], "only functions can be tried"),
    "option without a value": (["length_reward", "a", "--target"], "--target: give a value"),
    "option that is no YAML": (["length_reward", "a", "--target", "["], "--target: '[' is not valid YAML"),
    "missing reference": (["length_similarity_reward", "a"], "needs the column `reference`: add --reference TEXT"),
    "column without a value": (["length_reward", "a", "--column", "gold"], "write --column NAME=VALUE"),
    "a name of TRL's": (["length_reward", "a", "--column", "prompts=x"], "TRL itself passes prompts"),
    "text for a number": (["length_reward", "a", "--target", "much"], "rewards/length.py:"),
}


@pytest.mark.parametrize("case", WRONG)
def test_try_says_in_one_line_what_is_wrong(case, capsys):
    """Exit status 2, the same words as a run."""
    argv, said = WRONG[case]
    assert main(["try", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1, error


def test_list_is_quick_and_fits_a_terminal():
    """A real process, in which neither torch nor trl is imported: -X importtime names what is."""
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "grpo_launcher.rewards_command", "list"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert re.search(r"rewards\.length\.length_reward\s+Minus the distance", done.stdout) and "target=200" in done.stdout
    assert re.search(r"columns: reference\s", done.stdout) and max(map(len, done.stdout.splitlines())) <= 100
    assert not re.search(r"\| +(torch|trl|transformers|training)$", done.stderr, re.MULTILINE)


def test_without_a_command_it_teaches(capsys):
    """Examples, and the exit status of a mistake."""
    from grpo_launcher.plugins import FROM_TRL

    assert main([]) == 2 and "python -m grpo_launcher.rewards_command try" in capsys.readouterr().out
    assert PASSED == FROM_TRL
