"""What the launcher must know before it plans, and may not import trl for: `python -m grpo_launcher.preflight --config PATH [--key value …]`.

Prints one JSON object: values and given (the recipe as resolved), data, model, problems (a run is refused) and missing
(a run is refused, a --dry-run goes on without).
"""

import json
import os
import re
import sys
from pathlib import Path

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoTokenizer
from transformers.integrations import get_reporting_integration_callbacks
from trl import GRPOConfig, ModelConfig

from grpo_launcher import seq2seq as encoder_decoder, hub, merge
from grpo_launcher.plugins import load_rewards, metric_name
from grpo_launcher.bind_tools import load_environment, load_tools
from grpo_launcher.bind_tools import template_options as with_tools
from grpo_launcher.guards import limits
from grpo_launcher.config import Recipe, RecipeError, RecipeParser, SupervisedConfig, arguments_class, build, only_for_rewards, plain
from grpo_launcher.data import column_names, load_rows, longest_prompt

HOME = os.path.relpath(Path(__file__).resolve().parent.parent)


def gather(argv: list[str]) -> dict:
    """Resolve a recipe (--config PATH and flags, as train.py takes them) and look at its rewards, rows and model; nothing is trained and no weight is read."""
    facts = {"values": {}, "given": [], "data": None, "model": None, "adapter": None, "problems": [], "missing": []}
    try:
        parser = RecipeParser()
        values, facts["given"] = parser.read(argv, adapt=False)
        parser.require_model_and_rows(values)
        recipe = build(Recipe, values)
        build(ModelConfig, values)
        limits(recipe.guards, values.beta)
        template_options = getattr(_check_arguments(values), "chat_template_kwargs", None) or {}
        facts["problems"] += combinations(values)
    except (RecipeError, ValueError, TypeError, RuntimeError, ImportError) as error:
        facts["problems"].append(str(error))
        return facts
    facts["values"] = {name: plain(value) for name, value in vars(values).items()}
    tokenizer = _look_at_model(values, facts)
    if tokenizer is not None:
        try:
            _, tools = load_environment(recipe, load_tools(recipe, tokenizer))
            template_options = template_options | with_tools(tools, tokenizer)  # not in place: values holds that dict
        except RecipeError as error:
            facts["problems"].append(str(error))
    columns = _look_at_data(values, tokenizer, template_options, facts)
    try:
        rewards = load_rewards(recipe, columns, values.reward_weights) if values.method == "grpo" else []
    except RecipeError as error:
        facts["problems"].append(str(error))
        return facts
    own = [recipe.environment_factory.rpartition(".")[2]] if recipe.environment_factory else []
    facts["problems"] += best_metric(values, [*map(metric_name, rewards), *own])
    for reward in rewards:
        try:
            if isinstance(reward, str):
                AutoConfig.from_pretrained(reward)
            elif hasattr(reward, "ready"):
                reward.ready()
        except OSError:
            facts["problems"].append(f"reward_funcs: {reward} is no reward model that can be read. {hub.hint()}")
        except ValueError as error:
            facts["missing"].append(f"reward_kwargs: {error}")
    return facts


def _check_arguments(values) -> GRPOConfig | SupervisedConfig:
    """Let TRL and transformers refuse what they would refuse in the run; what depends on the ranks is the plan's to check."""
    neutral = {"generation_batch_size": None, "steps_per_generation": None, "bf16": False, "fp16": False}
    neutral["use_cpu"] = not torch.cuda.is_available()  # TRL keeps the device of the first arguments for the whole process
    neutral |= {"per_device_train_batch_size": values.num_generations, "per_device_eval_batch_size": values.num_generations}
    if values.generation_batch_size and values.steps_per_generation:
        raise RecipeError("generation_batch_size, steps_per_generation: give one of them; each follows from the other.")
    config = build(arguments_class(values), values, **neutral, output_dir=values.output_dir or "unused")
    for reporter in get_reporting_integration_callbacks(values.report_to):
        reporter()  # raises where its package is missing
    return config


