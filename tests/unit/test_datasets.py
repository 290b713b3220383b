"""process_dataset.py: every dataset and form of its source, what is left out and why, and whole output or none."""

import ast
import csv
import json
import operator
import re
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from helpers import ROOT, test_data
from tiny_models import make_encoder_model, make_tokenizer
from transformers import AutoTokenizer

from grpo_launcher.data import load_splits
from grpo_launcher.datasets import SkipRow, calculator, kuakua, load_spec, mcq, search_qa, summarization, tldr
from grpo_launcher.tools import calculator as calculate

main = runpy.run_path(str(ROOT / "process_dataset.py"))["main"]
POST = {"prompt": "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: It rained.\n\nTL;DR:", "completion": " Rain. "}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A folder with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys, tokenizer):
    """Run the command in an empty folder, with a name and options. It returns what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options, status: int = 0) -> str:
        given = [] if "--tokenizer" in options else ["--tokenizer", tokenizer]
        try:
            code = main([name, *given, *map(str, options)])
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        assert code == status, printed.err
        return printed.err if status else printed.out

    return run


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def raw_row(spec, raw: dict, **options) -> dict | str:
    """Return the prepared row, or the cause why there is none."""
    try:
        return spec.to_row(raw, **options)
    except SkipRow as cause:
        return str(cause)


def test_help_imports_nothing_heavy():
    """So it answers at once."""
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'numpy'} & set(sys.modules)"
    code = (
        f"import runpy, sys\ntry: runpy.run_path('process_dataset.py', run_name='__main__')\nfinally: print({heavy})"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "--max_prompt_length" in done.stdout and done.stdout.endswith("set()\n"), done.stdout + done.stderr


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "folder", "saved"])
def test_every_form_of_source_gives_the_same_rows(form, prepare, tmp_path, tokenizer):
    """A file of rows is split; a download of the dataset keeps its splits."""
    rows = [{**POST, "completion": f" Rain {number}."} for number in range(30)]
    source = tmp_path / f"raw.{form}"
    if form == "jsonl":
        write_lines(source, rows)
    elif form in ("csv", "tsv"):
        Dataset.from_list(rows).to_csv(source, sep="\t" if form == "tsv" else ",")
    elif form == "saved":
        Dataset.from_list(rows).save_to_disk(source)
    else:
        (source / "data").mkdir(parents=True)
        Dataset.from_list(rows[:27]).to_parquet(source / "data/train-00000-of-00001.parquet")
        Dataset.from_list(rows[27:]).to_parquet(source / "data/test-00000-of-00001.parquet")
    prepare("tldr", "--source", source)
    made = load_dataset("data/tldr")
    assert (len(made["train"]), len(made["test"])) == (27, 3)
    row = made["train"][0]
    assert row["prompt"][0] == {"role": "system", "content": tldr.SYSTEM}
    assert row["prompt"][1] == {"role": "user", "content": "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: It rained."}
    assert row["reference"].startswith("Rain ") and row["prompt_tokens"] > 20
    assert row["prompt_tokenizer"].startswith(tokenizer)


def test_rows_left_out_are_counted_by_cause(prepare, tmp_path):
    """Nothing vanishes in silence."""
    long = {**POST, "prompt": "POST: " + "It rained. " * 500}
    bad = [{**POST, "completion": " "}, {**POST, "completion": None}, {**POST, "prompt": "TL;DR:"}, long, long]
    write_lines(tmp_path / "train.jsonl", [POST] * 5 + bad)
    write_lines(tmp_path / "test.jsonl", [POST])
    printed = prepare("tldr", "--source", tmp_path, "--output", "out")
    for line in [
        "train: 5 of 10 rows kept",
        "1 left out: empty completion",
        "1 left out: malformed: completion must be text",
        "1 left out: empty prompt",
        "2 left out: prompt over 768 tokens",
        "95th percentile",
        "reference: Rain.",
    ]:
        assert line in printed, printed


def test_a_thousand_bad_rows_before_a_good_one_leave_a_file_that_can_be_read(prepare, tmp_path):
    """Rows are read by the thousand."""
    empty = {"prompt": "TL;DR:", "completion": "a"}
    write_splits(tmp_path / "raw", train=[empty] * 1000 + [POST] * 1200, test=[POST])
    assert "train: 1200 of 2200 rows kept" in prepare("tldr", "--source", "raw")
    rows = load_dataset("data/tldr")["train"]
    assert len(rows) == 1200 and rows[-1]["reference"] == "Rain."


def test_an_output_is_replaced_only_where_that_is_asked_for(prepare, tmp_path):
    """And then as a whole, unless it holds what the command has not written."""
    write_lines(tmp_path / "raw.jsonl", [POST] * 20)
    options = ["--source", "raw.jsonl", "--output", "out", "--limit", "10"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    assert "--overwrite" in prepare("tldr", *options, status=2)
    assert "mine.txt" in prepare("tldr", *options, "--overwrite", status=2)
    assert (tmp_path / "out/mine.txt").read_text() == "precious"
    (tmp_path / "out/mine.txt").rename(tmp_path / "out/validation.parquet")
    prepare("tldr", *options, "--overwrite")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    assert not list(tmp_path.glob(".out*"))


REFUSED = {
    "a source that is not there": ("tldr", ["--source", "nowhere.jsonl"], "--source nowhere.jsonl"),
    "a prompt file that is not there": ("kuakua", ["--source", "nowhere.txt"], "--source nowhere.txt"),
    "the Hub, offline": ("tldr", [], "HF_HUB_OFFLINE"),
    "an unknown tokenizer": ("tldr", ["--source", "raw.jsonl", "--tokenizer", "no/no"], "--tokenizer no/no"),
    "other columns": ("tldr", ["--source", "other.jsonl"], "malformed: prompt must be text"),
    "a broken file": ("tldr", ["--source", "broken.jsonl"], "--source broken.jsonl: line 1: Expecting property name"),
    "a sheet": ("tldr", ["--source", "raw.xlsx"], "--source raw.xlsx: unknown ending .xlsx. Fix: give .jsonl"),
    "prompts in GBK": ("kuakua", ["--source", "gbk.txt"], "Fix: save it as UTF-8"),
    "prompts too long": ("tldr", ["--source", "raw.jsonl", "--max_prompt_length", "3"], "prompt over 3 tokens"),
    "a limit of 0": ("tldr", ["--source", "raw.jsonl", "--limit", "0"], "--limit"),
    "a length of 0": ("tldr", ["--source", "raw.jsonl", "--max_prompt_length", "0"], "--max_prompt_length"),
    "an unknown dataset": ("tdlr", [], "invalid choice: 'tdlr'"),
    "no questions": ("mcq", [], "--source FILE.csv"),
    "steps of another dataset": ("tldr", ["--steps", "2"], "--steps: makes sums for calculator"),
    "steps with a source": ("calculator", ["--steps", "2", "--source", "raw.jsonl"], "--steps: makes sums"),
    "no steps": ("calculator", ["--steps", "0"], "--steps: invalid choice: 0"),
    "too many steps": ("calculator", ["--steps", "9"], "--steps: invalid choice: 9"),
    "options of another dataset": ("tldr", ["--prefix", "summarize: "], "--prefix: no option of tldr"),
    "one column named": ("summarization", ["--source", "raw.jsonl", "--article", "prompt"], "--article, --summary"),
    "unknown columns": ("summarization", ["--source", "other.jsonl"], "--article COLUMN --summary COLUMN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name_and_leaves_nothing(case, prepare, tmp_path):
    """Exit status 2, one line that says what and where, and no folder that is half made."""
    name, options, problem = REFUSED[case]
    write_lines(tmp_path / "raw.jsonl", [POST] * 20)
    write_lines(tmp_path / "other.jsonl", [{"text_": "a"}] * 20)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", \n' * 3)
    (tmp_path / "raw.xlsx").touch()
    (tmp_path / "gbk.txt").write_text("夸夸我的猫", encoding="gbk")
    assert problem in prepare(name, *options, status=2)
    assert not list(tmp_path.glob("data/*")) and not list(tmp_path.glob("data/.*"))


STRICT = (  # like Gemma 2's and Mistral's
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def test_a_template_without_system_role_gets_the_system_text_before_the_users(prepare, tmp_path):
    """Where that is asked for. Else it is refused in the template's words."""
    make_tokenizer(STRICT).save_pretrained(tmp_path / "strict")
    write_lines(tmp_path / "raw.jsonl", [POST] * 20)
    options = ["--source", "raw.jsonl", "--tokenizer", "strict"]
    problem = prepare("tldr", *options, status=2)
    assert "error: strict: " in problem and "System role not supported" in problem
    assert "--system_in_user" in problem and not (tmp_path / "data").exists()
    prepare("tldr", *options, "--system_in_user")
    (message,) = load_dataset("data/tldr")["train"][0]["prompt"]
    assert message == {"role": "user", "content": f"{tldr.SYSTEM}\n\nSUBREDDIT: r/a\n\nTITLE: b\n\nPOST: It rained."}


