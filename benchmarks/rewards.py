"""How long the rewards take for 768 completions of about 200 tokens, on one core: `python benchmarks/rewards.py`."""

import os
import random
import sys
import time
from pathlib import Path

sys.path.pop(0)  # else `rewards` would be this file

from grpo_launcher.messages import words
from rewards import rouge
from rewards.chinese import chinese_reward
from rewards.choice import choice_format_reward, choice_reward, reasoning_length_reward
from rewards.length import gaussian_length_reward, length_reward, length_similarity_reward, smooth_length_reward
from rewards.repetition import distinct_words_reward, ngram_repetition_reward

STRINGS = (
    length_reward,
    smooth_length_reward,
    gaussian_length_reward,
    length_similarity_reward,
    distinct_words_reward,
    ngram_repetition_reward,
    chinese_reward,
    choice_reward,
    choice_format_reward,
    reasoning_length_reward,
)
MODEL = Path("data/quickstart-model")
HALF, GROUP = 384, 8
CHINESE_WORDS = (
    "我们 今天 学习 语言 模型 训练 奖励 函数 北京 大学 学生 老师 朋友 工作 问题 方法 时间 "
    "重要 可以 需要 因为 所以 如果 但是 非常 喜欢 看见 觉得 知道 开始 结束 城市 生活 音乐 "
    "电影 天气 下雨 的 了 是 在 和 有 不 也 很 就 都 要 会 把 给 从 到"
)


def texts(choose: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Return English texts of 150 words (some 200 tokens), Chinese ones of 160, English summaries of 40."""
    stems = ["".join(choose.choices("abcdefghiklmnoprstuvwy", k=choose.randint(2, 9))) for _ in range(6000)]
    vocabulary = [stem + choose.choice(["", "", "s", "ed", "ing", "ation"]) for stem in stems]
    falling = [1 / rank for rank in range(1, len(vocabulary) + 1)]  # words fall off by rank, as in any language

    def english(count: int) -> str:
        said = choose.choices(vocabulary, falling, k=count)
        return " ".join(word + choose.choice(["", "", "", "", "", ",", "."]) for word in said)

    def chinese() -> str:
        return "".join(
            word + choose.choice(["", "", "", "", "", "，", "。"])
            for word in choose.choices(CHINESE_WORDS.split(), k=160)
        )

    return (
        [english(150) for _ in range(2 * HALF)],
        [chinese() for _ in range(HALF)],
        [english(40) for _ in range(2 * HALF // GROUP)],
    )


def seconds(function, *args, **kwargs) -> float:
    """What a call took of this process's CPU time, so that a neighbour on the core does not count."""
    start = time.process_time()
    function(*args, **kwargs)
    return time.process_time() - start


def show(what: str, took: float, note: str = "") -> None:
    """A line."""
    print(f"{what:<44}{took:9.4f} s  {note}".rstrip())


def string_rewards(english: list[str], chinese: list[str]) -> None:
    """Time each reward on half English, half Chinese texts, the best of three; jieba's time is shown apart."""
    show("jieba: load its dictionary", seconds(words, "中"), "once a process")
    import jieba

    cutting, cut = [0.0], jieba.lcut

    def timed_cut(text: str) -> list[str]:
        start = time.process_time()
        found = cut(text)
        cutting[0] += time.process_time() - start
        return found

    jieba.lcut = timed_cut
    plain, total = english[:HALF] + chinese, 0.0
    tagged = [f"<reasoning>{text}</reasoning><answer>B. {text[:20]}</answer>" for text in plain]
    for reward in STRINGS:
        replies = tagged if reward.__module__ == "rewards.choice" else plain
        tries = []
        for _ in range(3):
            cutting[0] = 0.0
            took = seconds(reward, replies, reference=replies[::-1], answer=["B"] * len(replies))
            tries.append((took - cutting[0], cutting[0]))
        took, jieba_took = min(tries)
        total += took
        show(
            reward.__name__,
            took,
            f"and jieba cutting {HALF} Chinese replies: {jieba_took:.4f} s" if jieba_took else "",
        )
    jieba.lcut = cut
    show("string rewards together", total, f"target: under 0.5 s ({'met' if total < 0.5 else 'MISSED'})")


def rouge_beside_naive(english: list[str], chinese: list[str], references: list[str]) -> None:
    """A group of 8 replies shares its reference; ours starts with empty caches; both import rouge_score before."""
    from rouge_score.rouge_scorer import RougeScorer

    def naive(replies: list[str], wanted: list[str], scores: list[float]) -> None:
        kinds = list(rouge.KINDS[:3])
        for said, reference in zip(replies, wanted, strict=True):
            f1 = RougeScorer(kinds, use_stemmer=True).score(reference, said)
            scores.append(sum(f1[kind].fmeasure for kind in kinds) / len(kinds))

    def ours(replies: list[str], wanted: list[str], scores: list[float]) -> None:
        rouge._tokens.cache_clear()
        rouge._stem.cache_clear()
        scores.extend(rouge.rouge_reward(replies, wanted))

    for name, wanted in {"40 words": references, "150 words": english[::-GROUP]}.items():
        column = [wanted[row // GROUP] for row in range(len(english))]
        expected, scores = [], []
        took, naively = seconds(ours, english, column, scores), seconds(naive, english, column, expected)
        show(
            f"rouge_reward, English, references of {name}",
            took,
            f"naive: {naively:.2f} s, ratio {took / naively:.3f} (target 0.6)",
        )
        assert scores == expected, "the scores differ"
    print("  all scores equal, to the last digit")
    show(f"rouge_reward, {HALF} in Chinese", seconds(ours, chinese, chinese[::-1], []), "naive: 0 for every row")


def perplexity_beside_one_by_one(english: list[str]) -> None:
    """Time texts of 200 tokens under the quickstart's model; one by one an eighth of them counts eight times."""
    if not MODEL.exists():
        print(
            f"perplexity_reward: not timed, as {MODEL} is not there; make it with python -m grpo_launcher.quickstart"
        )
        return
    import torch

    from rewards.perplexity import _load, perplexity_reward

    torch.set_num_threads(1)
    _, tokenizer = _load(str(MODEL))
    replies = tokenizer.batch_decode([ids[:200] for ids in tokenizer(english)["input_ids"]])
    prompts = ["What happened?"] * len(replies)
    took = seconds(perplexity_reward, prompts, replies, model=str(MODEL))
    naively = 8 * seconds(perplexity_reward, prompts[::8], replies[::8], model=str(MODEL), batch_size=1)
    show(
        "perplexity_reward, 1 M parameters, batches of 8",
        took,
        f"one by one: {naively:.2f} s, ratio {took / naively:.2f}",
    )


def main() -> None:
    """Run every section on one core."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    print(f"{2 * HALF} completions of about 200 tokens, CPU time on one core (number {core})")
    english, chinese, references = texts(random.Random(0))
    string_rewards(english, chinese)
    rouge_beside_naive(english, chinese, references)
    perplexity_beside_one_by_one(english)


if __name__ == "__main__":
    main()
