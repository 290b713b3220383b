"""Checkpoints that are made in a moment: random Qwen2 models of two layers in the quickstart's template, adapters on them, and runs of both."""

from pathlib import Path

import torch
import trl
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Qwen2Config, Qwen2ForCausalLM

from grpo_launcher.quickstart.pretrain import make_tokenizer
from grpo_launcher import runs as run_folder
from grpo_launcher.seq2seq import TASK, is_encoder_decoder, model_class
from grpo_launcher.config import RecipeParser, plain

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
TEXTS = ["The cat sat on the mat and looked at the moon for an hour.", "Every night the cat climbs onto the roof and waits.", "今天天气很好，我们去公园。"]
SYSTEM = "Answer in one sentence."


def make_model(folder: Path, seed: int, template: str = TEMPLATE, context: int = 2048) -> None:
    """Write a whole model, large in its weights, so that two seeds say different things."""
    tokenizer = make_tokenizer(TEXTS * 3, template)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=context, tie_word_embeddings=False, initializer_range=0.3,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # it hardly ever ends by itself
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_encoder_model(folder: Path, kind: str, places: int = 256) -> None:
    """Write a t5, mt5, bart or pegasus that drops out as the real ones do, large in its weights; places: of bart's encoder and decoder."""
    tokenizer = make_tokenizer(TEXTS * 3, "")
    tokenizer.chat_template, end, pad = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)])
    torch.manual_seed(0)
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": pad, "d_model": 32}
    if kind in ("t5", "mt5"):
        sizes = {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **tokens, **sizes, decoder_start_token_id=pad))
    else:
        sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 2))}
        drops = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "encoder_layerdrop": 0.1}
        other = {"bos_token_id": end, "decoder_start_token_id": end, "forced_eos_token_id": end, "max_position_embeddings": places, "init_std": 0.2}
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **tokens, **sizes, **drops, **other))
        model.generation_config.update(num_beams=4, min_length=20, no_repeat_ngram_size=3, forced_eos_token_id=end)  # as facebook/bart-large-cnn asks
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_adapter(folder: Path, base: Path, seed: int, named: str | None = None) -> None:
    """Write a LoRA adapter on `base` that changes what it says; named: what its adapter_config.json calls the base."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(base)
    targets = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}.get(config.model_type, ["q_proj", "v_proj", "down_proj"])
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type=TASK[True] if is_encoder_decoder(config) else None)
    model = get_peft_model(model_class(config).from_pretrained(base), lora)
    model.peft_config["default"].base_model_name_or_path = named or str(base)
    model.save_pretrained(folder)


def make_run(run: Path, model: str, **fields) -> None:
    """Write a run's folder with its recipe.yaml; the checkpoints are the caller's. fields: of the recipe, as flags."""
    run.mkdir(parents=True)
    run_folder.point(run.parent / "latest", run)
    flags = {"model_name_or_path": model, "dataset_name": "data/rows", "reward_funcs": "rewards.length.length_reward", "max_completion_length": 24, **fields}
    values, given = RecipeParser().read(
        [word for name, value in flags.items() for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]
    )
    run_folder.write_recipe(run, {name: plain(value) for name, value in vars(values).items()}, given, SYSTEM)