def test_plain_text_has_no_system_text_to_move(prepare, tmp_path):
    write_lines(tmp_path / "raw.jsonl", articles(12))
    prepare("summarization", "--source", "raw.jsonl", "--prefix", "summarize: ", "--system_in_user")
    assert load_dataset("data/summarization")["train"][0]["prompt"].startswith("summarize: Article")


def test_real_posts(prepare):
    """600 posts, counted by the tokenizer of Qwen2.5."""
    prepare("tldr", "--source", test_data("tldr/tldr.jsonl"), "--tokenizer", test_data("qwen2.5_tokenizer"))
    made = load_dataset("data/tldr")
    assert (len(made["train"]), len(made["test"])) == (540, 60)
    assert all("TL;DR:" not in row["prompt"][1]["content"][-10:] for row in made["test"])
    assert max(made["train"]["prompt_tokens"]) < 600


# kuakua


def test_praise_needs_no_dataset(prepare, tmp_path):
    """One prompt as often as rows are wanted; those of a file take turns with it."""
    prepare("kuakua", "--limit", 30)
    made = load_dataset("data/kuakua")
    assert (len(made["train"]), len(made["test"])) == (30, 1)
    system = {"role": "system", "content": "你是一个夸夸机器人"}
    assert made["train"][29]["prompt"] == [system, {"role": "user", "content": "尝试用尽量浮夸的语气夸我"}]
    (tmp_path / "more.txt").write_text("夸夸我的猫\n\n夸夸我的代码\n", encoding="utf-8")
    prepare("kuakua", "--source", "more.txt", "--limit", 7, "--output", "more")
    prompts = [row["prompt"][1]["content"] for row in load_dataset("more")["train"]]
    assert prompts == ([kuakua.PROMPT, "夸夸我的猫", "夸夸我的代码"] * 3)[:7]


