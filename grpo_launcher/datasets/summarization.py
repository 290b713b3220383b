"""Articles and their summaries, to be summarised: CNN/DailyMail, XSum, or any Hub id, folder or file with the two columns.

With a prefix (T5 was taught on "summarize: "; BART on none: an empty one) a prompt is plain text, for a model with an encoder; without one chat messages.
"""

SOURCE = "abisee/cnn_dailymail"
CONFIG = "3.0.0"
TOKENIZER = "google-t5/t5-small"
MAX_PROMPT_LENGTH = 512  # tokens, which T5 was taught on
SPLITS = ("train", "validation", "test")
COLUMNS = [("article", "highlights"), ("document", "summary"), ("article", "summary"), ("dialogue", "summary"), ("text", "summary"), ("prompt", "completion")]
SYSTEM = "You are a helpful assistant. Summarise the text that the user shows you in a few sentences."


def to_row(raw: dict, article: str | None = None, summary: str | None = None, prefix: str | None = None) -> dict | str:
    """One raw row → {"prompt": text or [system, user], "reference": the summary}, or the cause why it is left out.

    article, summary: its columns; by default the first pair of COLUMNS that it has. The gold text is no `completion`, which no reward would get.
    """
    pairs = [(article, summary)] if article and summary else COLUMNS
    pair = next((pair for pair in pairs if set(pair) <= set(raw)), None)
    if pair is None:
        return f"neither of its columns ({', '.join(raw)}) is known: name them, --article COLUMN --summary COLUMN"
    text, gold = (raw[column] or "" for column in pair)
    if not isinstance(text, str) or not isinstance(gold, str):
        return f"malformed: {' and '.join(pair)} must be text"
    if not text.strip() or not gold.strip():
        return f"empty {'summary' if text.strip() else 'article'}"
    if prefix is not None:
        return {"prompt": prefix + text.strip(), "reference": gold.strip()}
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text.strip()}], "reference": gold.strip()}
