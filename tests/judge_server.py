"""A judge of the tests' own: a real HTTP server that answers as Ollama or vLLM would, with whatever it is told to."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    """`with JudgeServer(answer) as judge:` listens at judge.url on a free port of this machine until the block ends.

    Args:
        answer: (reply, request) -> what the judge says, or (status, body); a body that is text is sent as it is.
        delay: seconds before each answer.
        model: the only one that it has.
        key: wanted as Bearer; None wants none.
        vllm: whether to answer in vLLM's form, else in Ollama's.
    """

    def __init__(
        self,
        answer: Callable = lambda reply, request: "8",
        delay: float = 0.0,
        model: str = "qwen2.5:7b",
        key: str | None = None,
        vllm: bool = False,
    ):
        self.answer, self.delay, self.model, self.key, self.vllm = answer, delay, model, key, vllm
        self.requests, self.authorizations = [], []  # one each for every rating that was asked for
        self.most_at_once = self._at_once = 0
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self):
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes, which would wait 40 ms for each other

            def do_GET(self):
                there = {"object": "list", "data": [{"id": judge.model, "object": "model"}]}
                self.send(*((200, there) if self.path == "/v1/models" else (404, "404 page not found")))

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send(*judge.respond(self.path, request, self.headers["Authorization"]))

            def send(self, status, body):
                body = (body if isinstance(body, str) else json.dumps(body)).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except ConnectionError:  # the client gave up waiting
                    self.close_connection = True

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()  # wakes those that are still silent
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def respond(self, path: str, request: dict, authorization: str | None) -> tuple[int, dict | str]:
        """(status, body) for one rating."""
        with self._lock:
            self.requests.append(request)
            self.authorizations.append(authorization)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.delay:
                self._ended.wait(self.delay)
            if path != "/v1/chat/completions":
                return 404, "404 page not found"
            if self.key and authorization != f"Bearer {self.key}":
                return 401, {
                    "error": {"message": f"Incorrect API key: {authorization}", "type": "invalid_request_error"}
                }
            if request["model"] != self.model:
                gone = (
                    f"The model `{request['model']}` does not exist."
                    if self.vllm
                    else f'model "{request["model"]}" not found, try pulling it first'
                )
                return 404, {"error": {"message": gone, "type": "NotFoundError", "code": 404 if self.vllm else None}}
            said = self.answer(
                json.loads(re.search(r"^Reply: (.*)$", request["messages"][-1]["content"], re.MULTILINE)[1]), request
            )
            return said if isinstance(said, tuple) else (200, self.completion(said))
        finally:
            with self._lock:
                self._at_once -= 1

    def completion(self, said: str | None) -> dict:
        """A chat completion as Ollama sends it, or vLLM with what it adds."""
        more = {"reasoning": None, "refusal": None, "tool_calls": []} if self.vllm else {}
        choice = {"index": 0, "message": {"role": "assistant", "content": said} | more, "finish_reason": "stop"}
        choice |= {"logprobs": None, "stop_reason": None, "token_ids": None} if self.vllm else {}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [choice],
            "usage": usage,
        }
