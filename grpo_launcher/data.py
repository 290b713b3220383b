"""Datasets: load the splits, count the tokens of prompts, leave long prompts of a stream out."""

import hashlib
import os
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_splits(dataset_name: str, dataset_config: str | None = None, streaming: bool = False) -> DatasetDict:
    """Load a dataset by Hub id, prepared folder, or one file of rows, which becomes the split train."""
    file_type = FILE_TYPES.get(Path(dataset_name).suffix)
    if file_type and Path(dataset_name).is_file():
        return load_dataset(file_type, data_files={"train": dataset_name}, streaming=streaming)
    return load_dataset(dataset_name, name=dataset_config, streaming=streaming)


def column_names(split: Dataset | IterableDataset) -> list[str]:
    """Return the columns of a split. A stream may not know them: then those of its first row."""
    return split.column_names or list(next(iter(split), {}))


def count_tokens(prompts: list, tokenizer: PreTrainedTokenizerBase, **template_options) -> list[int]:
    """Count the tokens of each prompt as the trainer sees it: text, or chat messages in the tokenizer's template."""
    counts = []
    batches = range(0, len(prompts), 1000)
    for start in tqdm(batches, desc="counting tokens", unit="k rows", disable=len(prompts) < 20_000):
        batch = prompts[start : start + 1000]
        if isinstance(batch[0], str):
            ids = tokenizer(batch)["input_ids"]
        else:
            options = {"add_generation_prompt": True, "return_dict": True} | template_options
            ids = tokenizer.apply_chat_template(batch, **options)["input_ids"]
        counts += [len(row) for row in ids]
    return counts


def tokenizer_mark(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's name and twelve hex digits that change with its vocabulary or chat template.

    Models of one family share the digits, so that a count made for one holds for the other.
    """
    content = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return f"{name} {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def longest_prompt(split: Dataset, tokenizer: PreTrainedTokenizerBase, **template_options) -> int:
    """Return the tokens of the longest prompt.

    They come from the column that process_dataset.py wrote, where it used this tokenizer and no other template.
    """
    if "prompt_tokens" in split.column_names and not template_options:
        digits = tokenizer_mark("", tokenizer).split()[-1]
        if {mark.split()[-1] for mark in split.unique("prompt_tokenizer")} == {digits}:
            return max(split["prompt_tokens"])
    return max(count_tokens(list(split["prompt"]), tokenizer, **template_options))


def drop_long_prompts(
    stream: IterableDataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int, **template_options
) -> IterableDataset:
    """Leave the prompts of a stream out that have more than `max_tokens` tokens: one of them would end the run.

    The main rank prints the first that is left out, and every hundredth.
    """
    dropped = 0

    def fits(row: dict) -> bool:
        nonlocal dropped
        tokens = count_tokens([row["prompt"]], tokenizer, **template_options)[0]
        if tokens <= max_tokens:
            return True
        if dropped % 100 == 0 and os.environ.get("RANK", "0") == "0":
            print(f"Left out a prompt of {tokens} tokens; {max_tokens} fit ({dropped + 1} so far).", flush=True)
        dropped += 1
        return False

    return stream.filter(fits)


def load_for_training(
    values: dict, tokenizer: PreTrainedTokenizerBase, max_prompt: int | None, **template_options
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load the training split, and the test split where the recipe evaluates, cut to its first eval_rows.

    Args:
        values: the recipe's fields.
        tokenizer: of the model.
        max_prompt: tokens. Longer prompts are left out. None keeps all.
        template_options: what the chat template is given beside the messages.
    """
    splits = load_splits(values["dataset_name"], values["dataset_config"], values["dataset_streaming"])
    if max_prompt:
        splits = {
            name: drop_long_prompts(split, tokenizer, max_prompt, **template_options) for name, split in splits.items()
        }
    if values["eval_strategy"] == "no":
        return splits[values["dataset_train_split"]], None
    eval_split = splits[values["dataset_test_split"]]
    return splits[values["dataset_train_split"]], eval_split.take(values["eval_rows"]) if values[
        "eval_rows"
    ] else eval_split


def load_tokenizer(values: dict) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe's model."""
    return AutoTokenizer.from_pretrained(
        values["model_name_or_path"], revision=values["model_revision"], trust_remote_code=values["trust_remote_code"]
    )
