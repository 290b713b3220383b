"""Datasets: splits, streams, and prompts counted in tokens."""

import json

import pytest
from datasets import Dataset
from tiny_models import TEMPLATE, make_tokenizer

from grpo_launcher.data import (
    column_names,
    count_tokens,
    drop_long_prompts,
    load_for_training,
    load_splits,
    longest_prompt,
    tokenizer_mark,
)

TEXTS = ["The cat sat.", "The cat sat on the mat and looked at the moon.", "The cat."]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEMPLATE)


@pytest.fixture
def file(tmp_path):
    """A file of three rows, of which the second is long."""
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "mood": "glad"}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_one_file_of_rows_is_the_split_train(suffix, tmp_path):
    path, rows = tmp_path / f"rows.{suffix}", Dataset.from_dict({"prompt": TEXTS})
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(suffix, rows.to_json)(path)
    splits = load_splits(str(path))
    assert list(splits) == ["train"] and splits["train"]["prompt"][:] == TEXTS


def test_what_is_added_to_a_file_is_read_when_the_stream_begins_anew(file):
    rows = load_splits(str(file), streaming=True)["train"]
    assert column_names(rows) == ["prompt", "mood"] and len(list(rows)) == 3
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(json.dumps({"prompt": "new", "mood": "sad"}) + "\n")
    assert [row["mood"] for row in rows] == ["glad", "glad", "glad", "sad"]


def test_tokens_are_counted_as_the_trainer_sees_them(tokenizer):
    """Text as it is, chat messages in the template with its options and the beginning of the completion."""
    assert count_tokens(TEXTS, tokenizer) == [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    chat = [[{"role": "user", "content": text}] for text in TEXTS]
    expected = tokenizer.apply_chat_template(chat[1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert count_tokens(chat, tokenizer)[1] == len(expected)
    tool = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {}}}
    assert count_tokens(chat, tokenizer, tools=[tool])[1] > len(expected) + 10


def test_counts_of_the_same_tokenizer_are_taken_from_the_dataset(tokenizer):
    """Not those of another vocabulary or template, nor where the run adds something to the template."""
    longest, other = max(count_tokens(TEXTS, tokenizer)), make_tokenizer(TEMPLATE + " ")
    rows = Dataset.from_dict({"prompt": TEXTS, "prompt_tokens": [1, 2, 99]})
    for name, marked, expected in [("owner/a", tokenizer, 99), ("owner/b", other, longest)]:
        column = [tokenizer_mark(name, marked)] * 3
        assert longest_prompt(rows.add_column("prompt_tokenizer", column), tokenizer) == expected
    mixed = [tokenizer_mark("a", tokenizer), *[tokenizer_mark("a", other)] * 2]
    assert longest_prompt(rows.add_column("prompt_tokenizer", mixed), tokenizer) == longest
    same = rows.add_column("prompt_tokenizer", [tokenizer_mark("a", tokenizer)] * 3)
    assert longest_prompt(same, tokenizer, tools=None) == longest


def test_long_prompts_of_a_stream_are_left_out_and_counted(file, tokenizer, capsys):
    stream = load_splits(str(file), streaming=True)["train"]
    limit = max(count_tokens([TEXTS[0], TEXTS[2]], tokenizer))
    rows = drop_long_prompts(stream, tokenizer, limit)
    assert [row["prompt"] for row in rows] == [TEXTS[0], TEXTS[2]] and column_names(rows) == ["prompt", "mood"]
    assert f"{count_tokens(TEXTS[1:2], tokenizer)[0]} tokens; {limit} fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "train_rows", "eval_rows"),
    [
        ({}, 3, None),
        ({"eval_strategy": "steps"}, 3, 2),
        ({"eval_strategy": "steps", "eval_rows": 1}, 3, 1),
        ({"eval_strategy": "steps", "dataset_test_split": "train"}, 3, 3),
        ({"eval_strategy": "steps", "dataset_streaming": True, "max_prompt": 8}, 2, 1),
    ],
)
def test_splits_of_a_run(fields, train_rows, eval_rows, tokenizer, tmp_path):
    """The test split where the recipe evaluates, cut to eval_rows. Long prompts are left out of both."""
    splits = {"train": Dataset.from_dict({"prompt": TEXTS}), "test": Dataset.from_dict({"prompt": TEXTS[1:]})}
    for name, split in splits.items():
        split.to_json(tmp_path / f"{name}.jsonl")
    values = {"dataset_name": str(tmp_path), "dataset_config": None, "dataset_streaming": False}
    values |= {"dataset_train_split": "train", "dataset_test_split": "test", "eval_strategy": "no", "eval_rows": None}
    max_prompt = fields.get("max_prompt")
    train, evaluation = load_for_training(values | fields, tokenizer, max_prompt)
    assert len(list(train)) == train_rows
    assert evaluation is None if eval_rows is None else len(list(evaluation)) == eval_rows
