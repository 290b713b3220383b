"""Everyday requests in English, 240 made from lists: short prompts for a small instruction-tuned model."""

import random

from grpo_launcher.datasets import DatasetSpec, Request, read_source

TEST_REQUESTS = 32
TOPICS = {
    ("Explain how {} works.", "What is {} good for?", "How do I choose {}?", "How do I look after {}?"): [
        "a bicycle", "a refrigerator", "a washing machine", "a pair of running shoes", "a wristwatch",
        "a kitchen knife", "a tent", "a vacuum cleaner", "an umbrella", "a camera", "a piano", "a wooden table",
        "a laptop", "a coffee machine", "a sewing machine", "a garden hose", "a pair of glasses", "a mattress",
        "a car battery", "a cast iron pan",
    ],
    ("How can I learn to {}?", "Why do people like to {}?", "Give me some advice before I {} for the first time."): [
        "cook", "swim", "dance", "paint", "sing", "camp in the woods", "play chess", "grow tomatoes", "bake bread",
        "ski", "ride a horse", "give a speech", "write a poem", "travel alone", "run a marathon", "knit",
    ],
    ("Write a short message to {}.", "What should I say when I meet {}?"): [
        "my new neighbour", "an old friend from school", "my grandmother", "a colleague who is ill", "my landlord",
        "a teacher whom I admire", "my best friend before an exam", "the owner of a small bakery",
        "my boss after a holiday", "a cousin who has just married", "a doctor who helped me",
        "a new member of our team", "my little brother", "a person who found my keys", "the parents of my friend",
        "a guest from another country",
    ],
    ("What is {}?", "Why does {} matter?", "Tell me something interesting about {}.", "Describe {} to a child."): [
        "the moon", "the rain", "sleep", "friendship", "music", "the sea", "bread", "a library", "the winter",
        "honesty", "a rainbow", "patience", "a volcano", "the forest", "breakfast", "money", "a bridge",
        "kindness", "the desert", "time",
    ],
}  # fmt: skip


def make_rows(seed: int) -> dict[str, list[dict]]:
    """Return the requests in random order, as {"prompt": text}, in the splits train and test."""
    requests = [form.format(topic) for forms, topics in TOPICS.items() for form in forms for topic in topics]
    random.Random(seed).shuffle(requests)
    rows = [{"prompt": request} for request in requests]
    return {"train": rows[TEST_REQUESTS:], "test": rows[:TEST_REQUESTS]}


def load(request: Request) -> tuple[dict, dict]:
    """Return the rows of the source, or those that are made here."""
    return read_source(request) if request.source else make_rows(request.seed), {}


def to_row(raw: dict) -> dict:
    """Turn {"prompt": text} into {"prompt": [user], "reference": the request, to see whether a reply keeps to it}."""
    return {"prompt": [{"role": "user", "content": raw["prompt"]}], "reference": raw["prompt"]}


DATASET = DatasetSpec(
    to_row,
    tokenizer="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_prompt_length=64,
    columns={"reference": "string"},
    load=load,
)
