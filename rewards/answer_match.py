"""Reward an answer for being one of the gold answers, by SQuAD's exact match and F1, and for having looked up the passage that holds it."""

import math
import re
import string
import unicodedata
from collections import Counter

from grpo_launcher.messages import CHINESE, last_reply, tool_calls

# What says that a question cannot be answered: normalised, so without articles and punctuation, at the beginning of the answer.
NONE = ["unanswerable", "no answer", "not answerable", "cannot be answered", "question is unanswerable", "question cannot be answered", "not in passage"]
NONE += ["not in passages", "answer is not in passage", "answer is not in passages", "i dont know", "i do not know"]
NONE += ["无法回答", "無法回答", "不知道", "我不知道", "没有答案", "沒有答案", "文中没有", "文中沒有"]
WIDE = re.compile(rf"{CHINESE.pattern}|[\u3001-\u303f\uff00-\uffef]")
TOKEN = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})\S)+")


def answer_match_reward(completions, answers, *, exact: float = 0.5, f1: float = 0.5, retrieved: float = 0.2, **columns) -> list[float]:
    """`exact` for one of the gold answers to the letter, plus `f1` times the best token F1, plus `retrieved` for the passage found: 0 to their sum.

    Both matches are SQuAD v2's (Rajpurkar et al. 2018, evaluate-v2.0.py): lower case, no ASCII punctuation, no a, an, the. A Chinese character
    is a token of its own, as in CMRC 2018 (Cui et al. 2019), whose F1 however counts the longest common run. What stands in the last
    <answer>…</answer> counts, without one the whole reply. `retrieved` is due where a tool call that did not fail gave a line that begins
    with [ID], the row's `passage_id` (an optional column). An empty list of answers is a question without one: exact and F1 are 1 for an
    answer that begins with one of NONE, else 0, and nothing is due for a passage.
    completions: B replies, as text or as chat messages; answers: B lists of texts. Returns B floats. Raises ValueError for an option below
    0 or not finite, answers that are no list of texts, a passage_id that is neither text nor a whole number.
    """
    for name, value in {"exact": exact, "f1": f1, "retrieved": retrieved}.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"answer_match_reward: {name} is {value!r}, and has to be a number from 0 up")
    rows = zip(_matches("answer_match_reward", completions, answers), passage_retrieved(completions, **columns), answers, strict=True)
    return [float(exact * same + f1 * overlap + (retrieved * found if gold and found else 0)) for (same, overlap), found, gold in rows]


def answer_exact(completions, answers, **columns) -> list[float]:
    """1 for one of the gold answers to the letter, else 0, as in answer_match_reward. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages; answers: B lists of texts. Returns B floats.
    """
    return [same for same, _ in _matches("answer_exact", completions, answers)]


def answer_f1(completions, answers, **columns) -> list[float]:
    """The best token F1 with a gold answer, 0 to 1, as in answer_match_reward. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages; answers: B lists of texts. Returns B floats.
    """
    return [overlap for _, overlap in _matches("answer_f1", completions, answers)]


def passage_retrieved(completions, **columns) -> list[float | None]:
    """1 where a tool gave the row's passage, else 0; None without a passage_id. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages; passage_id (optional column): B texts or whole numbers. Returns B floats or None.
    """
    wanted = columns.get("passage_id") or [None] * len(completions)
    return [_holds(completion, passage) for completion, passage in zip(completions, wanted, strict=True)]


def _holds(completion, passage: str | int | None) -> float | None:
    if passage in (None, ""):
        return None
    if not isinstance(passage, str | int):
        raise ValueError(f"passage_retrieved: passage_id is {passage!r}, and has to be the passage's id as text, or empty where there is none")
    begins = re.compile(rf"^{re.escape(f'[{passage}]')}", re.MULTILINE)
    return float(any(begins.search(call.result) for call in tool_calls(completion) if call.result and not call.failed))


def _matches(name: str, completions, answers) -> list[tuple[float, float]]:
    """Exact match and F1 of each reply; `name` asks, should an answer be none."""
    scores = []
    for completion, gold in zip(completions, answers, strict=True):
        if not isinstance(gold, list | tuple) or not all(isinstance(text, str) and text.strip() for text in gold):
            raise ValueError(f"{name}: answers is {gold!r}, and has to be a list of texts for each row, an empty list where there is no answer")
        text = last_reply(completion)
        text = (re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE) or [text])[-1]
        given = _tokens(text)
        if gold:
            wanted = [_tokens(one) for one in gold]
            scores.append((float(given in wanted), max(_f1(given, one) for one in wanted)))
        else:
            plain = _tokens(text.replace("’", "'"))
            scores.append((float(any(plain[: len(said)] == said for said in map(_tokens, NONE))),) * 2)
    return scores


def _tokens(text: str) -> list[str]:
    """SQuAD's normalisation, and its words; in text with Chinese or full-width characters all of Unicode's punctuation goes."""
    text = text.lower()
    if WIDE.search(text):
        text = "".join(one for one in unicodedata.normalize("NFKC", text) if not unicodedata.category(one).startswith("P"))
    text = "".join(one for one in text if one not in string.punctuation)
    return TOKEN.findall(re.sub(r"\b(a|an|the)\b", " ", text))


def _f1(given: list[str], wanted: list[str]) -> float:
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if given and wanted else float(given == wanted)
