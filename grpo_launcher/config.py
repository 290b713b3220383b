"""Recipes: TRL's own fields, the few of ours, and the parser that reads a YAML file and flags.

python -m grpo_launcher.config show configs/NAME.yaml [--key value ...] prints a recipe as resolved.
"""

import argparse
import enum
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from transformers import Seq2SeqTrainingArguments
from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from grpo_launcher.console import end_with
from grpo_launcher.errors import UserError, did_you_mean
from grpo_launcher.merge import merged_path
from grpo_launcher.runs import expand_home

# Fields that TRL keeps as free text and reads only after the model is loaded.
CHOICES = {
    "loss_type": ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"],
    "scale_rewards": ["group", "batch", "none"],
    "importance_sampling_level": ["token", "sequence"],
    "vllm_mode": ["server", "colocate"],
    "vllm_importance_sampling_mode": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
}
SFT_LOSSES = ["nll", "dft", "chunked_nll"]
DEFAULTS = {
    "logging_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 0,  # silences TRL's table of samples; the trainer prints its own
    "report_to": "tensorboard",
    "disable_tqdm": True,
    "lora_dropout": 0.0,  # with dropout the trainer's log-probabilities differ from those of the server
    "hub_strategy": "end",  # only the final checkpoint is pushed
}
MAPPINGS = ("reward_kwargs", "tool_kwargs", "guards", "generation_kwargs")  # a flag gives them as JSON
# Numbers that would end a run, or keep it from learning, only when they are used. The key says which ones work.
RANGES = {
    "at least 1": (lambda n: n >= 1, [
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_generations",
        "num_generations_eval", "generation_batch_size", "steps_per_generation", "num_iterations", "eval_rows",
        "max_completion_length", "vllm_max_model_length", "vllm_tensor_parallel_size", "ref_model_sync_steps",
        "keep_rollouts"]),
    "more than 0": (lambda n: n > 0, [
        "temperature", "repetition_penalty", "num_train_epochs", "logging_steps", "save_steps", "eval_steps"]),
    "at least 0": (lambda n: n >= 0, [
        "learning_rate", "beta", "epsilon", "epsilon_high", "weight_decay", "max_grad_norm", "warmup_steps",
        "sample_every", "resample_groups", "reward_timeout", "max_server_restarts", "max_restarts",
        "max_tool_calling_iterations", "vllm_server_timeout", "dataloader_num_workers"]),
    "from 0 to under 1": (lambda n: 0 <= n < 1, ["adam_beta1", "adam_beta2"]),
    "more than 0 and at most 1": (lambda n: 0 < n <= 1, ["top_p", "vllm_gpu_memory_utilization"]),
    "from 0 to 1": (lambda n: 0 <= n <= 1, ["min_p", "top_entropy_quantile", "lora_dropout"]),
    "from 1 to 65535": (lambda n: 1 <= n <= 65535, ["vllm_server_port", "vllm_group_port"]),
    "from 0 to 4294967295": (lambda n: 0 <= n < 2**32, ["seed"]),
    "at least 1, or -1 for whole epochs": (lambda n: n >= 1 or n == -1, ["max_steps"]),
}  # fmt: skip
# Fields of older versions and of other trainers that have another name today, or none.
OLD_FIELDS = {
    "torch_dtype": "dtype", "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu", "kl_coef": "beta",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex", "group_by_length": "train_sampling_strategy",
    "max_new_tokens": "max_completion_length", "hub_model_revision": "hub_revision", "lr": "learning_rate",
    "warmup_ratio": "write warmup_steps: a number under 1 is a share of all steps",
    "max_prompt_length": "use process_dataset.py --max_prompt_length, or vllm_max_model_length for all tokens",
    "system_prompt": "write it into the prompts, as a message of the role system",
    "wandb_project": "write report_to: wandb, and set WANDB_PROJECT in the environment",
    "overwrite_output_dir": "leave it out: each run gets a new folder",
    **dict.fromkeys(["vllm_device", "num_processes", "mixed_precision"], "leave it out: the launcher decides it"),
}  # fmt: skip
PLUGIN_FIELDS = ("reward_funcs", "tools", "environment_factory")


