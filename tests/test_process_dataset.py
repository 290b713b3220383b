"""process_dataset.py: every form of the source, what is left out and why, and output that is whole or not there."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, test_data
from datasets import Dataset, load_dataset

from grpo_launcher.datasets import mcq, tldr

GOOD = {"prompt": "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: It rained.\n\nTL;DR:", "completion": " Rain. "}


def process(folder: Path, *arguments: str, name: str = "tldr") -> subprocess.CompletedProcess:
    """`python process_dataset.py NAME …` in `folder`, offline."""
    command = [sys.executable, str(ROOT / "process_dataset.py"), name, *arguments]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A tokenizer with a chat template, made in a second."""
    from grpo_launcher.quickstart.pretrain import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    make_tokenizer([GOOD["prompt"] * 20], template).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet folder"])
def test_every_form_of_source_gives_the_same_rows(form, tmp_path, tokenizer):
    """A file of rows is split; a download of the dataset keeps its splits."""
    rows = [{**GOOD, "completion": f" Rain {i}."} for i in range(30)]
    source = tmp_path / f"raw.{form}"
    if form == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)))
    elif form == "csv":
        with open(source, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (source / "data").mkdir(parents=True)
        Dataset.from_list(rows[:27]).to_parquet(source / "data/train-00000-of-00001.parquet")
        Dataset.from_list(rows[27:]).to_parquet(source / "data/test-00000-of-00001.parquet")
    done = process(tmp_path, "--source", str(source), "--tokenizer", tokenizer)
    assert done.returncode == 0, done.stderr
    made = load_dataset(str(tmp_path / "data/tldr"))
    assert (len(made["train"]), len(made["test"])) == (27, 3)
    row = made["train"][0]
    assert row["prompt"][0] == {"role": "system", "content": tldr.SYSTEM}
    assert row["prompt"][1]["content"] == "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: It rained."
    assert row["reference"].startswith("Rain ") and row["prompt_tokens"] > 20 and row["prompt_tokenizer"].startswith(tokenizer)


def test_what_is_left_out_is_counted_by_cause(tmp_path, tokenizer):
    """Nothing vanishes in silence."""
    long = {**GOOD, "prompt": "POST: " + "It rained. " * 500}
    bad = [{**GOOD, "completion": " "}, {**GOOD, "completion": None}, {**GOOD, "prompt": "TL;DR:"}, long, long]
    for split, rows in {"train": [GOOD] * 5 + bad, "test": [GOOD]}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = process(tmp_path, "--source", str(tmp_path), "--tokenizer", tokenizer, "--output", "out")
    assert done.returncode == 0, done.stderr
    for line in [
        "train: 5 of 10 rows kept",
        "1 left out: empty summary",
        "1 left out: malformed",
        "1 left out: empty post",
        "2 left out: prompt over 768",
    ]:
        assert line in done.stdout, done.stdout
    assert "95th percentile" in done.stdout and "reference: Rain." in done.stdout


def test_output_is_not_replaced_unless_asked(tmp_path, tokenizer):
    """And then as a whole."""
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, [GOOD] * 20)))
    flags = ["--source", "raw.jsonl", "--tokenizer", tokenizer, "--output", "out", "--limit", "10"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    refused = process(tmp_path, *flags)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
    assert (tmp_path / "out/mine.txt").read_text() == "precious"
    assert process(tmp_path, *flags, "--overwrite").returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]


BROKEN = {
    "a source that is not there": (["--source", "nowhere.jsonl"], "--source nowhere.jsonl"),
    "the Hub, offline": ([], "HF_HUB_OFFLINE is set"),
    "a tokenizer that is not there": (["--source", "raw.jsonl", "--tokenizer", "nobody/nothing"], "--tokenizer nobody/nothing"),
    "a file in other columns": (["--source", "other.jsonl"], "malformed: prompt and completion must be text"),
    "a broken file": (["--source", "broken.jsonl"], "--source broken.jsonl"),
    "every prompt too long": (["--source", "raw.jsonl", "--max_prompt_length", "3"], "prompt over 3 tokens"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_named_and_leaves_nothing(case, tmp_path, tokenizer):
    """One line that says what and where; no half-made folder."""
    arguments, said = BROKEN[case]
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, [GOOD] * 20)))
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"text": "a"}) for _ in range(20)))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", \n' * 3)
    done = process(tmp_path, *([] if "--tokenizer" in arguments else ["--tokenizer", tokenizer]), *arguments)
    assert done.returncode not in (0, None) and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "data").glob("*")) and not list((tmp_path / "data").glob(".*"))


