"""A model behind an OpenAI-compatible server as one more column. The key comes from OPENAI_API_KEY in the environment, or there is none."""

import os
import queue
import threading
from collections.abc import Generator
from urllib.parse import urlsplit

from grpo_launcher.chat.checkpoints import CheckpointError, Manner
from grpo_launcher.chat.columns import End

LOOK_S = 0.1  # between two looks at whether the reader wants no more


class Served:
    """The model of a server. address: http://HOST:PORT, with #MODEL where the server has several; without it the first one is taken."""

    def __init__(self, address: str):
        import openai

        url, _, wanted = address.partition("#")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise CheckpointError(f"--server {address}: write http://HOST:PORT.")
        self.source = url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
        timeout = openai.Timeout(600.0, connect=5.0)  # a busy server may think long before the first token
        self.client = openai.OpenAI(base_url=self.source, api_key=_key() or "none", timeout=timeout, max_retries=0)
        try:
            there = [model.id for model in self.client.models.list().data or []]
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"--server {address}: no list of models from {self.source}/models: {_told(error)}") from None
        if not there or (wanted and wanted not in there):
            raise CheckpointError(f"--server {address}: this server has no such model; it has: {', '.join(there) or 'none'}.")
        self.model = wanted or there[0]
        self.name = f"{self.model.rstrip('/').split('/')[-1]} at {urlsplit(url).netloc.rpartition('@')[2]}"

    def stream(self, prompt: str | list[dict], manner: Manner, stop: threading.Event | None = None, seed: int | None = None) -> Generator[str, None, End]:
        """The reply in pieces, behind an empty one; the chunks are read in a thread, so that `stop` ends it while the server is silent too.

        Raises CheckpointError where the server refuses, or goes away in mid-reply.
        """
        import openai

        chunks, left = queue.SimpleQueue(), threading.Event()

        def read():
            try:
                with self._ask(prompt, manner, seed) as answer:
                    for chunk in answer:
                        chunks.put(chunk)
                        if left.is_set():
                            return
                chunks.put(None)
            except Exception as error:
                chunks.put(error)

        yield ""
        threading.Thread(target=read, daemon=True).start()
        text, tokens, ended = "", None, None
        try:
            while not (stop is not None and stop.is_set()):
                try:
                    chunk = chunks.get(timeout=LOOK_S)
                except queue.Empty:
                    continue
                if isinstance(chunk, (openai.OpenAIError, ValueError)):
                    raise CheckpointError(f"{self.name}: {'the server went away in mid-reply' if text else 'no reply'}: {_told(chunk)}")
                if isinstance(chunk, Exception):
                    raise chunk
                if chunk is None:
                    break
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                for choice in chunk.choices:
                    piece = (choice.text if isinstance(prompt, str) else choice.delta.content) or ""
                    text, ended = text + piece, choice.finish_reason or ended
                    yield piece
        finally:
            left.set()
        if ended is None and not (stop is not None and stop.is_set()):
            raise CheckpointError(f"{self.name}: the server went away in mid-reply.")
        return End(text, None, tokens, ended == "length")

    def _ask(self, prompt: str | list[dict], manner: Manner, seed: int | None):
        common = {"model": self.model, "temperature": manner.temperature, "top_p": manner.top_p, "max_tokens": manner.max_new_tokens, "seed": seed}
        beyond = {"top_k": manner.top_k or None, "min_p": manner.min_p, "chat_template_kwargs": manner.template_options or None}
        beyond["repetition_penalty"] = manner.repetition_penalty if manner.repetition_penalty != 1 else None
        more = {name: value for name, value in beyond.items() if value is not None}  # a server that knows only OpenAI's own fields refuses any other
        streaming = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": more}
        if isinstance(prompt, str):
            return self.client.completions.create(prompt=prompt, **common, **streaming)
        return self.client.chat.completions.create(messages=prompt, **common, **streaming)


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def _told(error: Exception) -> str:
    return (str(error) or type(error).__name__).replace(_key() or "\0", "…").splitlines()[0][:300]  # some servers repeat the key
