"""Reward a reply for being written in Chinese."""

from grpo_launcher.messages import CHINESE, last_reply


def chinese_reward(completions, **columns) -> list[float]:
    """Chinese characters over all letters: 1 for Chinese alone, 0 for none of it or no letter at all.

    Punctuation, digits, emoji and spaces count on neither side; a Latin word counts once a letter. completions: B replies, as text or
    as chat messages. Returns B floats.
    """
    letters = ["".join(filter(str.isalpha, last_reply(completion))) for completion in completions]
    return [len(CHINESE.findall(text)) / len(text) if text else 0.0 for text in letters]
