"""A small stand-in for the Hub on 127.0.0.1: it takes every file of a push and keeps them."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """A server at `url`. `commits` holds a dict of file name -> content for each push."""

    def __init__(self):
        self.commits = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(hub.answer(self.path, body))

            def do_GET(self):
                self.answer({"sha": "0" * 40, "siblings": [], "id": "somebody/short", "private": False})

            def answer(self, content: dict):
                text = json.dumps(content).encode()
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

    def answer(self, path: str, body: bytes) -> dict:
        """Return the answer to a POST."""
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            return {"commitUrl": f"{self.url}/somebody/short/commit/{'0' * 40}", "commitOid": "0" * 40}
        return {"url": f"{self.url}/somebody/short", "warnings": [], "errors": []}

    def close(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self.server.server_close()
