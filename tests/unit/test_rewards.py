"""Rewards on chat and plain completions, in English and Chinese."""

import itertools
import json
import math

import pytest
from helpers import test_data
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from rewards.chinese import chinese_reward
from rewards.length import gaussian_length_reward, length_reward, length_similarity_reward, smooth_length_reward
from rewards.repetition import distinct_words_reward, ngram_repetition_reward
from rewards.rouge import KINDS, SENTENCE_END, rouge_reward


def chat(text: str) -> list[dict]:
    """Return a completion as chat messages."""
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(("length", "score"), [(200, 0), (100, -100), (300, -100), (0, -200)])
def test_length_is_subtracted(length, score):
    """A published reward adds the distance; ours is 0 at best, in characters, Chinese too."""
    assert length_reward(["x" * length, chat("夸" * length)]) == [score, score]


@pytest.mark.parametrize(
    ("length", "score"), [(300, 0), (270, 0), (330, 0), (331, -0.05), (370 + 60, -0.5), (0, -0.05 * 270**0.5)]
)
def test_smooth_length_is_flat_inside_its_tolerance(length, score):
    """Then a square root."""
    assert smooth_length_reward(["x" * length]) == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("length", "score"), [(200, 10), (250, 10 * math.exp(-0.5)), (150, 10 * math.exp(-0.5)), (0, 10 * math.exp(-8))]
)
def test_gaussian_length_is_a_bell(length, score):
    """50 characters off is one σ, on both sides."""
    assert gaussian_length_reward(["x" * length, chat("夸" * length)]) == [pytest.approx(score)] * 2


VALUES = {
    "same length": (length_similarity_reward, "abcd", "夸夸夸夸", {}, 1),
    "half as long": (length_similarity_reward, "ab", "abcd", {}, 0.5),
    "twice as long": (length_similarity_reward, "abcd", "ab", {}, 0.5),
    "an empty reply": (length_similarity_reward, "", "ab", {}, 0),
    "both empty": (length_similarity_reward, "", "", {}, 1),
    "no word twice": (distinct_words_reward, "to be or not", "", {}, 1),
    "case and punctuation aside": (distinct_words_reward, "No, no; NO! Yes.", "", {}, 0.5),
    "Chinese words by jieba": (distinct_words_reward, "北京，北京，大学", "", {}, 2 / 3),
    "Chinese and English words": (distinct_words_reward, "我们 love 北京 Love", "", {}, 3 / 4),
    "distinct words of nothing": (distinct_words_reward, "", "", {}, 0),
    "distinct words of punctuation": (distinct_words_reward, "?! …。", "", {}, 0),
    "no trigram twice": (ngram_repetition_reward, "a b c d a b", "", {}, 0),
    "one of five trigrams again": (ngram_repetition_reward, "a b c x a b c", "", {}, -1 / 5),
    "all trigrams but one again": (ngram_repetition_reward, "a a a a a", "", {}, -2 / 3),
    "bigrams": (ngram_repetition_reward, "a b a b", "", {"n": 2}, -1 / 3),
    "Chinese words again": (ngram_repetition_reward, "北京大学，北京大学。", "", {"n": 1}, -1 / 2),
    "fewer words than n": (ngram_repetition_reward, "a a", "", {}, 0),
    "Cyrillic": (distinct_words_reward, "Да, да! Нет.", "", {}, 2 / 3),
    "Hindi, whose vowel signs are no letters": (distinct_words_reward, "हिन्दी की हिन्दी", "", {}, 2 / 3),
    "accents in two forms": (distinct_words_reward, "caf\u00e9 cafe\u0301", "", {}, 1 / 2),
    "Thai, which has no spaces": (ngram_repetition_reward, "ดีดีดีดี", "", {"n": 1}, -3 / 4),
    "Cyrillic among Chinese": (distinct_words_reward, "我爱 Москва 和 Москва", "", {}, 4 / 5),
    "n-grams of nothing": (ngram_repetition_reward, "", "", {}, 0),
    "Chinese alone": (chinese_reward, "你好，世界！ 123", "", {}, 1),
    "no Chinese": (chinese_reward, "hello", "", {}, 0),
    "half Chinese": (chinese_reward, "你好 ab.", "", {}, 0.5),
    "rare characters": (chinese_reward, "㐀𠀀a", "", {}, 2 / 3),
    "no letter": (chinese_reward, "12 + 3 = 15 🙂。", "", {}, 0),
    "Chinese of nothing": (chinese_reward, "", "", {}, 0),
    "one of two words": (rouge_reward, "the cat", "the dog", {"weights": {"rouge1": 1}}, 0.5),
    "a weighted mean": (rouge_reward, "the cat", "the dog", {"weights": {"rouge1": 3, "rouge2": 1}}, 3 / 8),
    "rouge by default": (rouge_reward, "the cat", "the dog", {}, (0.5 + 0 + 0.5) / 3),
    "rouge in Chinese": (rouge_reward, "我爱北京", "他爱北京", {}, (3 / 4 + 2 / 3 + 3 / 4) / 3),
    "rouge in both": (rouge_reward, "我用Python3写", "我用 python3 。", {"weights": {"rouge1": 1}}, 6 / 7),
    "rouge of a Chinese zero": (rouge_reward, "二〇", "二零", {"weights": {"rouge1": 1}}, 0.5),
    "rouge in Greek": (rouge_reward, "η γάτα", "η Γάτα!", {}, 1),
    "rouge in Korean": (rouge_reward, "나는 학생", "나는 선생", {"weights": {"rouge1": 1}}, 0.5),
    "rouge in Thai": (rouge_reward, "ดีมาก", "ดี", {"weights": {"rouge1": 1}}, 2 * (1 / 4) / (1 / 4 + 1)),
    "rouge in Kana": (rouge_reward, "ねこ", "ねず", {"weights": {"rouge1": 1}}, 0.5),
    "rouge with accents": (rouge_reward, "Café naïve", "cafe\u0301 naive", {"weights": {"rouge1": 1}}, 0.5),
    "rouge in Arabic by sentences": (rouge_reward, "نعم؟ لا", "لا\nنعم؟", {"weights": {"rougeLsum": 1}}, 1),
    "sentences in another order": (rouge_reward, "甲乙。丙丁！", "丙丁！甲乙。", {"weights": {"rougeLsum": 1}}, 1),
    "a point inside a number": (rouge_reward, "3.5", "5.3", {"weights": {"rougeLsum": 1}}, 0.5),
    "rouge of nothing": (rouge_reward, "", "the dog", {}, 0),
    "rouge of nothing to nothing": (rouge_reward, "", "", {"weights": {"rouge1": 1, "rougeLsum": 1}}, 0),
}


