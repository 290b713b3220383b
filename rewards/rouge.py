"""Reward a completion for sharing words with a reference: ROUGE, in Chinese too."""

import functools
import math
import re
import unicodedata
from types import SimpleNamespace

from grpo_launcher.messages import CHINESE, WORD, gold_text, last_reply

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Between words as far as rouge_score is concerned: _, ², ½, ①.
NO_LETTERS = {code: " " for code in range(0x3400) if unicodedata.category(chr(code)) in ("No", "Nl", "Pc")}
del NO_LETTERS[ord("〇")]
SENTENCE_END = re.compile(r"(?<=[.!?؟۔।])\s+|(?<=[。！？])")


def rouge_reward(completions, reference, *, weights: dict[str, float] | None = None, **columns) -> list[float | None]:
    """Reward the weighted mean of ROUGE F1 scores between a completion and its reference text.

    Scores equal those of rouge_score with stemming, except that words of all alphabets count (it knows a to z alone),
    that each Chinese, Japanese or Thai character is a word, and that rougeLsum, whose sentences are lines, also begins
    a new one after . ! ? 。！？.

    Args:
        weights: weight of rouge1, rouge2, rougeL and rougeLsum, of any sum; by default the first three alike.

    Returns:
        B rewards in [0, 1]; None for a row without a reference.

    Source: Lin 2004, ROUGE.
    """
    weights = dict.fromkeys(KINDS[:3], 1.0) if weights is None else weights
    total = sum(weights.values())
    if set(weights) - set(KINDS) or min(weights.values(), default=0) < 0 or not 0 < total < math.inf:
        raise ValueError(f"rouge_reward: weights is {weights} and must hold numbers from 0 up, not all 0, for {KINDS}")
    scores = []
    for completion, gold in zip(completions, reference, strict=True):
        text = gold_text(gold, "rouge_reward")
        f1 = _f1_scores(text or "", last_reply(completion), tuple(weights))
        score = sum(weight * f1[kind] for kind, weight in weights.items()) / total
        scores.append(None if text is None else score)
    return scores


rouge_reward.check_gold = functools.partial(gold_text, reward="rouge_reward")


def _f1_scores(reference: str, completion: str, kinds: tuple[str, ...]) -> dict[str, float]:
    from rouge_score import scoring

    if "rougeLsum" in kinds:  # the tokens stay the same, so the other kinds do not notice
        reference, completion = (SENTENCE_END.sub("\n", text) for text in (reference, completion))
    scorer = _scorer(tuple(kind for kind in kinds if kind != "rougeL"))
    f1 = {kind: float(score.fmeasure) for kind, score in scorer.score(reference, completion).items()}
    expected, actual = _tokens(reference), _tokens(completion)
    common = _common_subsequence(expected, actual)
    f1["rougeL"] = float(scoring.fmeasure(common / len(actual), common / len(expected))) if common else 0.0
    return f1


def _common_subsequence(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """Return the length of the longest common subsequence (Hyyrö 2004: a row of the table is one integer).

    rouge_score fills a table of Python lists, which took 6 to 20 times as long for a whole reward.
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << index
    row = full = (1 << len(first)) - 1
    for token in second:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()


@functools.cache
def _scorer(kinds: tuple[str, ...]):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(kinds, tokenizer=SimpleNamespace(tokenize=_tokens))


@functools.lru_cache(maxsize=2048)  # the completions of a group share their reference
def _tokens(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(_stem, WORD.findall(text.lower().translate(NO_LETTERS)))))


@functools.lru_cache(maxsize=65536)  # stemming is slow, and words recur
def _stem(word: str) -> str:
    if word.isascii():
        return "".join(_english_tokenizer().tokenize(word))
    return word if CHINESE.match(word) else unicodedata.normalize("NFC", word)


@functools.cache
def _english_tokenizer():
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
