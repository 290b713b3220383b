"""Word problems with one number as answer, to be solved in words: openai/gsm8k, or files in its form."""

from grpo_launcher.datasets import DatasetSpec, calculator, chat_prompt, text_of

SYSTEM = r"Solve the user's problem step by step. End with the final answer alone in \boxed{}."


def to_row(raw: dict) -> dict:
    """Turn a worked problem into {"prompt": [system, user], "answer": number}."""
    return {"prompt": chat_prompt(SYSTEM, text_of(raw, "question")), "answer": calculator.to_row(raw)["answer"]}


DATASET = DatasetSpec(
    to_row,
    tokenizer="Qwen/Qwen2.5-1.5B-Instruct",
    max_prompt_length=512,
    columns={"answer": "string"},
    source="openai/gsm8k",
    config="main",
)
