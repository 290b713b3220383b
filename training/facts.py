"""What the launcher must know before it plans, and may not import trl for: `python -m training.facts --config PATH [--key value …]`.

Prints one JSON object: values and given (the recipe as resolved), data, model, problems (a run is refused) and missing
(a run is refused, a --dry-run goes on without).
"""

import json
import os
import re
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import get_reporting_integration_callbacks
from trl import GRPOConfig, ModelConfig

from training import hub
from training.bind import load_rewards
from training.guards import limits
from training.recipe import Recipe, RecipeError, RecipeParser, build, plain
from training.rows import load_rows, longest_prompt

HOME = os.path.relpath(Path(__file__).resolve().parent.parent)


def gather(argv: list[str]) -> dict:
    """Resolve a recipe (--config PATH and flags, as train.py takes them) and look at its rewards, rows and model; nothing is trained and no weight is read."""
    facts = {"values": {}, "given": [], "data": None, "model": None, "problems": [], "missing": []}
    try:
        parser = RecipeParser()
        values, facts["given"] = parser.read(argv, adapt=False)
        parser.require_model_and_rows(values)
        recipe = build(Recipe, values)
        build(ModelConfig, values)
        limits(recipe.guards, values.beta)
        template_options = _check_arguments(values).chat_template_kwargs or {}
    except (RecipeError, ValueError, TypeError, RuntimeError, ImportError) as error:
        facts["problems"].append(str(error))
        return facts
    facts["values"] = {name: plain(value) for name, value in vars(values).items()}
    tokenizer = _look_at_model(values, facts)
    columns = _look_at_data(values, tokenizer, template_options, facts)
    try:
        rewards = load_rewards(recipe, columns, values.reward_weights)
    except RecipeError as error:
        facts["problems"].append(str(error))
        return facts
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


def _check_arguments(values) -> GRPOConfig:
    """Let TRL and transformers refuse what they would refuse in the run; what depends on the ranks is the plan's to check."""
    neutral = {"generation_batch_size": None, "steps_per_generation": None, "bf16": False, "fp16": False}
    neutral["use_cpu"] = not torch.cuda.is_available()  # TRL keeps the device of the first arguments for the whole process
    neutral |= {"per_device_train_batch_size": values.num_generations, "per_device_eval_batch_size": values.num_generations}
    if values.generation_batch_size and values.steps_per_generation:
        raise RecipeError("generation_batch_size, steps_per_generation: give one of them; each follows from the other.")
    config = build(GRPOConfig, values, **neutral, output_dir=values.output_dir or "unused")
    for reporter in get_reporting_integration_callbacks(values.report_to):
        reporter()  # raises where its package is missing
    return config


def _look_at_model(values, facts: dict):
    """Fill facts["model"]; returns the tokenizer, or None where the model cannot be reached."""
    name = values.model_name_or_path
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
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=values.trust_remote_code)
    facts["model"] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heads": getattr(config.get_text_config(), "num_attention_heads", None),
        "context": getattr(config.get_text_config(), "max_position_embeddings", None),
        "source": "its config.json",
    }
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        facts["problems"].append(f"model_name_or_path: the tokenizer of {name} has neither a pad nor an end-of-text token.")
    return tokenizer


def _look_at_data(values, tokenizer, template_options: dict, facts: dict) -> list[str] | None:
    """Fill facts["data"]; returns the columns, or None where the dataset cannot be reached."""
    name, split = values.dataset_name, values.dataset_train_split
    try:
        rows = load_rows(name, values.dataset_config, values.dataset_streaming)
    except Exception as error:  # the Hub, files and builders each raise their own
        known = not values.prepare or Path(HOME, "prepare", f"{Path(name).name}.py").exists()
        script = f"{HOME}/process_dataset.py {Path(name).name}" if known else f"-m {values.prepare}"
        remedy = f"Make it: {os.path.relpath(sys.executable)} {script}" if name.startswith("data/") else hub.hint()
        facts["missing"].append(f"dataset_name: {name} cannot be read: {_first_line(error)} {remedy}")
        return None
    if split not in rows:
        facts["problems"].append(f"dataset_train_split: {name} has no split {split!r}, only {', '.join(rows)}.")
        return None
    rows = rows[split]
    if "prompt" not in rows.column_names:
        facts["problems"].append(f"dataset_name: {name} has no column `prompt`, only {', '.join(rows.column_names)}; rename yours to prompt.")
        return rows.column_names
    if values.dataset_streaming:
        facts["data"] = {"rows": None, "longest_prompt": None, "system_prompt": None}
        return rows.column_names
    if len(rows) == 0:
        facts["problems"].append(f"dataset_name: {name} has no rows.")
        return rows.column_names
    first = rows[0]["prompt"]
    chat = isinstance(first, list)
    if chat and tokenizer is not None and tokenizer.chat_template is None:
        facts["problems"].append(
            f"dataset_name: {name} holds chat messages, and {values.model_name_or_path} has no chat template: use an instruct model or plain-text prompts."
        )
        tokenizer = None
    facts["data"] = {
        "rows": len(rows),
        "longest_prompt": tokenizer and longest_prompt(rows, values.model_name_or_path, tokenizer, **template_options),
        "system_prompt": first[0]["content"] if chat and first[0]["role"] == "system" else None,
    }
    return rows.column_names


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".") + "."


if __name__ == "__main__":
    print(json.dumps(gather(sys.argv[1:]), ensure_ascii=False))
