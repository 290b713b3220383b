"""Questions to be answered from passages that a search tool finds: SQuAD 2.0, or files in its flat or nested form."""

from collections.abc import Iterable, Iterator

from grpo_launcher.datasets import DatasetSpec, Request, SkipRow, chat_prompt, read_source, text_of

SYSTEM = (
    "Look the user's question up with the search tool. Answer in a few words taken from the passages, as "
    "<answer>…</answer>; where they do not hold the answer, say <answer>unanswerable</answer>."
)


def load(request: Request) -> tuple[dict, dict]:
    """Return questions with the id of their passage, and corpus.jsonl: one {"id", "title", "text"} for each passage.

    Ids count up from "1" over all splits. The corpus is whole whatever --limit says. No answers and the id "" mean
    that the passages do not hold the answer.
    """
    passages = {}
    splits = {}
    for split, raw in read_source(request).items():
        splits[split] = []
        for number, question in enumerate(flatten(raw), 1):
            if problem := find_problem(question):
                raise ValueError(f"{split}, question {number}: {problem}")
            text = question["context"].strip()
            title = (question.get("title") or "").replace("_", " ")
            if text and text not in passages:
                passages[text] = {"id": str(len(passages) + 1), "title": title, "text": text}
            answers = list(dict.fromkeys(answer.strip() for answer in question["answers"]["text"]))
            passage_id = passages[text]["id"] if text and answers else ""
            row = {"question": question["question"], "context": text, "answers": answers, "passage_id": passage_id}
            splits[split].append(row)
    return splits, {"corpus.jsonl": list(passages.values())}


def flatten(rows: Iterable[dict]) -> Iterator[dict]:
    """Yield questions in the Hub's columns. SQuAD's own file is one row, {"data": articles of paragraphs of qas}."""
    for row in rows:
        if "data" not in row:
            yield row
            continue
        try:
            for article in row["data"]:
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        texts = [answer.get("text") for answer in question["answers"]]
                        yield {**article, **paragraph, **question, "answers": {"text": texts}}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not in SQuAD's form: {error!r}") from error


def find_problem(question: dict) -> str:
    """Return what is wrong with a question, or ""."""
    for column in ("context", "question"):
        if not isinstance(question.get(column), str):
            return f"{column} is {question.get(column)!r:.60}, not text"
    answers = question.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        return f"answers is {answers!r:.60}, not an object with a list of texts"
    if question.get("is_impossible") not in (None, not texts):
        return f"is_impossible is {question['is_impossible']} beside {len(texts)} answers"
    return ""


def to_row(raw: dict) -> dict:
    """Turn a question into {"prompt": [system, user], "answers": distinct texts, "passage_id": "17"}."""
    prompt = chat_prompt(SYSTEM, text_of(raw, "question"))
    context = text_of(raw, "context")
    if not all(answer in context for answer in raw["answers"]):
        raise SkipRow("an answer that its passage does not hold")
    return {"prompt": prompt, "answers": raw["answers"], "passage_id": raw["passage_id"]}


DATASET = DatasetSpec(
    to_row,
    tokenizer="Qwen/Qwen2.5-3B-Instruct",
    max_prompt_length=256,  # without the tool's schema, which the chat template renders in 150 to 200 tokens more
    columns={"answers": ["string"], "passage_id": "string"},
    source="rajpurkar/squad_v2",
    load=load,
)
