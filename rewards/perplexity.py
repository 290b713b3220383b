"""Reward a reply for fluency: how little it surprises a frozen reference model that has read the prompt."""

import functools

from grpo_launcher.messages import last_reply

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def perplexity_reward(prompts, completions, *, model: str = MODEL, batch_size: int = 8, **columns) -> list[float]:
    """10·clamp(1 − (ln ppl − 1)/10, 0, 1): 10 where the reply's perplexity is e or less, 0 from e¹¹ on and for an empty reply.

    prompts, completions: B each, as text or as chat messages (which `model`'s own chat template joins). model: a causal model, Hub id or
    folder; every rank keeps a whole copy of it, on its GPU where it has one. Returns B floats. ppl: exp of the mean negative
    log-likelihood of the reply's tokens (Jelinek et al. 1977). Raises OSError where the model cannot be read.
    """
    network, tokenizer = _load(model)
    pairs = [_ids(tokenizer, network.config, prompt, last_reply(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    scores = [0.0] * len(pairs)
    order = sorted((index for index, (_, answer) in enumerate(pairs) if answer), key=lambda index: sum(map(len, pairs[index])))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for index, surprise in zip(chosen, _surprise(network, [pairs[index] for index in chosen]), strict=True):
            scores[index] = 10 * min(1.0, max(0.0, 1 - (surprise - 1) / 10))
    return scores


def perplexity_ready(*, model: str = MODEL, batch_size: int = 8) -> None:
    """Raise ValueError where `model` cannot be read."""
    from transformers import AutoConfig

    if batch_size < 1:
        raise ValueError(f"perplexity_reward: batch_size {batch_size} must be at least 1.")
    try:
        AutoConfig.from_pretrained(model)
    except OSError:
        raise ValueError(f"perplexity_reward: model {model} is no folder with a model and no Hub id that can be read.") from None


perplexity_reward.ready = perplexity_ready


@functools.cache
def _load(name: str):
    """The model, whole and frozen, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations import deepspeed

    # While ZeRO-3 is on, transformers would split this model over the ranks too, and every forward would wait for all of them.
    kept = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        gpu = torch.cuda.is_available()
        network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if gpu else torch.float32)
    finally:
        if kept:
            deepspeed.set_hf_deepspeed_config(kept)
    return network.eval().requires_grad_(False).to(torch.cuda.current_device() if gpu else "cpu"), AutoTokenizer.from_pretrained(name)


def _ids(tokenizer, config, prompt, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of prompt and reply; of a prompt too long for the model the end."""
    if not isinstance(prompt, str):
        joined = "\n\n".join(message["content"] or "" for message in prompt) + "\n\n"
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if tokenizer.chat_template else joined
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    answer = tokenizer(answer, add_special_tokens=False)["input_ids"][: limit - 1]
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]
    return before[-(limit - len(answer)) :], answer


def _surprise(network, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Mean negative log-likelihood of each reply's tokens, in nats. Padding stands on the left and is masked, so that no reply feels its batch."""
    import torch

    width, last = max(len(before) + len(answer) for before, answer in pairs), max(len(answer) for _, answer in pairs)
    ids = torch.tensor([[0] * (width - len(before) - len(answer)) + before + answer for before, answer in pairs], device=network.device)
    mask = torch.tensor([[0] * (width - len(before) - len(answer)) + [1] * (len(before) + len(answer)) for before, answer in pairs], device=ids.device)
    with torch.inference_mode():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = network(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=last + 1, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -last:].flatten(), reduction="none").view(len(pairs), last)
    return [losses[row, last - len(answer) :].mean().item() for row, (_, answer) in enumerate(pairs)]
