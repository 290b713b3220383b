"""Multiple choice: what counts as an answer, what it is worth, and that reasoning that was cut off still teaches."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.choice import (
    REFUSED,
    choice_accuracy,
    choice_accuracy_of_answered,
    choice_format_reward,
    choice_reward,
    chosen,
    reasoning_length_reward,
)

ANSWERS = {
    "a letter": ("<answer>B</answer>", "B"),
    "lower case": ("<answer> b </answer>", "B"),
    "full-width": ("＜answer＞Ｂ＜/answer＞", "B"),
    "tags in capitals": ("<ANSWER>B</ANSWER>", "B"),
    "with the option's text": ("<answer>B. 選項內容</answer>", "B"),
    "a text that names a letter": ("<answer>B：維他命A</answer>", "B"),
    "without a mark between": ("<answer>B因為</answer>", "B"),
    "in brackets": ("<answer>（B）</answer>", "B"),
    "introduced in Chinese": ("<answer>正確答案是B。</answer>", "B"),
    "introduced in English": ("<answer>The correct option is B.</answer>", "B"),
    "with a reason": ("<answer>B, because A is wrong</answer>", "B"),
    "after reasoning about others": ("<reasoning>A? No. C? No.</reasoning><answer>B</answer>", "B"),
    "said twice": ("<answer>B</answer> so <answer>b.</answer>", "B"),
    "in bold": ("<answer>**B**</answer>", "B"),
    "in bold, introduced": ("<answer>**Answer:** B</answer>", "B"),
    "in a box of LaTeX": (r"<answer>$\boxed{\text{(B)}}$</answer>", "B"),
    "in quotes": ("<answer>“B”</answer>", "B"),
    "in other quotes": ("<answer>«B»</answer><answer>'b'</answer><answer>「B」</answer>", "B"),
    "with zero-width characters": ("<answer>\ufeffB\u200b</answer>", "B"),
    "in brackets, with the option's text": ("<answer>(B) Paris</answer><answer>b) Paris</answer>", "B"),
    "with a text that begins with a letter": ("<answer>B. A dog</answer><answer>B. A型</answer>", "B"),
    "with a reason in Chinese": ("<answer>B，因為A不對</answer>", "B"),
    "denied": ("<answer>B不是答案</answer>", None),
    "denied, then another": ("<answer>A不對，選B</answer>", None),
    "a list": ("<answer>A. B. C. D.</answer>", None),
    "a range": ("<answer>A-D</answer>", None),
    "two letters, either way": ("<answer>選A，或者選B</answer>", None),
    "two letters, one or the other": ("<answer>A還是B</answer>", None),
    "two letters in brackets": ("<answer>(A) (B)</answer>", None),
    "two letters with dots": ("<answer>A. or B.</answer>", None),
    "two letters in bold": ("<answer>**A** **B**</answer>", None),
    "two letters in quotes": ("<answer>“A”或“B”</answer>", None),
    "a word in bold": ("<answer>**Bad**</answer>", None),
    "two letters": ("<answer>A and B</answer>", None),
    "two letters in Chinese": ("<answer>A、B</answer>", None),
    "either of two": ("<answer>答案是A或B</answer>", None),
    "two answers": ("<answer>A</answer><answer>B</answer>", None),
    "inside a word": ("<answer>Bad</answer>", None),
    "at the end of a text": ("<answer>Vitamin A</answer>", None),
    "an article": ("<answer>A dog</answer>", None),
    "no such letter": ("<answer>E</answer>", None),
    "an empty answer": ("<answer></answer>", None),
    "outside the tags": ("The answer is B", None),
    "cut off": ("<reasoning>It is B</reasoning><answer>B", None),
    "nothing": ("", None),
    "refused": ("<answer>拒答</answer>", REFUSED),
    "refused in Traditional Chinese": ("<answer>「無法確定」</answer>", REFUSED),
    "refused in bold": ("<answer>**I don't know**</answer>", REFUSED),
    "refused in English": ("<answer>I don’t know.</answer>", REFUSED),
}


@pytest.mark.parametrize(("text", "letter"), ANSWERS.values(), ids=ANSWERS)
def test_what_counts_as_an_answer(text, letter):
    """A published evaluation answers A where it can read nothing, and so is right a quarter of the time."""
    assert chosen(text) == letter


def test_right_pays_more_than_refusing_than_wrong_than_nothing():
    """In chat and plain text; each reply meets its own row's answer."""
    replies = ["<answer>C</answer>", "<answer>拒答</answer>", "<answer>B</answer>", "A"]
    replies += [[{"role": "assistant", "content": reply}] for reply in replies]
    assert choice_reward(replies, answer=["C", "C", "C", "A"] * 2) == [1, 0, -1, -1.5] * 2
    assert choice_reward(replies[:2], answer=["A", "A"], wrong=-3, unparseable=-4, refused=0.5) == [-3, 0.5]


