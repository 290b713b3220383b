"""Encoder-decoder models (T5, mT5, BART, Pegasus): what is particular to them. Does not import trl.

The prompt goes to the encoder, padded on the right: BART counts positions from the left end and takes padding there
for text. The completion is the decoder's, behind its start token. A model is of this kind where its config says so.
"""

import json
import re
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_launcher.errors import UserError

SEQ2SEQ_TASK = "SEQ_2_SEQ_LM"  # peft's name for the kind of model, in adapter_config.json
PLAIN_TEXT = (
    "an encoder-decoder model takes plain-text prompts; `process_dataset.py summarization --prefix TEXT` makes them"
)


def is_seq2seq_checkpoint(folder: Path) -> bool:
    """Whether a folder with a checkpoint or an adapter holds an encoder-decoder model. Reads JSON alone."""
    paths = [folder / "config.json", folder / "adapter_config.json"]
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    return any(config.get("is_encoder_decoder") or config.get("task_type") == SEQ2SEQ_TASK for config in configs)


def model_class(config: PretrainedConfig) -> type:
    """Return the auto class with a generating head. The class in config.json may have none (facebook/bart-base)."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the most tokens of a sequence; None where positions are relative (T5).

    For an encoder-decoder the limit holds for the prompt and for the completion, each for itself.
    """
    return getattr(config, "max_position_embeddings", None)


def no_dropout(config: PretrainedConfig) -> dict[str, float]:
    """Return the config's dropout fields, each set to 0, for loading.

    TRL's `disable_dropout` reaches the dropout modules alone, and attention and layer drop have none. With dropout the
    policy would differ from itself: the KL of T5 in step 1 was 0.016 in place of 0.
    """
    fields = config.to_dict().items()
    return {name: 0.0 for name, value in fields if ("dropout" in name or "layerdrop" in name) and value}


def check_seq2seq(values: dict, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[UserError]:
    """Return what a recipe asks for that an encoder-decoder model cannot do."""
    name = values["model_name_or_path"]
    kind = f"{name} is an encoder-decoder model ({config.model_type})"
    problems = []
    if values["use_vllm"]:
        fix = "leave use_vllm out: every device trains, and transformers generates"
        problems.append(UserError("use_vllm", f"{kind}, which vLLM cannot run", fix))
    for field in ("tools", "environment_factory"):
        if values[field]:
            problem = f"{kind}: its completion cannot go on behind the result of a tool"
            problems.append(UserError(field, problem, f"leave {field} out, or take a chat model"))
    if tokenizer.pad_token is None:
        problem = f"the tokenizer of {name} has no pad token, and the end-of-text token cannot stand for it here"
        problems.append(UserError("model_name_or_path", problem, "add a pad token to the tokenizer"))
    if getattr(config, "decoder_start_token_id", None) is None:
        problem = f"{kind}, and its config.json has no decoder_start_token_id"
        problems.append(UserError("model_name_or_path", problem, "add that token to config.json"))
    return problems


def common_prefix(prompts: list[str]) -> str | None:
    """Return what all prompts begin with, up to its last colon ("summarize: "); None where there is no such thing."""
    if len(set(prompts)) < 2:
        return None
    prefixes = [prompts[0][: colon.end()] for colon in re.finditer(r"[:：]\s*", prompts[0])]
    shared = [prefix for prefix in prefixes if all(prompt.startswith(prefix) for prompt in prompts)]
    return shared[-1] if shared else None


def tokenize_references(rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Dataset:
    """Turn prompts and references into `input_ids` of the encoder and `labels` of the decoder, for SFT.

    Raises:
        UserError: a reference is longer than `limit` tokens.
    """

    def tokenize(row: dict) -> dict:
        return {**tokenizer(row["prompt"]), "labels": tokenizer(text_target=row["reference"])["input_ids"]}

    rows = rows.map(tokenize, remove_columns=rows.column_names)
    longest = max(len(labels) for labels in rows["labels"])
    if limit and longest > limit:
        problem = f"a reference has {longest} tokens, and the decoder takes {limit}"
        raise UserError("dataset_name", problem, "leave such rows out")
    return rows


def plain_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """Return a generation config with nothing but the model's special tokens.

    A checkpoint's own file may bend sampling: that of facebook/bart-large-cnn asks for four beams, at least 56 tokens,
    a forced first and last token and no repeated trigram.
    """
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    tokens = {name: getattr(own, name, None) for name in names}
    if tokens["decoder_start_token_id"] is None:
        tokens["decoder_start_token_id"] = model.config.decoder_start_token_id
    return GenerationConfig(**{name: token for name, token in tokens.items() if token is not None})


def encoder_inputs(prompts: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad B prompts on the right: `input_ids` and `attention_mask`, (B, P) each."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths).long()}


def sample_completions(model, prompts, config: GenerationConfig, eos_token_ids: list[int]) -> list[list[int]]:
    """Generate one completion for each tokenized prompt.

    Args:
        model: unwrapped model or peft model.
        prompts: B lists of token ids.
        config: how to sample; needs pad_token_id.
        eos_token_ids: tokens that end a completion.

    Returns:
        B completions: token ids without the start token, up to and with the first end token.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own_config = base.generation_config
    base.generation_config = plain_generation_config(base)
    try:
        inputs = {name: ids.to(base.device) for name, ids in encoder_inputs(prompts, config.pad_token_id).items()}
        with torch.no_grad():
            rows = model.generate(**inputs, generation_config=config)[:, 1:].tolist()
    finally:
        base.generation_config = own_config
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos_token_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def decoder_log_probs(model, input_ids, attention_mask, completion_length: int, start_token_id: int, temperature):
    """Score completions by the decoder.

    Args:
        model: policy or reference, as wrapped for training.
        input_ids: (B, P + C), prompts padded on the left, completions of C = completion_length tokens on the right.
        attention_mask: the same shape.
        completion_length: C.
        start_token_id: the decoder's first input token.
        temperature: the logits are divided by it.

    Returns:
        (B, C) log-probabilities of the completions' tokens, and (B, C) entropies in nats.
    """
    prompts, completions = input_ids[:, :-completion_length], input_ids[:, -completion_length:]
    mask = attention_mask[:, :-completion_length]
    padding_last = mask.argsort(dim=1, descending=True, stable=True)  # moves the padding to the right end
    logits = model(
        input_ids=prompts.gather(1, padding_last),
        attention_mask=mask.gather(1, padding_last),
        decoder_input_ids=torch.cat([torch.full_like(completions[:, :1], start_token_id), completions[:, :-1]], dim=1),
        use_cache=False,
    ).logits
    log_probs = log_softmax(logits.float() / temperature, dim=-1)
    return log_probs.gather(2, completions.unsqueeze(2)).squeeze(2), -(log_probs.exp() * log_probs).sum(-1)
