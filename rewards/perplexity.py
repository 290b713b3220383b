"""Reward a completion for fluency: how little it surprises a frozen language model that has read the prompt."""

import functools

from grpo_launcher.messages import last_reply

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def perplexity_reward(prompts, completions, *, model: str = MODEL, batch_size: int = 8, **columns) -> list[float]:
    """Reward a low perplexity of the completion: 10 * clamp(1 - (ln ppl - 1) / 10, 0, 1).

    Args:
        model: a causal model, Hub id or folder. Every rank keeps a whole copy, on its GPU where it has one.
        batch_size: completions in one forward pass.

    Returns:
        B rewards in [0, 10]: 10 for a perplexity up to e, 0 from e^11 on and for an empty completion.

    Source: Jelinek et al. 1977.
    """
    network, tokenizer = _load(model)
    pairs = [
        _token_ids(tokenizer, network.config, prompt, last_reply(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    scores = [0.0] * len(pairs)
    not_empty = [index for index, (_, completion_ids) in enumerate(pairs) if completion_ids]
    by_length = sorted(not_empty, key=lambda index: sum(map(len, pairs[index])))  # less padding
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        for index, loss in zip(batch, _losses(network, [pairs[index] for index in batch]), strict=True):
            scores[index] = 10 * min(1.0, max(0.0, 1 - (loss - 1) / 10))
    return scores


def perplexity_ready(*, model: str = MODEL, batch_size: int = 8) -> int:
    """Return the number of parameters that every rank keeps. Called once before a run starts.

    Raises:
        ValueError: `model` cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if batch_size < 1:
        raise ValueError(f"perplexity_reward: batch_size is {batch_size} and must be at least 1")
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"perplexity_reward: model {model} is no folder with a model and no readable Hub id"
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


perplexity_reward.ready = perplexity_ready


@functools.cache
def _load(name: str):
    """Return the frozen model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations import deepspeed

    # While ZeRO-3 is on, transformers would split this model over the ranks, and each forward would wait for them all.
    zero3 = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = torch.cuda.current_device(), torch.bfloat16
    try:
        network = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    finally:
        if zero3:
            deepspeed.set_hf_deepspeed_config(zero3)
    return network.eval().requires_grad_(False).to(device), AutoTokenizer.from_pretrained(name)


def _token_ids(tokenizer, config, prompt, completion: str) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and completion, cut to the model's context: the prompt's end stays."""
    if not isinstance(prompt, str) and tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    elif not isinstance(prompt, str):
        prompt = "".join((message["content"] or "") + "\n\n" for message in prompt)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"][: limit - 1]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    prompt_ids = prompt_ids or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]
    return prompt_ids[-(limit - len(completion_ids)) :], completion_ids


def _losses(network, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Return the mean loss of each completion's tokens in nats; masked padding on the left changes none of them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(prompt_ids + completion_ids, device=network.device) for prompt_ids, completion_ids in pairs]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last = max(len(completion_ids) for _, completion_ids in pairs)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.inference_mode():
        logits = network(**inputs, logits_to_keep=last + 1, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -last:], reduction="none")
    return [row[-len(completion_ids) :].mean().item() for row, (_, completion_ids) in zip(losses, pairs, strict=True)]