# mcq

HEADER = ["題目", "選項A", "選項B", "選項C", "選項D", "正確答案"]
SIMPLIFIED = ["题目", "选项A", "选项B", "选项C", "选项D", "正确答案"]
ENGLISH = ["Question", "Option A", "option_b", "C", "D", "Correct answer"]
FULL_WIDTH = ["題目", "選項Ａ", "選項Ｂ", "選項Ｃ", "選項Ｄ", "正確答案"]
QUESTIONS = [[f"第{number}題：下列何者正確？", "甲", "乙", "丙", "丁", "ABCD"[number % 4]] for number in range(20)]
SHEETS = {  # encoding, delimiter, header, and how the fifth answer is written
    "UTF-8": ("utf-8", ",", HEADER, "A"),
    "UTF-8 with a byte order mark": ("utf-8-sig", ",", HEADER, "A"),
    "Big5": ("cp950", ",", HEADER, "A"),
    "GB18030, Simplified": ("gb18030", ",", SIMPLIFIED, "A"),
    "tabs": ("utf-8", "\t", HEADER, "A"),
    "bars": ("utf-8", "|", HEADER, "A"),
    "semicolons, English": ("utf-8", ";", ENGLISH, "A"),
    "full-width letters": ("utf-8", ",", FULL_WIDTH, "Ａ"),
    "a letter in brackets": ("utf-8", ",", HEADER, "(a)"),
}


def write_sheet(path: Path, rows: list[list[str]], encoding: str = "utf-8", delimiter: str = ",") -> None:
    """Write a CSV file."""
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def read_sheet(path: Path) -> list[dict]:
    """Return the questions of a CSV file."""
    return mcq.load(mcq.Request("mcq", source=str(path)))[0]["train"]


@pytest.mark.parametrize("form", SHEETS)
def test_questions_are_read_from_every_form_of_csv(form, tmp_path):
    """Encoding, delimiter and columns are recognised."""
    encoding, delimiter, header, letter = SHEETS[form]
    rows = [header, *QUESTIONS[:4], [*QUESTIONS[4][:5], letter], *QUESTIONS[5:]]
    write_sheet(tmp_path / "a.csv", rows, encoding, delimiter)
    questions = read_sheet(tmp_path / "a.csv")
    assert [question["answer"] for question in questions] == ["ABCD"[number % 4] for number in range(20)]
    prompt = mcq.to_row(questions[4])["prompt"]
    assert prompt[1]["content"] == "第4題：下列何者正確？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"


