"""Read prompts and completions, which are text or lists of chat messages, and split text into words."""

import functools
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CHINESE = re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
# Thai, Lao, Burmese, Khmer and Kana have no spaces between words: each letter counts as one, as in Chinese.
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
# Accents and vowel signs, which \w leaves out (behind Hangul stand those that only choose how an emoji looks).
_MARKS = "".join(char for char in map(chr, range(0x300, 0xAC00)) if unicodedata.category(char) in ("Mn", "Mc"))
_ALONE = rf"{CHINESE.pattern}|{_SPACELESS.pattern}"
WORD = re.compile(rf"(?=\w)(?:{_ALONE})[{_MARKS}]*|(?:(?!{_ALONE})\w[{_MARKS}]*)+")
_SETTING = re.compile(r"\\(?:boxed|fbox|mbox|underline|emph|bm|operatorname|text\w*|math\w+)\s*\{([^{}]*)\}")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # would move the cursor or change colours
TOOL_ERROR = "{'error': "  # how TRL begins the result of a tool that raised


def printable(text: str) -> str:
    """Replace what would command a terminal."""
    return _UNPRINTABLE.sub("\ufffd", text)


def last_reply(completion: str | list[dict]) -> str:
    """Return the text of a completion: the string itself, or the content of its last assistant message.

    With tools a completion holds several messages: calls, results, the answer. "" where that message has no words.
    """
    return completion if isinstance(completion, str) else _last_content(completion, "assistant")


def last_user_text(prompt: str | list[dict]) -> str:
    """Return the text of a prompt: the string itself, or the content of its last user message ("" without one)."""
    return prompt if isinstance(prompt, str) else _last_content(prompt, "user")


def _last_content(messages: list[dict], role: str) -> str:
    contents = [message.get("content") or "" for message in messages if message.get("role") == role] or [""]
    is_text = isinstance(contents[-1], str)
    return contents[-1] if is_text else "".join(part.get("text") or "" for part in contents[-1])


def is_null(value) -> bool:
    """Whether a column holds nothing in a row: null, or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def gold_value(value, column: str, wanted: str, read: Callable):
    """Return what `read` makes of a gold value; None for null and NaN. What `read` makes None of is a ValueError."""
    if is_null(value):
        return None
    gold = read(value)
    if gold is None:
        raise ValueError(f"{column} is {value!r:.200} and must be {wanted}")
    return gold


def gold_text(value, reward: str) -> str | None:
    """Return the text of a row's column `reference`, or None where the row has none."""
    return gold_value(value, f"{reward}: reference", "a text", lambda text: text if isinstance(text, str) else None)


def without_marks(text: str) -> str:
    r"""Return a text without what only sets it: \boxed{…}, \text{…}, \( and \), zero-width characters."""
    text = re.sub(r"\\[()\[\]]", "", "".join(char for char in text if unicodedata.category(char) != "Cf"))
    found = 1
    while found:  # from the inside out; a space keeps a unit apart from its number
        text, found = _SETTING.subn(lambda match: f" {match[1]}" if match[1][:1].isalpha() else match[1], text)
    return text


class ToolCall(NamedTuple):
    """One call of a tool and its result."""

    name: str
    arguments: dict
    result: str | None  # None where the completion was cut off before it
    failed: bool  # the tool raised: the result is its message


def tool_calls(completion: str | list[dict]) -> list[ToolCall]:
    """Return the tool calls of a completion in their order; a text has none."""
    calls = []
    messages = completion if isinstance(completion, list) else []
    for index, message in enumerate(messages):
        requests = message.get("tool_calls") or []
        answers = itertools.takewhile(lambda answer: answer["role"] == "tool", messages[index + 1 :])
        results = [answer["content"] for answer in answers][: len(requests)]
        for request, result in itertools.zip_longest(requests, results):
            function = request.get("function", request)
            failed = str(result).startswith(TOOL_ERROR)
            calls.append(ToolCall(function.get("name", ""), function.get("arguments") or {}, result, failed))
    return calls


def transcript(completion: str | list[dict]) -> str:
    """Return a completion for people to read: text, `→ tool(argument="…")` for a call and `← …` for its result."""
    if isinstance(completion, str):
        return completion
    lines = []
    for message in completion:
        content = message.get("content")
        if message["role"] == "tool":
            lines.append(f"← {content}")
        elif content:
            lines.append(content)
        for request in message.get("tool_calls") or []:
            function = request.get("function", request)
            arguments = (function.get("arguments") or {}).items()
            listed = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments)
            lines.append(f"→ {function.get('name', '')}({listed})")
    return "\n".join(lines)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; jieba's words where it holds Chinese."""
    text = text.lower()
    if not CHINESE.search(text):
        return WORD.findall(unicodedata.normalize("NFC", text))
    found, start = [], 0
    for match in WORD.finditer(text):
        is_foreign = any(char.isalpha() and not char.isascii() for char in match[0]) and not CHINESE.match(match[0])
        if is_foreign:  # jieba would cut it into letters
            found += [*_jieba().lcut(text[start : match.start()]), unicodedata.normalize("NFC", match[0])]
            start = match.end()
    return [word for word in found + _jieba().lcut(text[start:]) if re.search(r"\w", word)]


@functools.cache
def _jieba():
    import jieba

    jieba.setLogLevel("WARNING")
    cache = Path.home() / ".cache" / "jieba"  # its own choice is one file in /tmp that anybody may have put there
    cache.mkdir(parents=True, exist_ok=True)
    jieba.dt.tmp_dir = str(cache)
    return jieba
