"""Hold a reward function against what a run asks of it: generated batches, passed as TRL passes them. For `python -m grpo_launcher.rewards_command`.

FAIL is what would end or spoil a run on chat rows, this project's own kind; what matters only with plain-text rows or with tools
is a warning, and so is what is merely slow or odd.
"""

import asyncio
import copy
import inspect
import math
import numbers
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers import TrainerState

from grpo_launcher import plugins as bind
from grpo_launcher.config import Recipe, RecipeError

PROMPTS = ("What did the cat do last night?", "How high is the moon?")
REPLIES = (
    "The cat sat on the mat and looked at the moon for an hour.",
    "No.",
    "It is 384,400 km away.\n\n- far\n- far away\n\nThe answer is 42 (and 8/10).",
    "Every night the cat climbs onto the roof, waits until the moon is up, and comes down only when it hears the milk. " * 2,
)
ODD_TEXTS = ("今天天气很好，我们去公园。分数8分", "🙂👩‍👩‍👧🏽", "e\u0301\u0323a\u0308", "שלום, عالم", "\x00\x07\u202e\u200b\ufffd", " \n\t ")
LIKE_A_REFERENCE = re.compile("reference|answer|gold|target|label|solution|summary|truth")
REFERENCES = ("The cat looked at the moon.", "The moon is 384,400 km away.")
READ = "A chat completion is a list of messages, with tools several: read it with grpo_launcher.messages.reply(completion)."
NUMBERS = "Return a list with one float (or None) a completion."
LONG = 100_000  # characters
LIMIT_S = 120  # for one call; TRL has no limit, the other ranks give up after 1800 s
SLOW_MS = 10  # a completion
CASES = ["kinds", "steadiness", "formats", "two_prompts", "empty_reply", "unicode", "very_long_reply", "tool_messages", "inputs", "speed"]


class Row(NamedTuple):
    """One line of the table."""

    case: str
    seen: str
    verdict: str = "ok"
    remedy: str = ""


class Fault(Exception):
    """A batch that the reward could not be scored on."""

    def __init__(self, seen: str, remedy: str):
        self.seen, self.remedy = seen, remedy


def load(name: str, options: dict) -> Callable:
    """The reward with its options bound, by the code and in the words of a run. Raises RecipeError."""
    if "/" in name:
        raise RecipeError(f"{name}: a reward model is loaded by TRL when the run begins; only functions can be tried before.")
    function = bind.find(name)
    if not inspect.isfunction(function):
        raise RecipeError(f"{name}: write a function (def {name.rpartition('.')[2]}(completions, **columns)), not a {type(function).__name__}.")
    return bind.load_rewards(Recipe(reward_funcs=[name], reward_kwargs={function.__name__: options} if options else None))[0]


def where(error: Exception) -> str:
    """'file:line: Type: text', the line being the innermost one in the reward's own file; without file where it raised nothing itself."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [index for index, frame in enumerate(frames) if frame.filename == bind.__file__]
    inside = frames[ours[-1] + 1 :] if ours else frames
    what = f"{type(error).__name__}: {error}"
    if not inside:
        return what
    frame = [frame for frame in inside if frame.filename == inside[0].filename][-1]
    return f"{frame.filename.removeprefix(os.getcwd() + os.sep)}:{frame.lineno}: {what}"


def call(reward: Callable, batch: dict, runner: asyncio.Runner, logged: list) -> list:
    """Scores of one call as TRL makes it, by keyword and on one loop; what the reward logs goes into `logged`. Raises what it raises."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(LIMIT_S)
    try:
        logs = {"log_extra": lambda column, values: logged.append((column, values)), "log_metric": lambda name, value: logged.append((name, value))}
        scores = reward(**batch, trainer_state=TrainerState(), **logs)
        return runner.run(scores) if inspect.iscoroutine(scores) else scores
    finally:
        signal.alarm(0)


def _late(*_):
    raise TimeoutError(f"no answer within {LIMIT_S} s")


def check(names: list[str], options: dict, columns: dict[str, list]) -> dict[str, list[Row]]:
    """Rows of findings, by reward. columns: name → one value, or two for the two prompts. Raises RecipeError for what cannot be looked at."""
    found = {}
    for name in names:
        try:
            with asyncio.Runner() as runner:
                found[name] = _Check(load(name, options), columns, runner).rows()
        except RecipeError as error:
            if "must end in **columns" not in str(error):
                raise
            found[name] = [Row("keywords", str(error), "FAIL", "def NAME(completions, **columns):")]
    try:
        bind.load_rewards(Recipe(reward_funcs=names))
    except RecipeError as error:
        if "two rewards are called" in str(error):
            found["together"] = [Row("names", str(error), "FAIL")]
    return found


