"""Which trainer a recipe needs, composed from TRL's."""

import functools
import os

from transformers import PretrainedConfig
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path

from grpo_launcher.callbacks import sample_printer
from grpo_launcher.card import RunCard
from grpo_launcher.seq2seq import EncoderDecoder, is_encoder_decoder, model_class, no_dropout
from grpo_launcher.failed_rewards import FailedRewards
from grpo_launcher.measures import Measures
from grpo_launcher.config import Recipe
from grpo_launcher.tool_lockstep import ToolLockstep
from grpo_launcher.tool_metrics import ToolMetrics

TRL_VERSION = "1.16.0"  # the names rebound below are those of this version


def trainer_class(args: GRPOConfig, recipe: Recipe, config: PretrainedConfig) -> type[GRPOTrainer]:
    """TRL's GRPOTrainer with failed ratings mended, measures over items and a card of ours; its console sample, and for `weight_sync: disk` its
    vLLM client, are replaced; and a model whose config says that it has an encoder is loaded and asked as one.

    TRL reaches what is replaced through names of its modules, so a subclass alone would not be asked: they are rebound here and nowhere else.
    """
    _rebind(grpo_trainer, "print_prompt_completions_sample", sample_printer(recipe.sample_every))
    if args.use_vllm and args.vllm_mode == "server" and recipe.weight_sync == "disk":
        from grpo_launcher.weight_sync import DiskSyncClient

        _rebind(vllm_generation, "VLLMClient", DiskSyncClient)
    loading = {"architecture": model_class(config), **no_dropout(config)} if is_encoder_decoder(config) else {}
    _rebind(grpo_trainer, "create_model_from_path", functools.partial(create_model_from_path, **loading))
    kind = [EncoderDecoder] if is_encoder_decoder(config) else []
    turns = recipe.tools or recipe.environment_factory
    tools = [ToolMetrics] if turns else []
    if turns and args.world_size > 1 and (args.use_vllm or args.deepspeed_plugin):
        tools.append(ToolLockstep)
    return type("Trainer", (RunCard, Measures, FailedRewards, *tools, *kind, GRPOTrainer), {})


def compile_nothing() -> None:
    """Keep DeepSpeed on a CPU from compiling an operator, for a minute and with a compiler that may not be there: only its inference uses it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" and "LOCAL_RANK" in os.environ:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}  # else asked for at first use, and kept by this name


def _rebind(module, name: str, replacement) -> None:
    if not hasattr(module, name):
        raise RuntimeError(f"{module.__name__} has no {name}: this was written for trl {TRL_VERSION}; install requirements/*.lock.")
    setattr(module, name, replacement)