def test_columns_come_in_any_order_and_cells_hold_anything_in_quotes(tmp_path):
    """Delimiters, quotes and line breaks; further columns and empty rows do not count."""
    cells = ["B", "理化", '何謂"酸,鹼"？\n請選。', "1,2", "3", "4", "5"]
    write_sheet(tmp_path / "a.csv", [["正確答案", "科目", *HEADER[:5]], cells, [""] * 7])
    (question,) = read_sheet(tmp_path / "a.csv")
    expected = {"question": '何謂"酸,鹼"？\n請選。', "A": "1,2", "B": "3", "C": "4", "D": "5", "answer": "B"}
    assert question == expected


def changed_sheet(row: int, column: int, value: str | None) -> list[list[str]]:
    """Return the sheet with one cell changed, or removed."""
    rows = [list(HEADER), *map(list, QUESTIONS)]
    rows[row - 1][column : column + 1] = [] if value is None else [value]
    return rows


DAMAGED_SHEETS = {
    "no answer column": (changed_sheet(1, 5, "難度"), "row 1: no header with 題目, 選項a"),
    "a column twice": ([[*HEADER, "題目"], *([*row, "x"] for row in QUESTIONS)], "row 1: the column 題目 stands"),
    "an answer beyond D": (changed_sheet(13, 5, "E"), "row 13: 正確答案 is 'E'"),
    "an answer in words": (changed_sheet(3, 5, "乙"), "row 3: 正確答案 is '乙'"),
    "two answers": (changed_sheet(3, 5, "AB"), "row 3: 正確答案 is 'AB'"),
    "no answer": (changed_sheet(21, 5, " "), "row 21: the cell 正確答案 is empty"),
    "no question": (changed_sheet(2, 0, ""), "row 2: the cell 題目 is empty"),
    "an option missing": (changed_sheet(9, 3, ""), "row 9: the cell 選項c is empty"),
    "a cell short": (changed_sheet(9, 3, None), "row 9: 5 cells, and the header has 6"),
    "only a header": ([HEADER], "a header and no question"),
    "a cell too many": (b"question,A,B,C,D,answer\nwho, me?,a,b,c,d,A\n", "row 2: 7 cells, and the header has 6"),
    "an open quote": (b'question,A,B,C,D,answer\nok,a,b,c,d,A\n"who,a,b,c,d,A\n', "row 3: unexpected end"),
    "UTF-16": ("題目,選項A".encode("utf-16"), "save the file as UTF-8"),
    "no text at all": (b"\x89PNG\r\n\x1a\n\xff\xff\x00", "save the file as UTF-8"),
    "empty": (b"", "row 1: no header"),
}


@pytest.mark.parametrize("case", DAMAGED_SHEETS)
def test_a_damaged_sheet_is_refused_by_its_row(case, tmp_path):
    """Nothing is guessed, and nothing is lost."""
    content, problem = DAMAGED_SHEETS[case]
    if isinstance(content, bytes):
        (tmp_path / "a.csv").write_bytes(content)
    else:
        write_sheet(tmp_path / "a.csv", content)
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_sheet(tmp_path / "a.csv")


def test_the_command_names_file_and_row_of_a_damaged_sheet(prepare, tmp_path):
    """And leaves no folder."""
    write_sheet(tmp_path / "a.csv", changed_sheet(13, 5, "E"))
    assert "error: --source a.csv: row 13: 正確答案 is 'E'" in prepare("mcq", "--source", "a.csv", status=2)
    assert not (tmp_path / "data").exists()


def test_real_questions_of_an_exam(prepare):
    """800: each is kept or counted, and one has the same option twice."""
    source = test_data("mcq/tmmlu.csv")
    printed = prepare("mcq", "--source", source, "--max_prompt_length", 9999)
    made = load_dataset("data/mcq")
    left_out = sum(int(number) for number in re.findall(r"(\d+) left out", printed))
    assert len(made["train"]) + len(made["test"]) + left_out == 800 and left_out <= 3
    assert "1 left out: two options are the same" in printed
    assert set(made["train"]["answer"]) == set("ABCD")


# summarization


def articles(count: int, article: str = "article", summary: str = "highlights") -> list[dict]:
    """Return short articles, all different."""
    numbers = range(count)
    return [{article: f"Article {n}. The cat sat on the mat.", summary: f"A cat, {n}.", "id": n} for n in numbers]


