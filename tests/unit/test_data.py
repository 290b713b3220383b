"""Datasets: splits, streams, files that cannot be read, and prompts counted in tokens."""

import json
import random
import time

import pytest
from datasets import Dataset, DatasetDict
from tiny_models import TEMPLATE, make_tokenizer
from tokenizers import AddedToken
from tokenizers.normalizers import Prepend, Sequence
from tokenizers.pre_tokenizers import ByteLevel

from grpo_launcher.data import (
    check_prompt,
    column_values,
    count_tokens,
    drop_long_prompts,
    load_for_training,
    load_splits,
    longest_prompt,
    tokenizer_mark,
)
from grpo_launcher.errors import UserError

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


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "CSV", "tsv", "parquet"])
def test_one_file_of_rows_is_the_split_train(suffix, tmp_path):
    path, rows = tmp_path / f"rows.{suffix}", Dataset.from_dict({"prompt": TEXTS, "mood": ["a, b"] * 3})
    write = {"csv": rows.to_csv, "tsv": rows.to_csv, "parquet": rows.to_parquet}.get(suffix.lower(), rows.to_json)
    write(path, **({"sep": "\t"} if suffix == "tsv" else {}))
    splits = load_splits(str(path))
    assert list(splits) == ["train"] and splits["train"]["prompt"][:] == TEXTS
    assert splits["train"].column_names == ["prompt", "mood"]


