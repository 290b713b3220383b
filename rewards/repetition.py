"""Reward a completion for not repeating itself."""

from grpo_launcher.messages import last_reply, words


def distinct_words_reward(completions, **columns) -> list[float]:
    """Reward the share of distinct words among all words. Long texts score lower by nature.

    Returns:
        B rewards in [0, 1]: 1 if no word comes twice, 0 for a completion without words.

    Source: distinct-1, Li et al. 2016 (arXiv:1510.03055).
    """
    texts = [words(last_reply(completion)) for completion in completions]
    return [len(set(tokens)) / len(tokens) if tokens else 0.0 for tokens in texts]


def ngram_repetition_reward(completions, *, n: int = 3, **columns) -> list[float]:
    """Punish the share of n-grams of words that repeat an earlier one.

    Returns:
        B rewards in (-1, 0]: minus that share, 0 for fewer than n words.

    Source: distinct-n minus 1, Li et al. 2016 (arXiv:1510.03055).
    """
    if n < 1:
        raise ValueError(f"ngram_repetition_reward: n is {n} and must be at least 1")
    scores = []
    for completion in completions:
        tokens = words(last_reply(completion))
        ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        scores.append(len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0)
    return scores
