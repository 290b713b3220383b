"""Reward <reasoning>…</reasoning><answer>B</answer> for a multiple-choice question, where refusing is allowed."""

import re
import unicodedata

from grpo_launcher.messages import gold_value, last_reply, without_marks

REFUSED = "refused"
REFUSALS = {"拒答", "拒絕回答", "拒绝回答", "不知道", "我不知道", "不確定", "不确定"}
REFUSALS |= {"無法回答", "无法回答", "無法確定", "无法确定"}
REFUSALS |= {"refuse", "refused", "i refuse", "unknown", "unsure", "i don't know", "i do not know"}
# What may stand before the letter: "The correct answer is", "答案是"; and brackets around it.
_INTRODUCTION = (
    r"(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option|choice|正確|正确)?\s*"
    r"(?:選項|选项|答案|選擇|选择|選|选)?\s*(?:is|是|為|为)?\s*:?\s*"
)
_OPEN, _CLOSE = r"[(\[{<【]?", r"[)\]}>】]"
# What may follow it: any text behind a bracket or punctuation, a space and no word ("A dog"), or Chinese text.
_REST = rf"(?:{_CLOSE}.*|\s*[.。、,:;!-].*|\s+(?![a-z]).*|(?=[\u3400-\u9fff]).*)?"
_DENIED = rf"{_CLOSE}?\s*(?:不|錯|错|以外|除外)"
_MARKS = re.compile(r"[*_`$~\"“”„«»「」『』《》]|(?<![a-z])['’‘]|['’‘](?![a-z])")  # "don't" keeps its own
_LETTER = re.compile(rf"{_INTRODUCTION}{_OPEN}([a-d])(?!{_DENIED}){_REST}", re.DOTALL)
_JOINED = r"(?:\s*[.;]?\s*(?:[,、/&+]|\b(?:and|or)\b|和|或者?|及|與|与|跟|還是|还是))+\s*[選选]?"
_SEVERAL = re.compile(
    rf"{_INTRODUCTION}{_OPEN}[a-d]{_CLOSE}?"
    rf"(?:{_JOINED}\s*{_OPEN}[a-d](?![a-z])|\s*(?:[.;-]|(?=[(\[【]))\s*{_OPEN}[a-d](?:{_CLOSE}|\s*[.;-]|$))"
)

_TAG = re.compile(r"</?(?:reasoning|answer)>")
_WHOLE = re.compile(r"\s*<reasoning>(.*?)</reasoning>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def chosen(text: str) -> str | None:
    """Return the letter that a text answers with, A to D, or REFUSED; None where no single answer stands in <answer>.

    Full-width letters and tags, lower case, "B. the option's text", "(B)", "**B**", LaTeX's boxes and "答案是B" are B.
    Several letters, or several blocks that differ, are no answer, and neither is a letter inside a text ("Bad").
    """
    blocks = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", _normalize(text), re.DOTALL)
    answers = {_read_block(block) for block in blocks}
    return answers.pop() if len(answers) == 1 else None


def _read_block(block: str) -> str | None:
    block = " ".join(_MARKS.sub("", without_marks(block)).replace("’", "'").split())
    if block.strip(" .。!()[]【】") in REFUSALS:
        return REFUSED
    match = _LETTER.fullmatch(block)
    return match[1].upper() if match and not _SEVERAL.match(block) else None


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _gold_letter(gold: str | None) -> str | None:
    return gold_value(gold, "choice: answer", "A, B, C or D", lambda text: text if text in list("ABCD") else None)


def choice_reward(
    completions,
    answer,
    *,
    right: float = 1.0,
    refused: float = 0.0,
    wrong: float = -1.0,
    unparseable: float = -1.5,
    **columns,
) -> list[float | None]:
    """Reward the right letter most, then a refusal, then a wrong letter, then a completion without an answer.

    With p the chance of being right, answering pays where p * right + (1 - p) * wrong > refused: p > 1/2 by default.

    Args:
        answer: B letters A to D.

    Returns:
        B rewards, each one of the four options; None for a row without an answer.
    """
    if not unparseable < wrong < refused < right:
        raise ValueError(
            f"choice_reward: unparseable {unparseable} < wrong {wrong} < refused {refused} < right {right} must hold"
        )
    scores = []
    for completion, gold in zip(completions, map(_gold_letter, answer), strict=True):
        values = {None: unparseable, REFUSED: refused, gold: right}
        score = float(values.get(chosen(last_reply(completion)), wrong))
        scores.append(None if gold is None else score)
    return scores


def choice_accuracy(completions, answer, **columns) -> list[float | None]:
    """Measure: 1 for the right letter, 0 for a wrong one, a refusal or no answer."""
    rows = zip(completions, map(_gold_letter, answer), strict=True)
    return [None if gold is None else float(chosen(last_reply(completion)) == gold) for completion, gold in rows]


def choice_refusal(completions, **columns) -> list[float]:
    """Measure: 1 for a refusal, else 0."""
    return [float(chosen(last_reply(completion)) == REFUSED) for completion in completions]


def choice_accuracy_of_answered(completions, answer, **columns) -> list[float | None]:
    """Measure: 1 for the right letter, 0 for a wrong one, None where no letter was given."""
    scores = []
    for completion, gold in zip(completions, map(_gold_letter, answer), strict=True):
        letter = chosen(last_reply(completion))
        scores.append(None if gold is None or letter in (None, REFUSED) else float(letter == gold))
    return scores


def choice_format_reward(completions, **columns) -> list[float]:
    """Reward 1 for <reasoning>…</reasoning><answer>…</answer>, neither empty, and nothing else; else 0."""
    scores = []
    for completion in completions:
        match = _WHOLE.fullmatch(_normalize(last_reply(completion)))
        parts = match.groups() if match else [""]
        scores.append(float(all(part.strip() and not _TAG.search(part) for part in parts)))
    return scores


def reasoning_length_reward(completions, *, least: int = 100, **columns) -> list[float]:
    """Reward the length of <reasoning>…, so that completions that were all cut off still differ.

    Args:
        least: characters of reasoning from which on the reward is 1.

    Returns:
        B rewards in [0, 1]: characters over `least`, at most 1; 0 without <reasoning>.
    """
    if least < 1:
        raise ValueError(f"reasoning_length_reward: least is {least} and must be at least 1")
    scores = []
    for completion in completions:
        match = re.search(
            r"<reasoning>(.*?)(?:</reasoning>|<answer>|$)", _normalize(last_reply(completion)), re.DOTALL
        )
        scores.append(min(1.0, len(match[1].strip()) / least) if match else 0.0)
    return scores


for _function in (choice_reward, choice_accuracy, choice_accuracy_of_answered):
    _function.check_gold = _gold_letter
