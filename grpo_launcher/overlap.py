"""Generation beside training: while the ranks train on one block of completions, the vLLM server makes the next one.

A block is what one generation makes. With `overlap: true` it is made by the weights of one block before, and trained
right after that block. A thread of the main rank asks the server. All else keeps the order that it has in TRL.
"""

import time
from concurrent.futures import Future
from threading import Thread

import requests

LAG = "overlap/lag_steps"  # optimizer steps by which the weights that made a block are older than those it trains
WAITED = "overlap/trainer_waited_seconds"  # for the completions of a block
IDLE = "overlap/server_idle_seconds"  # before it was asked for the next block


class NextBlock:
    """The block that is generated ahead. Only the main rank has a client: on the others nothing is ever ahead.

    Args:
        client: TRL's VLLMClient, whose generate() is replaced; or None.
        is_repeated: a request that found no server is repeated where its block is collected (recovery.py).

    Attributes:
        step: the trainer's optimizer step while it asks for a training block, else None.
    """

    def __init__(self, client, is_repeated: bool = False):
        self.step: int | None = None
        self._is_repeated, self._is_restored = is_repeated, False
        self._prompts, self._answer, self._made_by, self._options = None, None, 0, {}
        self._figures = {LAG: 0.0, WAITED: 0.0, IDLE: 0.0}
        self._idle_since = time.monotonic()
        if client:
            self._ask, client.generate = client.generate, self._generate

    def wait(self) -> str | None:
        """Wait until the server is idle, and return what went wrong with the block ahead, or None."""
        start = time.monotonic()
        error = self._answer and self._answer.exception()
        self._figures[WAITED] += time.monotonic() - start
        if not error or (self._is_repeated and isinstance(error, requests.RequestException)):
            return None
        return f"the vLLM server gave no completions: {error}"

    def request(self, prompts: list[list[int]]) -> None:
        """Ask for the next block in the background.

        Args:
            prompts: token ids, each prompt once.
        """
        self._figures[IDLE] += time.monotonic() - self._idle_since
        self._prompts, self._answer, self._made_by = prompts, Future(), self.step
        Thread(target=self._send, args=(self._answer,), daemon=True).start()

    def _send(self, answer: Future) -> None:
        """Run in the thread. It touches no tensor, no random state and no metric."""
        try:
            completions = self._ask(prompts=self._prompts, **self._options)
        except BaseException as error:  # wait() tells it
            answer.set_exception(error)
        else:
            self._idle_since = time.monotonic()
            answer.set_result(completions)

    def _generate(self, prompts: list[list[int]], **options) -> dict:
        """Return the block ahead, or ask the server where there is none. VLLMGeneration calls it as generate()."""
        if self.step is None:
            return self._ask(prompts=prompts, **options)
        self._options = options
        if self._is_restored and self._prompts != prompts:
            self._answer = None  # --force goes on with other prompts
        if self._answer is None:
            self.request(prompts)
            self.wait()
        elif self._prompts != prompts:
            raise RuntimeError("overlap: the prompts of this block are not those that were sent ahead")
        self._is_restored = False
        self._figures[LAG] = self.step - self._made_by
        answer, self._answer = self._answer, None
        return answer.result()

    def state(self) -> dict | None:
        """Return the block ahead for a checkpoint, once it is there; None where none was asked for, or it failed."""
        if self._answer is None or self._answer.exception():
            return None
        return {"prompts": self._prompts, "made_by": self._made_by, "answer": self._answer.result()}

    def restore(self, state: dict) -> None:
        """Take the block ahead from a checkpoint."""
        self._prompts, self._made_by, self._answer = state["prompts"], state["made_by"], Future()
        self._answer.set_result(state["answer"])
        self._is_restored = True

    def figures(self) -> dict[str, float]:
        """Return lag and times of the block that was collected last."""
        figures, self._figures = self._figures, {LAG: 0.0, WAITED: 0.0, IDLE: 0.0}
        return figures


def summary(lines: list[dict]) -> str | None:
    """Return which side of a run waited for the other, from the lines of metrics.jsonl; None without overlap."""
    lines = [line for line in lines if line.get(LAG) is not None]
    if not lines:
        return None
    waited, idle = (sum(line[name] for line in lines) / len(lines) for name in (WAITED, IDLE))
    slower, side = ("Generation", "the server") if waited > idle else ("Training", "the ranks")
    text = f"Overlap: for a block the trainer waited {waited:.1f} s, and the server {idle:.1f} s"
    return f"{text}. {slower} takes longer: give {side} more of the GPUs."