def write_splits(folder: Path, **splits: list[dict]) -> None:
    """Write a JSON lines file for each split."""
    folder.mkdir()
    for split, rows in splits.items():
        write_lines(folder / f"{split}.jsonl", rows)


@pytest.mark.parametrize("columns", [*summarization.COLUMNS, ("body", "abstract")], ids=" and ".join)
def test_the_columns_of_known_datasets_are_found_and_others_named(columns):
    """Chat messages without a prefix; the summary is `reference`, as TRL drops a column called completion."""
    named = {"article": "body", "summary": "abstract"} if columns[0] == "body" else {}
    row = summarization.to_row(articles(1, *columns)[0], **named)
    assert row["reference"] == "A cat, 0." and [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"] == "Article 0. The cat sat on the mat."


def test_a_prefix_makes_plain_text_in_three_splits(prepare, tmp_path):
    """Of columns named by options."""
    rows = articles(12, "body", "abstract")
    write_splits(tmp_path / "raw", train=rows, validation=rows, test=rows)
    options = ["--prefix", "summarize: ", "--article", "body", "--summary", "abstract"]
    printed = prepare("summarization", "--source", "raw", *options)
    made = load_dataset("data/summarization")
    assert {split: len(made[split]) for split in made} == {"train": 12, "validation": 12, "test": 12}
    first = made["train"][0]
    assert (first["prompt"], first["reference"]) == ("summarize: Article 0. The cat sat on the mat.", "A cat, 0.")
    assert "no split" not in printed


def test_a_missing_validation_split_is_drawn_from_train(prepare, tmp_path):
    """The command says so, and train loses those rows."""
    write_splits(tmp_path / "raw", train=articles(40), test=articles(5))
    printed = prepare("summarization", "--source", "raw", "--prefix", "")
    assert "no split validation: 4 rows of train" in printed
    prompts = {name: set(split["prompt"]) for name, split in load_dataset("data/summarization").items()}
    assert {name: len(split) for name, split in prompts.items()} == {"train": 36, "validation": 4, "test": 5}
    assert not prompts["train"] & prompts["validation"]


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_long_articles_are_left_out_or_cut(too_long, prepare, tmp_path):
    """To the token. Rows without text are left out and counted in any case."""
    make_encoder_model(tmp_path / "t5", "t5")  # its tokenizer ends a text with a token of its own
    long = "The cat sat on the mat and looked at the moon. " * 60
    bad = [("A.", " "), (None, "B."), (3, "C."), (long, "Long.")]
    rows = articles(10) + [{"article": article, "highlights": summary} for article, summary in bad]
    write_splits(tmp_path / "raw", train=rows, validation=articles(3), test=articles(3))
    options = ["--prefix", "summarize: ", "--max_prompt_length", 40, "--tokenizer", "t5", "--too_long", too_long]
    printed = prepare("summarization", "--source", "raw", *options)
    for cause in ("1 left out: empty highlights", "2 left out: malformed: article must be text"):
        assert cause in printed, printed
    made = load_dataset("data/summarization")["train"]
    counts = [len(ids) for ids in AutoTokenizer.from_pretrained("t5")(made["prompt"][:])["input_ids"]]
    assert counts == made["prompt_tokens"][:] and max(counts) <= 40
    if too_long == "drop":
        assert "1 left out: prompt over 40 tokens" in printed and len(made) == 10
    else:
        assert "1 prompts over 40 tokens lose their end" in printed and len(made) == 11
        assert ("summarize: " + long).startswith(made["prompt"][-1])
        assert counts[-1] >= 38, "no more is cut than must be"


# calculator

ANSWERS = {  # worked answer: the number, or the cause why the row is left out
    "48/2 = <<48/2=24>>24\n#### 24": "24",
    "#### -3": "-3",
    "#### 0.5": "0.5",
    "#### 109,200,000": "109200000",
    "#### $1,234.50": "1234.50",
    "#### 3\n#### 4": "4",
    "The answer is 4.": "no #### before the answer",
    "#### ": "the answer is no number",
    "#### four": "the answer is no number",
    "#### 4 5": "the answer is no number",
    "#### 1,08": "the answer is no number",
    None: "malformed: answer must be text",
}


@pytest.mark.parametrize("worked", ANSWERS)
def test_an_answer_is_a_plain_number(worked):
    """Or the row is left out with the cause."""
    row = raw_row(calculator, {"question": " How many? ", "answer": worked})
    if isinstance(row, str):
        assert row == ANSWERS[worked]
    else:
        assert row["answer"] == ANSWERS[worked] and row["needs_tool"] is True
        system = {"role": "system", "content": calculator.SYSTEM}
        assert row["prompt"] == [system, {"role": "user", "content": "How many?"}]


def test_real_word_problems(prepare):
    """1,000 become rows. 934 answers are what the last <<...=...>> gives; the others go on without such a mark."""
    source = test_data("gsm8k/gsm8k.jsonl")
    prepare("calculator", "--source", source, "--max_prompt_length", 9999)
    made = load_dataset("data/calculator")
    answers = {row["prompt"][1]["content"]: row["answer"] for split in made.values() for row in split}
    assert (len(made["train"]), len(made["test"]), len(answers)) == (900, 100, 1000)
    raw = [json.loads(line) for line in source.read_text().splitlines()]
    marks = [(re.findall(r"<<[^<>]*=([^<>]*)>>", row["answer"]), answers[row["question"].strip()]) for row in raw]
    assert sum(bool(found) and float(found[-1]) == float(answer) for found, answer in marks) == 934
    assert all(re.fullmatch(r"\d+", answer) and calculate(answer) == answer for answer in answers.values())


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(node: ast.expr) -> Fraction:
    """Work a sum out anew, and assert that every part of it is whole and not negative."""
    if isinstance(node, ast.Constant):
        assert 1 <= node.value <= 99
        return Fraction(node.value)
    value = OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    assert value >= 0 and value.denominator == 1
    return value


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_sums_have_their_operations_and_the_answer_of_the_tool(steps):
    """They differ from each other, and one seed gives one list."""
    rows = [calculator.to_row(raw) for raw in calculator.make_sums(steps, 1000, seed=0)]
    questions = [row["prompt"][1]["content"] for row in rows]
    assert len(set(questions)) == 1000
    for question, row in zip(questions[::4], rows[::4], strict=True):
        text = re.fullmatch(r"What is (.*)\?", question)[1]
        tree = ast.parse(text, mode="eval").body
        assert sum(isinstance(node, ast.BinOp) for node in ast.walk(tree)) == steps
        assert row["answer"] == calculate(text) == str(value_of(tree)) and value_of(tree) < 1_000_000, text
    assert all(sum(sign in question for question in questions) > 50 for sign in "+-*/")
    assert steps == 1 or any("(" in question for question in questions)
    again = [[raw["question"] for raw in calculator.make_sums(steps, 5, seed)] for seed in (0, 0, 1)]
    assert again[0] == again[1] == questions[:5] and again[2] != questions[:5]


def test_more_sums_than_there_are_is_refused(monkeypatch):
    """With the remedy."""
    monkeypatch.setattr(calculator, "LARGEST", 1)
    with pytest.raises(ValueError, match=r"only \d+ different sums of 1 operations found; give a smaller --limit"):
        calculator.make_sums(1, 400, seed=0)


def test_the_command_makes_sums(prepare):
    """As many as --limit says."""
    prepare("calculator", "--steps", 2, "--limit", 50, "--seed", 7)
    made = load_dataset("data/calculator")
    assert {split: len(rows) for split, rows in made.items()} == {"train": 45, "test": 5}
    expected = {raw["question"] for raw in calculator.make_sums(2, 50, 7)}
    assert {row["prompt"][1]["content"] for rows in made.values() for row in rows} == expected


def test_the_configuration_of_the_hub_is_read_of_a_download_too(prepare, tmp_path, monkeypatch):
    """Of GSM8K's two; not of other folders or files, which have none."""
    parts = ""
    for name in ("main", "socratic"):
        (tmp_path / "gsm8k" / name).mkdir(parents=True)
        files = []
        for split in ("train", "test"):
            path = f"{name}/{split}-00000-of-00001.parquet"
            Dataset.from_list([{"question": f"{name} {split}?", "answer": "#### 1"}]).to_parquet(
                tmp_path / "gsm8k" / path
            )
            files.append(f"  - split: {split}\n    path: {path}\n")
        parts += f"- config_name: {name}\n  data_files:\n{''.join(files)}"
    (tmp_path / "gsm8k/README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    prepare("calculator", "--source", "gsm8k")
    assert load_dataset("data/calculator")["train"][0]["prompt"][1]["content"] == "main train?"
    prepare("calculator", "--source", "gsm8k/socratic", "--output", "other")
    assert load_dataset("other")["train"][0]["prompt"][1]["content"] == "socratic train?"
    seen = []
    monkeypatch.setattr("grpo_launcher.data.load_splits", lambda *arguments: seen.append(arguments) or {"train": []})
    prepare("calculator", "--output", "third", status=2)
    assert seen == [("openai/gsm8k", "main")] and load_spec("tldr").config is None


# search_qa

NORMANS = "The Normans gave their name to Normandy, a region in France."
ENGINES = " A steam engine does work with steam. "
FLAT = [  # context, question, answers
    (NORMANS, "Where is Normandy?", ["France", "in France", "France "]),
    (ENGINES, "What does a steam engine work with?", ["steam"]),
    (NORMANS, " Who was their king? ", []),
]


def flat_rows(rows=FLAT) -> list[dict]:
    """Return rows in the Hub's columns."""
    made = []
    for number, (context, question, texts) in enumerate(rows):
        answers = {"text": texts, "answer_start": [max(0, context.find(text)) for text in texts]}
        title = "Steam_engine" if context == ENGINES else "Normans"
        row = {"id": str(number), "title": title, "context": context, "question": question, "answers": answers}
        made.append(row)
    return made


def nested_rows() -> dict:
    """Return the same in SQuAD's own form: two articles of a paragraph each."""
    paragraphs = {}
    for row in flat_rows():
        answers = [{"text": text, "answer_start": 0} for text in row["answers"]["text"]]
        question = {"question": row["question"], "id": row["id"], "answers": answers, "is_impossible": not answers}
        if not answers:
            question["plausible_answers"] = [{"text": "a", "answer_start": 0}]
        paragraphs.setdefault((row["title"], row["context"]), []).append(question)
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": questions}]}
        for (title, context), questions in paragraphs.items()
    ]
    return {"version": "v2.0", "data": data}


def read_questions(path: Path, content: list | dict) -> tuple[list[dict | str], list[dict]]:
    """Return the prepared questions and the corpus of a file: jsonl of a list, json of an object."""
    if isinstance(content, list):
        write_lines(path, content)
    else:
        path.write_text(json.dumps(content))
    splits, files = search_qa.load(search_qa.Request("search_qa", source=str(path)))
    return [raw_row(search_qa, raw) for raw in splits["train"]], files["corpus.jsonl"]


def test_flat_and_nested_questions_give_the_same_rows_and_corpus(tmp_path):
    """Answers without repeats; a context that comes again is one passage; without an answer there is no passage."""
    rows, corpus = read_questions(tmp_path / "a.jsonl", flat_rows())
    assert [(row["prompt"][1]["content"], row["answers"], row["passage_id"]) for row in rows] == [
        ("Where is Normandy?", ["France", "in France"], "1"),
        ("What does a steam engine work with?", ["steam"], "2"),
        ("Who was their king?", [], ""),
    ]
    assert all(row["prompt"][0] == {"role": "system", "content": search_qa.SYSTEM} for row in rows)
    assert corpus == [
        {"id": "1", "title": "Normans", "text": NORMANS},
        {"id": "2", "title": "Steam engine", "text": ENGINES.strip()},
    ]
    again, its_corpus = read_questions(tmp_path / "a.json", nested_rows())
    assert its_corpus == corpus and sorted(map(str, again)) == sorted(map(str, rows))


def test_passages_are_numbered_over_all_splits_and_kept_whole(prepare, tmp_path):
    """With a split `validation`, as the Hub has it, and with --limit. Empty rows are counted."""
    more = [("A third.", "Which?", ["third"]), ("A fourth.", " ", ["fourth"]), ("", "What?", [])]
    more.append((NORMANS, "What is it?", ["a duchy"]))
    (tmp_path / "raw").mkdir()
    for split, rows in {"train": FLAT[:2] * 3, "validation": [*FLAT[1:], *more]}.items():
        Dataset.from_list(flat_rows(rows)).to_parquet(tmp_path / f"raw/{split}.parquet")
    printed = prepare("search_qa", "--source", "raw")
    assert "test: 3 of 6 rows" in printed
    for cause in ("empty question", "empty context", "an answer that its passage does not hold"):
        assert f"1 left out: {cause}" in printed, printed
    corpus = (tmp_path / "data/search_qa/corpus.jsonl").read_text()
    assert [json.loads(line)["id"] for line in corpus.splitlines()] == ["1", "2", "3", "4"]
    assert load_dataset("data/search_qa", data_files={"test": "test.parquet"})["test"]["passage_id"][:] == [
        "2",
        "",
        "3",
    ]
    prepare("search_qa", "--source", "raw", "--limit", 4, "--output", "few")
    assert (tmp_path / "few/corpus.jsonl").read_text() == corpus


def test_a_split_without_any_answer_has_the_columns_of_the_other(prepare, tmp_path):
    """Its empty lists are lists of text. The folder loads as two splits, corpus.jsonl beside them."""
    (tmp_path / "raw").mkdir()
    for split, rows in {"train": [2], "test": [0, 1]}.items():
        Dataset.from_list(flat_rows()).select(rows).to_parquet(tmp_path / f"raw/{split}.parquet")
    prepare("search_qa", "--source", "raw")
    made = load_splits("data/search_qa")
    assert made["train"]["answers"][:] == [[]] and made["test"]["answers"][1] == ["steam"]


def changed(content, *path, value):
    """Return the content with one value changed."""
    holder = content
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    return content


QUESTION = ("data", 0, "paragraphs", 0, "qas", 0)
DAMAGED_QUESTIONS = {
    "other columns": ([{"text": "a"}] * 3, "train, question 1: context is None"),
    "a context of null": (changed(flat_rows(), 1, "context", value=None), "train, question 2: context is None"),
    "a question of null": (changed(flat_rows(), 2, "question", value=None), "train, question 3: question is None"),
    "answers in words": (changed(flat_rows(), 1, "answers", value="steam"), "question 2: answers is 'steam'"),
    "answers without text": (changed(flat_rows(), 1, "answers", value={"a": 1}), "question 2: answers is {"),
    "an empty answer": (changed(flat_rows(), 0, "answers", "text", value=[" "]), "question 1: answers is {"),
    "no articles": ({"data": "none"}, "not in SQuAD's form"),
    "no paragraphs": (changed(nested_rows(), "data", 1, "paragraphs", value=None), "not in SQuAD's form"),
    "a broken paragraph": (changed(nested_rows(), "data", 1, "paragraphs", 0, value="oops"), "not in SQuAD's form"),
    "a nested context of null": (changed(nested_rows(), *QUESTION[:4], "context", value=None), "question 1: context"),
    "a nested question of null": (changed(nested_rows(), *QUESTION, "question", value=None), "question 1: question"),
    "an answer without text": (
        changed(nested_rows(), *QUESTION, "answers", 1, value={"answer_start": 0}),
        "question 1: answers",
    ),
    "impossible and answered": (
        changed(nested_rows(), *QUESTION, "is_impossible", value=True),
        "question 1: is_impossible is True",
    ),
    "possible without answers": (
        changed(nested_rows(), *QUESTION, "answers", value=[]),
        "question 1: is_impossible is False",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_QUESTIONS)
def test_a_damaged_question_is_refused_by_its_number(case, tmp_path):
    """And by its field."""
    content, problem = DAMAGED_QUESTIONS[case]
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_questions(tmp_path / ("a.jsonl" if isinstance(content, list) else "a.json"), content)


def test_the_command_names_file_and_number_of_a_damaged_question(prepare, tmp_path):
    """Without a word about the Hub, and it leaves no folder."""
    content, _ = DAMAGED_QUESTIONS["a nested context of null"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    printed = prepare("search_qa", "--source", "a.json", status=2)
    assert "--source a.json: train, question 1: context" in printed and "Hub" not in printed
    assert not (tmp_path / "data").exists()


def test_real_questions_of_squad(prepare, tmp_path):
    """All 1,135 are kept, and each answer is in its passage."""
    prepare("search_qa", "--source", test_data("squad/squad_v2.json"), "--max_prompt_length", 9999)
    folder = tmp_path / "data/search_qa"
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.jsonl", "test.parquet", "train.parquet"]
    made = load_splits(str(folder))
    assert {split: len(rows) for split, rows in made.items()} == {"train": 1022, "test": 113}
    passages = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    assert [passage["id"] for passage in passages] == [str(number) for number in range(1, 121)]
    assert passages[0]["title"] == "Normans"
    texts = {passage["id"]: passage["text"] for passage in passages} | {"": ""}
    rows = [row for split in made.values() for row in split]
    assert sum(row["answers"] == [] for row in rows) == 577
    for row in rows:
        assert len(set(row["answers"])) == len(row["answers"]) and bool(row["answers"]) == bool(row["passage_id"])
        assert all(answer in texts[row["passage_id"]] for answer in row["answers"])
