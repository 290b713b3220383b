"""Data for a model with tools: sums for the calculator, questions and the corpus that the search looks through."""

import ast
import json
import operator
import re
from fractions import Fraction

import pytest
import test_process_dataset
from conftest import test_data
from datasets import Dataset, DatasetDict
from test_process_dataset import process

import process_dataset
from grpo_launcher.datasets import calculator, search_qa, tldr
from grpo_launcher.tools.calculator import calculator as calculate
from grpo_launcher.data import load_rows

tokenizer = test_process_dataset.tokenizer
GOLDS = {  # a worked answer → the gold answer, or the cause
    "whole": ("48/2 = <<48/2=24>>24\n#### 24", "24"),
    "negative": ("#### -3", "-3"),
    "a fraction": ("#### 0.5", "0.5"),
    "thousands": ("#### 109,200,000", "109200000"),
    "dollars and cents": ("#### $1,234.50", "1234.50"),
    "the last mark counts": ("#### 3\n#### 4", "4"),
    "no mark": ("The answer is 4.", "no #### before the answer"),
    "nothing behind the mark": ("#### ", "the answer is no number"),
    "words": ("#### four", "the answer is no number"),
    "two numbers": ("#### 4 5", "the answer is no number"),
    "a comma at the wrong place": ("#### 1,08", "the answer is no number"),
    "no text": (None, "malformed: question and answer must be text"),
}


@pytest.mark.parametrize("case", GOLDS)
def test_a_gold_answer_is_a_plain_number(case):
    """Or the row is left out with the cause."""
    worked, wanted = GOLDS[case]
    row = calculator.to_row({"question": " How many? ", "answer": worked})
    if isinstance(row, str):
        assert row == wanted
    else:
        assert row["answer"] == wanted and row["needs_tool"] is True
        assert row["prompt"] == [{"role": "system", "content": calculator.SYSTEM}, {"role": "user", "content": "How many?"}]


def test_real_word_problems(tmp_path):
    """All 1,000 become rows; 934 golds are what the last <<…=…>> gives, the others go on from there without a mark, or show none."""
    source = test_data("gsm8k/gsm8k.jsonl")
    done = process(tmp_path, "--source", str(source), "--tokenizer", str(test_data("qwen2.5_tokenizer")), name="calculator")
    assert done.returncode == 0, done.stderr
    made = load_rows(str(tmp_path / "data/calculator"))
    golds = {row["prompt"][1]["content"]: row["answer"] for split in made.values() for row in split}
    raw = [json.loads(line) for line in source.read_text().splitlines()]
    assert (len(made["train"]), len(made["test"]), len(golds)) == (900, 100, 1000)
    marks = [(re.findall(r"<<[^<>]*=([^<>]*)>>", row["answer"]), golds[row["question"].strip()]) for row in raw]
    assert sum(bool(found) and float(found[-1]) == float(gold) for found, gold in marks) == 934
    assert all(re.fullmatch(r"\d+", gold) and calculate(gold) == gold for _, gold in marks)


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(node: ast.expr) -> Fraction:
    """What a sum comes to, worked out anew; every part of it is whole and not negative."""
    if isinstance(node, ast.Constant):
        assert 1 <= node.value <= 99
        return Fraction(node.value)
    part = OPERATIONS[type(node.op)](value(node.left), value(node.right))
    assert part >= 0 and part.denominator == 1
    return part


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_sums_have_their_operations_and_the_tools_answer(steps):
    """And differ from each other; one seed gives one list."""
    rows = [calculator.to_row(raw) for raw in calculator.sums(steps, None, 0)["train"]]
    asked = [row["prompt"][1]["content"] for row in rows]
    assert len(set(asked)) == 1000
    for question, row in zip(asked, rows, strict=True):
        text = re.fullmatch(r"What is (.*)\?", question)[1]
        tree = ast.parse(text, mode="eval").body
        assert sum(isinstance(node, ast.BinOp) for node in ast.walk(tree)) == steps
        assert row["answer"] == calculate(text) == str(value(tree)) and value(tree) < 1_000_000, text
    for sign in "+-*/":
        assert sum(sign in question for question in asked) > 50
    assert steps == 1 or any("(" in question for question in asked)
    again = [calculator.sums(steps, 5, seed)["train"]["question"][:] for seed in (0, 0, 1)]
    assert again[0] == again[1] == asked[:5] and again[2] != asked[:5]


