"""What a recipe is: TRL's own fields, the few of ours, and the parser that holds a YAML file and flags against them.

`python -m grpo_launcher.config show configs/X.yaml [--key value …]` prints a recipe as a run would see it.
"""

import argparse
import dataclasses
import difflib
import enum
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import Seq2SeqTrainingArguments
from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from grpo_launcher import merge

# Fields that TRL keeps as free text and reads only when training has begun.
CHOICES = {
    "loss_type": ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"],
    "scale_rewards": ["group", "batch", "none", True, False, "True", "False"],
    "importance_sampling_level": ["token", "sequence"],
    "vllm_mode": ["server", "colocate"],
    "vllm_importance_sampling_mode": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
}
# Where this project's defaults differ from TRL's: every step is logged, with its completions; no LoRA dropout, with which the trainer's
# log-probabilities would differ from those that the server sampled by; and a push, where one is asked for, of the final checkpoint alone.
DEFAULTS = {"logging_steps": 1, "log_completions": True, "report_to": "tensorboard", "disable_tqdm": True, "lora_dropout": 0.0, "hub_strategy": "end"}
CPU = {"use_cpu": True, "bf16": False}
MAPPINGS = ("reward_kwargs", "tool_kwargs", "guards", "provenance")  # a flag gives them as JSON; everybody else sees a dict


SUPERVISED_LOSSES = ["nll", "dft", "chunked_nll"]


class RecipeError(ValueError):
    """A recipe that cannot run: says the file, the field, the value and what to do."""


@dataclass
class Recipe(ScriptArguments):
    """The fields of this project; every other field of a recipe is TRL's, and TRL's documentation is ours.

    dataset_name (TRL's) is a Hub id, a prepared folder such as data/tldr, or one jsonl, json, csv or parquet file.
    """

    method: Literal["grpo", "sft"] = field(
        default="grpo",
        metadata={
            "help": "grpo rewards what the model writes; sft (supervised) teaches it the column `reference` word by word, as a warm-up say. A run "
            "of either starts from the final checkpoint of the other. Rewards of a supervised recipe are those by which chat and comparison score."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards by dotted name (rewards.length.length_reward, or module.function of your own, beside the recipe or in the folder "
            "you stand in), or the Hub id or folder of a reward model."
        },
    )
    reward_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Options of the rewards, by function name: {length_reward: {target: 200}}."},
    )
    tools: list[str] | None = field(
        default=None,
        metadata={"help": "Tools that the model may call, by dotted name (grpo_launcher.tools.calculator.calculator, or module.function of your own)."},
    )
    tool_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of the tools, by function name: {search: {corpus: data/search_qa/corpus.jsonl, k: 3}}; the model does not see them."},
    )
    environment_factory: str | None = field(
        default=None,
        metadata={"help": "Class by dotted name: an object for each reply; reset(**row) begins it, public methods are tools, get_reward() may rate it."},
    )
    guards: dict | str | None = field(
        default=None,
        metadata={
            "help": "Ranges that end the run when left for some steps: {kl: {max: 0.5, steps: 3}, entropy: null}; null switches one off. "
            "By default: see grpo_launcher/guards.py."
        },
    )
    eval_rows: int | None = field(
        default=None,
        metadata={"help": "Held-out prompts that an evaluation asks, the first of the test split. By default all of it."},
    )
    prepare: str | None = field(
        default=None,
        metadata={"help": "Module that makes what the recipe needs, run with `python -m` before the launcher plans; it must return at once when all is there."},
    )
    parallel: Literal["zero3", "ddp"] | None = field(
        default=None,
        metadata={
            "help": "How the training ranks share the work: zero3 shards weights, gradients and optimizer (zero3.yaml); ddp keeps all of them on "
            "every rank (ddp.yaml). The launcher fills it: zero3, but for quantised weights."
        },
    )
    weight_sync: Literal["nccl", "disk"] = field(
        default="nccl",
        metadata={
            "help": "How the vLLM server gets new weights: over NCCL (GPUs), or as a file in shared memory (CPU, or where NCCL cannot "
            "connect the two). The launcher fills it."
        },
    )
    sample_every: int = field(
        default=10,
        metadata={"help": "Steps between two printed samples of prompt, replies and rewards; 0 prints none."},
    )
    provenance: dict | str | None = field(
        default=None,
        metadata={"help": "Written by the launcher into a run's recipe.yaml: versions, commit, system prompt."},
    )


