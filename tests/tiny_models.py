"""Models that are made in a moment, with random weights: causal, encoder-decoder, adapters on them, and runs."""

import json
import tempfile
from pathlib import Path

import pandas
import torch
import trl
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from grpo_launcher.config import load_config
from grpo_launcher.runs import Run, point
from grpo_launcher.seq2seq import SEQ2SEQ_TASK, model_class

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
TEXTS = [
    "The cat sat on the mat and looked at the moon for an hour.",
    "Every night the cat climbs onto the roof and waits.",
    "今天天气很好，我们去公园。",
]
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
SYSTEM = "Answer in one sentence."


def make_tokenizer(chat_template: str | None, pre_tokenizer=None) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on TEXTS. It ends a turn with <|im_end|> and pads with <|endoftext|>."""
    bpe = ByteLevelBPETokenizer()
    bpe.pre_tokenizer = pre_tokenizer or Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe.train_from_iterator(TEXTS * 3, vocab_size=1536, special_tokens=SPECIAL_TOKENS, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(f"{folder}/tokenizer.json")
        return PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="left",
            model_max_length=2048,
            chat_template=chat_template,
        )


def make_model(folder: Path, seed: int, template: str = TEMPLATE, context: int = 2048) -> None:
    """Write a Qwen2 model of two layers. Its weights are large, so that two seeds generate different texts."""
    tokenizer = make_tokenizer(template)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # it hardly ever ends by itself
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_encoder_model(folder: Path, kind: str, positions: int = 256) -> None:
    """Write a t5, mt5, bart or pegasus, with dropout as the real ones have. positions: of BART and Pegasus."""
    tokenizer = make_tokenizer(None)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": pad, "d_model": 32}
    if kind in ("t5", "mt5"):
        fields |= {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": pad}
    else:
        for part in ("encoder", "decoder"):
            fields |= {f"{part}_layers": 2, f"{part}_ffn_dim": 64, f"{part}_attention_heads": 2}
        fields |= {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "encoder_layerdrop": 0.1}
        fields |= {"bos_token_id": end, "decoder_start_token_id": end, "forced_eos_token_id": end}
        fields |= {"max_position_embeddings": positions, "init_std": 0.2}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **fields))
    if kind not in ("t5", "mt5"):  # as facebook/bart-large-cnn asks for it
        model.generation_config.update(num_beams=4, min_length=20, no_repeat_ngram_size=3, forced_eos_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_adapter(folder: Path, base: Path, seed: int, named: str | None = None) -> None:
    """Write a LoRA adapter that changes what `base` generates; named: what adapter_config.json calls the base."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(base)
    targets = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}
    lora = LoraConfig(
        r=4,
        target_modules=targets.get(config.model_type, ["q_proj", "v_proj", "down_proj"]),
        init_lora_weights=False,
        task_type=SEQ2SEQ_TASK if config.is_encoder_decoder else None,
    )
    model = get_peft_model(model_class(config).from_pretrained(base), lora)
    model.peft_config["default"].base_model_name_or_path = named or str(base)
    model.save_pretrained(folder)


def write_rollouts(folder: Path, step: int, rows: list[dict], **fields) -> None:
    """Write the completions of one step as a run keeps them, and the run where there is none.

    Args:
        folder: the run's folder.
        step: of training.
        rows: prompt and completion as texts, advantage and other columns; all of type float but the advantage are
            rewards.
        fields: of the recipe.
    """
    if not (folder / "run.json").exists():
        make_run(folder, "no-model", **fields)
    (folder / "completions").mkdir(exist_ok=True)
    frame = pandas.DataFrame([{"step": step, "advantage": 0.0, **row} for row in rows])
    if "reference" in frame:
        frame["dataset_row"] = [json.dumps({"reference": text}) for text in frame.pop("reference")]
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        frame[name] = [[{"role": role, "content": text}] for text in frame[name]]
    frame.to_parquet(folder / f"completions/completions_{step:05d}.parquet")
    means = frame.drop(columns="advantage").select_dtypes("float").mean()
    line = {"step": step, "reward": means.sum(), **{f"rewards/{name}/mean": mean for name, mean in means.items()}}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def make_run(folder: Path, model: str, **fields) -> None:
    """Write a run's folder without checkpoints. fields: of the recipe, as flags."""
    fields = {
        "model_name_or_path": model,
        "dataset_name": "data/rows",
        "reward_funcs": "rewards.length.length_reward",
        "max_completion_length": 24,
        **fields,
    }
    argv = []
    for name, value in fields.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    config = load_config(argv)
    Run(folder, "recipe", config.values, config.given, system_prompt=SYSTEM).write()
    point(folder.parent / "latest", folder)