def test_sums_through_the_command(tmp_path, tokenizer):
    """--limit says how many; more than there are is refused."""
    done = process(tmp_path, "--steps", "2", "--limit", "50", "--seed", "7", "--tokenizer", tokenizer, name="calculator")
    assert done.returncode == 0, done.stderr
    made = load_rows(str(tmp_path / "data/calculator"))
    assert {split: len(rows) for split, rows in made.items()} == {"train": 45, "test": 5}
    questions = {raw["question"] for raw in calculator.sums(2, 50, 7)["train"]}
    assert {row["prompt"][1]["content"] for rows in made.values() for row in rows} == questions
    with pytest.raises(process_dataset.DataError, match=r"^--steps 1: only \d+ different sums found; give a smaller --limit\.$"):
        process_dataset.process("calculator", None, tmp_path / "many", tokenizer, 999, 30_000, 0, steps=1)


WRONG = {
    "another dataset": ("tldr", ["--steps", "2"], "--steps is for calculator"),
    "with a source": ("calculator", ["--steps", "2", "--source", "a.jsonl"], "without --source"),
    "none": ("calculator", ["--steps", "0"], "argument --steps: invalid choice: 0"),
    "too many": ("calculator", ["--steps", "9"], "argument --steps: invalid choice: 9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_steps_where_they_say_nothing_are_refused(case, capsys):
    """Before anything is read."""
    name, flags, said = WRONG[case]
    with pytest.raises(SystemExit) as ended:
        process_dataset.arguments([name, *flags])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_configuration_of_the_hub_is_asked_for_where_there_is_one(tmp_path, tokenizer):
    """On the Hub and in a download of it, of which that part is read; not in other folders or files, nor of other datasets."""
    for name in ("main", "socratic"):
        (tmp_path / "gsm8k" / name).mkdir(parents=True)
        for split in ("train", "test"):
            Dataset.from_list([{"question": f"{name} {split}?", "answer": "#### 1"}]).to_parquet(tmp_path / "gsm8k" / name / f"{split}-00000-of-00001.parquet")
    parts = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n  - split: test\n    path: {name}/test-*\n"
        for name in ("main", "socratic")
    )
    (tmp_path / "gsm8k/README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    done = process(tmp_path, "--source", "gsm8k", "--tokenizer", tokenizer, name="calculator")
    assert done.returncode == 0, done.stderr
    assert load_rows(str(tmp_path / "data/calculator"))["train"][0]["prompt"][1]["content"] == "main train?"
    assert process_dataset._config(calculator, "openai/gsm8k") == "main"
    assert process_dataset._config(calculator, str(tmp_path / "gsm8k/socratic")) is None
    assert process_dataset._config(calculator, "a.jsonl") is None and process_dataset._config(tldr, tldr.SOURCE) is None


NORMANS = "The Normans gave their name to Normandy, a region in France."
ENGINES = " A steam engine does work with steam. "
FLAT = [  # context, question, answers
    (NORMANS, "Where is Normandy?", ["France", "in France", "France "]),
    (ENGINES, "What does a steam engine work with?", ["steam"]),
    (NORMANS, " Who was their king? ", []),
]


def flat_rows(rows=FLAT) -> list[dict]:
    """Rows in the Hub's columns."""
    answers = [{"text": texts, "answer_start": [max(0, context.find(text)) for text in texts]} for context, _, texts in rows]
    return [
        {"id": str(at), "title": "Steam_engine" if row[0] == ENGINES else "Normans", "context": row[0], "question": row[1], "answers": answers[at]}
        for at, row in enumerate(rows)
    ]


def nested() -> dict:
    """The same in SQuAD's own form: two articles of a paragraph each."""
    paragraphs = {}
    for row in flat_rows():
        answers = [{"text": text, "answer_start": 0} for text in row["answers"]["text"]]
        asked = {"question": row["question"], "id": row["id"], "answers": answers, "is_impossible": not answers}
        paragraphs.setdefault((row["title"], row["context"]), []).append(asked | ({} if answers else {"plausible_answers": [{"text": "a", "answer_start": 0}]}))
    return {"version": "v2.0", "data": [{"title": key[0], "paragraphs": [{"context": key[1], "qas": asked}]} for key, asked in paragraphs.items()]}


def arranged(path, content) -> tuple[list[dict], list[dict]]:
    """Questions and corpus of a file: jsonl of a list, json of an object."""
    path.write_text("\n".join(map(json.dumps, content)) if isinstance(content, list) else json.dumps(content))
    splits, beside = search_qa.arrange(load_rows(str(path)))
    return [search_qa.to_row(raw) for raw in splits["train"]], beside["corpus.jsonl"]


def test_flat_and_nested_questions_give_the_same_rows_and_corpus(tmp_path):
    """Answers without repeats; a context that comes again is one passage; what cannot be answered has neither answers nor passage."""
    rows, corpus = arranged(tmp_path / "a.jsonl", flat_rows())
    assert [(row["prompt"][1]["content"], row["answers"], row["passage_id"]) for row in rows] == [
        ("Where is Normandy?", ["France", "in France"], "1"),
        ("What does a steam engine work with?", ["steam"], "2"),
        ("Who was their king?", [], ""),
    ]
    assert all(row["prompt"][0] == {"role": "system", "content": search_qa.SYSTEM} for row in rows)
    assert corpus == [{"id": "1", "title": "Normans", "text": NORMANS}, {"id": "2", "title": "Steam engine", "text": ENGINES.strip()}]
    again, its_corpus = arranged(tmp_path / "a.json", nested())
    assert its_corpus == corpus and sorted(map(str, again)) == sorted(map(str, rows))


def test_passages_are_numbered_over_all_splits_and_empty_rows_are_counted(tmp_path, tokenizer):
    """Through the command, with a split `validation` as the Hub has it; --limit leaves the corpus whole."""
    more = [("A third passage.", "Which?", ["third"]), ("A fourth.", " ", ["fourth"]), ("", "What?", []), (NORMANS, "What is it?", ["a duchy"])]
    (tmp_path / "raw").mkdir()
    for split, rows in {"train": FLAT[:2] * 3, "validation": [*FLAT[1:], *more]}.items():
        Dataset.from_list(flat_rows(rows)).to_parquet(tmp_path / f"raw/{split}.parquet")
    done = process(tmp_path, "--source", "raw", "--tokenizer", tokenizer, name="search_qa")
    assert done.returncode == 0, done.stderr
    for line in ["test: 3 of 6 rows", "1 left out: empty question", "1 left out: empty context", "1 left out: an answer that its passage does not hold"]:
        assert line in done.stdout, done.stdout
    corpus = (tmp_path / "data/search_qa/corpus.jsonl").read_text()
    assert [json.loads(line)["id"] for line in corpus.splitlines()] == ["1", "2", "3", "4"]
    test = load_rows(str(tmp_path / "data/search_qa"))["test"]
    assert test["passage_id"][:] == ["2", "", "3"]
    process_dataset.process("search_qa", str(tmp_path / "raw"), tmp_path / "few", tokenizer, 999, 4, 0)
    assert (tmp_path / "few/corpus.jsonl").read_text() == corpus


def test_a_split_without_any_answer_loads(tmp_path, tokenizer):
    """Its empty lists are lists of text all the same."""
    (tmp_path / "raw").mkdir()
    for split, rows in {"train": [2], "test": [0, 1]}.items():
        Dataset.from_list(flat_rows()).select(rows).to_parquet(tmp_path / f"raw/{split}.parquet")
    process_dataset.process("search_qa", str(tmp_path / "raw"), tmp_path / "made", tokenizer, 999, None, 0)
    made = load_rows(str(tmp_path / "made"))
    assert made["train"]["answers"][:] == [[]] and made["test"]["answers"][1] == ["steam"]


def changed(content, *path, value):
    """The content with one place of it changed."""
    holder = content
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    return content


ASKED = ("data", 0, "paragraphs", 0, "qas", 0)
PLACE = "train.data[0].paragraphs[0].qas[0]"
DAMAGED = {
    "other columns": ([{"text": "a"}] * 3, "train row 1: context is None; text is wanted"),
    "a context that is null": (changed(flat_rows(), 1, "context", value=None), "train row 2: context is None; text is wanted"),
    "a question that is null": (changed(flat_rows(), 2, "question", value=None), "train row 3: question is None; text is wanted"),
    "answers in words": (changed(flat_rows(), 1, "answers", value="steam"), "train row 2: answers is 'steam'; an object is wanted"),
    "answers without text": (changed(flat_rows(), 1, "answers", value={"a": 1}), "train row 2: answers: text is None; a list is wanted"),
    "an empty answer": (changed(flat_rows(), 0, "answers", "text", value=[" "]), "train row 1: answers: text is [' ']; a list of texts"),
    "no articles": ({"data": "none"}, "train: data is 'none'; a list is wanted"),
    "an article without paragraphs": (changed(nested(), "data", 1, "paragraphs", value=None), "train.data[1]: paragraphs is None; a list is wanted"),
    "a paragraph that is none": (changed(nested(), "data", 1, "paragraphs", 0, value="oops"), "train.data[1].paragraphs[0]: qas is None"),
    "a nested context that is null": (changed(nested(), *ASKED[:4], "context", value=None), f"{PLACE}: context is None; text is wanted"),
    "a nested question that is null": (changed(nested(), *ASKED, "question", value=None), f"{PLACE}: question is None; text is wanted"),
    "a nested answer without text": (changed(nested(), *ASKED, "answers", 1, value={"answer_start": 0}), f"{PLACE}.answers[1]: text is None"),
    "impossible and answered": (changed(nested(), *ASKED, "is_impossible", value=True), f"{PLACE}: is_impossible is True beside 3 answers"),
    "possible and not answered": (changed(nested(), *ASKED, "answers", value=[]), f"{PLACE}: is_impossible is False beside 0 answers"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_question_is_refused_with_its_place(case, tmp_path):
    """Row or path, and the field."""
    content, said = DAMAGED[case]
    with pytest.raises(ValueError, match=re.escape(said)):
        arranged(tmp_path / ("a.jsonl" if isinstance(content, list) else "a.json"), content)


def test_a_damaged_file_leaves_no_folder(tmp_path, tokenizer):
    """Through the command: one line that names file, place and field, without a word on the Hub."""
    (tmp_path / "a.json").write_text(json.dumps(DAMAGED["a nested context that is null"][0]))
    done = process(tmp_path, "--source", "a.json", "--tokenizer", tokenizer, name="search_qa")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"error: --source a.json: {PLACE}: context is None; text is wanted.", done.stderr
    assert not (tmp_path / "data").exists()


def test_real_questions(tmp_path):
    """All 1,135 are kept; each answer stands in its passage; the folder still has two splits."""
    source = str(test_data("squad/squad_v2.json"))
    done = process(tmp_path, "--source", source, "--tokenizer", str(test_data("qwen2.5_tokenizer")), name="search_qa")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "data/search_qa").iterdir()) == ["corpus.jsonl", "test.parquet", "train.parquet"]
    made = load_rows(str(tmp_path / "data/search_qa"))
    assert isinstance(made, DatasetDict) and {split: len(rows) for split, rows in made.items()} == {"train": 1022, "test": 113}
    passages = [json.loads(line) for line in (tmp_path / "data/search_qa/corpus.jsonl").read_text().splitlines()]
    assert [passage["id"] for passage in passages] == [str(number) for number in range(1, 121)] and passages[0]["title"] == "Normans"
    texts = {passage["id"]: passage["text"] for passage in passages}
    rows = [row for split in made.values() for row in split]
    assert sum(row["answers"] == [] for row in rows) == 577
    for row in rows:
        assert len(set(row["answers"])) == len(row["answers"])
        assert all(answer in texts[row["passage_id"]] for answer in row["answers"]) if row["answers"] else row["passage_id"] == ""