@dataclass
class SupervisedConfig(SFTConfig, Seq2SeqTrainingArguments):
    """Arguments of a supervised run, whichever of the two trainers a model needs. What a recipe can set of them are the fields that GRPOConfig has too."""

    max_length: int | None = None  # nothing is cut: what is too long is refused, or left out by process_dataset.py


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error; the stock loader lets the last one win in silence."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise RecipeError(f"{self.name}: `{key.value}` stands in lines {seen[key.value]} and {line}; keep one of them.")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


class RecipeParser(TrlParser):
    """TrlParser for (Recipe, GRPOConfig, ModelConfig) whose errors name file, field, value and remedy."""

    def __init__(self):
        super().__init__((Recipe, GRPOConfig, ModelConfig), prog="train.py", allow_abbrev=False)
        self.description = "Train a recipe: python train.py --config configs/NAME.yaml [--key value …]"
        self.known = {action.dest: action for action in reversed(self._actions) if action.dest != "help"}

    def error(self, message):
        raise RecipeError(f"{message[0].upper()}{message[1:].rstrip('.')}. `python train.py --help` lists every field.")

    def read(self, argv: list[str], adapt: bool = True) -> tuple[argparse.Namespace, list[str]]:
        """All values, TRL's default < this project's < YAML < the machine < flags, and the names of those that YAML or flags gave.

        adapt=False leaves the machine out, for the launcher, whose plan decides that and says so.
        """
        argv = list(argv)
        config = {}
        path = None
        if "--config" in argv:
            at = argv.index("--config")
            if at + 1 == len(argv):
                self.error("--config needs the path of a recipe")
            path = argv[at + 1]
            del argv[at : at + 2]
            config = self._from_yaml(path)
            sys.path.append(str(Path(path).resolve().parent))
        sys.path.append(os.getcwd())
        flags = {token.split("=")[0].lstrip("-").replace("-", "_") for token in argv if token.startswith("--")}
        machine = {} if torch.cuda.is_available() or not adapt else {key: value for key, value in CPU.items() if key not in flags}
        self.set_defaults_with_config(**{**DEFAULTS, **config, **machine})
        values, unknown = self.parse_known_args(argv)
        supervised = values.method == "sft"
        if supervised:
            self.set_defaults_with_config(**{**_supervised_defaults(), **DEFAULTS, **config, **machine})
            values, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unknown flag {unknown[0]}{self._nearest(unknown[0].lstrip('-'), '--')}")
        for name, allowed in (CHOICES | ({"loss_type": SUPERVISED_LOSSES} if supervised else {})).items():
            if getattr(values, name) not in allowed:
                choices = ", ".join(choice for choice in allowed if isinstance(choice, str))
                raise RecipeError(f"{path or 'flags'}: {name}: {getattr(values, name)!r} is none of {choices}.")
        for name in MAPPINGS:
            vars(values)[name] = _mapping(path, name, getattr(values, name))
        values.model_name_or_path = values.model_name_or_path and merge.start(values.model_name_or_path)
        flags = {name.removeprefix("no_") if name not in self.known else name for name in flags}
        return values, sorted((set(config) | flags) & set(self.known))

    def parse(self, argv: list[str]) -> tuple[Recipe, GRPOConfig | SupervisedConfig, ModelConfig]:
        """The dataclasses of a run. Builds GRPOConfig or SupervisedConfig, so it must run with the run's own number of ranks."""
        values, _ = self.read(argv)
        self.require_model_and_rows(values)
        recipe, args, model = (build(kind, values) for kind in (Recipe, arguments_class(values), ModelConfig))
        args.output_dir = values.output_dir  # None where nobody named a folder: transformers would put one of its own
        return recipe, args, model

    @staticmethod
    def require_model_and_rows(values: argparse.Namespace) -> None:
        """Raise RecipeError where the recipe names no model or no dataset, or wants to be pushed without a name."""
        if not values.model_name_or_path:
            raise RecipeError("model_name_or_path: give a Hub id or a folder.")
        if not values.dataset_name:
            raise RecipeError("dataset_name: give a prepared folder (data/tldr), a file of rows or a Hub id.")
        if values.push_to_hub and not values.hub_model_id:
            raise RecipeError("push_to_hub: give hub_model_id too, such as you/short-summaries; it would be called by the run's number.")

    def _from_yaml(self, path: str) -> dict:
        try:
            with open(path, encoding="utf-8") as file:
                config = yaml.load(file, Loader=_UniqueKeys)
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(config, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of fields, `name: value` a line.")
        for name in config:
            if name not in self.known:
                raise RecipeError(f"{path}: unknown field `{name}`{self._nearest(name)}.")
        return {name: self._cast(path, name, value) for name, value in config.items()}

    def _cast(self, path: str, name: str, value):
        """A YAML value as the command line would read it, so that both refuse the same."""
        action = self.known[name]
        text = action.type is str
        if value is None or (text and isinstance(value, (dict, list)) and action.nargs is None):
            return value
        if isinstance(value, dict) or (isinstance(value, list) and action.nargs != "+"):
            raise RecipeError(f"{path}: {name}: {value!r}: one value is wanted here.")
        try:
            if action.nargs == "+":
                return [self._get_value(action, str(item)) for item in (value if isinstance(value, list) else [value])]
            return self._get_value(action, str(value))
        except argparse.ArgumentError as error:
            raise RecipeError(f"{path}: {name}: {value!r}: {error.message}.") from None

    def _nearest(self, name: str, prefix: str = "") -> str:
        near = difflib.get_close_matches(name.replace("-", "_"), self.known, n=1)
        return f"; did you mean {prefix}{near[0]}?" if near else ""


def _mapping(path: str | None, name: str, value: dict | str | None) -> dict | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    if not isinstance(value, dict | None):
        raise RecipeError(f"{path or 'flags'}: {name}: {value!r}: a mapping is wanted; a flag takes it as JSON.")
    return value


def arguments_class(values: argparse.Namespace) -> type:
    """Which of TRL's arguments a recipe's method takes."""
    return SupervisedConfig if values.method == "sft" else GRPOConfig


def build(kind: type, values: argparse.Namespace, **changes):
    """One of the dataclasses from the values that belong to it."""
    names = [name for name, one in kind.__dataclass_fields__.items() if one.init]
    given = {name: getattr(values, name) for name in names if hasattr(values, name)}
    return kind(**given | {name: value for name, value in changes.items() if name in names})


def only_for_rewards(values: argparse.Namespace) -> list[str]:
    """Fields that say how to draw or to reward replies and do not stand at their default; the longest reply is what chat and comparison draw."""
    theirs, defaults = SFTConfig.__dataclass_fields__, RecipeParser().read([], adapt=False)[0]
    names = [name for name in GRPOConfig.__dataclass_fields__ if name not in theirs and name not in ("max_completion_length", "use_vllm")]
    return [name for name in [*names, "tools", "environment_factory"] if getattr(values, name) != getattr(defaults, name)]


def _supervised_defaults() -> dict:
    """TRL's own for the fields that both kinds of arguments have: another learning rate and loss, mainly."""
    theirs = SFTConfig.__dataclass_fields__
    shared = [one for one in dataclasses.fields(GRPOConfig) if one.name in theirs and one.default is not dataclasses.MISSING]
    return {one.name: theirs[one.name].default for one in shared if theirs[one.name].default != one.default}


def plain(value):
    """A value as YAML and JSON can hold it."""
    return value.value if isinstance(value, enum.Enum) else value


def show(argv: list[str]) -> None:
    """Print a recipe as resolved: first what YAML and flags gave, then what stands by default."""
    values, given = RecipeParser().read(["--config", *argv])
    values = {name: plain(value) for name, value in vars(values).items()}
    print(yaml.safe_dump({name: values[name] for name in given}, sort_keys=False, allow_unicode=True))
    print("# by default\n" + yaml.safe_dump({k: v for k, v in values.items() if k not in given and v is not None}))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "show":
        sys.exit("usage: python -m grpo_launcher.config show configs/NAME.yaml [--key value …]")
    try:
        show(sys.argv[2:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
