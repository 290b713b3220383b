"""Posts with summaries in the form of Reddit TL;DR, and praise, made from a grammar.

Every word that a post can hold stands in grammar.yaml or below. `vocabulary()` is the yardstick for a model
that still writes words.
"""

import functools
import random
import re
from pathlib import Path

import yaml

from grpo_launcher.datasets.kuakua import PROMPT, SYSTEM

GRAMMAR = yaml.safe_load(Path(__file__).with_name("grammar.yaml").read_text(encoding="utf-8"))
OBJECTS = {"she": "her", "he": "him", "they": "them"}


def posts(count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` rows {"prompt", "completion"} in the form of trl-lib/tldr. The same seed gives the same rows."""
    rng = random.Random(seed)
    return [_post(rng) for _ in range(count)]


def _post(rng: random.Random) -> dict[str, str]:
    """Return a post and its summary, which repeats five to nine facts of it: about 340 characters.

    So a target of 200 characters leaves something to learn.
    """
    who = rng.choice(list(GRAMMAR["people"]))
    they = rng.choice(GRAMMAR["people"][who])
    deed, remedy = rng.choice(GRAMMAR["deeds"])
    facts = {
        "who": who,
        "they": they,
        "them": OBJECTS[they],
        "remedy": remedy,
        "name": rng.choice(GRAMMAR["names"][they]),
    }
    facts |= {fact: rng.choice(GRAMMAR[f"{fact}s"]) for fact in ("thing", "place", "time", "feeling")}
    facts["n"] = rng.choice(["two", "three", "four", "five", "six"])
    topics = ("excuses", "reactions", "others", "history", "plans", "questions")
    excuse, reaction, other, history, plan, question = (rng.choice(GRAMMAR[topic]).format(**facts) for topic in topics)
    event = f"my {who} {facts['name']} {deed.format(**facts)}"
    body = [
        f"{facts['time']} {event}",
        *rng.sample([history, excuse, reaction, other], 4),
        f"I am {facts['feeling']} about it",
        plan,
        question,
    ]
    summary = [
        f"{event} {facts['time']}",
        excuse,
        reaction,
        history,
        f"I am {facts['feeling']} and do not know what to do",
        other,
        plan,
    ]
    kept = sorted(rng.sample(range(7), rng.choice([4, 5, 6, 6, 7, 7, 7])))
    if 0 in kept:
        summary[0] += f" and {they} will not {remedy}"
    summary = [summary[0], *(summary[index] for index in kept if index > 0)]
    if rng.randint(0, 1):
        summary.append(question)
    title = f"My {who} {deed.format(**facts)}"
    prompt = f"SUBREDDIT: r/{rng.choice(GRAMMAR['forums'])}\n\nTITLE: {title}\n\nPOST: {_text(body)}\n\nTL;DR:"
    return {"prompt": prompt, "completion": f" {_text(summary)}"}


def _text(sentences: list[str]) -> str:
    """Join sentences, each with a capital and a full stop. A question keeps its mark."""
    return " ".join(text[0].upper() + text[1:] + ("" if text.endswith("?") else ".") for text in sentences)


def strange_post(rng: random.Random) -> str:
    """Return a post of 60 to 320 words in no order, half of them put together from pieces of known ones.

    To a model that was pre-trained on `posts` alone most of a real post is such text.
    """
    known = sorted(vocabulary())

    def word() -> str:
        first, second = rng.choices(known, k=2)
        return first if rng.random() < 0.5 else first[: rng.randint(1, 4)] + second[-rng.randint(1, 4) :]

    def sentence() -> str:
        words_of_it = " ".join(word() for _ in range(rng.randint(4, 16)))
        return words_of_it.capitalize() + rng.choice([".", ".", "?", "!", "...", f" {rng.randint(1, 999)}."])

    body = " ".join(sentence() for _ in range(rng.randint(6, 32)))
    return f"SUBREDDIT: r/{word()}\n\nTITLE: {sentence()}\n\nPOST: {body}"


def praise_dialogue(rng: random.Random) -> list[dict[str, str]]:
    """Return the praise bot's prompt and four to eight sentences, half of them Chinese on average.

    So the share of Chinese in what the small model writes can rise.
    """
    languages = [GRAMMAR["praise_chinese"], GRAMMAR["praise_english"]]
    sentences = [rng.choice(rng.choice(languages)) for _ in range(rng.randint(4, 8))]
    words_of = GRAMMAR["praise_words"].items()
    filled = [sentence.format(**{name: rng.choice(choices) for name, choices in words_of}) for sentence in sentences]
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": " ".join(filled)},
    ]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())


@functools.cache
def vocabulary() -> set[str]:
    """Return every word that `posts` can write."""
    return {word for row in posts(4000, seed=0) for text in row.values() for word in words(text)}