@pytest.mark.parametrize(("reward", "text", "reference", "options", "score"), VALUES.values(), ids=VALUES)
def test_values_by_hand(reward, text, reference, options, score):
    """Plain and chat alike; a known reward divides by zero on an empty reply."""
    assert reward([text, chat(text)], reference=[reference] * 2, **options) == [pytest.approx(score, abs=1e-12)] * 2


RANGES = {
    length_reward: (-math.inf, 0),
    smooth_length_reward: (-math.inf, 0),
    gaussian_length_reward: (0, 10),
    length_similarity_reward: (0, 1),
    distinct_words_reward: (0, 1),
    ngram_repetition_reward: (-1, 0),
    chinese_reward: (0, 1),
    rouge_reward: (0, 1),
}
TEXT = st.text() | st.text("ab Z夸奖北京。.!\n3", max_size=60)


@pytest.mark.parametrize("reward", RANGES, ids=lambda reward: reward.__name__)
@given(text=TEXT, reference=TEXT)
@settings(deadline=None, database=None, max_examples=50, derandomize=True)
def test_any_text_scores_within_the_range(reward, text, reference):
    """Finite, a float, and the same in chat as in plain text."""
    low, high = RANGES[reward]
    plain, in_chat = reward([text, chat(text)], reference=[reference] * 2, prompts=["x"] * 2)
    assert plain == in_chat and type(plain) is float
    assert math.isfinite(plain) and low <= plain <= high


@pytest.mark.parametrize("reward", [length_similarity_reward, rouge_reward])
def test_each_reply_meets_its_own_reference(reward):
    """A published reward is zipped with the whole column of answers: always its first ones, never an error."""
    replies, references = ["a b c d", "x"], ["y", "a b c d"]
    assert reward(replies, references) == [reward([replies[row]], [references[row]])[0] for row in (0, 1)]
    assert reward(replies, references[::-1])[0] == 1 > reward(replies, references)[0]
    with pytest.raises(ValueError):
        reward(replies, [*references, "more"])


