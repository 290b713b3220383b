"""Make what the small summarisation recipes need, once: python -m grpo_launcher.quickstart.encoder [--output data] [--seed N]

data/quickstart-t5 and data/quickstart-bart, small models with an encoder that repeat sentences of a post; data/quickstart_summaries, other posts with
summaries, as train, validation and test. Needs no network.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, set_seed

from process_dataset import process
from grpo_launcher.quickstart.corpus import posts
from grpo_launcher.quickstart.pretrain import make_tokenizer

TAUGHT, ROWS = 3000, {"train": 512, "validation": 128, "test": 128}  # posts for the models, and for the rows: four different draws
STEPS, COPYING, BATCH, LEARNING_RATE = 400, 400, 16, 2e-3
PREFIX = "summarize: "
WIDTH, LAYERS, HEADS = 128, 3, 4


def main(argv: list[str]) -> None:
    """Write the three folders where they are missing; a folder appears only when it is whole."""
    parser = argparse.ArgumentParser(prog="python -m grpo_launcher.quickstart.encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for all three (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="of the posts and of the models (default: 0)")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=[*MODELS], help="which models (default: both)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for kind in args.model:
        name = f"quickstart-{kind}"
        if not (args.output / name).exists():
            draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=args.output))
            try:
                teach(MODELS[kind], draft, args.seed)
                draft.chmod(0o755)
                draft.rename(args.output / name)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
            print(f"Wrote {args.output / name}")
    data = args.output / "quickstart_summaries"
    if not data.exists():
        with tempfile.TemporaryDirectory() as folder:
            for offset, (split, count) in enumerate(ROWS.items()):
                lines = map(json.dumps, _articles(count, args.seed + 1_000_000 * (offset + 3)))
                Path(folder, f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
            process("summarization", folder, data, str(args.output / name), 512, None, args.seed, options={"prefix": PREFIX})


def teach(make, output: Path, seed: int) -> None:
    """Train a tokenizer and a model, and save both into the folder `output`: first to copy random tokens, then to repeat one to three sentences of a post.

    So it comes to read, and to write whole sentences, as Pegasus does (Zhang et al. 2020, arXiv 1912.08777), and has seen no summary yet.
    """
    set_seed(seed)
    rng, articles = random.Random(seed), _articles(TAUGHT, seed)
    tokenizer = make_tokenizer([text for row in articles for text in row.values()], chat_template="")
    tokenizer.chat_template = None
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    model = make(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / (COPYING + STEPS)))
    for step in tqdm(range(COPYING + STEPS), desc="teaching the base model", unit="step"):
        if step < COPYING:
            ids = torch.randint(3, len(tokenizer), (64, 8))
            batch = {"input_ids": ids, "labels": ids}
        else:
            told = [row["article"] for row in rng.choices(articles, k=BATCH)]
            batch = tokenizer([PREFIX + text for text in told], padding=True, padding_side="right", return_tensors="pt")
            gold = tokenizer([_some_of(text, rng) for text in told], padding=True, padding_side="right", return_tensors="pt")
            batch["labels"] = gold["input_ids"].masked_fill(gold["attention_mask"] == 0, -100)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _articles(count: int, seed: int) -> list[dict[str, str]]:
    """Rows {"article", "summary"}: the body of a post and its summary."""
    return [{"article": row["prompt"].split("POST: ")[1].removesuffix("\n\nTL;DR:"), "summary": row["completion"].strip()} for row in posts(count, seed=seed)]


def _some_of(text: str, rng: random.Random) -> str:
    sentences = re.split(r"(?<=[.?!]) ", text)
    return " ".join(sentences[at] for at in sorted(rng.sample(range(len(sentences)), rng.randint(1, 3))))


def _t5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 3 * WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, decoder_start_token_id=tokenizer.pad_token_id, dropout_rate=0.0))


def _bart(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = {
        f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", LAYERS), ("ffn_dim", 3 * WIDTH), ("attention_heads", HEADS))
    }
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": end,
        "eos_token_id": end,
        "forced_eos_token_id": end,
        "decoder_start_token_id": end,
        "pad_token_id": pad,
    }
    return BartForConditionalGeneration(BartConfig(d_model=WIDTH, max_position_embeddings=512, init_std=0.08, dropout=0.0, **sizes, **tokens))


MODELS = {"t5": _t5, "bart": _bart}


if __name__ == "__main__":
    main(sys.argv[1:])
