"""Reward a reply for sharing words with a reference: ROUGE, on Chinese too."""

import functools
import math
import re
from types import SimpleNamespace

from grpo_launcher.messages import CHINESE, last_reply

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TOKEN = re.compile(rf"[a-z0-9]+|{CHINESE.pattern}")
BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


def rouge_reward(completions, reference, *, weights: dict[str, float] | None = None, **columns) -> list[float]:
    """The weighted mean of ROUGE F1 between each reply and its reference: 0 for nothing in common, 1 for the same words.

    weights: the share of rouge1, rouge2, rougeL and rougeLsum, of any sum; by default the first three alike. The scores are those of
    rouge_score 0.1.2 with stemming (Lin 2004), to the last digit; but each Chinese character is a word (rouge_score drops them all),
    and for rougeLsum, whose sentences are lines, a new line begins after . ! ? before a space and after 。！？.
    completions: B replies, as text or as chat messages; reference: B texts. Returns B floats. Raises ValueError for an unknown kind,
    a weight below 0, weights that sum to 0, or not as many references as replies.
    """
    weights = dict.fromkeys(KINDS[:3], 1.0) if weights is None else weights
    if unknown := [kind for kind in weights if kind not in KINDS]:
        raise ValueError(f"rouge_reward: weights knows no {', '.join(map(repr, unknown))}; allowed are {', '.join(KINDS)}")
    total = sum(weights.values())
    if not all(weight >= 0 for weight in weights.values()) or not 0 < total < math.inf:
        raise ValueError(f"rouge_reward: weights has to hold numbers from 0 up with a sum above 0 for any of {', '.join(KINDS)}, not {weights}")
    scored = [_scores(wanted, last_reply(completion), tuple(weights)) for completion, wanted in zip(completions, reference, strict=True)]
    return [sum(weight * f1[kind] for kind, weight in weights.items()) / total for f1 in scored]


def _scores(reference: str, text: str, kinds: tuple[str, ...]) -> dict[str, float]:
    """The F1 of every kind."""
    if "rougeLsum" in kinds:  # tokens stay the same, so the others do not care
        reference, text = BETWEEN_SENTENCES.sub("\n", reference), BETWEEN_SENTENCES.sub("\n", text)
    others = tuple(kind for kind in kinds if kind != "rougeL")
    f1 = {kind: float(score.fmeasure) for kind, score in _scorer(others).score(reference, text).items()}
    return f1 | {"rougeL": _rouge_l(_tokens(reference), _tokens(text))}


def _rouge_l(reference: tuple[str, ...], said: tuple[str, ...]) -> float:
    """rouge_score's rougeL without its table of reference × reply cells, which takes more than half of its time."""
    from rouge_score import scoring

    common = _common_subsequence(reference, said)
    return float(scoring.fmeasure(common / len(said), common / len(reference))) if common else 0.0


def _common_subsequence(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """The length of the longest common subsequence, a row of the table at a time as the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    row = full = (1 << len(first)) - 1
    for token in second:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()


@functools.cache
def _scorer(kinds: tuple[str, ...]):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(kinds, tokenizer=SimpleNamespace(tokenize=_tokens))


@functools.lru_cache(maxsize=2048)  # the completions of a group share their reference
def _tokens(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(_stem, TOKEN.findall(text.lower()))))


@functools.lru_cache(maxsize=65536)  # stemming is most of what is left, and words recur
def _stem(word: str) -> str:
    return word if CHINESE.match(word) else "".join(_english().tokenize(word))


@functools.cache
def _english():
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