class _Check:
    """The cases for one reward. Each is a method that yields rows and raises Fault where the reward has no answer."""

    def __init__(self, reward: Callable, columns: dict[str, list], runner: asyncio.Runner):
        self.reward, self.runner = reward, runner
        self.filled = {name: REFERENCES if LIKE_A_REFERENCE.search(name) else ("x", "y") for name in bind.needs(reward) if name not in columns}
        # One column that no reward knows: a dataset has more of them than a reward asks for.
        self.columns = {"another_column": ("x", "y"), **self.filled, **{name: (values[0], values[-1]) for name, values in columns.items()}}
        self.scores = {}  # of REPLIES, as chat (True) and as text (False)
        self.chat = self.steady = True

    def rows(self) -> list[Row]:
        rows = [*self.signature()]
        if any(row.verdict == "FAIL" for row in rows):
            return rows
        for chat in (True, False):
            try:
                self.scores[chat], _ = self.score(self.batch(REPLIES, chat))
            except Fault as fault:
                verdict, note = ("warn", " (matters with plain-text rows)") if self.scores else ("FAIL", "")
                rows.append(Row("chat batch" if chat else "plain batch", fault.seen + note, verdict, fault.remedy))
        self.chat = True in self.scores
        if not self.scores:
            return rows  # the other cases would say the same
        for case in CASES:
            try:
                rows += getattr(self, case)()
            except Fault as fault:
                # A reward that never sees a tool may well read the only message that there is.
                verdict, note = ("warn", " (matters with tools)") if case == "tool_messages" else ("FAIL", "")
                rows.append(Row(case.replace("_", " "), fault.seen + note, verdict, fault.remedy))
        return rows

    def signature(self) -> Iterator[Row]:
        if inspect.iscoroutinefunction(self.reward):
            yield Row("async", "awaited together with the other async rewards, after the ordinary ones")
        for name, values in self.filled.items():
            remedy = f"Check with its real content: --column {name}=VALUE. In a run the dataset must have a column {name}."
            yield Row("columns", f"needs `{name}`, filled here with {values[0]!r}", "ok" if values is REFERENCES else "warn", remedy)
        if hasattr(self.reward, "ready"):
            try:
                self.reward.ready()
            except ValueError as error:
                yield Row("ready", str(error), "FAIL", "A run would not start.")

    def kinds(self) -> Iterator[Row]:
        scores = self.scores[self.chat]
        case = "chat batch" if self.chat else "plain batch"
        odd = {type(score).__name__ for score in scores if score is not None and (isinstance(score, bool) or not isinstance(score, numbers.Real))}
        seen, advice = _show(scores) + (" (None counts as failed)" if None in scores else ""), ()
        if all(score is None for score in scores):
            advice = ("warn", "None for every reply: where it asks a server, is that one up?")
        elif odd:
            advice = ("warn", f"Return plain floats, no {', '.join(odd)}, so that sums and the log are what you mean.")
        yield Row(case, seen, *advice)

    def steadiness(self) -> Iterator[Row]:
        scores = [self.scores[self.chat], self.score(self.batch(REPLIES))[0]]
        self.steady = _same(*scores)  # what follows compares scores only then
        noise = (" then ".join(map(_show, scores)), "warn", "Noise is nothing that the policy can learn: fix the seed, or temperature 0.")
        yield Row("same batch twice", *(("same scores",) if self.steady else noise))

    def formats(self) -> Iterator[Row]:
        if len(self.scores) < 2:
            return
        chat, text = self.scores[True], self.scores[False]
        if self.steady and not _same(chat, text):
            blind = len(set(map(str, chat))) == 1  # it tells no chat reply from another: nothing would be learned
            yield Row("plain batch", f"{_show(text)}; the same replies as chat: {_show(chat)}", "FAIL" if blind else "warn", READ)
        else:
            yield Row("plain batch", _show(text))

    def two_prompts(self) -> Iterator[Row]:
        one, two = self.batch(REPLIES), self.batch(REPLIES, second=True)
        both = self.score({key: one[key] + two[key] for key in one})[0]
        apart = self.score(one)[0] + self.score(two)[0]
        advice = ()
        if self.steady and not _same(both, apart):
            advice = ("warn", f"Alone each half gets {_show(apart)}: use each reply's own row, zip(completions, column), and no reply of another prompt.")
        yield Row("two prompts", _show(both), *advice)

    def empty_reply(self) -> Iterator[Row]:
        yield Row("empty reply", _show(self.score(self.batch(["", REPLIES[0]]))[0][:1]))

    def unicode(self) -> Iterator[Row]:
        yield Row("unicode", _show(self.score(self.batch(ODD_TEXTS))[0]))

    def very_long_reply(self) -> Iterator[Row]:
        scores, seconds = self.score(self.batch(["".join(f"word{n % 977} " for n in range(LONG))[:LONG]]))
        seen = f"{_show(scores)}, in {seconds:.1f} s for {LONG:,} characters"
        advice = ("warn", "The other ranks wait: read no more of a reply than you need, reply[:10_000].") if seconds > 1 else ()
        yield Row("very long reply", seen, *advice)

    def tool_messages(self) -> Iterator[Row]:
        if not self.chat:
            return
        calls = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"query": "moon"}}}]}
        result = {"role": "tool", "name": "search", "content": "The moon is 384,400 km away."}
        answer = {"role": "assistant", "content": REPLIES[0]}
        scores, _ = self.score(self.batch([[calls, result, answer], [calls, result, {**calls, "content": None}], [answer]]))
        seen, advice = f"{_show(scores[:1])} for an answer after a call; {_show(scores[1:2])} for calls alone", ()
        if self.steady and not _same(scores[:1], scores[2:]):
            advice = ("warn", f"Without a call it gets {_show(scores[2:])}. {READ}")
        yield Row("tool messages", seen, *advice)

    def inputs(self) -> Iterator[Row]:
        batch, before = self.batch(REPLIES), self.batch(REPLIES)
        self.score(batch)
        changed = [key for key in batch if batch[key] != before[key]]
        fault = (f"it changes {', '.join(changed)}", "warn", "The next reward and the log get the changed ones: work on a copy.")
        yield Row("inputs", *(fault if changed else ["left as they were"]))

    def speed(self) -> Iterator[Row]:
        seen, slowest, seconds = [], 0.0, 0.0
        for size in (64, 768):
            if seconds * size / 64 > 5:
                seen.append(f"{size}: about {seconds * size / 64:.0f} s")
                break
            _, seconds = self.score(self.batch([REPLIES[n % len(REPLIES)] for n in range(size)]))
            slowest = max(slowest, 1000 * seconds / size)
            seen.append(f"{size}: {seconds:.2f} s")
        advice = ("warn", "The other ranks wait: send requests together (async def), work on less text.") if slowest > SLOW_MS else ()
        yield Row("time for a batch", f"{', '.join(seen)}; {slowest:.2g} ms a completion", *advice)

    def batch(self, replies: list, chat: bool | None = None, second: bool = False) -> dict:
        """The keywords of a call: replies as texts, or as whole completions."""
        chat = self.chat if chat is None else chat
        completions = [[{"role": "assistant", "content": text}] if chat and isinstance(text, str) else copy.deepcopy(text) for text in replies]
        prompts = [[{"role": "user", "content": PROMPTS[second]}] if chat else PROMPTS[second] for _ in replies]
        ids = [list(str(text).encode()) for text in replies]
        columns = {name: [copy.deepcopy(values[second]) for _ in replies] for name, values in self.columns.items()}
        return {"prompts": prompts, "completions": completions, "completion_ids": ids, **columns}

    def score(self, batch: dict) -> tuple[list, float]:
        """Scores and seconds. Raises Fault with the place, the completion and what to do."""
        begun = time.perf_counter()
        try:
            scores = call(self.reward, batch, self.runner, [])
        except Exception as error:
            raise self.diagnose(error, batch) from None
        held = torch.tensor([math.nan if score is None else float(score) for score in scores], dtype=torch.float32)  # as TRL holds them
        if held.isinf().any():
            raise Fault(f"{max(map(abs, filter(None, scores)))} is infinite in TRL's float32", "Keep scores small, say within ±1000.")
        return scores, time.perf_counter() - begun

    def diagnose(self, error: Exception, batch: dict) -> Fault:
        text, prefix = where(error), f"reward {self.reward.__name__}: "
        if str(error).startswith(prefix):  # the run's own check of the scores
            remedies = {"return one each": "Loop over `completions`: every column has as many entries.", "is no number": NUMBERS}
            remedy = next((found for said, found in remedies.items() if said in str(error)), "Guard the division or logarithm that gave it.")
            return Fault(str(error).removeprefix(prefix), remedy)
        if isinstance(error, TimeoutError) and "no answer" in str(error):
            return Fault(str(error), "The other ranks wait, and a run gives up after half an hour: give requests a time limit, work on less text.")
        if text.startswith(type(error).__name__):  # nothing in the reward raised it, so what it returned did
            return Fault(f"it returned no list of numbers: {error}", NUMBERS)
        missing = error.args[0] if isinstance(error, KeyError) and error.args else None
        if isinstance(missing, str) and missing.isidentifier() and missing not in {"role", "content", "tool_calls", *batch}:
            return Fault(text, f"If {missing} is a column: check with --column {missing}=VALUE, and see that the dataset has it.")
        for index, completion in enumerate(batch["completions"]):
            try:
                call(self.reward, {key: values[index : index + 1] for key, values in batch.items()}, self.runner, [])
            except Exception as again:
                if type(again) is type(error):
                    text += f", on {completion!r:.160}"  # it raises the same when it is alone
                    break
        shape = isinstance(error, (AttributeError, TypeError, LookupError))
        return Fault(text, READ if shape else "An exception ends the run: give such a reply its lowest score, or None.")


def _same(one: list, other: list) -> bool:
    """Equal but for rounding."""
    one, other = ([math.inf if score is None else float(score) for score in scores] for scores in (one, other))
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(one, other, strict=True))


def _show(scores: list) -> str:
    return ", ".join("None" if score is None else f"{float(score):.6g}" for score in scores)
