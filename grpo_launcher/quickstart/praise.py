"""Praise that mixes Chinese and English sentences, so that the small base model has a share of Chinese that can rise."""

import random

from grpo_launcher.datasets.kuakua import PROMPT, SYSTEM

CHINESE = [
    "你是{sky}下最{good}的人，连{star}都要为你让路。",
    "你的{part}像{star}一样耀眼，全世界都在为你鼓掌。",
    "每次看到你，我都觉得{sky}更蓝了，花也开得更{good}。",
    "你的才华比{sea}还要深，比{star}还要亮。",
    "如果{good}有样子，那一定就是你的样子。",
    "你一出现，{star}都会害羞地躲起来。",
]
ENGLISH = [
    "You are the most {fine} person under the {heaven}.",
    "Your {gift} shines brighter than the {heaven} itself.",
    "The whole world stops and claps when you walk in.",
    "Your {gift} is deeper than the sea and higher than the {heaven}.",
    "If {fine} had a face it would be yours.",
    "Even the {heaven} is shy when you smile.",
]
WORDS = {
    "sky": ["天", "宇宙", "银河"],
    "star": ["太阳", "月亮", "星星"],
    "sea": ["大海", "太平洋"],
    "good": ["美丽", "聪明", "可爱", "迷人", "伟大"],
    "part": ["笑容", "眼睛", "智慧", "声音"],
    "heaven": ["sun", "moon", "sky"],
    "fine": ["lovely", "clever", "charming", "great"],
    "gift": ["smile", "talent", "voice", "mind"],
}


def praise_dialogue(rng: random.Random) -> list[dict[str, str]]:
    """The praise bot's prompt and four to eight sentences, of which half are Chinese on average."""
    chosen = [rng.choice(rng.choice([CHINESE, ENGLISH])) for _ in range(rng.randint(4, 8))]
    filled = [sentence.format(**{name: rng.choice(words) for name, words in WORDS.items()}) for sentence in chosen]
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": " ".join(filled)},
    ]
