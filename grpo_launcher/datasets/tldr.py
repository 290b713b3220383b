"""Reddit posts and their authors' own summaries, as a dialogue: trl-lib/tldr, or files with its columns."""

from grpo_launcher.datasets import DatasetSpec, SkipRow, chat_prompt, text_of

SYSTEM = (
    "You are a helpful assistant. Summarise the Reddit post that the user shows you in one short paragraph, "
    "in the voice of its author."
)


def to_row(raw: dict) -> dict:
    """Turn {"prompt": post, "completion": summary} into {"prompt": [system, user], "reference": summary}."""
    post = text_of(raw, "prompt").removesuffix("TL;DR:").strip()
    if not post:
        raise SkipRow("empty prompt")
    return {"prompt": chat_prompt(SYSTEM, post), "reference": text_of(raw, "completion")}


DATASET = DatasetSpec(
    to_row,
    tokenizer="Qwen/Qwen2.5-1.5B-Instruct",
    max_prompt_length=768,  # with the completions of configs/tldr_*.yaml they fit into a context of 1,024
    columns={"reference": "string"},
    source="trl-lib/tldr",
)
