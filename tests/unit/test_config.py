"""Recipes: what is read, in which order, and what is refused by field."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
import trl
import yaml
from helpers import ROOT

from grpo_launcher import config
from grpo_launcher.config import CHOICES, OLD_FIELDS, RANGES, SFT_LOSSES, SupervisedConfig, build, load_config
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
    "address without a scheme": ("vllm_server_base_url: localhost:8000", "vllm_server_base_url", "http://HOST:PORT"),
    "address of an API": ("vllm_server_base_url: http://a:8000/v1", "vllm_server_base_url", "http://HOST:PORT"),
    "host with a scheme": ("vllm_server_host: http://127.0.0.1", "vllm_server_host", "without http://"),
    "unknown field": ("beat: 0.1", "mine.yaml: beat", "did you mean beta?"),
    "duplicate key": ("beta: 0.1\nbeta: 0.2", "mine.yaml: beta", "lines 1 and 2"),
    "text for a number": ("beta: much", "mine.yaml: beta", "'much'"),
    "fraction for a count": ("max_completion_length: 1.5", "mine.yaml: max_completion_length", "1.5"),
    "list for one value": ("beta: [0.1]", "mine.yaml: beta", "[0.1]"),
    "mapping for one value": ("beta: {a: 1}", "mine.yaml: beta", "one value"),
    "list for a mapping": ("reward_kwargs: [1]", "mine.yaml: reward_kwargs", "a mapping is wanted"),
    "list for options of TRL": ("generation_kwargs: [a]", "mine.yaml: generation_kwargs", "a mapping is wanted"),
    "number for the options of a reward": ("reward_kwargs: {f: 100}", "reward_kwargs: f", "a mapping is wanted"),
    "empty number": ("learning_rate:", "mine.yaml: learning_rate", "for its default"),
    "empty list": ("reward_funcs: null", "mine.yaml: reward_funcs", "for its default"),
    "number as a field": ("1: 2", "mine.yaml: 1", "train.py --help"),
    "list as a field": ("[beta]: 0.1", "mine.yaml", "not valid YAML"),
    "tab": ("guards:\n\tkl: null", "mine.yaml", "line 2"),
    "date that is none": ("run_name: 2024-02-31", "mine.yaml", "not valid YAML"),
    "renamed field": ("torch_dtype: bfloat16", "mine.yaml: torch_dtype", "it is called dtype"),
    "unknown method": ("method: ppo", "mine.yaml: method", "'ppo'"),
    "unknown way to share": ("parallel: fsdp", "mine.yaml: parallel", "'zero3', 'ddp'"),
    "unknown scheduler": ("lr_scheduler_type: nonsense", "mine.yaml: lr_scheduler_type", "'cosine'"),
    "unknown loss": ("loss_type: dr_grp", "loss_type", "did you mean dr_grpo?"),
    "not a mapping": ("- beta", "mine.yaml", "not a mapping"),
    "not YAML": ("beta: [", "mine.yaml", "not valid YAML"),
    "no flag of the server": ("vllm_server_args: ['[--seed=1]']", "vllm_server_args", "YAML list"),
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
    assert found.name == "mine" and found.values["method"] == "grpo"


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5", "latin-1"])
def test_a_recipe_in_another_encoding_is_refused(encoding, tmp_path):
    """With the file and the remedy. A byte order mark, as some editors write it, is no part of the first field."""
    path, comment = tmp_path / "mine.yaml", "é" if encoding == "latin-1" else "學習率"
    path.write_text(f"beta: 0.1  # {comment}\n", encoding=encoding)
    with pytest.raises(UserError, match="save it as UTF-8") as error:
        load_config(["--config", str(path), *MODEL_AND_DATA])
    assert error.value.field == str(path)
    path.write_text(f"beta: 0.1  # {comment}\n", encoding="utf-8-sig")
    assert load_config(["--config", str(path), *MODEL_AND_DATA]).values["beta"] == 0.1


def test_words_are_read_as_they_are_written(read):
    """YAML takes `no` for false, and 1.10, 12:30 and 007 for numbers."""
    text = "save_strategy: no\neval_strategy: off\nlogging_strategy: NO\nmodel_revision: 1.10\nrun_name: 12:30\n"
    found = read(f"{text}dataset_config: 007\nbf16: no\nchat_template_kwargs: {{enable_thinking: no}}").values
    names = ("save_strategy", "eval_strategy", "logging_strategy", "model_revision", "run_name", "dataset_config")
    assert [found[name] for name in names] == ["no", "no", "no", "1.10", "12:30", "007"]
    assert found["bf16"] is False and found["chat_template_kwargs"] == {"enable_thinking": False}


def test_all_unknown_fields_are_refused_at_once(read):
    """Of the file, and of the flags, each with its remedy."""
    with pytest.raises(UserError) as error:
        read("torch_dtype: auto\nbeat: 0.1\nmax_prompt_length: 512\n1: 2\nbeta: 0.1")
    parts = ["torch_dtype: unknown field. Fix: it is called dtype.", "beat: unknown field. Fix: did you mean beta?"]
    parts += ["process_dataset.py --max_prompt_length", "1: unknown field"]
    assert all(part in str(error.value) for part in parts) and ": beta" not in str(error.value)
    with pytest.raises(UserError) as error:
        read("beta: 0.1", "--vllm-device=auto", "--evaluation_strategy", "steps")
    assert "--vllm-device: unknown field. Fix: leave it out" in str(error.value)
    assert "it is called eval_strategy" in str(error.value)


def test_old_names_are_no_fields_and_new_ones_are():
    known = set(config._Parser().known)
    assert not known & set(OLD_FIELDS)
    for fix in OLD_FIELDS.values():
        named = re.findall(r"^\w+$|write (\w+):", fix)
        assert set(named) - {""} <= known and (fix in known or " " in fix)


NUMBERS = {  # text of the recipe, and the field of which the number is out of range, or None
    "no completions": ("num_generations: 0", "num_generations"),
    "empty batch": ("per_device_eval_batch_size: 0", "per_device_eval_batch_size"),
    "greedy": ("temperature: 0", "temperature"),
    "no number": ("temperature: .nan", "temperature"),
    "negative": ("learning_rate: -1e-6", "learning_rate"),
    "share": ("top_p: 1.5", "top_p"),
    "port": ("vllm_server_port: 70000", "vllm_server_port"),
    "no steps": ("max_steps: 0", "max_steps"),
    "beyond 1": ("adam_beta1: 2", "adam_beta1"),
    "no workers": ("dataloader_num_workers: -1", "dataloader_num_workers"),
    "whole epochs": ("max_steps: -1", None),
    "never saved": ("save_steps: 0", "save_steps"),
    "not saved by steps": ("save_steps: 0\nsave_strategy: epoch", None),
    "no KL": ("beta: 0\nsample_every: 0\nwarmup_steps: 0.1", None),
}


@pytest.mark.parametrize(("text", "field"), NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_no_run_can_work_with_is_refused(text, field, read):
    """With its field and its range."""
    if field is None:
        read(text)
        return
    with pytest.raises(UserError, match=r"out of range\..* give a number that is ") as error:
        read(text)
    assert error.value.field == field


def test_ranges_are_those_of_fields():
    known = set(config._Parser().known)
    assert all(set(names) <= known for _, names in RANGES.values())
    with pytest.raises(UserError, match=r"temperature: 0\.0 .*\n.*max_steps: 0|max_steps: 0 .*\n.*temperature: 0"):
        load_config([*MODEL_AND_DATA, "--temperature", "0", "--max_steps", "0"])


def test_the_home_folder_stands_in_any_path(read, tmp_path, monkeypatch):
    """In YAML, in a flag, and inside of options. Other texts keep their ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").touch()
    (tmp_path / "other.yaml").write_text("beta: 0.5")
    assert load_config(["--config", "~/other.yaml", *MODEL_AND_DATA]).values["beta"] == 0.5
    text = "output_dir: ~/runs/a\nreward_funcs: [~/mine.py:f]\ntool_kwargs: {search: {corpus: ~/c.jsonl, k: 2}}\n"
    flags = ["--model_name_or_path=~/model", "--dataset_name", "~/rows.jsonl"]
    flags += ["--reward_kwargs", '{"f": {"template": "~/t.txt", "mark": "~"}}']
    found = read(text, *flags).values
    home = str(tmp_path)
    assert (found["output_dir"], found["model_name_or_path"]) == (f"{home}/runs/a", f"{home}/model")
    assert (found["reward_funcs"], found["dataset_name"]) == ([f"{home}/mine.py:f"], f"{home}/rows.jsonl")
    assert found["tool_kwargs"] == {"search": {"corpus": f"{home}/c.jsonl", "k": 2}}
    assert found["reward_kwargs"] == {"f": {"template": f"{home}/t.txt", "mark": "~"}}


def test_options_that_are_commented_out_are_none(read):
    found = read("reward_kwargs:\n  length_reward:\n    # target: 100\ntool_kwargs: {search: null}\nguards:\n").values
    assert found["reward_kwargs"] == {"length_reward": {}} and found["tool_kwargs"] == {"search": {}}
    assert found["guards"] is None


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
    for folder in ("recipes", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").touch()
    (tmp_path / "recipes/other.py").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
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
    assert values["reward_funcs"] == [f"{user_files}/elsewhere/mine.py:f", f"{user_files}/recipes/other.py:f"]
    assert values["environment_factory"] == absolute


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere.py:f", r"nowhere\.py in .*/elsewhere"), ("mine.py", "write mine.py:function")]
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


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("sync", ["disk", "adapter", "nccl"])
def test_files_go_to_a_server_alone(mode, sync):
    """A rank with an engine of its own needs all of vLLM, whatever the recipe says of a sync."""
    recipe, args = SimpleNamespace(weight_sync=sync), SimpleNamespace(use_vllm=True, vllm_mode=mode)
    assert config.sends_files(recipe, args) == (mode == "server" and sync != "nccl")
