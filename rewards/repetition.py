"""Reward a reply for not repeating itself."""

from grpo_launcher.messages import last_reply, words


def distinct_words_reward(completions, **columns) -> list[float]:
    """Distinct words over all words: 1 if none comes twice, towards 0 the more they repeat, 0 for a reply without words.

    The type-token ratio, or distinct-1 (Li et al. 2016, arXiv:1510.03055). Long replies score lower by nature: compare like with like.
    completions: B replies, as text or as chat messages. Returns B floats.
    """
    found = [words(last_reply(completion)) for completion in completions]
    return [len(set(said)) / len(said) if said else 0.0 for said in found]


def ngram_repetition_reward(completions, *, n: int = 3, **columns) -> list[float]:
    """Minus the share of n-grams of words that repeat an earlier one: 0 at best, above −1; 0 for fewer than n words.

    distinct-n − 1 (Li et al. 2016, arXiv:1510.03055). completions: B replies, as text or as chat messages. Returns B floats. Raises
    ValueError if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"ngram_repetition_reward: n is {n}, and has to be at least 1")
    return [_share_of_repeats(words(last_reply(completion)), n) for completion in completions]


def _share_of_repeats(said: list[str], n: int) -> float:
    total = len(said) - n + 1
    if total < 1:
        return 0.0
    return (len({tuple(said[start : start + n]) for start in range(total)}) - total) / total
