"""What can stand in a column: a checkpoint on this machine, or a model behind a server (served.py); and a reply as it grows.

Every column has a `name`, a `source`, and `stream(prompt, manner, stop, seed)`, which yields an empty piece once it is ready, then the
reply in pieces, and returns an End. Setting `stop`, a threading.Event, ends the reply early.
"""

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from grpo_launcher.chat.checkpoints import Checkpoint, CheckpointError, Manner
from grpo_launcher.messages import reply as reply_text
from grpo_launcher.messages import transcript


class End(NamedTuple):
    """A reply when it has ended."""

    text: str
    ids: list[int] | None  # its tokens, with that of the turn's end; None where a server keeps them to itself
    tokens: int | None
    cut_off: bool  # it used up all its tokens
    messages: list[dict] | None = None  # where the model may call tools: what it said and called, and what came back; `text` is the transcript


@dataclass
class Reply:
    """What one column says to a prompt, as far as it is drawn."""

    column: str
    text: str = ""
    ids: list[int] | None = None
    tokens: int | None = None
    cut_off: bool = False
    stopped: bool = False  # by who reads it
    seconds: float | None = None  # without loading the model
    problem: str | None = None  # why there is no reply, or only a part of one
    rewards: dict[str, float | None] = field(default_factory=dict)
    messages: list[dict] | None = None  # as in an End

    @property
    def said(self) -> list[dict]:
        """The reply as messages, for the prompt after it."""
        return self.messages or [{"role": "assistant", "content": self.text}]

    @property
    def characters(self) -> int:
        """The length of what the model finally said."""
        return len(reply_text(self.messages or self.text))


class Local:
    """A checkpoint that an engine of this process draws from."""

    def __init__(self, checkpoint: Checkpoint, engine):
        self.checkpoint, self.engine = checkpoint, engine
        self.name = checkpoint.name
        self.source = f"{checkpoint.path} on {checkpoint.base}" if checkpoint.base else checkpoint.path

    def stream(self, prompt: str | list[dict], manner: Manner, stop: threading.Event | None = None, seed: int | None = None) -> Generator[str, None, End]:
        """See the head of this file; of a chat a model with an encoder is asked the last message alone, as text behind the system prompt.

        Raises CheckpointError.
        """
        if not isinstance(prompt, str) and self.engine.has_encoder(self.checkpoint):
            prompt = "".join(message["content"] for message in prompt if message["role"] == "system") + prompt[-1]["content"]
        asked = self.engine.prompt_ids(self.checkpoint, prompt, manner)
        if manner.tools:
            from grpo_launcher.chat import turns

            messages, ids, tokens = yield from turns.stream(self.engine, self.checkpoint, asked, manner, stop, seed)
            text = transcript(messages)
        else:
            ids = yield from self.engine.stream(self.checkpoint, asked, manner, stop, seed)
            messages, tokens = None, len(ids)
            text = self.engine.tokenizer(self.checkpoint).decode(ids, skip_special_tokens=True)
        return End(text, ids, tokens, len(ids) >= manner.max_new_tokens and ids[-1] not in self.engine.ends(self.checkpoint), messages)


class Absent:
    """A column for what cannot answer, which says why, so that the others are not lost."""

    def __init__(self, name: str, problem: str):
        self.name = self.source = name
        self.problem = problem

    def stream(self, prompt, manner, stop=None, seed=None) -> Generator[str, None, End]:
        """Raises CheckpointError at the first step."""
        raise CheckpointError(self.problem)
        yield


def draw(column, prompt: str | list[dict], manner: Manner, stop: threading.Event | None = None, seed: int | None = None) -> Iterator[Reply]:
    """A column's reply, once with every piece and once when it is whole; whatever goes wrong stands in its `problem`."""
    reply, began = Reply(column.name), None

    def pieces():
        reply.text, reply.ids, reply.tokens, reply.cut_off, reply.messages = yield from column.stream(prompt, manner, stop, seed)

    try:
        for piece in pieces():
            began = began or time.monotonic()
            reply.text += piece
            reply.seconds = time.monotonic() - began
            yield reply
        reply.seconds = time.monotonic() - began
    except Exception as error:  # of one column: the others go on
        known = isinstance(error, CheckpointError)
        reply.problem = str(error) if known else f"{column.name}: {type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:300]}"
    reply.stopped = stop is not None and stop.is_set()
    yield reply
