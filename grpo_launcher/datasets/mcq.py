"""Multiple choice with four options and one right answer, from a CSV file, answered as reasoning and a letter, with a way to refuse."""

import contextlib
import csv
import io
import unicodedata
from pathlib import Path

from datasets import Dataset, DatasetDict

SOURCE = None
TOKENIZER = "Qwen/Qwen2.5-3B-Instruct"
MAX_PROMPT_LENGTH = 768  # tokens; the longest prompt and configs/mcq_refusal.yaml's reply fit into its context of 1,280
SYSTEM = (
    "請回答使用者的四選一選擇題。先把推理寫在 <reasoning> 和 </reasoning> 之間，再把答案寫在 <answer> 和 </answer> 之間，答案只寫一個字母：A、B、C 或 D。"
    "沒有把握時請在 <answer> 裡寫「拒答」：答對得一分，拒答零分，答錯扣一分。"
)
HEADERS = {  # column → how it may be called, spaces, underscores and case aside
    "question": ["題目", "题目", "問題", "问题", "question"],
    **{letter: [f"選項{letter}", f"选项{letter}", f"option{letter}", letter] for letter in "ABCD"},
    "answer": ["正確答案", "正确答案", "答案", "correctanswer", "answer"],
}
ENCODINGS = ["utf-8-sig", "cp950", "big5hkscs", "gb18030"]  # the strictest first: Chinese in another one fails in it, or garbles the header


def make(source: str | None, limit: int | None) -> DatasetDict:
    """The questions of a CSV file as the split train; columns in any order, further ones dropped.

    source: the file, in UTF-8, Big5 or GB18030, with commas, semicolons, tabs or bars, and headers in Chinese or English. Raises ValueError,
    naming the row as a spreadsheet counts it, where a cell is missing, empty or one too many, or the answer is none of A to D.
    """
    if not source:
        raise ValueError("give a CSV file of questions: --source FILE.csv")
    text, delimiter, places = _read(Path(source).read_bytes())
    questions, row, width = [], 1, None
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row, cells in enumerate(table, 1):
            width = width or len(cells)
            if row > 1 and any(cell.strip() for cell in cells):
                questions.append(_question(row, cells, width, places))
    except csv.Error as error:
        raise ValueError(f"row {row + 1}: {error}; a cell that holds quotes or the delimiter must stand in quotes") from None
    if not questions:
        raise ValueError("the file has a header and no question")
    return DatasetDict(train=Dataset.from_list(questions))


def to_row(raw: dict) -> dict | str:
    """One question → {"prompt": [system, user], "answer": the letter}, or the cause why it is left out."""
    if len({raw[letter] for letter in "ABCD"}) < 4:
        return "two options are the same"
    asked = "\n".join([raw["question"], *(f"{letter}. {raw[letter]}" for letter in "ABCD")])
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}], "answer": raw["answer"]}


def _read(data: bytes) -> tuple[str, str, dict[str, int]]:
    """The file's text, its delimiter and where each column stands, in the first encoding in which its header is known."""
    texts = []
    for encoding in ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(data.decode(encoding))
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or not texts:
        raise ValueError("the file is neither UTF-8, Big5 nor GB18030; save it as UTF-8 (in a spreadsheet: CSV UTF-8)")
    for text in texts:
        first = text.partition("\n")[0]
        for delimiter in ",;\t|":
            header = [_plain(cell) for cell in next(csv.reader([first], delimiter=delimiter), [])]
            names = {column: next((name for name in map(_plain, known) if name in header), None) for column, known in HEADERS.items()}
            if None not in names.values():
                if twice := [name for name in names.values() if header.count(name) > 1]:
                    raise ValueError(f"row 1: the column {twice[0]!r} stands there twice; rename one of them")
                return text, delimiter, {column: header.index(name) for column, name in names.items()}
    wanted = ", ".join(known[0] for known in HEADERS.values())
    raise ValueError(f"row 1 is {texts[0].partition(chr(10))[0].strip()[:100]!r}; a header with {wanted} is wanted (question, option A … answer will do too)")


def _plain(header: str) -> str:
    return unicodedata.normalize("NFKC", header).strip().lower().replace(" ", "").replace("_", "")


def _question(row: int, cells: list[str], width: int, places: dict[str, int]) -> dict[str, str]:
    if len(cells) != width:
        raise ValueError(f"row {row} has {len(cells)} cells, and the header {width}; a cell that holds the delimiter must stand in quotes")
    found = {column: cells[place].strip() for column, place in places.items()}
    if empty := [column for column in found if not found[column]]:
        raise ValueError(f"row {row}: the cell {HEADERS[empty[0]][0]} is empty")
    found["answer"] = unicodedata.normalize("NFKC", found["answer"]).upper().strip("().")
    if found["answer"] not in list("ABCD"):
        raise ValueError(f"row {row}: {HEADERS['answer'][0]} is {cells[places['answer']]!r}; A, B, C or D is wanted")
    return found
