"""Reddit posts and their authors' own summaries (trl-lib/tldr, or files in its form: prompt, completion) as a dialogue."""

SOURCE = "trl-lib/tldr"
TOKENIZER = "Qwen/Qwen2.5-1.5B-Instruct"
MAX_PROMPT_LENGTH = 768  # tokens; the longest prompt and configs/tldr_*.yaml's reply fit into their context of 1,024
SYSTEM = "You are a helpful assistant. Summarise the Reddit post that the user shows you in one short paragraph, in the voice of its author."


def to_row(raw: dict) -> dict | str:
    """One raw row → {"prompt": [system, user], "reference": the author's summary}, or the cause why it is left out."""
    post, summary = raw.get("prompt"), raw.get("completion")
    if not isinstance(post, str) or not isinstance(summary, str):
        return "malformed: prompt and completion must be text"
    post = post.strip().removesuffix("TL;DR:").strip()
    if not post:
        return "empty post"
    if not summary.strip():
        return "empty summary"
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": post}]
    return {"prompt": prompt, "reference": summary.strip()}
