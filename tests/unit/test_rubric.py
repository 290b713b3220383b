"""A rubric's ratings, from a real HTTP server: what it asks, what it reads, and which rubrics it refuses."""

import asyncio
import json
import re
import time
from contextlib import ExitStack

import pytest
from judge_server import JudgeServer

from grpo_launcher.plugins import call_reward, load_rewards
from rewards import judge as module
from rewards.judge import judge_reward
from rewards.rubric import rubric_reward

RUBRIC = """
- {name: brief, weight: 3, text: The reply has one sentence.}
- {name: kind, text: The reply is polite.}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No key, no proxy, nothing remembered."""
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, empty in (("_cache", {}), ("_failing", set()), ("_refused", {})):
        monkeypatch.setattr(module, name, empty)


@pytest.fixture
def serve():
    """A function that starts a JudgeServer, which is stopped when the test ends."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(JudgeServer(*args, **kwargs))


@pytest.fixture
def rubric(tmp_path):
    """A file of two criteria: brief, of weight 3, and kind."""
    path = tmp_path / "rubric.yaml"
    path.write_text(RUBRIC, encoding="utf-8")
    return str(path)


def rate(url, completions, rubric, **columns):
    """Return the ratings of completions of one prompt; nothing is tried again."""
    columns = {"base_url": url, "retries": 0, "trainer_state": None, "rubric": rubric} | columns
    return asyncio.run(rubric_reward(prompts=["Hi"] * len(completions), completions=completions, **columns))


def of(brief, kind) -> str:
    """Return what a judge answers."""
    return json.dumps({"brief": brief, "kind": kind})


def test_the_weighted_mean_counts_and_each_criterion_is_logged(serve, rubric):
    """In the order of the batch; a completion without a rating is in no mean, and 0 is a rating."""
    ratings = {"a": (8, 4), "none": None, "zero": (0, 0), "best": (10, 10)}
    judge = serve(lambda reply, _: time.sleep(0.02 * len(reply)) or (of(*ratings[reply]) if ratings[reply] else "?"))
    logged = []
    scores = rate(judge.url, list(ratings), rubric, log_metric=lambda *metric: logged.append(metric))
    assert scores == [7, None, 0, 10]
    assert dict(logged) == {"rubric/brief": 6, "rubric/kind": pytest.approx(14 / 3)} and len(logged) == 2


def test_nothing_is_logged_where_nothing_is_rated(serve, rubric):
    """An empty batch costs no request."""
    judge, logged = serve(), []
    options = {"rubric": rubric, "log_metric": lambda *metric: logged.append(metric)}
    assert rate(judge.url, [], **options) == [] and judge.requests == []
    assert rate(judge.url, ["a", "b"], **options) == [None, None] and logged == []


def test_one_request_asks_for_all_criteria(serve, rubric):
    """With a schema of integers from 0 to 10, and their texts in the judge's instructions."""
    judge = serve(lambda *_: of(1, 2))
    assert rate(judge.url, ["a", "b", "a"], rubric) == [1.25] * 3
    assert len(judge.requests) == 2
    for request in judge.requests:
        schema = request["response_format"]["json_schema"]["schema"]
        rating = {"type": "integer", "minimum": 0, "maximum": 10}
        assert schema["properties"] == {"brief": rating, "kind": rating} and schema["required"] == ["brief", "kind"]
        system = request["messages"][0]["content"]
        assert "- brief: The reply has one sentence." in system and "- kind: The reply is polite." in system
        assert "never instructions" in system


def test_weights_may_change_without_a_new_request_and_texts_not(serve, rubric, tmp_path):
    """The judge does not see the weights."""
    judge = serve(lambda *_: of(8, 4))
    assert rate(judge.url, ["a"], rubric) == [7]
    other = tmp_path / "other.yaml"
    other.write_text(RUBRIC.replace("weight: 3", "weight: 1"), encoding="utf-8")
    assert rate(judge.url, ["a"], str(other)) == [6] and len(judge.requests) == 1
    other.write_text(RUBRIC.replace("one", "no"), encoding="utf-8")
    assert rate(judge.url, ["a"], str(other)) == [7] and len(judge.requests) == 2


READABLE = {
    "JSON": of(8, 4),
    "a code block": f"```json\n{of(8, 4)}\n```",
    "thoughts before it": "<think>Is {brief: 3} right? " + of(1, 1) + "</think>\n" + of(8, 4),
    "numbers with a point": of(8.0, 4.0),
    "numbers in quotes": of("8", "4/10"),
    "another field": '{"reason": "so {short}", "brief": 8, "kind": 4}',
    "words around it": f"My ratings: {of(8, 4)}. Thanks",
}
UNREADABLE = {
    "a criterion that is missing": '{"brief": 8}',
    "over 10": of(8, 11),
    "under 0": of(-1, 4),
    "no number": of(8, "good"),
    "true": of(8, True),
    "null": of(8, None),
    "not a number": of(8, float("nan")),
    "without an end": of(8, float("inf")),
    "too many digits for an integer": '{"brief": 8, "kind": %s}' % ("9" * 5000),
    "a list that is deep": '{"brief": 8, "kind": ' + "[" * 900 + "]" * 900 + "}",
    "nested too deep": '{"brief": ' + "[" * 100_000 + "}",
    "words": "The reply is brief.",
    "a list": "[8, 4]",
    "half of it": '{"brief": 8, "kind"',
    "two of them": of(8, 4) + of(10, 10),
    "nested": json.dumps({"ratings": {"brief": 8, "kind": 4}}),
    "thoughts without an end": "<think>Perhaps " + of(8, 4) + ", but",
    "thoughts alone": "<think>" + of(8, 4) + "</think>",
    "nothing": "",
    "no text": None,
}


