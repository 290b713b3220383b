"""Reward a reply for its length in characters."""

import math

from grpo_launcher.messages import last_reply


def length_reward(completions, *, target: int = 200, **columns) -> list[float]:
    """Minus the distance of each reply from `target`, in characters: 0 at best, no lower bound.

    completions: B replies, as text or as chat messages (the last assistant message counts). Returns B floats.
    """
    return [-float(abs(target - len(last_reply(completion)))) for completion in completions]


def smooth_length_reward(completions, *, target: int = 300, tolerance: int = 30, scale: float = 0.05, **columns) -> list[float]:
    """0 within `tolerance` characters of `target`, beyond that −scale·√(excess in characters): 0 at best, no lower bound.

    The square root keeps one very long reply from drowning the rest of its group. completions: B replies, as text or as chat
    messages. Returns B floats.
    """
    excess = (max(0, abs(target - len(last_reply(completion))) - tolerance) for completion in completions)
    return [-scale * beyond**0.5 for beyond in excess]


def gaussian_length_reward(completions, *, target: int = 200, spread: float = 5000.0, **columns) -> list[float]:
    """10·exp(−(characters − target)²/spread): 10 at best, never below 0.

    A Gaussian bell; `spread` is 2σ² in characters², so 5000 is σ = 50. It cannot tell very long replies apart: 8σ away it is 1e-13,
    beyond 38σ it rounds to 0. completions: B replies, as text or as chat messages. Returns B floats. Raises ValueError unless
    `spread` is above 0.
    """
    if not spread > 0:
        raise ValueError(f"gaussian_length_reward: spread is {spread}, and has to be above 0")
    return [10 * math.exp(-((len(last_reply(completion)) - target) ** 2) / spread) for completion in completions]


def length_similarity_reward(completions, reference, **columns) -> list[float]:
    """The shorter of reply and reference over the longer, in characters: 1 for the same length, 0 if only one is empty.

    completions: B replies, as text or as chat messages; reference: B texts. Returns B floats. Raises ValueError if there are not as
    many references as replies.
    """
    lengths = [sorted((len(last_reply(completion)), len(wanted))) for completion, wanted in zip(completions, reference, strict=True)]
    return [shorter / longer if longer else 1.0 for shorter, longer in lengths]
