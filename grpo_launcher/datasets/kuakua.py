"""Kuakua, a praise bot: one Chinese prompt, and those of a file if there is one, as often as rows are wanted."""

from pathlib import Path

from grpo_launcher.datasets import DatasetSpec, Request, chat_prompt

SYSTEM = "你是一个夸夸机器人"
PROMPT = "尝试用尽量浮夸的语气夸我"
ROWS = 1000


def load(request: Request) -> tuple[dict, dict]:
    """Repeat the prompts for the train split: `limit` rows, or 1,000. The test split has each of them once."""
    prompts = [PROMPT]
    if request.source:
        lines = Path(request.source).read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    count = request.limit or max(ROWS, len(prompts))
    train = [{"prompt": prompts[index % len(prompts)]} for index in range(count)]
    return {"train": train, "test": train[: len(prompts)]}, {}


def to_row(raw: dict) -> dict:
    """Turn {"prompt": text} into {"prompt": [system, user]}."""
    return {"prompt": chat_prompt(SYSTEM, raw["prompt"])}


DATASET = DatasetSpec(to_row, tokenizer="Qwen/Qwen2.5-0.5B-Instruct", max_prompt_length=256, columns={}, load=load)
