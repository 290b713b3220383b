"""Reward an answer for being one of the gold answers (SQuAD's exact match and F1), and for having looked it up."""

import math
import re
import string
import unicodedata
from collections import Counter

from grpo_launcher.messages import CHINESE, gold_value, last_reply, tool_calls, without_marks

# How an answer begins that says that there is none; without articles and punctuation.
UNANSWERABLE = ["unanswerable", "no answer", "not answerable", "cannot be answered", "i dont know", "i do not know"]
UNANSWERABLE += ["question is unanswerable", "question cannot be answered", "not in passage", "not in passages"]
UNANSWERABLE += ["answer is not in passage", "answer is not in passages", "无法回答", "無法回答", "不知道", "我不知道"]
UNANSWERABLE += ["没有答案", "沒有答案", "文中没有", "文中沒有"]
_WIDE = re.compile(rf"{CHINESE.pattern}|[\u3001-\u303f\uff00-\uffef]")
_QUOTED = re.compile(r"\A\s*[“”„‟«»‹›‘’‚]+(.*?)[“”„‟«»‹›‘’‚]+[\s.,!?]*\Z", re.DOTALL)
_TOKEN = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})\S)+")


def answer_match_reward(
    completions, answers, *, exact: float = 0.5, f1: float = 0.5, retrieved: float = 0.2, **columns
) -> list[float | None]:
    """Reward `exact` for a gold answer to the letter, `f1` times the best token F1, and `retrieved` for the passage.

    What stands in the last <answer>…</answer> counts, without one the whole text. A Chinese character is a token.
    For a question without answer, exact match and F1 are 1 for a text that begins like one of UNANSWERABLE.

    Args:
        answers: B lists of texts, an empty list where the question has no answer.
        columns: may hold `passage_id`, the id of the passage that a tool has to find, on a line that begins with [ID].

    Returns:
        B rewards in [0, exact + f1 + retrieved]; None for a row whose answers are null, not even [].

    Source: Rajpurkar et al. 2018, SQuAD 2.0; Chinese as in Cui et al. 2019, CMRC 2018.
    """
    for name, value in {"exact": exact, "f1": f1, "retrieved": retrieved}.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"answer_match_reward: {name} is {value!r} and must be a number from 0 up")
    scores = []
    found = passage_retrieved(completions, **columns)
    for completion, gold, was_found in zip(completions, answers, found, strict=True):
        is_exact, best_f1 = _match(completion, gold)
        bonus = retrieved if gold and was_found else 0.0
        scores.append(None if is_exact is None else float(exact * is_exact + f1 * best_f1 + bonus))
    return scores


def answer_exact(completions, answers, **columns) -> list[float | None]:
    """Measure: 1 for one of the gold answers to the letter, else 0, as in `answer_match_reward`."""
    return [_match(completion, gold)[0] for completion, gold in zip(completions, answers, strict=True)]


def answer_f1(completions, answers, **columns) -> list[float | None]:
    """Measure: the best token F1 with a gold answer, 0 to 1, as in `answer_match_reward`."""
    return [_match(completion, gold)[1] for completion, gold in zip(completions, answers, strict=True)]


def passage_retrieved(completions, **columns) -> list[float | None]:
    """Measure: 1 where a tool gave the passage of the column `passage_id`, else 0; None for a row without one."""
    scores = []
    passage_ids = columns.get("passage_id") or [None] * len(completions)
    for completion, passage_id in zip(completions, passage_ids, strict=True):
        if passage_id in (None, ""):
            scores.append(None)
            continue
        if not isinstance(passage_id, str | int):
            raise ValueError(
                f"passage_retrieved: passage_id is {passage_id!r} and must be a text, an integer or empty"
            )
        label = re.compile(rf"^{re.escape(f'[{passage_id}]')}", re.MULTILINE)
        results = [call.result for call in tool_calls(completion) if call.result and not call.failed]
        scores.append(float(any(label.search(result) for result in results)))
    return scores


def _match(completion, gold: list[str] | None) -> tuple[float, float] | tuple[None, None]:
    """Return exact match and F1 of a completion, or None for a row without answers."""
    gold = _gold_answers(gold)
    if gold is None:
        return None, None
    text = last_reply(completion)
    text = (re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE) or [text])[-1]
    if not gold:
        tokens = _tokens(text.replace("’", "'"))
        beginnings = [_tokens(phrase) for phrase in UNANSWERABLE]
        is_refusal = float(any(tokens[: len(beginning)] == beginning for beginning in beginnings))
        return is_refusal, is_refusal
    tokens = _tokens(text)
    expected = [_tokens(answer) for answer in gold]
    return float(tokens in expected), max(_f1(tokens, answer) for answer in expected)


def _gold_answers(gold: list[str] | None) -> list[str] | None:
    def read(gold) -> list[str] | None:
        is_list = isinstance(gold, list | tuple) and all(isinstance(text, str) and text.strip() for text in gold)
        return gold if is_list else None

    return gold_value(gold, "answer_match: answers", "a list of texts for each row, [] for no answer", read)


for _function in (answer_match_reward, answer_exact, answer_f1):
    _function.check_gold = _gold_answers


def _tokens(text: str) -> list[str]:
    """Normalise as SQuAD does (lower case, no ASCII punctuation, no articles) and split at spaces.

    In text with Chinese or full-width characters all punctuation of Unicode goes, in others the quotes around it.
    """
    text = _QUOTED.sub(r"\1", without_marks(unicodedata.normalize("NFC", text.lower())))
    if _WIDE.search(text):
        text = unicodedata.normalize("NFKC", text)
        text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
    text = "".join(char for char in text if char not in string.punctuation)
    return _TOKEN.findall(re.sub(r"\b(a|an|the)\b", " ", text))


def _f1(actual: list[str], expected: list[str]) -> float:
    common = sum((Counter(actual) & Counter(expected)).values())
    return 2 * common / (len(actual) + len(expected)) if actual and expected else float(actual == expected)
