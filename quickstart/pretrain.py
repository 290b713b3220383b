"""The quickstart's base model: a one-million-parameter Qwen2 that learns to summarise the corpus in a minute or two on two cores."""

import os
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

STEPS, BATCH, LEARNING_RATE = 500, 8, 4e-3
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(texts: list[str], chat_template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1,536 ids over `texts`, with Qwen2.5's special tokens and the given chat template.

    The end of a turn is <|im_end|> and padding is <|endoftext|>: were they one id, masking the padding would mask the end too.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1536, special_tokens=SPECIALS, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(os.path.join(folder, "tokenizer.json"))
        return PreTrainedTokenizerFast(
            tokenizer_file=os.path.join(folder, "tokenizer.json"),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="left",
            model_max_length=2048,
            chat_template=chat_template,
        )


def pretrain(dialogues: list[tuple[list[dict[str, str]], float]], chat_template: str, output: Path, seed: int, steps: int = STEPS) -> None:
    """Train tokenizer and model on whole dialogues and save both into the folder `output`.

    dialogues: (messages, the last of them the reply; the loss weight of a token of the prompt, where one of the reply has 1).

    A count of steps and not of seconds ends it, so that a busy machine makes the same model, only later.
    """
    set_seed(seed)
    tokenizer = make_tokenizer([message["content"] for dialogue, _ in dialogues for message in dialogue], chat_template)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.08,  # at the usual 0.02 attention stays flat so long in a model this narrow that it learns to ignore the prompt
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    batches = _batches(dialogues, random.Random(seed))
    for step in tqdm(range(steps), desc="teaching the base model", unit="step"):
        batch = batches[step % len(batches)]
        ids, weights = _encode(tokenizer, batch)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _batches(dialogues: list, rng: random.Random) -> list[list]:
    """All dialogues in batches of like length, so that little of one is padding, in an order of their own."""
    order = rng.sample(dialogues, len(dialogues))
    order.sort(key=lambda pair: len(pair[0][-2]["content"]) // 500)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    rng.shuffle(batches)
    return batches


def _encode(tokenizer, dialogues) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and loss weights (B, T): the dialogue's own on the prompt, 1 on the reply, 0 on padding and after it."""
    rows = []
    for dialogue, weight in dialogues:
        prompt = tokenizer.apply_chat_template(dialogue[:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(prompt)["input_ids"]
        reply = tokenizer(dialogue[-1]["content"] + tokenizer.eos_token)["input_ids"]
        rows.append((prompt + reply, [weight] * len(prompt) + [1.0] * len(reply)))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])
    return ids, weights
