"""Recipes: what is read, what is refused, and in which words."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from grpo_launcher.plugins import load_rewards
from grpo_launcher.config import Recipe, RecipeError, RecipeParser

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


REFUSED = {
    "unknown field": ("beat: 0.1", "unknown field `beat`; did you mean beta?"),
    "value of an enumeration": ("loss_type: dr_grp", "loss_type: 'dr_grp' is none of grpo, bnpo, dr_grpo"),
    "duplicate key": ("beta: 0.1\nbeta: 0.2", "`beta` stands in lines 1 and 2"),
    "text for a number": ("beta: much", "beta: 'much'"),
    "fraction for a count": ("max_completion_length: 1.5", "max_completion_length: 1.5"),
    "list for one value": ("beta: [0.1]", "beta: [0.1]: one value is wanted"),
    "not a mapping": ("- beta", "a recipe is a mapping"),
    "not YAML": ("beta: [", "not valid YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_recipe_is_refused_with_file_field_and_remedy(case, tmp_path):
    """Each names the file."""
    text, message = REFUSED[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        RecipeParser().read(["--config", str(path)])
    assert str(path) in str(error.value)


def test_an_unknown_flag_is_refused_with_the_nearest():
    """A misspelt flag must not become a default in silence."""
    with pytest.raises(RecipeError, match="Unknown flag --bet; did you mean --beta"):
        RecipeParser().read(["--config", str(CONFIGS[0]), "--bet", "0.1"])


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    """TRL's default < YAML < flags, and exponents without a point are numbers."""
    (tmp_path / "a.yaml").write_text("beta: 1e-2\nlearning_rate: 1e-6\nreward_weights: [1, 0.5]")
    values, given = RecipeParser().read(["--config", str(tmp_path / "a.yaml"), "--learning_rate", "3e-5"])
    assert (values.beta, values.learning_rate, values.reward_weights, values.temperature) == (0.01, 3e-5, [1.0, 0.5], 1.0)
    assert given == ["beta", "learning_rate", "reward_weights"]


def test_a_mapping_given_as_a_flag_is_one_for_everybody():
    """JSON on the command line, a dict in the run's recipe.yaml and for whoever reads it; anything else is refused by name."""
    flags = ["--config", str(CONFIGS[0]), "--reward_kwargs", '{"length_reward": {"target": 3}}', "--guards"]
    values, _ = RecipeParser().read([*flags, "{}"])
    assert values.reward_kwargs == {"length_reward": {"target": 3}} and values.guards == {}
    for text in ("{kl: 1}", "[1]", "3"):
        with pytest.raises(RecipeError, match=r"guards: .* a mapping is wanted"):
            RecipeParser().read([*flags, text])


GOOD = "from rewards.length import *\ndef plain(completions, **columns):\n    return [0.0 for _ in completions]\n"
BAD_REWARDS = {
    "misspelt option": ({"reward_kwargs": {"length_reward": {"taget": 100}}}, "no option `taget`; did you mean target?"),
    "options of no reward": ({"reward_kwargs": {"lenght_reward": {}}}, "reward_kwargs: lenght_reward is none of the rewards"),
    "unknown module": ({"reward_funcs": ["rewards.lenght.length_reward"]}, "there is no module `rewards.lenght`"),
    "unknown function": ({"reward_funcs": ["rewards.length.lenght_reward"]}, "did you mean length_reward?"),
    "no module at all": ({"reward_funcs": ["length_reward"]}, "write module.function"),
    "two of one name": ({"reward_funcs": ["rewards.length.length_reward", "good.length_reward"]}, "two rewards are called length_reward"),
    "no **columns": ({"reward_funcs": ["bad.closed"]}, "bad.closed must end in **columns"),
    "a column that is missing": ({"reward_funcs": ["bad.needs_gold"]}, "bad.needs_gold needs gold, and the dataset has only prompt"),
    "a completion column": ({"reward_funcs": ["bad.needs_completion"]}, "rename those"),
    "none at all": ({"reward_funcs": []}, "give at least one"),
}