def _help(text: str) -> dict:
    return {"metadata": {"help": text}}


@dataclass
class Recipe(ScriptArguments):
    """The fields of this project. Every other field of a recipe is TRL's, and TRL's documentation describes it.

    dataset_name (TRL's) is a Hub id, a prepared folder such as data/tldr, or one file of rows.
    """

    method: Literal["grpo", "sft"] = field(
        default="grpo",
        **_help("grpo: reinforcement learning from rewards. sft: supervised fine-tuning on the column `reference`."),
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        **_help("Rewards: my_reward.py:function, package.module.function, or the Hub id or folder of a reward model."),
    )
    reward_kwargs: dict | str | None = field(
        default=None, **_help("Options of the rewards, by function name: {length_reward: {target: 200}}.")
    )
    reward_timeout: float = field(
        default=60.0, **_help("Seconds for a call of a reward. What takes longer is not rated. 0: no limit.")
    )
    max_server_restarts: int = field(
        default=3, **_help("How often a vLLM server that was lost is started again, where it gets weights as files.")
    )
    max_restarts: int = field(
        default=0, **_help("How often a run that lost a process, or hung, is started again from its last checkpoint.")
    )
    tools: list[str] | None = field(
        default=None, **_help("Tools that the model may call, named like rewards: grpo_launcher.tools.calculator.")
    )
    tool_kwargs: dict | str | None = field(
        default=None, **_help("Settings of the tools, by function name. The model does not see them.")
    )
    environment_factory: str | None = field(
        default=None, **_help("Class, named like a reward: reset(**row), tools as public methods, and get_reward().")
    )
    guards: dict | str | None = field(
        default=None, **_help("Ranges of metrics: {kl: {max: 0.5, steps: 3}, entropy: null}. See docs/rewards.md.")
    )
    eval_rows: int | None = field(
        default=None, **_help("Number of test prompts in an evaluation: the first of the split. Default: all.")
    )
    prepare: str | None = field(
        default=None, **_help("What makes the data and models that are missing: a module, or process_dataset.py NAME.")
    )
    parallel: Literal["zero3", "ddp"] | None = field(
        default=None, **_help("How ranks share the work: zero3 (default), or ddp (default for quantised weights).")
    )
    weight_sync: Literal["nccl", "disk", "adapter"] | None = field(
        default=None,
        **_help(
            "How the server gets new weights: nccl, disk (shared memory), or adapter (of LoRA, no other weights)."
        ),
    )
    overlap: bool = field(
        default=False, **_help("The vLLM server makes the next completions while these are trained, by older weights.")
    )
    vllm_server_args: list[str] | None = field(
        default=None, **_help("More arguments of the vLLM server, passed through as they are: ['--max-num-seqs=64'].")
    )
    keep_rollouts: int = field(
        default=1000, **_help("Steps whose completions are kept: the first, the newest, and others evenly between.")
    )
    refuse_hopeless: bool = field(
        default=False,
        **_help("End a run when in two steps in a row more than 0.95 of the groups have rewards without spread."),
    )
    resample_groups: int = field(
        default=0,
        **_help("How often in a step groups whose rewards are all the same are asked again, with other prompts."),
    )
    sample_every: int = field(default=10, **_help("Steps between two printed samples. 0 prints none."))


@dataclass
class SupervisedConfig(SFTConfig, Seq2SeqTrainingArguments):
    """Arguments of a supervised run, for TRL's SFTTrainer or transformers' Seq2SeqTrainer."""

    max_length: int | None = None  # nothing is cut: what is too long is refused, or left out by process_dataset.py


