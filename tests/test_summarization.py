"""process_dataset.py summarization: columns, splits, prefixes and articles that are too long."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from datasets import load_dataset
from tiny_models import make_encoder_model
from transformers import AutoTokenizer

from grpo_launcher.datasets import summarization

LONG = "The cat sat on the mat and looked at the moon. " * 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A folder with a tokenizer that ends a text with a token of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_encoder_model(folder, "t5")
    return str(folder)


@pytest.fixture
def prepare(tmp_path, tokenizer):
    """prepare(rows by split, *flags) → the finished command; the rows lie in out/."""

    def run(splits: dict, *flags: str):
        (tmp_path / "raw").mkdir()
        for split, rows in splits.items():
            (tmp_path / f"raw/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = [sys.executable, str(ROOT / "process_dataset.py"), "summarization", "--source", "raw", "--tokenizer", tokenizer, "--output", "out", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


def rows(count: int, article: str = "article", summary: str = "highlights") -> list[dict]:
    """Short articles, each another one."""
    return [{article: f"Article {number}. The cat sat on the mat.", summary: f"A cat, {number}.", "id": str(number)} for number in range(count)]


@pytest.mark.parametrize("columns", [*summarization.COLUMNS, ("body", "abstract")], ids=" and ".join)
def test_the_columns_of_known_datasets_are_found_and_others_named(columns):
    """The gold summary as `reference`, since TRL drops a column called completion; chat messages without a prefix."""
    named = {"article": "body", "summary": "abstract"} if columns[0] == "body" else {}
    made = summarization.to_row(rows(1, *columns)[0], **named)
    assert made["reference"] == "A cat, 0." and [message["role"] for message in made["prompt"]] == ["system", "user"]
    assert made["prompt"][1]["content"] == "Article 0. The cat sat on the mat."


def test_plain_text_in_three_splits(prepare, tmp_path):
    """Behind the prefix, of columns named by flags."""
    flags = ["--prefix", "summarize: ", "--article", "body", "--summary", "abstract"]
    done = prepare({split: rows(12, "body", "abstract") for split in ("train", "validation", "test")}, *flags)
    assert done.returncode == 0, done.stderr
    made = load_dataset(str(tmp_path / "out"))
    assert {split: len(made[split]) for split in made} == {"train": 12, "validation": 12, "test": 12}
    first = made["train"][0]
    assert (first["prompt"], first["reference"]) == ("summarize: Article 0. The cat sat on the mat.", "A cat, 0.")
    assert "the source has no split" not in done.stdout.lower()


def test_a_missing_validation_split_is_made_and_said_so(prepare, tmp_path):
    """Of train's rows, which it then lacks."""
    done = prepare({"train": rows(40), "test": rows(5)}, "--prefix", "")
    assert done.returncode == 0, done.stderr
    assert "The source has no split validation: 4 of its rows, drawn at random, become it" in done.stdout
    made = load_dataset(str(tmp_path / "out"))
    parts = {split: set(made[split]["prompt"]) for split in made}
    assert {split: len(part) for split, part in parts.items()} == {"train": 36, "validation": 4, "test": 5} and not parts["train"] & parts["validation"]


BAD = [
    {"article": LONG, "highlights": "Long."},
    {"article": "A.", "highlights": " "},
    {"article": None, "highlights": "B."},
    {"article": 3, "highlights": "C."},
]


@pytest.mark.parametrize("cut", [False, True], ids=["left out", "cut"])
def test_what_does_not_fit_is_counted(cut, prepare, tmp_path, tokenizer):
    """A long article is left out, or loses its end to the token where that is asked; an empty summary goes in any case."""
    splits = {"train": rows(10) + BAD, "validation": rows(3), "test": rows(3)}
    done = prepare(splits, "--prefix", "summarize: ", "--max_prompt_length", "40", *(["--too_long", "cut"] if cut else []))
    assert done.returncode == 0, done.stderr
    causes = ["1 left out: empty summary", "1 left out: empty article", "1 left out: malformed: article and highlights must be text"]
    causes += ["train: 1 prompts over 40 tokens lose their end"] if cut else ["1 left out: prompt over 40 tokens"]
    assert all(cause in done.stdout for cause in causes), done.stdout
    made = load_dataset(str(tmp_path / "out"))["train"]
    assert len(made) == (11 if cut else 10) and max(made["prompt_tokens"]) <= 40
    assert [len(ids) for ids in AutoTokenizer.from_pretrained(tokenizer)(made["prompt"][:])["input_ids"]] == made["prompt_tokens"][:]
    if cut:
        assert made["prompt"][-1].startswith("summarize: The cat sat") and ("summarize: " + LONG).startswith(made["prompt"][-1])
        assert made["prompt_tokens"][-1] >= 38, "no more is cut than must be"


REFUSED = {
    "unknown columns": ([{"title": "a", "text_": "b"}], [], "name them, --article COLUMN --summary COLUMN"),
    "one column named": (rows(3), ["--article", "article"], "--article and --summary go together"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_named(case, prepare, tmp_path):
    """With the remedy, and nothing is written."""
    raw, flags, said = REFUSED[case]
    done = prepare({"train": raw * 5, "test": raw}, *flags)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_options_of_summarization_are_for_it_alone(tmp_path):
    """A prefix for chat messages would be passed over in silence."""
    command = [sys.executable, str(ROOT / "process_dataset.py"), "tldr", "--prefix", "summarize: "]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--prefix is for summarization" in done.stderr
