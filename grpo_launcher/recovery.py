"""A vLLM server that was lost while the ranks need it: they wait for a new one, push their weights, and ask again.

For the weight sync by files, which has no connection to set up anew. Only the main rank talks to the server, in the
middle of what all ranks do together. So it notes that the server is gone and goes on with a stand-in, until all ranks
have come to the same place and can begin again.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import requests
from accelerate.utils import broadcast_object_list

from grpo_launcher.weight_sync import DiskSyncClient

ATTEMPTS = 5  # to generate the same completions
PAUSE = 2.0  # seconds between two of them: a server that is about to end may still answer


class Recovery:
    """Repeats what failed because the server was lost.

    Args:
        client: of the main rank, None on the others.
        timeout: seconds to wait for a server.
        report: says on the main rank what the run is doing.
    """

    def __init__(self, client: DiskSyncClient | None, timeout: float, report: Callable[[str], None]):
        self.client, self.timeout, self.report = client, timeout, report
        self.lost: str | None = None
        if client:
            client.generate = functools.partial(self._generate, client.generate)
            for name in ("update_named_params", "load_adapter", "reset_prefix_cache"):
                setattr(client, name, functools.partial(self._try, getattr(client, name)))

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note in `lost` that the server gave no answer."""
        try:
            yield
        except requests.RequestException as error:
            self.lost = str(error)

    def _try(self, method: Callable, *args, **options):
        with self.noting():
            return method(*args, **options)

    def _generate(self, method: Callable, *, prompts: list, n: int = 1, **options) -> dict:
        """Generate by `method`. Where the server is lost the stand-in is one token for each completion."""
        if self.lost is None:
            with self.noting():
                return method(prompts=prompts, n=n, **options)
        count = len(prompts) * n
        return {"prompt_ids": prompts, "completion_ids": [[0]] * count, "logprobs": [[[0.0]]] * count}

    def until_answered(self, generate: Callable, push_again: Callable) -> tuple:
        """Return what `generate` returns. All ranks call it together.

        Args:
            generate: pushes the weights where that is due, and generates.
            push_again: lets it push them once more.

        Raises:
            RuntimeError: on all ranks, where no server comes back.
        """
        state = [self._is_another()]
        broadcast_object_list(state)
        if state[0]:
            push_again()
        for _ in range(ATTEMPTS):
            result = generate()
            state = [self.lost, self._wait()]
            broadcast_object_list(state)
            lost, error = state
            if lost is None:
                return result
            if error:
                break
            push_again()
        raise RuntimeError(f"the vLLM server was lost ({lost}): {error or 'it was asked again and again'}")

    def _is_another(self) -> bool:
        """Whether another server has taken the place of the one that has the weights, between two requests."""
        if not self.client:
            return False
        with self.noting():
            if self.client.has_weights():
                return False
            self.client.reconnect(self.timeout)
        return True

    def _wait(self) -> str | None:
        """Wait for a server where the last one was lost. Returns what went wrong, or None."""
        if self.lost is None:
            return None
        self.lost = None
        self.report("waiting for the vLLM server")
        time.sleep(PAUSE)
        try:
            self.client.reconnect(self.timeout)
        except requests.RequestException as error:
            return str(error)
        return None