@dataclass
class Config:
    """A recipe as read.

    Attributes:
        values: every field of Recipe, GRPOConfig and ModelConfig. Plugin files are absolute paths.
        given: sorted names of the fields that the YAML file or a flag gave.
        name: the recipe's name, from its file.
    """

    values: dict[str, Any]
    given: list[str]
    name: str


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice. The stock loader keeps the last one in silence."""

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{self.name}: {key.value}", f"given in lines {lines[key.value]} and {line}", "keep one of them"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Parser(TrlParser):
    """TrlParser whose errors name the field and the remedy."""

    def __init__(self):
        super().__init__((Recipe, GRPOConfig, ModelConfig), prog="train.py", allow_abbrev=False)
        self.description = "Train a recipe: python train.py --config configs/NAME.yaml [--key value ...]"
        self.known = {action.dest: action for action in reversed(self._actions) if action.dest != "help"}
        self.types = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}

    def error(self, message):
        raise UserError("flags", message, "python train.py --help lists every field")

    def read_yaml(self, path: str) -> dict:
        try:
            with open(path, encoding="utf-8-sig") as file:
                loader = _UniqueKeyLoader(file)
                node = loader.get_single_node()
                content = node and loader.construct_document(node)
        except OSError as error:
            raise UserError(path, error.strerror) from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: another encoding, or a date that is none
            problem = f"not valid YAML in UTF-8: {' '.join(str(error).split())}"
            raise UserError(path, problem, "save it as UTF-8, write `name: value`, and indent by spaces") from None
        if not isinstance(content, dict):
            raise UserError(path, "not a mapping", "write one `name: value` a line")
        self.refuse_unknown(path, {name: f"{path}: {name}" for name in content if name not in self.known})
        texts = {key.value: value.value for key, value in node.value if isinstance(value, yaml.ScalarNode)}
        return {name: self._cast(path, name, value, texts.get(name)) for name, value in content.items()}

    def refuse_unknown(self, source: str, names: dict[str, str]) -> None:
        """Refuse all unknown fields at once. names: of the fields, and how each is shown."""
        problems = []
        for name, shown in names.items():
            fix = OLD_FIELDS.get(name) or did_you_mean(name, self.known) or "python train.py --help lists them all"
            fix = f"it is called {fix}" if fix in self.known else fix
            problems.append(UserError(shown, "unknown field", fix))
        _refuse_all(source, problems)

    def _cast(self, path: str, name: str, value, text: str | None):
        """Read a YAML value as the command line would, so that both refuse the same. text: as it is written."""
        action = self.known[name]
        is_list_field = action.nargs == "+"
        kinds = {getattr(hint, "__origin__", hint) for hint in get_args(self.types[name]) or [self.types[name]]}
        if value is None and type(None) not in kinds:
            raise UserError(f"{path}: {name}", "empty", "give a value, or leave the field out for its default")
        if value is None or (type(value) in kinds & {dict, list} and not is_list_field):
            return value
        if isinstance(value, dict) or (isinstance(value, list) and not is_list_field):
            wanted = "a mapping" if dict in kinds else "one value"
            raise UserError(f"{path}: {name}", f"{wanted} is wanted, not {value!r}")
        if text is not None and not kinds & {bool, int, float}:
            value = "no" if value is False and "no" in (action.choices or []) else text  # YAML reads 1.10 as 1.1
        try:
            if is_list_field:
                return [self._get_value(action, str(item)) for item in (value if isinstance(value, list) else [value])]
            value = self._get_value(action, str(value))
            self._check_value(action, value)
            return value
        except argparse.ArgumentError as error:
            raise UserError(f"{path}: {name}", f"{value!r}: {error.message}") from None


def _refuse_all(source: str, problems: list[UserError]) -> None:
    """Raise everything that is wrong as one error."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError(source, "\n  ".join([f"{len(problems)} fields are wrong", *map(str, problems)]))


