"""Datasets: load the splits, look at the prompts, count their tokens, leave long prompts of a stream out."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo_launcher import hub
from grpo_launcher.errors import UserError, first_line

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SPACE = re.compile(r" (?<=\S )")  # behind anything but a space; looked at in this order it takes a third of the time
FORMS = "give .jsonl or .json (an object a line), .csv or .tsv (cells with a comma in quotes), in UTF-8, or .parquet"


def load_splits(dataset_name: str, dataset_config: str | None = None, streaming: bool = False) -> dict:
    """Load a Hub id, a folder, or one file of rows as the split train. UserError says why it cannot be read."""
    path = Path(dataset_name)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in FILE_TYPES:
        raise UserError(dataset_name, f"unknown ending {suffix}", FORMS)
    if path.is_file() and dataset_config:
        raise UserError(dataset_name, f"dataset_config is {dataset_config}, and a file has none", "leave it out")
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    is_pattern = path.is_dir() and not is_saved and glob.escape(dataset_name) != dataset_name
    if is_pattern or ("::" in dataset_name and path.exists()):
        problem = "datasets reads :: in a path, and * ? [ ] in that of a folder, as more than letters"
        raise UserError(dataset_name, problem, "give it another name")
    try:
        if path.is_file():
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            files = {"train": glob.escape(dataset_name)}
            splits = load_dataset(FILE_TYPES[suffix], data_files=files, streaming=streaming, **options)
        elif is_saved:
            splits = load_from_disk(dataset_name).with_format(None)
            splits = {"train": splits} if isinstance(splits, Dataset) else splits
        else:
            splits = load_dataset(dataset_name, name=dataset_config, streaming=streaming)
        return {name: _check_format(split) for name, split in splits.items()}
    except (OSError, ValueError, StopIteration, IndexError, DatasetsError) as error:
        raise _explain(path, error) from error


def _check_format(split: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return a split without text parts in its prompts. Raises ValueError for what datasets reads without a word."""
    if isinstance(split, IterableDataset):
        list(split.take(100))
    else:
        split.data.validate(full=True)  # text that is not UTF-8
    if split.builder_name == "csv" and "__index_level_0__" in (split.column_names or []):
        raise ValueError("line 2 has more cells than the header")  # pandas took its first cells for an index
    prompt_type = str((split.features or {}).get("prompt"))
    is_plain = not any(word in prompt_type for word in ("Json", "'text'", "tool_calls"))
    return split if is_plain else split.map(_with_text_contents)


def _with_text_contents(row: dict) -> dict:
    """Write as text the content of a message that is a list of text parts, or null beside tool calls, as OpenAI does.

    The templates of text models take no lists, and TRL reads each content.
    """
    with suppress(AttributeError, KeyError, TypeError):  # check_prompt refuses what has another form
        for message in row["prompt"]:
            if isinstance(message.get("content"), list):
                message["content"] = "".join(part["text"] for part in message["content"])
            elif message.get("content") is None and message.get("tool_calls"):
                message["content"] = ""
    return row


def _explain(path: Path, error: BaseException) -> UserError:
    """Return the innermost cause why a dataset cannot be read, with file and line where they are known."""
    if not path.exists():
        return UserError(str(path), first_line(error.__cause__ or error), hub.hint())
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in [file for file in files if FILE_TYPES.get(file.suffix.lower()) in ("json", "csv")]:
        parse = json.loads if file.suffix.lower() == ".jsonl" else str
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                parse(line.decode("utf-8-sig").strip() or "null")
            except ValueError as fault:
                problem = fault.msg if isinstance(fault, json.JSONDecodeError) else "not UTF-8"
                return UserError(str(file), f"line {number}: {problem}", FORMS)
    while error.__cause__:
        error = error.__cause__
    if isinstance(error, StopIteration | IndexError) or "corresponds to no data" in str(error):
        return UserError(str(path), "a split has no rows")
    return UserError(str(path), " ".join(str(error).split())[:300], FORMS)


def column_values(split: Dataset | IterableDataset, column: str) -> Iterator:
    """Yield the values of a column, of a stream the first 100. Batches are six times faster than a Column."""
    rows = split.take(100) if isinstance(split, IterableDataset) else split
    for batch in rows.select_columns(column).iter(1000):
        yield from batch[column]


def check_prompt(prompt, is_chat: bool, row: str) -> None:
    """Raise UserError for a prompt that is no text, or no list of messages (is_chat). `row` says where it stands."""
    is_right = bool(prompt) and isinstance(prompt, list if is_chat else str)
    for message in prompt if is_chat and is_right else []:
        has_role = isinstance(message, dict) and isinstance(message.get("role"), str)
        is_right = is_right and has_role and (isinstance(message.get("content"), str) or message.get("tool_calls"))
    if not is_right:
        fix = "write every prompt as a text, or every prompt as messages: [{role: user, content: text}]"
        raise UserError("dataset_name", f"{row}: prompt is {prompt!r:.200}", fix)