def test_kuakua_needs_no_dataset(tmp_path, tokenizer):
    """One prompt as often as rows are wanted; those of a file take turns with it."""
    done = process(tmp_path, "--tokenizer", tokenizer, "--limit", "30", name="kuakua")
    assert done.returncode == 0, done.stderr
    made = load_dataset(str(tmp_path / "data/kuakua"))
    assert (len(made["train"]), len(made["test"])) == (30, 1)
    assert made["train"][29]["prompt"] == [
        {"role": "system", "content": "你是一个夸夸机器人"},
        {"role": "user", "content": "尝试用尽量浮夸的语气夸我"},
    ]
    (tmp_path / "more.txt").write_text("夸夸我的猫\n\n夸夸我的代码\n")
    done = process(tmp_path, "--tokenizer", tokenizer, "--source", "more.txt", "--limit", "7", "--output", "more", name="kuakua")
    assert done.returncode == 0, done.stderr
    asked = [row["prompt"][1]["content"] for row in load_dataset(str(tmp_path / "more"))["train"]]
    assert asked == (["尝试用尽量浮夸的语气夸我", "夸夸我的猫", "夸夸我的代码"] * 3)[:7]
    missing = process(tmp_path, "--tokenizer", tokenizer, "--source", "nowhere.txt", "--output", "no", name="kuakua")
    assert missing.returncode != 0 and "--source nowhere.txt" in missing.stderr and "Traceback" not in missing.stderr


def test_real_rows(tmp_path):
    """The 600 real posts, counted by the real Qwen2.5 tokenizer."""
    source, qwen = test_data("tldr/tldr.jsonl"), test_data("qwen2.5_tokenizer")
    done = process(tmp_path, "--source", str(source), "--tokenizer", str(qwen))
    assert done.returncode == 0, done.stderr
    made = load_dataset(str(tmp_path / "data/tldr"))
    assert len(made["train"]) + len(made["test"]) == 600 and len(made["test"]) == 60
    assert all("TL;DR:" not in row["prompt"][1]["content"][-10:] for row in made["test"])
    assert max(made["train"]["prompt_tokens"]) < 600


HEADER = ["題目", "選項A", "選項B", "選項C", "選項D", "正確答案"]
QUESTIONS = [[f"第{number}題：下列何者正確？", "甲", "乙", "丙", "丁", "ABCD"[number % 4]] for number in range(20)]
SHEETS = {  # how a file may come → its bytes, and how its fifth answer is read
    "UTF-8": ("utf-8", ",", HEADER, "A"),
    "UTF-8 with a byte order mark": ("utf-8-sig", ",", HEADER, "A"),
    "Big5": ("cp950", ",", HEADER, "A"),
    "GB18030, Simplified": ("gb18030", ",", ["题目", "选项A", "选项B", "选项C", "选项D", "正确答案"], "A"),
    "tabs": ("utf-8", "\t", HEADER, "A"),
    "semicolons, English": ("utf-8", ";", ["Question", "Option A", "option_b", "C", "D", "Correct answer"], "A"),
    "full-width letters": ("utf-8", ",", ["題目", "選項Ａ", "選項Ｂ", "選項Ｃ", "選項Ｄ", "正確答案"], "Ａ"),
    "a letter in brackets": ("utf-8", ",", HEADER, "(a)"),
}


def sheet(path: Path, rows: list[list[str]], encoding: str = "utf-8", delimiter: str = ",") -> None:
    """Write a CSV file."""
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize("form", SHEETS)
def test_questions_are_read_however_they_come(form, tmp_path):
    """Encoding, delimiter and headers are found out."""
    encoding, delimiter, header, letter = SHEETS[form]
    sheet(tmp_path / "a.csv", [header, *QUESTIONS[:4], [*QUESTIONS[4][:5], letter], *QUESTIONS[5:]], encoding, delimiter)
    rows = mcq.make(str(tmp_path / "a.csv"), None)["train"]
    assert len(rows) == 20 and rows["answer"] == ["ABCD"[number % 4] for number in range(20)]
    assert mcq.to_row(rows[4])["prompt"][1]["content"] == "第4題：下列何者正確？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"


