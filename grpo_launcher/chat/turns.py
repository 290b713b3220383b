"""Replies of several turns, in which a model calls tools: TRL's own loop over the turns, for checkpoints instead of a trainer.

Loads TRL's trainer, which takes seconds: to be imported where there are tools.
"""

import inspect
import itertools
import queue
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

from trl import GRPOTrainer
from trl.chat_template_utils import parse_response
from trl.trainer.utils import start_event_loop_in_daemon

from grpo_launcher.chat.checkpoints import Checkpoint, CheckpointError, Manner
from grpo_launcher.chat.engine import Engine
from grpo_launcher.messages import transcript

LOOK_S = 0.1  # between two looks at whether the reader wants no more


class Episode(NamedTuple):
    """A whole reply."""

    messages: list[dict]  # what was said and called, and what came back
    ids: list[int]  # all that stands behind the prompt
    tokens: int  # of them those that the model drew; the others are the results'


class Turns:
    """What TRL's loop asks of a trainer, for one checkpoint.

    draw: prompts as tokens, and how many tokens a turn may have → the tokens of a turn for each.
    """

    _tool_call_loop, _get_tool_suffix_ids = GRPOTrainer._tool_call_loop, GRPOTrainer._get_tool_suffix_ids  # those of trl 1.16.0
    use_vllm, _is_vlm, environment_factories = False, False, None

    def __init__(self, engine: Engine, checkpoint: Checkpoint, manner: Manner, draw: Callable[[list[list[int]], int], list[list[int]]]):
        options, limit = engine.template(checkpoint, manner), manner.max_tool_calling_iterations
        self.tools, self.chat_template, self.chat_template_kwargs = options["tools"], options.get("chat_template"), manner.template_options
        self.processing_class = self._tokenizer = engine.tokenizer(checkpoint)
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=engine.context(checkpoint) or sys.maxsize))
        self.max_completion_length, self.max_tool_calling_iterations = manner.max_new_tokens, sys.maxsize if limit is None else limit
        self.draw, self.said = draw, [[]]

    def replies(self, prompts: list[list[int]]) -> list[Episode]:
        """The whole reply to each prompt (tokens). Whatever a tool raises is told to the model, as in training; `said` grows meanwhile."""
        self.prompts = sorted(prompts, key=len, reverse=True)
        waited_for = {tool.__name__: tool for tool in self.tools if inspect.iscoroutinefunction(tool)}
        called = {tool.__name__: tool for tool in self.tools if tool.__name__ not in waited_for}
        self._sync_tool_dicts, self._async_tool_dicts = [called] * len(prompts), [waited_for] * len(prompts)
        if waited_for:
            _, self.async_loop, _ = start_event_loop_in_daemon()
        ids = self.draw(prompts, self.max_completion_length)
        self.said = [[parse_response(self._tokenizer, one, prefix=prompt, tools=self.tools)] for prompt, one in zip(prompts, ids, strict=True)]
        masks, said, ids, *_ = self._tool_call_loop([[] for _ in prompts], prompts, ids, self.said, None, None, {})
        return [Episode(*one) for one in zip(said, ids, map(sum, masks), strict=True)]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_, **__) -> tuple[list[list[int]], None]:
        """A further turn of some replies, behind their results; of these TRL cuts off what goes beyond a whole reply's tokens."""
        spent = [len(ids) - len(next(prompt for prompt in self.prompts if ids[: len(prompt)] == prompt)) for ids in prompt_ids]
        left = self.max_completion_length - min(spent)
        return (self.draw(prompt_ids, left) if left else [[] for _ in prompt_ids]), None


def replies(engine: Engine, checkpoint: Checkpoint, prompts: list[list[int]], manner: Manner, seed: int | None = None) -> list[Episode]:
    """The whole reply to each of a batch of prompts (tokens)."""
    seeds = iter([seed])  # of the first turn; the others draw on
    turns = Turns(engine, checkpoint, manner, lambda asked, most: engine.replies(checkpoint, asked, replace(manner, max_new_tokens=most), next(seeds, None)))
    return turns.replies(prompts)


def stream(
    engine: Engine, checkpoint: Checkpoint, prompt: list[int], manner: Manner, stop: threading.Event | None = None, seed: int | None = None
) -> Generator[str, None, Episode]:
    """The whole reply to a prompt (tokens), piece by piece as Engine.stream gives a turn, with results between.

    It is made in a thread, so that `stop` ends the wait for a tool too: raises CheckpointError where one had not returned by then.
    """
    engine.model(checkpoint)
    yield ""
    pieces, made, seeds = queue.SimpleQueue(), [], iter([seed])
    stop, drawing = stop or threading.Event(), threading.Event()
    drawing.set()

    def draw(asked, most):
        results = itertools.takewhile(lambda message: message["role"] == "tool", reversed(turns.said[0]))
        if came_back := transcript([*results][::-1]):
            pieces.put(f"\n{came_back}\n")
        if came_back and stop.is_set():
            return [[]]
        drawing.set()
        growing = engine.stream(checkpoint, asked[0], replace(manner, max_new_tokens=most), stop, next(seeds, None))
        while True:
            try:
                pieces.put(next(growing))
            except StopIteration as end:
                drawing.clear()
                return [end.value]

    def work():
        try:
            made.extend(turns.replies([prompt]))
        except Exception as error:
            made.append(error)
        pieces.put(None)

    turns = Turns(engine, checkpoint, manner, draw)
    threading.Thread(target=work, daemon=True).start()
    try:
        while not made or not pieces.empty():
            try:
                yield pieces.get(timeout=LOOK_S) or ""
            except queue.Empty:
                if stop.is_set() and not drawing.is_set():
                    raise CheckpointError(f"{checkpoint.name}: stopped while a tool was at work, which goes on unseen.") from None
    except GeneratorExit:  # nobody reads on
        stop.set()
        raise
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]
