"""Reward a completion for being written in Chinese."""

from grpo_launcher.messages import CHINESE, last_reply


def chinese_reward(completions, **columns) -> list[float]:
    """Reward the share of Chinese characters among all letters; a Latin word counts once a letter.

    Returns:
        B rewards in [0, 1]: 1 for Chinese alone, 0 for none or for no letter at all (punctuation, digits, emoji).
    """
    texts = ["".join(filter(str.isalpha, last_reply(completion))) for completion in completions]
    return [len(CHINESE.findall(letters)) / len(letters) if letters else 0.0 for letters in texts]
