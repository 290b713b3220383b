"""Reward a completion for its length in characters."""

import functools
import math

from grpo_launcher.messages import gold_text, last_reply


def length_reward(completions, *, target: int = 200, **columns) -> list[float]:
    """Reward a completion for being close to a target length.

    Args:
        completions: B completions, as text or as chat messages (the last assistant message counts).
        target: wanted length in characters.

    Returns:
        B rewards in (-inf, 0]: minus the distance from `target` in characters.
    """
    return [-float(abs(target - len(last_reply(completion)))) for completion in completions]


def smooth_length_reward(
    completions, *, target: int = 300, tolerance: int = 30, scale: float = 0.05, **columns
) -> list[float]:
    """Reward a completion for being close to a target length; the root keeps a very long one from drowning its group.

    Returns:
        B rewards in (-inf, 0]: 0 within `tolerance` characters of `target`, -scale * sqrt(excess) beyond that.
    """
    excesses = [max(0, abs(target - len(last_reply(completion))) - tolerance) for completion in completions]
    return [-scale * math.sqrt(excess) for excess in excesses]


def gaussian_length_reward(completions, *, target: int = 200, spread: float = 5000.0, **columns) -> list[float]:
    """Reward a completion by a Gaussian bell over its length: 10 * exp(-(length - target)² / spread).

    Args:
        spread: 2σ² in characters², so 5000 is σ = 50. Lengths beyond 38σ all score 0.

    Returns:
        B rewards in [0, 10].
    """
    if not spread > 0:
        raise ValueError(f"gaussian_length_reward: spread is {spread} and must be above 0")
    return [10 * math.exp(-((len(last_reply(completion)) - target) ** 2) / spread) for completion in completions]


def length_similarity_reward(completions, reference, **columns) -> list[float | None]:
    """Reward a completion for being as long as its reference text, in characters.

    Returns:
        B rewards in [0, 1]: the shorter length over the longer, 1 for two empty texts; None without a reference.
    """
    scores = []
    for completion, gold in zip(completions, reference, strict=True):
        text = gold_text(gold, "length_similarity_reward")
        shorter, longer = sorted([len(last_reply(completion)), len(text or "")])
        score = shorter / longer if longer else 1.0
        scores.append(None if text is None else score)
    return scores


length_similarity_reward.check_gold = functools.partial(gold_text, reward="length_similarity_reward")
