"""Rows for the trainer: loading them, and counting the tokens of their prompts."""

import hashlib
import os
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """A dataset by Hub id, prepared folder, or one jsonl, json, csv or parquet file (which becomes the split train)."""
    if Path(name).is_file() and Path(name).suffix in FILE_TYPES:
        return load_dataset(FILE_TYPES[Path(name).suffix], data_files={"train": name}, streaming=streaming)
    return load_dataset(name, name=config, streaming=streaming)


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """The columns; of a stream, which need not know them, those of its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def short_prompts(rows: IterableDataset, model: str, limit: int, **template_options) -> IterableDataset:
    """A stream without the prompts over `limit` tokens, each of which would end the run; the first that is left out is told, and every hundredth.

    Other datasets need none: what does not fit is refused before the run, with `process_dataset.py … --max_prompt_length`.
    """
    tokenizer, left_out = AutoTokenizer.from_pretrained(model), 0

    def fits(row: dict) -> bool:
        nonlocal left_out
        tokens = count_tokens([row["prompt"]], tokenizer, **template_options)[0]
        if tokens > limit:
            if left_out % 100 == 0 and os.environ.get("RANK", "0") == "0":  # every rank reads the whole stream
                print(f"Left out of the stream: a prompt of {tokens} tokens, where {limit} fit ({left_out + 1} so far).", flush=True)
            left_out += 1
        return tokens <= limit

    return rows.filter(fits)


def tokenizer_mark(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's name and twelve hex digits that change with its vocabulary or chat template.

    Two models of one family share the digits, so a count made for one holds for the other.
    """
    content = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return f"{name} {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def count_tokens(prompts: list, tokenizer: PreTrainedTokenizerBase, **template_options) -> list[int]:
    """The number of tokens of each prompt (text, or chat messages in the tokenizer's template), as the trainer will see it."""
    counts = []
    for start in tqdm(range(0, len(prompts), 1000), desc="counting tokens", unit="k rows", disable=len(prompts) < 20_000):
        batch = prompts[start : start + 1000]
        if isinstance(batch[0], str):
            ids = tokenizer(batch)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(batch, add_generation_prompt=True, return_dict=True, **template_options)["input_ids"]
        counts += [len(row) for row in ids]
    return counts


def longest_prompt(rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, **template_options) -> int:
    """Tokens of the longest prompt: from the column that process_dataset.py wrote where it used this tokenizer, else counted."""
    if "prompt_tokens" in rows.column_names and not template_options:
        digits = tokenizer_mark(name, tokenizer).split()[-1]
        if {mark.split()[-1] for mark in rows.unique("prompt_tokenizer")} == {digits}:
            return max(rows["prompt_tokens"])
    return max(count_tokens(list(rows["prompt"]), tokenizer, **template_options))