def load_config(argv: list[str]) -> Config:
    """Read a recipe: TRL's defaults < DEFAULTS < the YAML file of --config < flags.

    Args:
        argv: as for train.py, for example ["--config", "configs/quickstart.yaml", "--beta", "0.1"].

    Raises:
        UserError: unknown field or flag, or a value that the field cannot have.
    """
    argv = list(argv)
    parser = _Parser()
    path, content, folders = None, {}, [Path.cwd()]
    if "--config" in argv:
        position = argv.index("--config")
        if position + 1 == len(argv):
            parser.error("--config needs the path of a recipe")
        path = os.path.expanduser(argv[position + 1])
        del argv[position : position + 2]
        content = parser.read_yaml(path)
        folders.append(Path(path).resolve().parent)
        _resolve_plugins(content, folders[::-1])

    parser.set_defaults_with_config(**DEFAULTS | content)
    namespace, unknown = parser.parse_known_args(argv)
    if namespace.method == "sft":
        sft_defaults = vars(TrlParser(SFTConfig).parse_args([]))  # of these the parser takes its own fields
        parser.set_defaults_with_config(**sft_defaults | DEFAULTS | content)
        namespace, unknown = parser.parse_known_args(argv)
    flags = [token.split("=")[0] for token in unknown if token.startswith("--")] or unknown
    parser.refuse_unknown("flags", {flag.lstrip("-").replace("-", "_"): flag for flag in flags})

    values = {name: plain(value) for name, value in vars(namespace).items()}
    _resolve_plugins(values, folders)
    switch = {"true": "group", "false": "none"}  # TRL takes the two as bool, which a field of text cannot hold
    values["scale_rewards"] = switch.get(str(values["scale_rewards"]).lower(), values["scale_rewards"])
    for name in MAPPINGS:
        values[name] = _as_mapping(name, values[name])
    for name in ("reward_kwargs", "tool_kwargs"):
        for function, options in (values[name] or {}).items():
            values[name][function] = _as_mapping(f"{name}: {function}", options) or {}
    values = expand_home(values)
    for name, allowed in (CHOICES | ({"loss_type": SFT_LOSSES} if namespace.method == "sft" else {})).items():
        if values[name] not in allowed:
            raise UserError(name, f"unknown value {values[name]!r}", did_you_mean(str(values[name]), allowed))
    _require(values)
    _check_ranges(values)
    values["model_name_or_path"] = merged_path(values["model_name_or_path"])
    flags = {token.split("=")[0].lstrip("-").replace("-", "_") for token in argv if token.startswith("--")}
    flags = {name if name in parser.known else name.removeprefix("no_") for name in flags}
    given = sorted((set(content) | flags) & set(parser.known))
    return Config(values, given, Path(path).stem if path else "flags")


def _require(values: dict) -> None:
    if not values["model_name_or_path"]:
        raise UserError("model_name_or_path", "missing", "give a Hub id or a folder")
    if not values["dataset_name"]:
        raise UserError("dataset_name", "missing", "give a prepared folder (data/tldr), a file of rows or a Hub id")
    if values["hub_token"]:
        problem = "it would stand in the run's folder for all to read"
        raise UserError("hub_token", problem, "set HF_TOKEN in the environment, or run `hf auth login` once")
    if values["push_to_hub"] and not values["hub_model_id"]:
        raise UserError("push_to_hub", "hub_model_id is missing", "give it, for example you/short-summaries")
    url, host = values["vllm_server_base_url"], values["vllm_server_host"]
    if url and not re.fullmatch(r"https?://[^/\s]+/?", url):
        raise UserError("vllm_server_base_url", f"{url} is no address of a server", "write http://HOST:PORT")
    if re.search(r"[/\s]", host):
        raise UserError("vllm_server_host", f"{host} is no name of a machine", "write it without http:// and port")
    if values["vllm_server_args"] and not values["vllm_server_args"][0].startswith("-"):
        # vLLM would take it for a model, which it has already, and say nothing.
        problem = f"{values['vllm_server_args'][0]!r} is no flag of the server"
        raise UserError("vllm_server_args", problem, "write a YAML list in the recipe: ['--max-num-seqs=64']")