@pytest.fixture
def user_modules(tmp_path, monkeypatch):
    """Two modules of a user's own."""
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(
        "def closed(completions):\n    return [0.0]\n"
        "def needs_gold(completions, gold, **columns):\n    return [0.0]\n"
        "def needs_completion(completions, completion, **columns):\n    return [0.0]\n"
        "def short(completions, **columns):\n    return [0.0]\n"
        "def infinite(completions, **columns):\n    return [float('inf')] * len(completions)\n"
        "def unknown(completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "async def late(completions, **columns):\n    return [None] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("good", "bad"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_a_bad_reward_is_refused_by_name(case, user_modules):
    """Before anything is loaded."""
    fields, message = BAD_REWARDS[case]
    recipe = Recipe(**{"reward_funcs": ["rewards.length.length_reward"], **fields})
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_rewards(recipe, ["prompt", "completion"])


def test_weights_must_be_as_many_as_rewards():
    """One weight a reward."""
    with pytest.raises(RecipeError, match="2 weights for 1 rewards"):
        load_rewards(Recipe(reward_funcs=["rewards.length.length_reward"]), weights=[1.0, 2.0])


@pytest.mark.parametrize(("name", "message"), [("short", "1 scores for 2"), ("infinite", "inf for completion 0"), ("unknown", "nan for completion 0")])
def test_a_bad_score_names_the_reward(name, message, user_modules):
    """A wrong count or a value that is no number ends the run with the reward's name, not with silent zeros."""
    reward = load_rewards(Recipe(reward_funcs=[f"bad.{name}"]))[0]
    with pytest.raises(ValueError, match=f"reward {name}: {message}"):
        reward(completions=["a", "b"], prompts=["p", "p"])


def test_options_are_bound_and_names_kept(user_modules):
    """An option reaches the function, async stays async, and a reward model of the Hub passes through."""
    import asyncio
    import inspect

    recipe = Recipe(reward_funcs=["rewards.length.length_reward", "bad.late", "owner/model"], reward_kwargs={"length_reward": {"target": 3}})
    length, late, model = load_rewards(recipe)
    assert length(completions=["abcd"], prompts=["p"]) == [-1.0] and length.__name__ == "length_reward"
    assert inspect.iscoroutinefunction(late) and asyncio.run(late(completions=["a"])) == [None]
    assert model == "owner/model"


def test_show_prints_the_recipe_as_resolved():
    """`python -m grpo_launcher.config show` gives given fields first."""
    command = [sys.executable, "-m", "grpo_launcher.config", "show", "configs/quickstart.yaml", "--beta", "0.5"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    given, _, default = shown.partition("# by default")
    assert "beta: 0.5" in given and "temperature: 1.0" in default


def facts(tmp_path: Path, *flags: str) -> dict:
    """What grpo_launcher.preflight says of the quickstart recipe with flags, in `tmp_path`."""
    command = [sys.executable, "-P", "-m", "grpo_launcher.preflight", "--config", str(ROOT / "configs/quickstart.yaml"), *flags]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "has no column `prompt`, only text"),
        (None, "dataset_name: rows.csv cannot be read"),
    ],
    ids=["no prompt column", "empty"],
)
def test_rows_that_cannot_be_trained_on(row, said, tmp_path):
    """The dataset is looked at before a model is."""
    (tmp_path / "rows.csv").write_text("prompt\n" if row is None else "\n".join([*row.keys(), *row.values()]))
    found = facts(tmp_path, "--dataset_name", "rows.csv")
    assert any(said in problem for problem in found["problems"] + found["missing"]), found
    assert any("model_name_or_path: data/quickstart-model is no folder with a model" in line for line in found["missing"])


def test_missing_data_names_the_command_that_makes_it(tmp_path):
    """data/tldr that is not there: how to make it."""
    found = facts(tmp_path, "--dataset_name", "data/tldr")
    assert any("process_dataset.py tldr" in line for line in found["missing"]), found


def test_values_that_transformers_refuses_are_refused_here(tmp_path):
    """An unknown optimizer or scheduler is told before anything starts."""
    assert any("nonsense" in problem for problem in facts(tmp_path, "--lr_scheduler_type", "nonsense")["problems"])
