"""Supervised runs: the column `reference` taught word by word, by TRL's SFTTrainer or, where the model has an encoder, transformers' Seq2SeqTrainer."""

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PretrainedConfig, PreTrainedTokenizerBase, Seq2SeqTrainer, Trainer
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from grpo_launcher.card import RunCard
from grpo_launcher.seq2seq import is_encoder_decoder, model_class, places
from grpo_launcher.config import RecipeError, SupervisedConfig

GOLD = "reference"


def make_trainer(args: SupervisedConfig, model: ModelConfig, config: PretrainedConfig, rows: dict[str, Dataset | None], callbacks: list) -> Trainer:
    """The trainer of a model of either kind. rows: `train_dataset` and `eval_dataset`, with prompt (chat messages or text) and reference (text)."""
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    shared = {"args": args, "processing_class": tokenizer, "callbacks": callbacks}
    if not is_encoder_decoder(config):
        rows = {name: _completions(one) for name, one in rows.items()}
        adapted = {"quantization_config": get_quantization_config(model), "peft_config": get_peft_config(model)}
        return type("Trainer", (RunCard, SFTTrainer), {})(model.model_name_or_path, **shared, **rows, **adapted)
    rows = {name: _tokens(one, tokenizer, places(config)) for name, one in rows.items()}
    loading = {"quantization_config": get_quantization_config(model), "trust_remote_code": args.trust_remote_code}
    loaded = create_model_from_path(model.model_name_or_path, model_class(config), **loading, **args.model_init_kwargs)
    if adapter := get_peft_config(model):
        sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        loaded = get_peft_model(loaded, adapter, autocast_adapter_dtype=not sharded)
        if args.gradient_checkpointing:  # as TRL's trainers do (trl#2514, transformers#42489)
            loaded.enable_input_require_grads()
            args.gradient_checkpointing_kwargs = {"use_reentrant": sharded} | (args.gradient_checkpointing_kwargs or {})
    collator = DataCollatorForSeq2Seq(tokenizer, model=loaded)
    return type("Trainer", (RunCard, Seq2SeqTrainer), {})(loaded, data_collator=collator, **shared, **rows)


def _completions(rows: Dataset | None) -> Dataset | None:
    """Rows as SFTTrainer takes them: the loss is on `completion` alone."""

    def of(row: dict) -> dict:
        gold = row[GOLD]
        return {"prompt": row["prompt"], "completion": gold if isinstance(row["prompt"], str) else [{"role": "assistant", "content": gold}]}

    return rows and rows.map(of, remove_columns=rows.column_names)


def _tokens(rows: Dataset | None, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Dataset | None:
    """Rows as tokens of encoder and decoder. Raises RecipeError for a reference over `limit` tokens."""
    if rows is None:
        return None
    rows = rows.map(lambda row: {**tokenizer(row["prompt"]), "labels": tokenizer(text_target=row[GOLD])["input_ids"]}, remove_columns=rows.column_names)
    longest = max(map(len, rows["labels"]))
    if limit and longest > limit:
        raise RecipeError(f"dataset_name: a {GOLD} has {longest} tokens, and the model's decoder takes {limit}: leave such rows out.")
    return rows