@pytest.mark.parametrize("reward", [length_similarity_reward, rouge_reward])
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_row_without_a_reference_is_a_failed_rating(reward, missing):
    """Nothing ends the run; a list of texts is refused with the name of the reward."""
    assert reward(["a b c", "a b c"], [missing, "a b c"]) == [None, 1]
    with pytest.raises(ValueError, match=rf"{reward.__name__}: reference is \['a', 'b'\]"):
        reward(["a b"], [["a", "b"]])


@pytest.mark.parametrize(
    ("reward", "options", "words"),
    [
        (rouge_reward, {"weights": {"rouge1": 1, "rouge3": 1}}, ["rouge_reward", "'rouge3'", "rougeLsum"]),
        (rouge_reward, {"weights": {"rouge1": 0}}, ["rouge_reward", "not all 0", "rouge1"]),
        (rouge_reward, {"weights": {}}, ["rouge_reward", "not all 0"]),
        (rouge_reward, {"weights": {"rouge1": 2, "rouge2": -1}}, ["rouge_reward", "-1"]),
        (ngram_repetition_reward, {"n": 0}, ["ngram_repetition_reward", "n is 0"]),
        (gaussian_length_reward, {"spread": 0}, ["gaussian_length_reward", "spread is 0"]),
    ],
    ids=["an unknown kind", "weights of 0", "no weights", "a negative weight", "n of 0", "no spread"],
)
def test_an_impossible_option_is_named(reward, options, words):
    """The reward, the option and what is allowed."""
    with pytest.raises(ValueError) as caught:
        reward(["a"], reference=["a"], **options)
    assert all(word in str(caught.value) for word in words)


def rouge_score_of(text: str, reference: str) -> dict[str, float]:
    """What a new scorer of rouge_score's own gives, for sentences on lines of their own."""
    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = scorer.score(SENTENCE_END.sub("\n", reference), SENTENCE_END.sub("\n", text))
    return {kind: score.fmeasure for kind, score in scores.items()}


def check_equal(text: str, reference: str) -> None:
    """Every kind alone, and the default mean, to the last digit."""
    expected = rouge_score_of(text, reference)
    assert {kind: rouge_reward([text], [reference], weights={kind: 1})[0] for kind in KINDS} == expected
    assert rouge_reward([text], [reference]) == [(expected["rouge1"] + expected["rouge2"] + expected["rougeL"]) / 3]


ENGLISH = {
    "sentences": (
        "The cats were running quickly.\nA dog's: 3.5 miles away! No.",
        "A cat runs; its owner\nwas 3,5 mile away. Not it.",
    ),
    "a letter that changes in lower case": ("\u212aelvin", "kelvin"),
    "signs that are no letters": ("5 m² or ½ of H₂O ❤️ snake_case ①", "5 m or 12 of HO, 1️⃣ snake case"),
    "stems": ("ties dies flies generously agreed hopping skies sss ings", "tie die fly generous agree hop sky ss ing"),
    "nothing": ("", "nothing said"),
}


@pytest.mark.parametrize(("text", "reference"), ENGLISH.values(), ids=ENGLISH)
def test_rouge_is_that_of_rouge_score(text, reference):
    """A memo of stems and an LCS of our own change no digit."""
    check_equal(text, reference)


@given(text=st.text("abc .\n"), reference=st.text("abc .\n"))
@settings(deadline=None, database=None, max_examples=100, derandomize=True)
def test_rouge_is_that_of_rouge_score_on_any_letters(text, reference):
    """Few words, many repeats: the hard case for a common subsequence."""
    check_equal(text, reference)


def test_rouge_on_real_summaries():
    """Summaries against themselves, their neighbours and the posts."""
    with open(test_data("tldr/tldr.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 12)]
    for row, after in itertools.pairwise(rows):
        for text in (row["completion"], after["completion"], row["prompt"][:500]):
            check_equal(text, row["completion"])


def test_rouge_score_alone_gives_chinese_nothing():
    """Its tokenizer keeps a-z and digits only; ours has each Chinese character."""
    assert set(rouge_score_of("我爱北京", "我爱北京").values()) == {0}
    assert rouge_reward(["我爱北京"], ["我爱北京"], weights=dict.fromkeys(KINDS, 0.1)) == [1]