def combinations(values) -> list[str]:
    """What TRL cannot do together, each with its reason and what works instead."""
    found, quantized = [], next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(values, name)), None)
    if quantized:
        working = "configs/tldr_qlora.yaml works: LoRA on 4-bit weights, generation by transformers, one GPU or DDP"
        if values.use_vllm:
            found.append(f"use_vllm: {quantized}: TRL cannot hand quantised weights to vLLM (trl#4973, trl#3466); use_vllm: false. {working}.")
        if values.parallel == "zero3":
            found.append(f"parallel: zero3: {quantized}: ZeRO-3 cannot shard weights that are packed so; leave parallel out, or ddp. {working}.")
        if not values.use_peft:
            found.append(f"use_peft: {quantized}: quantised weights cannot be trained themselves; use_peft: true. {working}.")
    if values.sync_ref_model and values.beta == 0:
        found.append("sync_ref_model: with beta 0 there is no reference model to sync; set beta (0.04, say), or leave sync_ref_model out.")
    if values.sync_ref_model and values.use_peft:
        found.append("sync_ref_model: with LoRA the reference is the base model itself, which no sync may move; use_peft: false, or leave sync_ref_model out.")
    if values.method == "sft":
        for name in only_for_rewards(values):
            found.append(f"{name}: a supervised run (method: sft) draws and rewards no replies; leave it out.")
        if values.use_vllm:
            found.append("use_vllm: a supervised run (method: sft) draws no replies; leave use_vllm out.")
        if values.dataset_streaming:
            found.append("dataset_streaming: a supervised run turns its rows into tokens before it begins; dataset_streaming: false.")
    if values.dataset_streaming and values.max_steps <= 0:
        found.append("max_steps: a streamed dataset has no length, so the number of steps must be given: max_steps: 200, say.")
    return found


def best_metric(values, rewards: list[str]) -> list[str]:
    """What is wrong with metric_for_best_model, which transformers would find out at the first evaluation."""
    wanted = values.metric_for_best_model
    if not wanted:
        return []
    known = ["loss"] if values.method == "sft" else ["reward", "loss", *(f"rewards/{name}/mean" for name in rewards)]
    if wanted.removeprefix("eval_") not in known:
        return [f"metric_for_best_model: {wanted}: no such figure is logged; there are: {', '.join('eval_' + name for name in known)}."]
    if values.eval_strategy == "no":
        return [f"metric_for_best_model: {wanted}: nothing is evaluated; eval_strategy: steps, with eval_steps."]
    each = values.eval_steps or values.logging_steps
    if values.eval_strategy == values.save_strategy == "steps" and each % values.save_steps:
        return [f"save_steps: {values.save_steps:g}: what is evaluated must be saved to be the best; save_steps {each:g}, as eval_steps."]
    return []


def _look_at_model(values, facts: dict):
    """Fill facts["model"]; returns the tokenizer, or None where the model cannot be reached."""
    name = values.model_name_or_path
    facts["adapter"] = merge.needed(name)
    if facts["adapter"]:
        facts["missing"].append(f"model_name_or_path: {name} is an adapter; the launcher merges it into its base, or: python -m grpo_launcher.merge {name}")
        return None
    options = {"revision": values.model_revision, "trust_remote_code": values.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        facts["missing"].append(f"model_name_or_path: {name} is no folder with a model, and no Hub id that can be read: {_first_line(error)} {hub.hint()}")
        if size := re.search(r"(\d+(?:\.\d+)?)B\b", name):
            facts["model"] = {"parameters": int(float(size[1]) * 1e9), "context": None, "source": "the model's name"}
        return None
    with torch.device("meta"):
        model = encoder_decoder.model_class(config).from_config(config, trust_remote_code=values.trust_remote_code)
    reads = encoder_decoder.is_encoder_decoder(config)
    facts["model"] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heads": getattr(config.get_text_config(), "num_attention_heads", None),
        "context": encoder_decoder.places(config.get_text_config()),
        "encoder_decoder": reads,
        "source": "its config.json",
    }
    facts["problems"] += encoder_decoder.problems(values, config, tokenizer) if reads else []
    facts["problems"] += _lora_targets(values, config, model) if values.use_peft else []
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        facts["problems"].append(f"model_name_or_path: the tokenizer of {name} has neither a pad nor an end-of-text token.")
    return tokenizer


