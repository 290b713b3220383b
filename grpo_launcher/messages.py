"""The one place that knows what a completion looks like: plain text, or a list of chat messages; and what a word is."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")


def reply(completion: str | list[dict]) -> str:
    """What the model finally said: the text itself, or the content of the last assistant message.

    With tools a completion holds several messages (calls, results, the answer), so the last assistant message counts. A call
    without words, or no assistant message at all, gives "".
    """
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            return message.get("content") or ""
    return ""


class ToolCall(NamedTuple):
    """One call of a tool: what the model asked for, and what it got."""

    name: str
    arguments: dict
    result: str | None  # None where the reply was cut off before it
    failed: bool  # the tool raised: the result is its message


def tool_calls(completion: str | list[dict]) -> list[ToolCall]:
    """The calls of a reply in their order; none in a plain text. A failed call is told by the form in which TRL gives its error to the model."""
    calls = []
    for at, message in enumerate(completion if isinstance(completion, list) else []):
        asked = message.get("tool_calls") or []
        results = [one["content"] for one in itertools.takewhile(lambda one: one["role"] == "tool", completion[at + 1 :])]
        for call, result in itertools.zip_longest(asked, results[: len(asked)]):
            function = call.get("function", call)
            calls.append(ToolCall(function.get("name", ""), function.get("arguments") or {}, result, str(result).startswith("{'error': ")))
    return calls


def transcript(completion: str | list[dict]) -> str:
    """A whole reply for people to read: what was said, `→ tool(argument="…")` for each call and `← …` for what came back, a line each."""
    if isinstance(completion, str):
        return completion
    lines = []
    for message in completion:
        if message["role"] == "tool":
            lines.append(f"← {message['content']}")
            continue
        lines += filter(None, [message.get("content")])
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            given = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in (function.get("arguments") or {}).items())
            lines.append(f"→ {function.get('name', '')}({given})")
    return "\n".join(lines)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation: runs of letters and digits; where it holds Chinese, jieba's words."""
    if not CHINESE.search(text):
        return re.findall(r"\w+", text.lower())
    return [word for word in _jieba().lcut(text.lower()) if re.search(r"\w", word)]


@functools.cache
def _jieba():
    import jieba

    jieba.setLogLevel("WARNING")
    cache = Path.home() / ".cache" / "jieba"  # its own choice is one file in /tmp that anybody may have put there
    cache.mkdir(parents=True, exist_ok=True)
    jieba.dt.tmp_dir = str(cache)
    return jieba