def test_columns_stand_in_any_order_and_a_cell_may_hold_anything_in_quotes(tmp_path):
    """Delimiters, quotes and line breaks; further columns and empty rows are passed over."""
    rows = [["正確答案", "科目", *HEADER[:5]], ["B", "理化", '何謂"酸,鹼"？\n請選。', "1,2", "3", "4", "5"], [""] * 7]
    sheet(tmp_path / "a.csv", rows)
    (row,) = mcq.make(str(tmp_path / "a.csv"), None)["train"]
    assert row == {"question": '何謂"酸,鹼"？\n請選。', "A": "1,2", "B": "3", "C": "4", "D": "5", "answer": "B"}


def change(row: int, column: int, value: str | None) -> list[list[str]]:
    """The sheet with one cell changed, or taken out."""
    rows = [list(HEADER), *map(list, QUESTIONS)]
    rows[row - 1][column : column + 1] = [] if value is None else [value]
    return rows


DAMAGED = {
    "no answer column": (change(1, 5, "難度"), "row 1 is '題目,選項A,選項B,選項C,選項D,難度'; a header with 題目, 選項A"),
    "a column twice": ([[*HEADER, "題目"], *([*row, "x"] for row in QUESTIONS)], "row 1: the column '題目' stands there twice"),
    "an answer beyond D": (change(13, 5, "E"), "row 13: 正確答案 is 'E'; A, B, C or D is wanted"),
    "an answer in words": (change(3, 5, "乙"), "row 3: 正確答案 is '乙'"),
    "two answers": (change(3, 5, "AB"), "row 3: 正確答案 is 'AB'"),
    "no answer": (change(21, 5, " "), "row 21: the cell 正確答案 is empty"),
    "no question": (change(2, 0, ""), "row 2: the cell 題目 is empty"),
    "an option missing": (change(9, 3, ""), "row 9: the cell 選項C is empty"),
    "a cell short": (change(9, 3, None), "row 9 has 5 cells, and the header 6"),
    "only a header": ([HEADER], "the file has a header and no question"),
    "a cell too many": (b"question,A,B,C,D,answer\nwho, me?,a,b,c,d,A\n", "row 2 has 7 cells, and the header 6; a cell that holds the delimiter"),
    "an open quote": (b'question,A,B,C,D,answer\nok,a,b,c,d,A\n"who,a,b,c,d,A\n', "row 3: unexpected end of data"),
    "UTF-16": ("題目,選項A".encode("utf-16"), "neither UTF-8, Big5 nor GB18030; save it as UTF-8"),
    "no text at all": (b"\x89PNG\r\n\x1a\n\xff\xff\x00", "neither UTF-8, Big5 nor GB18030"),
    "empty": (b"", "row 1 is ''; a header with"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_sheet_is_refused_with_its_row(case, tmp_path):
    """Nothing is guessed, and nothing lost."""
    content, said = DAMAGED[case]
    if isinstance(content, bytes):
        (tmp_path / "a.csv").write_bytes(content)
    else:
        sheet(tmp_path / "a.csv", content)
    with pytest.raises(ValueError, match=re.escape(said)):
        mcq.make(str(tmp_path / "a.csv"), None)


def test_a_damaged_sheet_leaves_no_folder(tmp_path, tokenizer):
    """Through the command: one line that names file and row."""
    sheet(tmp_path / "a.csv", change(13, 5, "E"))
    done = process(tmp_path, "--source", "a.csv", "--tokenizer", tokenizer, name="mcq")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: --source a.csv: row 13: 正確答案 is 'E'"), done.stderr
    assert not (tmp_path / "data").exists()
    done = process(tmp_path, "--tokenizer", tokenizer, name="mcq")
    assert "give a CSV file of questions: --source FILE.csv" in done.stderr


def test_real_questions(tmp_path):
    """The 800 of an exam: every row is kept or counted, one of them for an option that stands there twice."""
    source, qwen = test_data("mcq/tmmlu.csv"), test_data("qwen2.5_tokenizer")
    done = process(tmp_path, "--source", str(source), "--tokenizer", str(qwen), name="mcq")
    assert done.returncode == 0, done.stderr
    made = load_dataset(str(tmp_path / "data/mcq"))
    counts = [int(number) for number in re.findall(r"(\d+) left out", done.stdout)]
    assert len(made["train"]) + len(made["test"]) + sum(counts) == 800 and sum(counts) <= 3
    assert "1 left out: two options are the same" in done.stdout
    assert set(made["train"]["answer"]) == set("ABCD")
