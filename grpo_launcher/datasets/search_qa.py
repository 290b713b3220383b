"""Questions to be answered from passages that a search tool finds: SQuAD 2.0 (rajpurkar/squad_v2, or files in its form, flat or nested)."""

from collections.abc import Iterator

from datasets import Dataset, DatasetDict

SOURCE = "rajpurkar/squad_v2"
TOKENIZER = "Qwen/Qwen2.5-3B-Instruct"
MAX_PROMPT_LENGTH = 256  # tokens, without the tool's schema: with tools the template renders 150 to 200 more into every prompt
SYSTEM = (
    "Look the user's question up with the search tool. Answer in a few words taken from the passages, as <answer>…</answer>; "
    "where they do not hold the answer, say <answer>unanswerable</answer>."
)
KINDS = {str: "text", list: "a list", dict: "an object"}


def arrange(splits: DatasetDict) -> tuple[DatasetDict, dict[str, list[dict]]]:
    """Flat questions with their passage's id, and what goes beside them: corpus.jsonl, one {"id", "title", "text"} a distinct context.

    Ids count up from "1" over all splits, in order of appearance; --limit draws questions and leaves the corpus whole. Raises ValueError, naming row
    or path and the field, where something is missing or of the wrong type.
    """
    passages, flat = {}, DatasetDict()
    for split, raw in splits.items():
        rows = []
        for place, row in _questions(split, raw):
            text = _field(row, "context", str, place).strip()
            answers = _field(_field(row, "answers", dict, place), "text", list, f"{place}: answers")
            if not all(isinstance(answer, str) and answer.strip() for answer in answers):
                raise ValueError(f"{place}: answers: text is {answers!r:.60}; a list of texts that are not empty is wanted")
            question, known = _field(row, "question", str, place).strip(), list(dict.fromkeys(answer.strip() for answer in answers))
            if text and text not in passages:
                passages[text] = {"id": str(len(passages) + 1), "title": (row.get("title") or "").replace("_", " "), "text": text}
            rows.append({"question": question, "context": text, "answers": known, "passage_id": passages[text]["id"] if text and known else ""})
        flat[split] = Dataset.from_list(rows)
    return flat, {"corpus.jsonl": list(passages.values())}


def to_row(raw: dict) -> dict | str:
    """One question → {"prompt": [system, user], "answers": [distinct texts], "passage_id": "17"}, or the cause why it is left out.

    No answers and passage_id "": the passages do not hold the answer.
    """
    if not raw["question"] or not raw["context"]:
        return f"empty {'context' if raw['question'] else 'question'}"
    if not all(answer in raw["context"] for answer in raw["answers"]):
        return "an answer that its passage does not hold"
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": raw["question"]}]
    return {"prompt": prompt, "answers": raw["answers"], "passage_id": raw["passage_id"]}


def _questions(split: str, raw: Dataset) -> Iterator[tuple[str, dict]]:
    """Where each question stands, and the question in the Hub's columns; SQuAD's own file is one row that nests them."""
    for number, row in enumerate(raw, 1):
        if "data" not in row:
            yield f"{split} row {number}", row
            continue
        for article, above in _items(row, "data", split):
            for paragraph, within in _items(article, "paragraphs", above):
                for asked, place in _items(paragraph, "qas", within):
                    answers = [_field(answer, "text", str, at) for answer, at in _items(asked, "answers", place)]
                    if asked.get("is_impossible") not in (None, not answers):
                        raise ValueError(f"{place}: is_impossible is {asked['is_impossible']} beside {len(answers)} answers")
                    yield place, {**article, **paragraph, **asked, "answers": {"text": answers}}


def _items(holder: dict, name: str, place: str) -> Iterator[tuple[dict, str]]:
    return ((item, f"{place}.{name}[{number}]") for number, item in enumerate(_field(holder, name, list, place)))


def _field(holder: dict, name: str, kind: type, place: str):
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{place}: {name} is {value!r:.60}; {KINDS[kind]} is wanted")
    return value
