"""Reward an answer to a multiple-choice question given as <reasoning>…</reasoning><answer>…</answer>, where refusing is allowed."""

import re
import unicodedata

from grpo_launcher.messages import last_reply

REFUSED = "refused"
REFUSALS = {"拒答", "拒絕回答", "拒绝回答", "不知道", "不確定", "不确定", "refuse", "refused", "i refuse", "unknown", "unsure", "i don't know", "i do not know"}
_INTRODUCED = r"(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option|choice|正確|正确)?\s*(?:選項|选项|答案|選擇|选择|選|选)?\s*(?:is|是|為|为)?\s*:?\s*"
_CHOICE = re.compile(rf"{_INTRODUCED}[(\[【「]?([a-d])[)\]】」]?(?:\s*[.。、,:;!-].*|\s+(?![a-z]).*|(?=[\u3400-\u9fff]).*)?", re.DOTALL)
_SEVERAL = re.compile(r"[(\[【「]?[a-d][)\]】」]?\s*(?:[,、/&+]|\b(?:and|or)\b|和|或|及|與|与)\s*[(\[【「]?[a-d](?![a-z])")


def chosen(text: str) -> str | None:
    """The letter A to D that a reply answers with, REFUSED, or None for no answer that can be read: never a letter by default.

    Full-width letters and tags, lower case, "B. the option's text", "(B)" and "答案是B" all are B. Only what stands in <answer> counts;
    several letters, or several blocks that differ, are no answer; a letter inside a word ("Bad", "Vitamin A") is none.
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    parts = (part.partition("</answer>") for part in plain.split("<answer>")[1:])
    found = {_read(block) for block, closed, _ in parts if closed}
    return found.pop() if len(found) == 1 else None


def _read(block: str) -> str | None:
    block = block.strip().replace("’", "'")
    if block.strip(" .。!'\"") in REFUSALS:
        return REFUSED
    match = None if _SEVERAL.match(re.sub(f"^{_INTRODUCED}", "", block)) else _CHOICE.fullmatch(block)
    return match[1].upper() if match else None


def choice_reward(completions, answer, *, right: float = 1.0, refused: float = 0.0, wrong: float = -1.0, unparseable: float = -1.5, **columns) -> list[float]:
    """`right`, `refused`, `wrong` or `unparseable`, which have to stand in this order: −1.5 to 1 by default.

    With p the chance of being right, answering pays only where p·right + (1 − p)·wrong > refused: above one half by default.
    completions: B replies, as text or as chat messages; answer: B letters A to D. Returns B floats. Raises ValueError for values out of
    order or an answer that is no such letter.
    """
    if not unparseable < wrong < refused < right:
        raise ValueError(f"choice_reward: unparseable {unparseable} < wrong {wrong} < refused {refused} < right {right} has to hold")
    scores = []
    for completion, gold in zip(completions, answer, strict=True):
        if gold not in ("A", "B", "C", "D"):
            raise ValueError(f"choice_reward: answer is {gold!r}, and has to be A, B, C or D")
        given = chosen(last_reply(completion))
        scores.append(float({None: unparseable, REFUSED: refused, gold: right}.get(given, wrong)))
    return scores


def choice_accuracy(completions, answer, **columns) -> list[float]:
    """1 for the right letter, 0 for a wrong one, a refusal or no answer. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages; answer: B letters A to D. Returns B floats.
    """
    return [float(chosen(last_reply(completion)) == gold) for completion, gold in zip(completions, answer, strict=True)]


def choice_refusal(completions, **columns) -> list[float]:
    """1 for a refusal, 0 for anything else. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages. Returns B floats.
    """
    return [float(chosen(last_reply(completion)) == REFUSED) for completion in completions]


def choice_accuracy_of_answered(completions, answer, **columns) -> list[float | None]:
    """1 for the right letter, 0 for a wrong one, None where no letter was given. A measure, to stand among the rewards with weight 0.

    completions: B replies, as text or as chat messages; answer: B letters A to D. Returns B floats or None.
    """
    given = [chosen(last_reply(completion)) for completion in completions]
    return [None if letter in (None, REFUSED) else float(letter == gold) for letter, gold in zip(given, answer, strict=True)]


def choice_format_reward(completions, **columns) -> list[float]:
    """1 for a reply that is <reasoning>…</reasoning><answer>…</answer>, once each, neither empty, and nothing else; else 0.

    completions: B replies, as text or as chat messages. Returns B floats.
    """
    return [float(_is_whole(unicodedata.normalize("NFKC", last_reply(completion)).lower())) for completion in completions]


def _is_whole(text: str) -> bool:
    match = re.fullmatch(r"\s*<reasoning>(.*?)</reasoning>\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
    return bool(match) and all(part.strip() and not re.search(r"</?(?:reasoning|answer)>", part) for part in match.groups())


def reasoning_length_reward(completions, *, least: int = 100, **columns) -> list[float]:
    """The reasoning's characters over `least`, at most 1: 0 without <reasoning>, 1 from `least` characters on.

    Reasoning that was cut off before </reasoning> counts as far as it goes: were it 0, replies that are all cut off would all score
    alike, and nothing would be learned. completions: B replies, as text or as chat messages. Returns B floats. Raises ValueError if
    `least` is below 1.
    """
    if least < 1:
        raise ValueError(f"reasoning_length_reward: least is {least}, and has to be at least 1")
    scores = []
    for completion in completions:
        match = re.search(r"<reasoning>(.*?)(?:</reasoning>|<answer>|$)", unicodedata.normalize("NFKC", last_reply(completion)), re.DOTALL | re.IGNORECASE)
        scores.append(min(1.0, len(match[1].strip()) / least) if match else 0.0)
    return scores