def _lora_targets(values, config, model: torch.nn.Module) -> list[str]:
    """What is wrong with lora_target_modules: peft minds only if none of them is there, and only when the weights are loaded."""
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    told = f"its linear layers are {', '.join(sorted(linear))}; all-linear takes all but the head."
    if not values.lora_target_modules:
        known = config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        return [] if known else [f"lora_target_modules: peft knows none for a {config.model_type} model; {told}"]
    wanted, names = [name for name in values.lora_target_modules if name != "all-linear"], [name for name, _ in model.named_modules()]
    if len(wanted) == 1:  # TRL hands a single one over as text, which peft takes for a pattern
        (one,) = wanted
        there = any(re.fullmatch(one, name) for name in names)
        return [] if there else [f"lora_target_modules: {one} alone is a pattern for a module's whole path, and none matches: '.*{one}', say; {told}"]
    paths = [f".{name}" for name in names]
    missing = [name for name in wanted if not any(path.endswith(f".{name}") for path in paths)]
    return [f"lora_target_modules: a {config.model_type} model has no {name}; {told}" for name in missing]


def _look_at_data(values, tokenizer, template_options: dict, facts: dict) -> list[str] | None:
    """Fill facts["data"]; returns the columns, or None where the dataset cannot be reached."""
    name, split = values.dataset_name, values.dataset_train_split
    try:
        rows = load_rows(name, values.dataset_config, values.dataset_streaming)
    except Exception as error:  # the Hub, files and builders each raise their own
        known = not values.prepare or Path(HOME, "grpo_launcher/datasets", f"{Path(name).name}.py").exists()
        script = f"{HOME}/process_dataset.py {Path(name).name}" if known else f"-m {values.prepare}"
        remedy = f"Make it: {os.path.relpath(sys.executable)} {script}" if name.startswith("data/") else hub.hint()
        facts["missing"].append(f"dataset_name: {name} cannot be read: {_first_line(error)} {remedy}")
        return None
    held_out = values.dataset_test_split if values.eval_strategy != "no" else None
    for field, wanted in {"dataset_train_split": split, "dataset_test_split": held_out}.items():
        if wanted and wanted not in rows:
            facts["problems"].append(f"{field}: {name} has no split {wanted!r}, only {', '.join(rows)}.")
            return None
    columns = column_names(rows[split])
    if "prompt" not in columns:
        facts["problems"].append(f"dataset_name: {name} has no column `prompt`, only {', '.join(columns)}; rename yours to prompt.")
        return columns
    first = next(iter(rows[split]), None)
    if first is None:
        facts["problems"].append(f"dataset_name: {name} has no rows.")
        return columns
    chat = isinstance(first["prompt"], list)
    if values.method == "sft" and not isinstance(first.get("reference"), str):
        facts["problems"].append(f"dataset_name: {name} has no column `reference` of texts, which a supervised run teaches, only {', '.join(columns)}.")
    if chat and (facts["model"] or {}).get("encoder_decoder"):
        facts["problems"].append(f"dataset_name: {name} holds chat messages, and {encoder_decoder.PLAIN}")
    if not chat and (field := next((field for field in ("tools", "environment_factory") if getattr(values, field)), None)):
        facts["problems"].append(f"{field}: {name} holds plain-text prompts, and tools need chat messages: a prompt as [{{role: user, content: …}}].")
    if chat and tokenizer is not None and tokenizer.chat_template is None:
        facts["problems"].append(
            f"dataset_name: {name} holds chat messages, and {values.model_name_or_path} has no chat template: use an instruct model or plain-text prompts."
        )
        tokenizer = None
    facts["data"] = {"rows": None, "test_rows": None, "longest_prompt": None}
    facts["data"]["system_prompt"] = first["prompt"][0]["content"] if chat and first["prompt"][0]["role"] == "system" else None
    if not chat and (facts["model"] or {}).get("encoder_decoder"):
        facts["data"]["system_prompt"] = encoder_decoder.prefix([row["prompt"] for row in rows[split].take(100)])
    if not values.dataset_streaming:
        used = [rows[one] for one in (split, held_out) if one]
        facts["data"] |= {"rows": len(used[0]), "test_rows": min(len(used[1]), values.eval_rows or len(used[1])) if held_out else None}
        if tokenizer:
            facts["data"]["longest_prompt"] = max(longest_prompt(one, values.model_name_or_path, tokenizer, **template_options) for one in used)
    return columns


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".") + "."


if __name__ == "__main__":
    print(json.dumps(gather(sys.argv[1:]), ensure_ascii=False))