def test_a_row_without_an_answer_is_a_failed_rating():
    """By the reward and both measures; nothing ends the run."""
    for reward in (choice_reward, choice_accuracy, choice_accuracy_of_answered):
        assert reward(["<answer>A</answer>"] * 3, answer=[None, "A", float("nan")]) == [None, 1, None]


WRONG = {
    "an answer that is none": ({"answer": ["c"]}, "answer is 'c'"),
    "a list of answers": ({"answer": [["A"]]}, r"answer is \['A'\]"),
    "refusing pays more than being right": ({"answer": ["C"], "refused": 2}, "refused 2 < right 1"),
    "fewer answers than replies": ({"answer": []}, "shorter"),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_named(given, said):
    """The option or the row's value."""
    with pytest.raises(ValueError, match=said):
        choice_reward(["<answer>A</answer>"], **given)
    with pytest.raises(ValueError, match="least is 0"):
        reasoning_length_reward([""], least=0)


FORMATS = {
    "whole": ("<reasoning>因為</reasoning>\n<answer>A</answer>", 1),
    "full-width": ("＜reasoning＞因為＜/reasoning＞＜answer＞A＜/answer＞", 1),
    "words before": ("Well. <reasoning>x</reasoning><answer>A</answer>", 0),
    "words behind": ("<reasoning>x</reasoning><answer>A</answer> I am sure", 0),
    "empty reasoning": ("<reasoning> </reasoning><answer>A</answer>", 0),
    "two answers": ("<reasoning>x</reasoning><answer>A</answer><answer>A</answer>", 0),
    "the other way round": ("<answer>A</answer><reasoning>x</reasoning>", 0),
}


@pytest.mark.parametrize(("text", "score"), FORMATS.values(), ids=FORMATS)
def test_the_format_is_whole_or_not(text, score):
    """Once each, in order, and nothing else."""
    assert choice_format_reward([text]) == [score]


def test_replies_that_are_all_cut_off_still_differ():
    """A published recipe allows 64 tokens for 100 characters of reasoning: all score 0, and nothing is learned."""
    cut = [f"<reasoning>{'因' * characters}" for characters in (0, 45, 60, 75)]
    assert set(choice_format_reward(cut)) == {0} and set(choice_reward(cut, answer=["A"] * 4)) == {-1.5}
    assert reasoning_length_reward([*cut, f"<reasoning>{'因' * 200}</reasoning>", "no tag"]) == [
        0,
        0.45,
        0.6,
        0.75,
        1,
        0,
    ]


TEXT = st.text() | st.text("<>/answerig ABCDＡ拒答.、\n", max_size=60)


@given(text=TEXT)
@settings(deadline=None, database=None, max_examples=200, derandomize=True)
def test_any_text_scores_within_the_range(text):
    """Finite, a float, and the same in chat as in plain text."""
    for reward, low, high in ((choice_reward, -1.5, 1), (choice_format_reward, 0, 1), (reasoning_length_reward, 0, 1)):
        plain, in_chat = reward(
            [f"<answer>{text}</answer>", [{"role": "assistant", "content": f"<answer>{text}</answer>"}]],
            answer=["A", "A"],
        )
        assert plain == in_chat and type(plain) is float and math.isfinite(plain) and low <= plain <= high
