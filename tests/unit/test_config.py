"""Recipes: what is read, in which order, and what is refused by field."""

import os
import re

import pytest
import torch
import trl
import yaml
from helpers import ROOT

from grpo_launcher import config
from grpo_launcher.config import CHOICES, SFT_LOSSES, SupervisedConfig, build, load_config
from grpo_launcher.errors import UserError

MODEL_AND_DATA = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl"]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A function that reads a recipe with this YAML text, in a folder of its own, and flags."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *flags: str):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return load_config(["--config", "mine.yaml", *MODEL_AND_DATA, *flags])

    return load


REFUSED = {  # text of the recipe, field, and a part of the fix or of the problem
    "unknown field": ("beat: 0.1", "mine.yaml: beat", "did you mean beta?"),
    "duplicate key": ("beta: 0.1\nbeta: 0.2", "mine.yaml: beta", "lines 1 and 2"),
    "text for a number": ("beta: much", "mine.yaml: beta", "'much'"),
    "fraction for a count": ("max_completion_length: 1.5", "mine.yaml: max_completion_length", "1.5"),
    "list for one value": ("beta: [0.1]", "mine.yaml: beta", "[0.1]"),
    "mapping for one value": ("beta: {a: 1}", "mine.yaml: beta", "one value"),
    "list for a mapping": ("reward_kwargs: [1]", "reward_kwargs", "a mapping is wanted"),
    "unknown method": ("method: ppo", "mine.yaml: method", "'ppo'"),
    "unknown way to share": ("parallel: fsdp", "mine.yaml: parallel", "'zero3', 'ddp'"),
    "unknown scheduler": ("lr_scheduler_type: nonsense", "mine.yaml: lr_scheduler_type", "'cosine'"),
    "unknown loss": ("loss_type: dr_grp", "loss_type", "did you mean dr_grpo?"),
    "not a mapping": ("- beta", "mine.yaml", "not a mapping"),
    "not YAML": ("beta: [", "mine.yaml", "not valid YAML"),
    "no Hub id": ("push_to_hub: true", "push_to_hub", "hub_model_id"),
}


