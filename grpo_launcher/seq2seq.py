"""Models with an encoder and a decoder (T5, mT5, BART, Pegasus): all that this project knows of them. Needs no trl to be imported.

The prompt goes to the encoder, whole and padded on the right: BART counts positions from the left end and sees padding there as text. The reply is the
decoder's, from its start token on. A model is of this kind where its own config says so.
"""

import json
import re
from pathlib import Path

import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PLAIN = "a model with an encoder takes plain-text prompts: process_dataset.py summarization --prefix TEXT makes such."
TASK = {True: "SEQ_2_SEQ_LM", False: "CAUSAL_LM"}  # peft's name for the kind of a model, by is_encoder_decoder


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Whether a model of this config has an encoder that reads the prompt."""
    return bool(getattr(config, "is_encoder_decoder", False))


def model_class(config: PretrainedConfig) -> type:
    """The auto class that loads a model of this config with the head that generates; a config.json may name a class without one (facebook/bart-base)."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def problems(values, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a recipe (its values, as attributes) asks that a model with an encoder cannot do, each with its reason."""
    found, name = [], f"{values.model_name_or_path} has an encoder ({config.model_type})"
    if values.use_vllm:
        found.append(f"use_vllm: {name}, and vLLM runs models without one only; leave use_vllm out: every device trains, and transformers generates.")
    for field in [field for field in ("tools", "environment_factory") if getattr(values, field)]:
        found.append(f"{field}: {name}: a reply is not read again, so it cannot go on behind a tool's result; leave {field} out, or take a chat model.")
    if tokenizer.pad_token is None:
        found.append(f"model_name_or_path: the tokenizer of {values.model_name_or_path} has no pad token, and the end of a text cannot stand for it here.")
    if getattr(config, "decoder_start_token_id", None) is None:
        found.append(f"model_name_or_path: {name}, and its config.json no decoder_start_token_id to begin a reply with.")
    return found


def no_dropout(config: PretrainedConfig) -> dict[str, float]:
    """The fields of a config that have to be 0 from loading on: what attention and layers drop by themselves no later switch reaches.

    With it a policy would differ from itself: T5's KL in step 1 was 0.016 in place of 0.
    """
    return {name: 0.0 for name, value in config.to_dict().items() if ("dropout" in name or "layerdrop" in name) and value}


def saved(folder: Path) -> bool:
    """Whether a folder with a checkpoint or an adapter holds such a model."""
    files = [folder / name for name in ("config.json", "adapter_config.json")]
    said = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return any(one.get("is_encoder_decoder") or one.get("task_type") == TASK[True] for one in said)


def places(config: PretrainedConfig) -> int | None:
    """The most tokens of a prompt (the encoder's) and of a reply (the decoder's), each for itself; None where places are relative (T5)."""
    return getattr(config, "max_position_embeddings", None)


def plain_generation(model: PreTrainedModel) -> GenerationConfig:
    """A generation config with the model's special tokens alone, so that a reply is drawn as the model says and not as a checkpoint's file does.

    facebook/bart-large-cnn's asks for four beams, at least 56 tokens, a forced first and last token and no trigram twice.
    """
    own, names = model.generation_config, ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    tokens = {name: value for name in names if (value := getattr(own, name, None)) is not None}
    return GenerationConfig(**({"decoder_start_token_id": model.config.decoder_start_token_id} | tokens))


def prefix(prompts: list[str]) -> str | None:
    """What all prompts begin with, up to its last colon ("summarize: "); None where they share no such beginning."""
    beginnings = [prompts[0][: colon.end()] for colon in re.finditer(r"[:：]\s*", prompts[0])] if len({*prompts}) > 1 else []
    return next((text for text in reversed(beginnings) if all(prompt.startswith(text) for prompt in prompts)), None)


def encoder_inputs(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Prompts' tokens as input_ids and attention_mask, (B, P) each, padded on the right."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=pad)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor([[len(prompt)] for prompt in prompts])).long()}


def until_end(drawn: torch.Tensor, ends: list[int]) -> list[list[int]]:
    """The replies' tokens in what `generate` returned (B, 1 + C): without the start token, up to and with the first of `ends`."""
    rows = [row[1:] for row in drawn.tolist()]
    return [next((row[: at + 1] for at, token in enumerate(row) if token in ends), row) for row in rows]


class EncoderDecoder:
    """A mixin for GRPOTrainer, which generates with and scores by the decoder; no vLLM, no tools, no images."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """(one reply a prompt of this rank, as tokens up to and with its end; None)."""
        from trl.models import unwrap_model_for_generation

        inputs = encoder_inputs(prompt_ids, self._tokenizer.pad_token_id)
        options = {"gather_deepspeed3_params": self.args.ds3_gather_for_generation, "gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator, **options) as model, torch.no_grad():
            whole = model.get_base_model() if hasattr(model, "get_base_model") else model
            own, whole.generation_config = whole.generation_config, plain_generation(whole)
            try:
                inputs = {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}
                drawn = model.generate(**inputs, generation_config=self.generation_config)
            finally:
                whole.generation_config = own
        return until_end(drawn, self.eos_token_ids), None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, compute_aux_loss=False, **images
    ):
        """((B, C) log-probabilities of the replies at the temperature, (B, C) entropies in nats or None, None).

        input_ids: (B, P + C), prompts padded on the left and replies of C = logits_to_keep tokens on the right; attention_mask: of the same.
        """
        prompts, replies = input_ids[:, :-logits_to_keep], input_ids[:, -logits_to_keep:]
        mask = attention_mask[:, :-logits_to_keep]
        order = mask.argsort(dim=1, descending=True, stable=True)  # the padding goes to the right end
        prompts, mask = prompts.gather(1, order), mask.gather(1, order)
        start = torch.full_like(replies[:, :1], self.model.config.decoder_start_token_id)
        before = torch.cat([start, replies[:, :-1]], dim=1)
        logps, entropies = [], []
        for at in range(0, len(prompts), batch_size or len(prompts)):
            part = slice(at, at + (batch_size or len(prompts)))
            with self.accelerator.autocast():
                logits = model(input_ids=prompts[part], attention_mask=mask[part], decoder_input_ids=before[part], use_cache=False).logits
            every = log_softmax(logits.float() / self.temperature, dim=-1)
            logps.append(every.gather(2, replies[part].unsqueeze(2)).squeeze(2))
            if compute_entropy:
                entropies.append(-(every.exp() * every).sum(-1))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None
