"""Kuakua, the praise bot: one Chinese prompt (and, if you like, a file of further ones) as often as rows are wanted; no dataset."""

from datasets import Dataset, DatasetDict, load_dataset

SOURCE = None
TOKENIZER = "Qwen/Qwen2.5-0.5B-Instruct"
MAX_PROMPT_LENGTH = 256  # tokens
SYSTEM = "你是一个夸夸机器人"
PROMPT = "尝试用尽量浮夸的语气夸我"
ROWS = 1000


def make(source: str | None, limit: int | None) -> DatasetDict:
    """The train split: the prompts over and over, `limit` rows (1,000). The test split: each of them once.

    source: a text file of further user prompts, one a line; empty lines do not count.
    """
    prompts = [PROMPT]
    if source:
        lines = load_dataset("text", data_files=source, split="train")["text"]
        prompts += [line.strip() for line in lines if line.strip()]
    rows = limit or max(ROWS, len(prompts))
    return DatasetDict(
        train=Dataset.from_dict({"prompt": [prompts[index % len(prompts)] for index in range(rows)]}),
        test=Dataset.from_dict({"prompt": prompts[:rows]}),
    )


def to_row(raw: dict) -> dict:
    """One user prompt → {"prompt": [system, user]}."""
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": raw["prompt"]}]}
