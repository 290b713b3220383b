"""Read prompts and completions, which are text or lists of chat messages, and split text into words."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
TOOL_ERROR = "{'error': "  # how TRL begins the result of a tool that raised


def last_reply(completion: str | list[dict]) -> str:
    """Return the text of a completion: the string itself, or the content of its last assistant message.

    With tools a completion holds several messages: calls, results, the answer. "" where that message has no words.
    """
    return completion if isinstance(completion, str) else _last_content(completion, "assistant")


def last_user_text(prompt: str | list[dict]) -> str:
    """Return the text of a prompt: the string itself, or the content of its last user message ("" without one)."""
    return prompt if isinstance(prompt, str) else _last_content(prompt, "user")


def _last_content(messages: list[dict], role: str) -> str:
    contents = [message.get("content") or "" for message in messages if message.get("role") == role]
    return contents[-1] if contents else ""


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