def count_tokens(prompts: list, tokenizer: PreTrainedTokenizerBase, **template_options) -> list[int]:
    """Count the tokens of each prompt as the trainer sees it: text, or chat messages in the tokenizer's template."""
    counts = []
    batches = range(0, len(prompts), 1000)
    for start in tqdm(batches, desc="counting tokens", unit="k rows", disable=len(prompts) < 20_000):
        texts = prompts[start : start + 1000]
        if is_chat := not isinstance(texts[0], str):
            if tokenizer.chat_template is None:
                fix = "take an instruct model's tokenizer, or plain-text prompts"
                raise UserError(tokenizer.name_or_path, "it has no chat template, and the prompts are messages", fix)
            options = {"add_generation_prompt": True, "tokenize": False} | template_options
            try:
                texts = tokenizer.apply_chat_template(texts, **options)
            except (TemplateError, TypeError) as error:
                problem = f"its chat template refuses a prompt: {first_line(error)}"
                fix = "a system text can stand before the user's: process_dataset.py --system_in_user writes it there"
                raise UserError(tokenizer.name_or_path, problem, fix) from error
        if not getattr(tokenizer, "is_fast", False):
            counts += map(len, tokenizer(texts, add_special_tokens=not is_chat)["input_ids"])
            continue
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        has_words = 20 * sum(text.count(" ") for text in texts) > sum(map(len, texts))  # Chinese has none
        if has_words and (count_word := _word_counter(tokenizer)):
            special = 0 if is_chat else backend.num_special_tokens_to_add(False)
            for first, *words in map(_SPACE.split, texts):
                counts.append(special + count_word(first, before="") + sum(map(count_word, words)))
        else:  # without the tokens themselves it takes half the time
            counts += map(len, backend.encode_batch_fast(texts, add_special_tokens=not is_chat))
    return counts


@lru_cache(maxsize=1)
def _word_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int] | None:
    """Return what counts the tokens of a word and the space before it, each word once.

    A text's tokens are those of its words where the tokenizer splits it at each space behind anything else, as GPT-2's
    does and those after it (Llama 3, Qwen, SmolLM2). Return None for other tokenizers.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    normalizer = state["normalizer"] or {"normalizers": []}
    changes_spaces = any(part["type"] != "NFC" for part in normalizer.get("normalizers", [normalizer]))
    takes_spaces = any(
        added["lstrip"] or added["rstrip"] or " " in added["content"] for added in state["added_tokens"]
    )
    if changes_spaces or takes_spaces or backend.pre_tokenizer is None:
        return None
    kinds = ["a", "Ab", "é", "e\u0301", "中", "한", "1", "234", "٣", ".", "?!", "'s", "_", "/", "<|", "€", "😀"]
    text = " ".join(f"{left} {right}" for left in kinds for right in kinds)
    starts = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(text)}
    if not starts.issuperset(match.start() for match in _SPACE.finditer(text)):
        return None

    @lru_cache(maxsize=1 << 18)
    def count_word(word: str, before: str = " ") -> int:
        return len(backend.encode(before + word, add_special_tokens=False))

    return count_word


def tokenizer_mark(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's name and twelve hex digits that change with its vocabulary or chat template.

    Models of one family share the digits, so that a count made for one holds for the other.
    """
    content = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return f"{name} {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def longest_prompt(split: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, **template_options) -> int:
    """Return the tokens of the longest prompt.

    They come from the column that process_dataset.py wrote, where it used this tokenizer and no other template.
    """
    is_counted = isinstance(split, Dataset) and {"prompt_tokens", "prompt_tokenizer"} <= set(split.column_names)
    if is_counted and not template_options:
        digits = tokenizer_mark("", tokenizer).split()[-1]
        if {str(mark).split()[-1] for mark in split.unique("prompt_tokenizer")} == {digits}:
            return max(split["prompt_tokens"])
    return max(count_tokens(list(column_values(split, "prompt")), tokenizer, **template_options))


def drop_long_prompts(
    stream: IterableDataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, **template_options
) -> IterableDataset:
    """Leave the prompts of a stream out that have more than `max_tokens` tokens: one of them would end the run.

    The main rank prints the first that is left out, and every hundredth. A prompt that is none raises UserError.
    """
    dropped = 0

    def fits(row: dict) -> bool:
        nonlocal dropped
        check_prompt(row["prompt"], isinstance(row["prompt"], list), "a row of the stream")
        tokens = count_tokens([row["prompt"]], tokenizer, **template_options)[0]
        if max_tokens is None or tokens <= max_tokens:
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
    if values["dataset_streaming"]:
        splits = {
            name: drop_long_prompts(split, tokenizer, max_prompt, **template_options) for name, split in splits.items()
        }
    train_split, eval_split = splits[values["dataset_train_split"]], None
    if values["eval_strategy"] != "no":
        eval_split = splits[values["dataset_test_split"]]
        eval_split = eval_split.take(values["eval_rows"]) if values["eval_rows"] else eval_split
    return train_split, eval_split


def load_tokenizer(values: dict) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe's model."""
    return AutoTokenizer.from_pretrained(
        values["model_name_or_path"], revision=values["model_revision"], trust_remote_code=values["trust_remote_code"]
    )
