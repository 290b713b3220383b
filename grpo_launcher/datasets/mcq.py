"""Multiple choice with four options and one right answer, from a CSV file, with a way to refuse."""

import csv
import io
import unicodedata
from pathlib import Path

from grpo_launcher.datasets import DatasetSpec, Request, SkipRow, chat_prompt

SYSTEM = (
    "請回答使用者的四選一選擇題。先把推理寫在 <reasoning> 和 </reasoning> 之間，再把答案寫在 <answer> 和 </answer> "
    "之間，答案只寫一個字母：A、B、C 或 D。沒有把握時請在 <answer> 裡寫「拒答」：答對得一分，拒答零分，答錯扣一分。"
)
HEADERS = {  # column: what it may be called, as _plain writes it
    "question": ["題目", "题目", "問題", "问题", "question"],
    **{letter: [f"{word}{letter.lower()}" for word in ("選項", "选项", "option", "")] for letter in "ABCD"},
    "answer": ["正確答案", "正确答案", "答案", "correctanswer", "answer"],
}
# The strictest first: Chinese in another encoding fails in it, or garbles the header. charset-normalizer takes two
# files in five of real questions in cp950 for big5hkscs, which changes some characters.
ENCODINGS = ["utf-8-sig", "cp950", "big5hkscs", "gb18030"]


def load(request: Request) -> tuple[dict, dict]:
    """Read the questions of a CSV file: in UTF-8, Big5 or GB18030, with commas, semicolons, tabs or bars.

    Raises ValueError with the row, as a spreadsheet counts it, where a cell is missing, empty or one too many, or
    where the answer is none of A to D.
    """
    if not request.source:
        raise ValueError("mcq needs a CSV file of questions: --source FILE.csv")
    text, delimiter, columns = _read_header(Path(request.source).read_bytes())
    records = []
    try:
        for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            records.append(record)
    except csv.Error as error:
        raise ValueError(f"row {len(records) + 1}: {error}; put a cell that holds quotes in quotes") from error
    questions = []
    for row, cells in enumerate(records[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(records[0]):
            count = f"{len(cells)} cells, and the header has {len(records[0])}"
            raise ValueError(f"row {row}: {count}; put a cell that holds the delimiter in quotes")
        question = {column: cells[index].strip() for column, index in columns.items()}
        if empty := [HEADERS[column][0] for column in question if not question[column]]:
            raise ValueError(f"row {row}: the cell {empty[0]} is empty")
        answer = unicodedata.normalize("NFKC", question["answer"]).upper().strip("().")
        if answer not in ("A", "B", "C", "D"):
            raise ValueError(f"row {row}: {HEADERS['answer'][0]} is {question['answer']!r}; write A, B, C or D")
        questions.append(question | {"answer": answer})
    if not questions:
        raise ValueError("a header and no question")
    return {"train": questions}, {}


def _read_header(data: bytes) -> tuple[str, str, dict[str, int]]:
    """Return a file's text, its delimiter and the index of each column, in the first encoding with a known header."""
    for encoding in ENCODINGS:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        first = text.partition("\n")[0]
        delimiter = max(",;\t|", key=first.count)
        header = [_plain(cell) for cell in next(csv.reader([first], delimiter=delimiter), [])]
        names = {column: next((name for name in known if name in header), None) for column, known in HEADERS.items()}
        if None in names.values():
            continue
        if twice := [name for name in names.values() if header.count(name) > 1]:
            raise ValueError(f"row 1: the column {twice[0]} stands there twice; rename one of them")
        return text, delimiter, {column: header.index(name) for column, name in names.items()}
    wanted = ", ".join(names[0] for names in HEADERS.values())
    raise ValueError(
        f"row 1: no header with {wanted} (or question, option A … answer) in UTF-8, Big5 or GB18030; "
        "name the columns so, and save the file as UTF-8 (in a spreadsheet: CSV UTF-8)"
    )


def _plain(header: str) -> str:
    return unicodedata.normalize("NFKC", header).strip().lower().replace(" ", "").replace("_", "")


def to_row(raw: dict) -> dict:
    """Turn a question into {"prompt": [system, user], "answer": letter}."""
    if len({raw[letter] for letter in "ABCD"}) < 4:
        raise SkipRow("two options are the same")
    lines = [raw["question"], *(f"{letter}. {raw[letter]}" for letter in "ABCD")]
    return {"prompt": chat_prompt(SYSTEM, "\n".join(lines)), "answer": raw["answer"]}


DATASET = DatasetSpec(
    to_row,
    tokenizer="Qwen/Qwen2.5-3B-Instruct",
    max_prompt_length=768,  # with the completions of configs/mcq_refusal.yaml they fit into a context of 1,280
    columns={"answer": "string"},
    load=load,
)
