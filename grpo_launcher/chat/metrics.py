"""What is measured of each reply: the rewards, ROUGE against a reference, length, whether it was cut off, repetition."""

import json

from grpo_launcher.chat.checkpoints import Checkpoint
from grpo_launcher.chat.comparison import Comparison
from grpo_launcher.chat.scores import Scores
from rewards.repetition import distinct_words_reward, ngram_repetition_reward
from rewards.rouge import rouge_reward
from grpo_launcher.messages import reply, tool_calls

BATCH = 64  # replies that a reward gets at once


def columns(comparison: Comparison) -> set[str]:
    """The columns that every split has."""
    return set.intersection(*(set(rows.column_names) for rows in comparison.rows.values()))


def measure(comparison: Comparison, drawn: dict[Checkpoint, dict[str, list[dict]]], scores: Scores) -> dict[str, dict[str, dict[str, list]]]:
    """One value a row, by split, metric and checkpoint's name; None where it could not be judged. A reward that failed on a checkpoint has no entry for it."""
    found = {}
    for split, rows in comparison.rows.items():
        found[split] = {}
        given = {name: rows[name] for name in rows.column_names}
        for checkpoint, of in drawn.items():
            replies = of[split]
            said = [json.loads(one["messages"]) if one["messages"] else one["reply"] for one in replies]
            values = _rewards(scores, rows["prompt"], said, [one["reply_ids"] for one in replies], given)
            texts = [reply(one) for one in said]
            if "reference" in given and all(isinstance(text, str) for text in given["reference"]):
                for kind in ("1", "2", "L"):
                    values[f"ROUGE-{kind}"] = rouge_reward(texts, given["reference"], weights={f"rouge{kind}": 1.0})
            values["length, characters"] = [len(text) for text in texts]
            values["length, tokens"] = [len(one["reply_ids"]) if one["tokens"] is None else one["tokens"] for one in replies]
            values["cut off"] = [float(one["cut_off"]) for one in replies]
            if any(one["messages"] for one in replies):
                values["tool calls"] = [len(tool_calls(one)) for one in said]
                values["tool calls that failed"] = [sum(call.failed for call in tool_calls(one)) for one in said]
            values["distinct-1"] = distinct_words_reward(texts)
            for n in (2, 3):
                values[f"distinct-{n}"] = [1 + share for share in ngram_repetition_reward(texts, n=n)]
            for metric, each in values.items():
                found[split].setdefault(metric, {})[checkpoint.name] = list(each)
    return found


def _rewards(scores: Scores, prompts: list, replies: list, ids: list[list[int]], given: dict[str, list]) -> dict[str, list[float | None]]:
    """The rewards of a checkpoint's replies to a split; one that fails on any of them is left out."""
    found = {reward.__name__: [] for reward in scores.rewards}
    for start in range(0, len(replies), BATCH):
        part = slice(start, start + BATCH)
        made = scores.of(list(prompts[part]), replies[part], ids[part], {name: list(values[part]) for name, values in given.items()})
        found = {name: [*before, *made[name]] for name, before in found.items() if name in made}
    return found