def _check_ranges(values: dict) -> None:
    problems = []
    for wanted, (works, names) in RANGES.items():
        for name in names:
            is_used = values.get(f"{name.removesuffix('_steps')}_strategy", "steps") == "steps"
            if is_used and values[name] is not None and not works(values[name]):
                problems.append(UserError(name, f"{values[name]} is out of range", f"give a number that is {wanted}"))
    _refuse_all("recipe", problems)


def _resolve_plugins(values: dict, folders: list[Path]) -> None:
    """Make `file.py:function` absolute: the first of `folders` that has the file."""

    def resolve(field_name: str, name: str) -> str:
        file, colon, function = name.rpartition(":")
        if not colon:
            if name.endswith(".py"):
                raise UserError(field_name, f"{name} names no function", f"write {name}:function")
            return name
        for folder in folders:
            path = Path(folder, os.path.expanduser(file))
            if path.is_file():
                return f"{path.resolve()}:{function}"
        places = " and ".join(str(folder) for folder in folders)
        raise UserError(
            field_name,
            f"there is no file {file} in {places}",
            "give its path relative to one of them, or an absolute one",
        )

    for field_name in PLUGIN_FIELDS:
        value = values.get(field_name)
        if isinstance(value, str):
            values[field_name] = resolve(field_name, value)
        elif value:
            values[field_name] = [resolve(field_name, name) for name in value]


def _as_mapping(name: str, value: dict | str | None) -> dict | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(name, f"not JSON: {error}", f"""write --{name} '{{"name": {{"option": 1}}}}'""") from None
    if not isinstance(value, dict | None):
        raise UserError(name, f"a mapping is wanted, not {value!r}")
    return value


def arguments_class(method: str) -> type:
    """Return the class of training arguments of a method."""
    return SupervisedConfig if method == "sft" else GRPOConfig


def build(kind: type, values: dict, **changes):
    """Build one of the dataclasses from the values that are its own."""
    names = [name for name, spec in kind.__dataclass_fields__.items() if spec.init]
    values = values | changes
    return kind(**{name: values[name] for name in names if name in values})


def build_dataclasses(values: dict) -> tuple[Recipe, GRPOConfig | SupervisedConfig, ModelConfig]:
    """Build recipe, training arguments and model arguments. It runs in a rank, as GRPOConfig reads their number."""
    return tuple(build(kind, values) for kind in (Recipe, arguments_class(values["method"]), ModelConfig))


def sends_files(recipe: Recipe, args) -> bool:
    """Whether the vLLM server gets its weights as files, and a rank needs nothing of vLLM but HTTP."""
    return args.use_vllm and args.vllm_mode == "server" and recipe.weight_sync in ("disk", "adapter")


OWN_GRPO_FIELDS = ["tools", "environment_factory", "resample_groups", "refuse_hopeless"]


def grpo_only_fields(values: dict) -> list[str]:
    """Return the fields that a supervised run has no use for and that do not stand at their default."""
    sft_fields = set(SFTConfig.__dataclass_fields__)
    shared = {"max_completion_length", "use_vllm", "num_completions_to_print"}  # chat and comparison use the first
    names = [name for name in GRPOConfig.__dataclass_fields__ if name not in sft_fields and name not in shared]
    defaults = {name: plain(value) for name, value in vars(_Parser().parse_args([])).items()} | DEFAULTS
    return [name for name in [*names, *OWN_GRPO_FIELDS] if values[name] != defaults[name]]


def plain(value):
    """Return a value as YAML and JSON can hold it."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def show(argv: list[str]) -> None:
    """Print a recipe as resolved: first what YAML and flags gave, then the defaults."""
    config = load_config(["--config", *argv])
    print(yaml.safe_dump({name: config.values[name] for name in config.given}, sort_keys=False, allow_unicode=True))
    defaults = {name: value for name, value in config.values.items() if name not in config.given and value is not None}
    print("# by default\n" + yaml.safe_dump(defaults))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "show":
        sys.exit("usage: python -m grpo_launcher.config show configs/NAME.yaml [--key value ...]")
    end_with(show, sys.argv[2:])
