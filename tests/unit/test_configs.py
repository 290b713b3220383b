"""Every recipe in configs/: its names, values and comments. test_preflight.py plans each for its hardware."""

import re

import pytest
import yaml
from helpers import ROOT

from grpo_launcher.config import load_config
from grpo_launcher.plugins import load_object, load_rewards, metric_name

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@each_config
def test_its_names_are_rewards_and_tools(path):
    """And what is generated is trained on with a KL term, and measured under names that differ."""
    config = load_config(["--config", str(path)])
    values = config.values
    rewards = load_rewards(values["reward_funcs"], values["reward_kwargs"], weights=values["reward_weights"])
    assert rewards and len({metric_name(reward) for reward in rewards}) == len(rewards)
    for tool in values["tools"] or []:
        assert callable(load_object(tool, "tools"))
    assert {"model_name_or_path", "dataset_name"} <= set(config.given)
    assert values["method"] == "sft" or values["beta"] > 0


@each_config
def test_it_holds_only_what_differs_from_a_default(path):
    """Else a default that changes with a version would be pinned here unseen."""
    content = yaml.safe_load(path.read_text())
    required = ["--model_name_or_path", "a", "--dataset_name", "a", "--method", content.get("method", "grpo")]
    defaults = load_config(required).values
    values = load_config(["--config", str(path)]).values
    assert [name for name in content if name != "method" and values[name] == defaults[name]] == []


@each_config
def test_its_head_says_what_it_is_for_how_to_run_it_and_what_to_watch(path):
    """In at most 40 lines of at most 119 characters."""
    lines = path.read_text().splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    command = "bash launch_train.sh" if path.stem == "quickstart" else f"bash launch_train.sh configs/{path.name}"
    assert command in head and "# Watch: " in head
    assert len(lines) <= 40 and max(map(len, lines)) <= 119
    comments = {line.index(" # ") for line in lines if " # " in line[1:] and not line.startswith("#")}
    assert len(comments) == 1, "the comments are aligned"


RELATED = {path: re.sub(r"\n# ", " ", path.read_text()) for path in CONFIGS}
RELATED = {path: re.search(r"Differs from (\S+) in: ([\w, ]+)\.", text) for path, text in RELATED.items()}


@pytest.mark.parametrize("path", [path for path, found in RELATED.items() if found], ids=lambda path: path.stem)
def test_it_differs_from_its_relative_in_what_it_says(path):
    """`Differs from NAME.yaml in: fields.` is true to the field."""
    name, fields = RELATED[path].groups()
    ours, theirs = (yaml.safe_load(file.read_text()) for file in (path, path.with_name(name)))
    assert {field for field in ours | theirs if ours.get(field) != theirs.get(field)} == set(fields.split(", "))