@pytest.mark.parametrize(("text", "field", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_recipe_is_refused_by_field(text, field, message, read):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(text)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("flags", "field", "message"),
    {
        "unknown flag": (["--bet", "0.1"], "--bet", "did you mean beta?"),
        "with dashes": (["--max-step=3"], "--max-step", "did you mean max_steps?"),
        "bad value": (["--beta", "much"], "flags", "much"),
        "no value": (["--beta"], "flags", "--beta"),
        "not JSON": (["--reward_kwargs", "{kl: 1}"], "reward_kwargs", "--reward_kwargs '"),
        "no mapping": (["--guards", "3"], "guards", "a mapping is wanted"),
        "no recipe": (["--config"], "flags", "path of a recipe"),
        "recipe not there": (["--config", "nowhere.yaml"], "nowhere.yaml", "No such file"),
    }.values(),
)
def test_a_bad_flag_is_refused(flags, field, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_config([*MODEL_AND_DATA, *flags])
    assert error.value.field == field


@pytest.mark.parametrize("field", ["model_name_or_path", "dataset_name"])
def test_model_and_dataset_are_required(field):
    position = MODEL_AND_DATA.index(f"--{field}")
    with pytest.raises(UserError, match="missing") as error:
        load_config(MODEL_AND_DATA[:position] + MODEL_AND_DATA[position + 2 :])
    assert error.value.field == field


def test_defaults_yield_to_yaml_and_yaml_to_flags(read):
    """Exponents without a point are numbers, which PyYAML alone takes for text."""
    flags = ["--learning_rate", "3e-5", "--no_gradient_checkpointing", "--max-steps", "7"]
    found = read("beta: 1e-2\nlearning_rate: 1e-6\nreward_weights: [1, 0.5]\nbf16: false\nguards:\n", *flags)
    expected = {"beta": 0.01, "learning_rate": 3e-5, "reward_weights": [1.0, 0.5], "temperature": 1.0, "max_steps": 7}
    expected |= {"gradient_checkpointing": False, "bf16": False, "guards": None, "report_to": "tensorboard"}
    assert {name: found.values[name] for name in expected} == expected
    given = {"beta", "learning_rate", "reward_weights", "bf16", "guards", "gradient_checkpointing", "max_steps"}
    assert set(found.given) == given | {"model_name_or_path", "dataset_name"}
    assert found.name == "mine" and found.recipe.method == "grpo"


def test_a_mapping_is_yaml_or_json(read):
    flags = ["--reward_kwargs", '{"length_reward": {"target": 3}}']
    found = read("tool_kwargs: {search: {k: 1}}\nreward_kwargs: {}", *flags).values
    assert found["reward_kwargs"] == {"length_reward": {"target": 3}}
    assert found["tool_kwargs"] == {"search": {"k": 1}} and found["guards"] is None


def test_one_value_may_stand_for_a_list(read):
    assert read("reward_funcs: rewards.length.length_reward").values["reward_funcs"] == [
        "rewards.length.length_reward"
    ]


@pytest.mark.parametrize(("value", "expected"), [("true", "group"), ("false", "none"), ("batch", "batch")])
def test_both_forms_of_scale_rewards_reach_trl(value, expected, read):
    """TRL's documentation allows true and false. As text they would be refused in the first step."""
    for found in (read(f"scale_rewards: {value}"), read("beta: 0", "--scale_rewards", value)):
        assert build(trl.GRPOConfig, found.values, use_cpu=True, bf16=False, output_dir="x").scale_rewards == expected


@pytest.fixture
def user_files(tmp_path, monkeypatch):
    """A file mine.py beside the recipe and another in the working directory; other.py beside the recipe alone."""
    for folder in ("recipes", "work"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").touch()
    (tmp_path / "recipes/other.py").touch()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_files_are_relative_to_the_recipe_or_to_the_working_directory(user_files):
    """In YAML the recipe's folder comes first, in flags the working directory."""
    recipe = user_files / "recipes/a.yaml"
    recipe.write_text("reward_funcs: [mine.py:f, rewards.length.length_reward, owner/model]\ntools: other.py:g")
    argv = ["--config", str(recipe), *MODEL_AND_DATA]
    values = load_config(argv).values
    assert values["reward_funcs"] == [
        f"{user_files}/recipes/mine.py:f",
        "rewards.length.length_reward",
        "owner/model",
    ]
    assert values["tools"] == [f"{user_files}/recipes/other.py:g"]
    absolute = f"{user_files}/recipes/other.py:Game"
    flags = ["--reward_funcs", "mine.py:f", "other.py:f", "--environment_factory", absolute]
    values = load_config([*argv, *flags]).values
    assert values["reward_funcs"] == [f"{user_files}/work/mine.py:f", f"{user_files}/recipes/other.py:f"]
    assert values["environment_factory"] == absolute


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere.py:f", r"nowhere\.py in .*/work"), ("mine.py", "write mine.py:function")]
)
def test_a_file_or_function_that_is_not_named_is_refused(name, message, user_files):
    with pytest.raises(UserError, match=message) as error:
        load_config([*MODEL_AND_DATA, "--reward_funcs", name])
    assert error.value.field == "reward_funcs"


def test_a_merged_adapter_takes_the_place_of_the_adapter(tmp_path):
    """Unless the adapter is newer."""
    adapter, weights = tmp_path / "adapter", tmp_path / "adapter/adapter_model.safetensors"
    argv = ["--model_name_or_path", str(adapter), "--dataset_name", "rows.jsonl"]
    (adapter / "merged").mkdir(parents=True)
    assert load_config(argv).values["model_name_or_path"] == str(adapter), "no adapter"
    (adapter / "adapter_config.json").touch()
    weights.touch()
    os.utime(weights, (1, 1))
    assert load_config(argv).values["model_name_or_path"] == f"{adapter}/merged"
    os.utime(weights, (2e9, 2e9))
    assert load_config(argv).values["model_name_or_path"] == str(adapter)


def test_supervised_defaults_are_those_of_trl():
    """Where the two methods differ. A given value stands above both."""
    values = load_config([*MODEL_AND_DATA, "--method", "sft"]).values
    trl_values = SupervisedConfig(output_dir="unused", use_cpu=not torch.cuda.is_available(), bf16=False)
    assert (values["learning_rate"], values["loss_type"]) == (trl_values.learning_rate, trl_values.loss_type)
    assert (values["learning_rate"], values["loss_type"]) == (2e-5, "nll")
    assert load_config([*MODEL_AND_DATA, "--method", "sft", "--learning_rate", "1e-4"]).values["learning_rate"] == 1e-4
    assert load_config(MODEL_AND_DATA).values["learning_rate"] == 1e-6
    with pytest.raises(UserError, match="nll"):
        load_config([*MODEL_AND_DATA, "--method", "sft", "--loss_type", "grpo"])


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_those_of_trls_documentation(name):
    """TRL keeps these fields as free text, so a new version could bring a value that we refuse."""
    assert trl.GRPOConfig.__dataclass_fields__[name].type in (str, "str")
    assert _documented_values(trl.GRPOConfig, name) == set(CHOICES[name])


def test_supervised_losses_are_those_of_trls_documentation():
    assert _documented_values(trl.SFTConfig, "loss_type") == set(SFT_LOSSES)


def _documented_values(kind: type, name: str) -> set[str]:
    text = re.search(rf"^ +{name} \(.*\n((?: {{12}}.*\n|\n)*)", kind.__doc__, re.MULTILINE)[1]
    in_a_list = re.findall(r'^ +- .*?`"(\w+)"`', text, re.MULTILINE)
    return set(in_a_list or re.findall(r'`"(\w+)"`', text))


def test_show_prints_what_was_given_before_the_defaults(capsys):
    config.show([str(ROOT / "configs/quickstart.yaml"), "--beta", "0.5"])
    given, _, defaults = capsys.readouterr().out.partition("# by default")
    assert yaml.safe_load(given)["beta"] == 0.5 and yaml.safe_load(given)["reward_kwargs"]
    assert yaml.safe_load(defaults)["temperature"] == 1.0 and "beta" not in yaml.safe_load(defaults)