@pytest.mark.parametrize("streaming", [False, True])
def test_brackets_in_the_name_of_a_file_are_letters(streaming, tmp_path):
    """To datasets they are a pattern, which another file may fit. Where they cannot be helped they are refused."""
    for name, text in {"rows [12].jsonl": "right", "rows 1.jsonl": "wrong", "[a]/train.jsonl": "right"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": text}))
    (split,) = load_splits(str(tmp_path / "rows [12].jsonl"), streaming=streaming).values()
    assert [row["prompt"] for row in split] == ["right"]
    (split,) = load_splits(str(tmp_path / "[a]/train.jsonl"), streaming=streaming).values()
    assert [row["prompt"] for row in split] == ["right"]
    with pytest.raises(UserError, match="another name"):
        load_splits(str(tmp_path / "[a]"), streaming=streaming)
    with pytest.raises(UserError, match="dataset_config"):
        load_splits(str(tmp_path / "rows 1.jsonl"), "main", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk_is_read(streaming, tmp_path):
    """Of one Dataset, which is the split train, or of a DatasetDict; whatever format it was saved in."""
    rows = Dataset.from_dict({"prompt": TEXTS, "number": [1, 2, 3]})
    rows.with_format("numpy").save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two [1]")
    (split,) = load_splits(str(tmp_path / "one"), streaming=streaming).values()
    assert [row["prompt"] for row in split] == TEXTS and type(split[0]["number"]) is int
    splits = load_splits(str(tmp_path / "two [1]"), streaming=streaming)
    assert {name: len(list(split)) for name, split in splits.items()} == {"train": 3, "test": 1}


UNREADABLE = {  # file: content, and words of the message
    "comma.jsonl": ('{"prompt": "a"}\n\n{"prompt": "b",}\n', "line 3: Expecting property name"),
    "between.jsonl": ('{"prompt": "a"},\n{"prompt": "b"}\n', "line 1: Extra data"),
    "cut.jsonl": ('{"prompt": "a"}\n{"prompt": "b"', "line 2: Expecting ',' delimiter"),
    "big5.jsonl": ('{"prompt": "a"}\n{"prompt": "你好"}\n'.encode("big5"), "line 2: not UTF-8"),
    "folder/train.jsonl": ('{"prompt": "a"}\n{"prompt": b}\n', "line 2: Expecting value"),
    "wide.csv": ("prompt,answer\na,1\na,b,c,2\n", "Expected 2 fields in line 3, saw 4"),
    "shifted.csv": ("prompt,answer\na, b,1\na,2\n", "line 2 has more cells"),
    "wide.tsv": ("prompt\tanswer\na\tb\t1\n", "line 2 has more cells"),
    "open.csv": ('prompt,answer\n"a,1\nb,2\n', "EOF inside string"),
    "excel.csv": ("prompt,answer\n你好,1\n".encode("utf-16"), "line 1: not UTF-8"),
    "late.csv": ("prompt,answer\n" + "a,1\n" * 10_000 + "b,x\n", "Failed to parse string: 'x'"),
    "nothing.jsonl": ("", "no rows"),
    "header.csv": ("prompt,answer\n", "no rows"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\n", "not a parquet file"),
    "rows.xlsx": ("PK", "unknown ending .xlsx"),
    "rows": ("prompt", "unknown ending"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_told_with_its_line(name, tmp_path):
    """And without a word of the Hub. A stream says so before the first row, where that is bad."""
    content, words = UNREADABLE[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        load_splits(str(path.parent if "/" in name else path))
    assert refused.value.field == str(path) and words in refused.value.problem
    assert "Hub" not in str(refused.value)


def test_files_of_a_folder_must_have_the_same_columns(tmp_path):
    for split, row in {"train": {"prompt": "a"}, "test": {"prompt": "a", "answer": "b"}}.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="column names don't match"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("name", ["big5.jsonl", "wide.csv", "nothing.jsonl", "excel.csv"])
def test_a_stream_that_cannot_be_read_is_refused_at_once(name, tmp_path):
    content, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        load_splits(str(tmp_path / name), streaming=True)
    assert words in refused.value.problem


def message(content, role: str = "user") -> dict:
    return {"role": role, "content": content}


PARTS = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def test_a_call_of_a_tool_without_content_gets_an_empty_one(tmp_path):
    """As OpenAI writes it. TRL reads the content of each message."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    prompt = [{"role": "user", "content": "How late?"}, {"role": "assistant", "tool_calls": [call]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [*prompt, {"role": "tool", "content": "12"}]}))
    (read,) = load_splits(str(tmp_path / "rows.jsonl"))["train"]["prompt"]
    assert [message["content"] for message in read] == ["How late?", "", "12"]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_parts_become_text(streaming, tmp_path):
    """Of all contents or of some. What holds an image stays, and is refused."""
    for name, prompts in {
        "all": [[message(PARTS)]],
        "some": [[message("Be brief.", "system"), message(PARTS)], [message("The cat.")]],
        "image": [[message([*PARTS, {"type": "image", "image": "a.png"}])]],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
        rows = list(load_splits(str(path), streaming=streaming)["train"])
        if name == "image":
            with pytest.raises(UserError, match=r"a\.png"):
                check_prompt(rows[0]["prompt"], True, "row 1")
        else:
            assert [row["prompt"][-1]["content"] for row in rows] == ["The cat."] * len(prompts)


RIGHT = ["The cat.", [message("The cat.")], [message("a"), CALL, message("b", "tool")]]
WRONG = {  # prompt, and whether chat messages are wanted
    "null": (None, False),
    "null in a chat": (None, True),
    "no text": ("", False),
    "no messages": ([], True),
    "one message": (message("a"), True),
    "a number": (3, False),
    "text among chats": ("a", True),
    "a chat among texts": ([message("a")], False),
    "ShareGPT": ([{"from": "human", "value": "a"}], True),
    "ShareGPT in a table": ([{"from": "human", "value": "a", "role": None, "content": None}], True),
    "no content": ([message("a"), {"role": "user", "text": "a"}], True),
    "content of null": ([message(None)], True),
    "content of a number": ([message(3)], True),
    "no role": ([{"content": "a"}], True),
    "texts": (["a", "b"], True),
}


def test_prompts_are_text_or_messages():
    for prompt in RIGHT:
        check_prompt(prompt, isinstance(prompt, list), "row 1")


@pytest.mark.parametrize("case", WRONG)
def test_a_prompt_of_another_form_is_refused(case):
    prompt, is_chat = WRONG[case]
    with pytest.raises(UserError, match="row 3: prompt is") as refused:
        check_prompt(prompt, is_chat, "a.jsonl, split train, row 3")
    assert refused.value.field == "dataset_name" and "[{role: user, content: text}]" in refused.value.fix


def test_many_rows_are_looked_at_in_a_moment():
    """116,000 chats, as trl-lib/tldr has them, in about half a second. A loop over rows takes nine."""
    rows = Dataset.from_dict({"prompt": [[message("Be brief.", "system"), message("a")]] * 116_000})
    start = time.monotonic()
    for prompt in column_values(rows, "prompt"):
        check_prompt(prompt, True, "row")
    assert time.monotonic() - start < 6


def test_a_stream_ends_at_the_first_prompt_of_another_form(tmp_path, tokenizer):
    """Rows before it come through."""
    prompts = [[message("The cat.")], [{"from": "human", "value": "a"}]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    rows = iter(drop_long_prompts(load_splits(str(tmp_path / "a.jsonl"), streaming=True)["train"], tokenizer, None))
    assert next(rows)["prompt"] == prompts[0]
    with pytest.raises(UserError, match="human"):
        next(rows)


TEMPLATES = {  # what it refuses, and a prompt
    "no system": ("messages[0].role == 'system'", [message("a", "system"), message("b")]),
    "turns": ("messages | length > 1 and messages[1].role == 'user'", [message("a"), message("b")]),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_what_a_chat_template_refuses_is_told_in_its_words(case):
    """With the name of the tokenizer, and the way out for system texts."""
    condition, prompt = TEMPLATES[case]
    refuse = f"{{% if {condition} %}}{{{{ raise_exception('Not so!') }}}}{{% endif %}}"
    tokenizer = make_tokenizer(refuse + TEMPLATE)
    tokenizer.name_or_path = "owner/strict"
    assert count_tokens([[message("a")]], tokenizer)[0] > 1
    with pytest.raises(UserError, match="Not so!") as refused:
        count_tokens([[message("a")], prompt], tokenizer)
    assert refused.value.field == "owner/strict" and "--system_in_user" in refused.value.fix


def test_what_is_added_to_a_file_is_read_when_the_stream_begins_anew(file):
    rows = load_splits(str(file), streaming=True)["train"]
    assert rows.column_names == ["prompt", "mood"] and len(list(rows)) == 3
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


@pytest.mark.parametrize(
    ("pre_tokenizer", "change"),
    [
        (None, lambda backend: None),
        (None, lambda backend: setattr(backend, "normalizer", Sequence([]))),
        (None, lambda backend: setattr(backend, "normalizer", Prepend("a"))),
        (None, lambda backend: backend.add_special_tokens([AddedToken("<|end|>", rstrip=True)])),
        (None, lambda backend: backend.add_tokens(["a <"])),
        (ByteLevel(use_regex=False), lambda backend: None),  # its tokens hold several words
    ],
)
def test_tokens_are_counted_as_the_tokenizer_makes_them(pre_tokenizer, change):
    """Words are counted once each, where a tokenizer splits at spaces and takes none away."""
    tokenizer = make_tokenizer(TEMPLATE, pre_tokenizer)
    change(tokenizer.backend_tokenizer)
    choose = random.Random(0)
    kinds = [
        *"aZ1٣éя中한.?'-_/<😀",
        "The cat sat",
        "'s",
        "e\u0301",
        "<|im_end|>",
        "<|end|>",
        *" " * 9,
        *"\n\t\u00a0\u3000",
    ]
    texts = ["".join(choose.choices(kinds, k=choose.randint(1, 40))) for _ in range(3000)]
    texts += [text.replace(" ", "") for text in texts[:1000]]
    assert count_tokens(texts, tokenizer) == list(map(len, tokenizer(texts)["input_ids"]))


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
    assert [row["prompt"] for row in rows] == [TEXTS[0], TEXTS[2]] and rows.column_names == ["prompt", "mood"]
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
