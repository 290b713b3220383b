"""As much of the Hub as a push asks for, on 127.0.0.1: it takes every file of a commit and keeps them."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """A server at `url`; `commits` holds, of each push, file name → content."""

    def __init__(self):
        self.commits = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(hub.asked(self.path, body))

            def do_GET(self):
                self.answer({"sha": "0" * 40, "siblings": [], "id": "somebody/short", "private": False})

            def answer(self, told: dict):
                text = json.dumps(told).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def asked(self, path: str, body: bytes) -> dict:
        """The answer to a POST."""
        if "/preupload/" in path:
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.commits.append({line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"})
            return {"commitUrl": f"{self.url}/somebody/short/commit/{'0' * 40}", "commitOid": "0" * 40}
        return {"url": f"{self.url}/somebody/short", "warnings": [], "errors": []}

    def close(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self.server.server_close()
