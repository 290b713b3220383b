"""Make what the small summarisation recipes need, once: models with an encoder, and articles with summaries.

python -m grpo_launcher.quickstart.encoder [--output data] [--seed N] [--model t5 bart] [--overwrite]

data/quickstart-t5, data/quickstart-bart  repeat sentences of an article
data/quickstart_summaries                 other articles, as train, validation and test
"""

import functools
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration, set_seed

from grpo_launcher.quickstart import Task, build
from grpo_launcher.quickstart.corpus import posts
from grpo_launcher.quickstart.pretrain import make_tokenizer, train

PRETRAINING_ARTICLES = 3000
ROWS = {"train": 512, "validation": 128, "test": 128}
COPYING_STEPS = 400
REPEATING_STEPS = 400
LEARNING_RATE = 2e-3
PREFIX = "summarize: "


def pretrain(make_model: Callable, output: Path, seed: int) -> None:
    """Train a tokenizer and a model, first to copy random tokens, then to repeat one to three sentences of an article.

    So it learns to read, and to write whole sentences, as Pegasus does (Zhang et al. 2020, arXiv 1912.08777). It has
    seen no summary yet.
    """
    set_seed(seed)
    rng = random.Random(seed)
    articles = make_articles(PRETRAINING_ARTICLES, seed)
    tokenizer = make_tokenizer([text for row in articles for text in row.values()], chat_template=None)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    model = make_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    encode = functools.partial(tokenizer, padding=True, padding_side="right", return_tensors="pt")

    def compute_loss(step: int) -> torch.Tensor:
        if step < COPYING_STEPS:
            ids = torch.randint(3, len(tokenizer), (64, 8))  # 0, 1 and 2 are special tokens
            return model(input_ids=ids, labels=ids).loss
        texts = [row["article"] for row in rng.choices(articles, k=16)]
        targets = encode([_some_sentences(text, rng) for text in texts])
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        return model(**encode([PREFIX + text for text in texts]), labels=labels).loss

    train(model, compute_loss, COPYING_STEPS + REPEATING_STEPS, LEARNING_RATE)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def make_articles(count: int, seed: int) -> list[dict[str, str]]:
    """Return rows {"article", "summary"}: the body of a post, and its summary."""
    rows = posts(count, seed)
    bodies = [row["prompt"].split("POST: ")[1].removesuffix("\n\nTL;DR:") for row in rows]
    return [{"article": body, "summary": row["completion"].strip()} for body, row in zip(bodies, rows, strict=True)]


def make_rows(seed: int) -> dict[str, list[dict]]:
    """Return articles of three other draws than the models'."""
    draws = enumerate(ROWS.items(), 3)
    return {split: make_articles(count, seed + 1_000_000 * draw) for draw, (split, count) in draws}


def _some_sentences(text: str, rng: random.Random) -> str:
    sentences = re.split(r"(?<=[.?!]) ", text)
    kept = sorted(rng.sample(range(len(sentences)), rng.randint(1, 3)))
    return " ".join(sentences[index] for index in kept)


def _t5(vocab_size: int, end: int, pad: int) -> T5ForConditionalGeneration:
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 384, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {"eos_token_id": end, "pad_token_id": pad, "decoder_start_token_id": pad}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocab_size, **sizes, **tokens))


def _bart(vocab_size: int, end: int, pad: int) -> BartForConditionalGeneration:
    sizes = {"d_model": 128, "max_position_embeddings": 512, "init_std": 0.08, "dropout": 0.0}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 3, f"{part}_ffn_dim": 384, f"{part}_attention_heads": 4}
    ends = ("bos_token_id", "eos_token_id", "forced_eos_token_id", "decoder_start_token_id")
    tokens = {"pad_token_id": pad, **dict.fromkeys(ends, end)}
    return BartForConditionalGeneration(BartConfig(vocab_size=vocab_size, **sizes, **tokens))


MODELS = {"t5": functools.partial(pretrain, _t5), "bart": functools.partial(pretrain, _bart)}


if __name__ == "__main__":
    build(sys.argv[1:], __doc__, MODELS, {"quickstart_summaries": Task("summarization", make_rows, PREFIX)})
