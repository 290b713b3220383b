"""The one place that knows what a completion looks like: plain text, or a list of chat messages; and what a word is."""

import functools
import re
from pathlib import Path

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
