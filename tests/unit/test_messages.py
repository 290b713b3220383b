"""What a prompt and a completion hold: text, last messages, tool calls."""

import pytest

from grpo_launcher.messages import last_reply, last_user_text, tool_calls, transcript, words


def call(expression: str) -> dict:
    """Return an assistant message with a call of the calculator."""
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


EPISODE = [
    call("2 plus 3"),
    {"role": "tool", "name": "calculator", "content": "{'error': 'unknown name plus'}"},
    call("2 + 3") | {"content": "Again."},
    {"role": "tool", "name": "calculator", "content": "5"},
    {"role": "assistant", "content": "The answer is 5."},
]
LAST_REPLIES = {
    "text": ("abc", "abc"),
    "empty text": ("", ""),
    "chat": ([{"role": "assistant", "content": "abc"}], "abc"),
    "the answer after tools": (EPISODE, "The answer is 5."),
    "a call without words": (EPISODE[:2], ""),
    "content in parts": ([{"role": "assistant", "content": [{"type": "text", "text": "abc"}]}], "abc"),
    "content None": ([{"role": "assistant", "content": None}], ""),
    "no message": ([], ""),
}


@pytest.mark.parametrize(("completion", "text"), LAST_REPLIES.values(), ids=LAST_REPLIES)
def test_last_reply_is_the_last_assistant_message(completion, text):
    """len() of a list of messages is 1: that must not be the length of a completion."""
    assert last_reply(completion) == text


def test_last_user_text_is_the_last_user_message():
    """Of several turns; "" without one; a plain prompt is its own text."""
    turns = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Praise me"), ("assistant", "A")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    assert [last_user_text(given) for given in (prompt, prompt[:1], "Praise me")] == ["Praise me", "", "Praise me"]


def test_calls_are_read_with_their_results():
    """In order; a call whose result was cut off has none; a text has no calls."""
    assert [(call.arguments["expression"], call.result, call.failed) for call in tool_calls(EPISODE)] == [
        ("2 plus 3", "{'error': 'unknown name plus'}", True),
        ("2 + 3", "5", False),
    ]
    assert tool_calls(EPISODE[:3])[1].result is None and tool_calls("2 + 3 = 5") == []


def test_a_transcript_has_calls_and_results_on_lines():
    """A text stays as it is."""
    assert transcript(EPISODE).splitlines() == [
        '→ calculator(expression="2 plus 3")',
        "← {'error': 'unknown name plus'}",
        "Again.",
        '→ calculator(expression="2 + 3")',
        "← 5",
        "The answer is 5.",
    ]
    assert transcript("5") == "5"


def test_words_are_lower_case_without_punctuation():
    """Chinese is cut by jieba, which keeps its cache out of /tmp."""
    assert words("No, no; 3 times!") == ["no", "no", "3", "times"]
    assert words("我们 love 北京。") == ["我们", "love", "北京"]
    assert words("Да, कि; ok_1 ❤️ 도서관") == ["да", "कि", "ok_1", "도서관"]
    assert words("iPhone手机涨3.5%，и всё") == ["iphone", "手机", "涨", "3.5%", "и", "всё"]
