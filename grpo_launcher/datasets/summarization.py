"""Articles to be summarised: CNN/DailyMail, XSum, or any dataset or file with a column of texts and one of summaries.

With a prefix a prompt is plain text, for a model with an encoder: "summarize: " for T5, "" for BART.
"""

from grpo_launcher.datasets import DatasetSpec, SkipRow, chat_prompt, text_of

COLUMNS = [  # pairs of known datasets
    ("article", "highlights"),
    ("document", "summary"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("prompt", "completion"),
]
SYSTEM = "You are a helpful assistant. Summarise the text that the user shows you in a few sentences."


def to_row(raw: dict, article: str | None = None, summary: str | None = None, prefix: str | None = None) -> dict:
    """Turn a raw row into {"prompt": text or [system, user], "reference": summary}.

    The summary must not be called completion: TRL hands no such column to a reward.
    """
    pairs = [(article, summary)] if article else COLUMNS
    pair = next((pair for pair in pairs if set(pair) <= set(raw)), None)
    if pair is None:
        raise SkipRow(f"unknown columns {', '.join(raw)}: name two, --article COLUMN --summary COLUMN")
    text, reference = (text_of(raw, column) for column in pair)
    return {"prompt": chat_prompt(SYSTEM, text) if prefix is None else prefix + text, "reference": reference}


DATASET = DatasetSpec(
    to_row,
    tokenizer="google-t5/t5-small",
    max_prompt_length=512,  # what T5 was pre-trained on
    columns={"reference": "string"},
    source="abisee/cnn_dailymail",
    config="3.0.0",
    splits=("train", "validation", "test"),
    options=("article", "summary", "prefix"),
)