@pytest.mark.parametrize(
    ("answer", "score"),
    [*((answer, 7) for answer in READABLE.values()), *((answer, None) for answer in UNREADABLE.values())],
    ids=[*READABLE, *UNREADABLE],
)
def test_an_answer_is_read(serve, rubric, answer, score):
    """Every criterion, each from 0 to 10, or nothing."""
    judge = serve()
    judge.answer = lambda *_: (200, judge.completion(answer))
    assert rate(judge.url, ["a"], rubric) == [score]


def test_a_rubric_and_a_rating_of_one_judge_are_told_apart(serve, rubric, caplog):
    """Each reward tells its failure once, although the other one works on the same server."""
    judge = serve()
    for step in "123":
        assert rate(judge.url, [step], rubric) == [None]
        score = judge_reward(prompts=["Hi"], completions=[step], base_url=judge.url, retries=0)
        assert asyncio.run(score) == [8]
    messages = [record.getMessage() for record in caplog.records if record.name == "rewards.judge"]
    assert len(messages) == 1 and all(part in messages[0] for part in ("rubric_reward", judge.url, "brief, kind"))


def test_a_recipe_names_the_rubric(serve, rubric):
    """By reward_kwargs; called as a run and the reward check do."""
    judge = serve(lambda *_: of(8, 4))
    options = {"rubric": rubric, "base_url": judge.url}
    (reward,) = load_rewards(["rewards.rubric.rubric_reward"], {"rubric_reward": options}, columns=["prompt"])
    reward.ready()
    assert call_reward(reward, prompts=["Hi"], completions=[[{"role": "assistant", "content": "a"}]]) == [7]
    assert len(judge.requests) == 2


REFUSED = {
    "an empty file": ("", "is no list of criteria"),
    "no YAML": ("- {name: brief", "is no list of criteria"),
    "a mapping": ("brief: The reply is short.", "is no list of criteria"),
    "a text": ("brief", "is no list of criteria"),
    "no item": ("[]", "is no list of criteria"),
    "no UTF-8": (b"- {name: brief, text: \xff}", "is no list of criteria"),
    "a name that comes again": ("- {name: a, text: x}\n- {name: a, text: y}", "criterion 2 of .*'text': 'y'"),
    "no name": ("- {text: x}", "criterion 1 of "),
    "a name of two words": ("- {name: a b, text: x}", "criterion 1 of .*'a b'"),
    "a name that YAML reads as true": ("- {name: yes, text: x}", "criterion 1 of .*True"),
    "no text": ("- {name: a, text: x}\n- {name: b}", "criterion 2 of "),
    "an empty text": ("- {name: a, text: ' '}", "criterion 1 of "),
    "a number as text": ("- {name: a, text: 5}", "criterion 1 of "),
    "a weight of 0": ("- {name: a, text: x, weight: 0}", "criterion 1 of .*'weight': 0"),
    "a negative weight": ("- {name: a, text: x, weight: -1}", "criterion 1 of "),
    "a weight without an end": ("- {name: a, text: x, weight: .inf}", "criterion 1 of "),
    "a weight that is no number": ("- {name: a, text: x, weight: .nan}", "criterion 1 of "),
    "a weight in words": ("- {name: a, text: x, weight: high}", "criterion 1 of "),
    "a mistyped key": ("- {name: a, text: x, wieght: 2}", "criterion 1 of .*wieght"),
    "an item in words": ("- brief", "criterion 1 of .*'brief'"),
}


@pytest.mark.parametrize(("content", "problem"), REFUSED.values(), ids=REFUSED)
def test_a_rubric_that_cannot_be_used_is_refused(tmp_path, content, problem):
    """By `ready` before a run, and by the reward, naming the reward, the file and the item."""
    path = tmp_path / "rubric.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for call in (
        lambda: rubric_reward.ready(rubric=str(path)),
        lambda: rate("http://127.0.0.1:1/v1", ["a"], str(path)),
    ):
        with pytest.raises(ValueError, match=f"^rubric_reward: .*{problem}.*Fix: ") as refusal:
            call()
        assert str(path) in str(refusal.value)


@pytest.mark.parametrize("path", [None, "", "nowhere.yaml", "/"])
def test_a_rubric_that_is_not_there_is_refused(path):
    """A folder neither."""
    with pytest.raises(ValueError, match=f"^rubric_reward: rubric {re.escape(repr(str(path)))} is no file.*Fix: "):
        rubric_reward.ready(rubric=path)


NOT_READY = {
    "another model": ({"model": "llama3"}, {}, ["not found", "/models lists"]),
    "the key": ({"key": "another"}, {}, ["Incorrect API key", "JUDGE_API_KEY"]),
    "one rating for two": ({}, {}, ["no rating from 0 to 10 for each of brief, kind in the answer '8'", "max_tokens"]),
    "silence": ({"delay": 30}, {"timeout": 0.3}, ["timed out", "raise `timeout`"]),
    "a number in quotes": ({}, {"concurrency": "16"}, ["concurrency is '16'"]),
}


@pytest.mark.parametrize(("server", "options", "parts"), NOT_READY.values(), ids=NOT_READY)
def test_a_judge_that_is_not_ready_is_refused_with_the_reason(serve, rubric, server, options, parts):
    """In the name of this reward."""
    with pytest.raises(ValueError, match=r"^rubric_reward: .*Fix: ") as refusal:
        rubric_reward.ready(rubric=rubric, base_url=serve(**server).url, **options)
    for part in parts:
        assert part in str(refusal.value)
