"""A real browser for the tests: headless Chromium, spoken to over its own DevTools pipe, so that no driver is needed.

python tests/browser.py URL FILE PROMPT sends a prompt on the page of `demo_in_chat.py --web` and saves a picture when
all models have written.
"""

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
]


# Each model's column ends in a line such as [270 characters, 90 tokens · length_reward −70.00 · 1.2 s].
ALL_WRITTEN = """(document.body.innerText.match(/ tokens[^\\]]* s\\]/g) || []).length
    == document.querySelectorAll('[role=log]').length"""


def chromium() -> str | None:
    """The browser on the PATH, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. `asked` holds every address that it asked for, `complaints` every error on its console."""

    def __init__(self, width: int = 1280, height: int = 900):
        self.profile = tempfile.mkdtemp(prefix="browser-")
        down, up = os.pipe(), os.pipe()
        theirs = [
            fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (down[0], up[1])
        ]  # clear of 3 and 4, where Chromium looks for them

        def place():
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        command = [
            chromium(),
            *FLAGS,
            f"--user-data-dir={self.profile}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command,
            pass_fds=(3, 4),
            preexec_fn=place,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (*theirs, down[0], up[1]):
            os.close(fd)
        self.to, self.back = os.fdopen(down[1], "wb", buffering=0), os.fdopen(up[0], "rb")
        self.asked, self.complaints, self.read, self.number, self.session = [], [], b"", 0, None
        page = next(target for target in self.tell("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.tell("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.tell(f"{domain}.enable")
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.to.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.back.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def tell(self, method: str, **params) -> dict:
        """Send a command of the DevTools protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        self.to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self.read:
            piece = self.back.read1()
            assert piece, "the browser ended"
            self.read += piece
        answer, _, self.read = self.read.partition(b"\0")
        answer = json.loads(answer)
        params = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif answer.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif answer.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        return answer

    def open(self, url: str) -> None:
        """Go to an address; the page's own parts come later, `wait` says when."""
        self.tell("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && document.body !== null")

    def run(self, script: str):
        """The value of a JavaScript expression in the page."""
        result = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, timeout: float = 120):
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + timeout
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, (
                f"not within {timeout} s: {script}\nThe page shows:\n{self.text()[-3000:]}"
            )
            time.sleep(0.1)
        return value

    def text(self) -> str:
        """What a reader sees."""
        return self.run("document.body.innerText")

    def click_at(self, script: str) -> None:
        """Click the element that an expression names, as soon as it is there."""
        self._press(
            f"""(() => {{
            const one = {script};
            one?.scrollIntoView({{block: 'center'}});
            const box = one?.getBoundingClientRect();
            return box?.width ? [box.x + box.width / 2, box.y + box.height / 2] : null;
        }})()"""
        )

    def click(self, words: str) -> None:
        """Click the button, tab or label with these words. Gradio has a hidden copy of each tab."""
        find = f"""(() => {{
            for (const one of document.querySelectorAll('button, label')) {{
                if (one.innerText.trim() != {json.dumps(words)} || one.disabled) continue;
                one.scrollIntoView({{block: 'center'}});
                const box = one.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
                if (one.contains(document.elementFromPoint(x, y))) return [x, y];
            }}
        }})()"""
        self._press(find)

    def _press(self, find: str) -> None:
        x, y = self.wait(find)
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, words: str) -> None:
        """Type into a field, in place of what it holds."""
        self.wait(f"document.querySelector({json.dumps(selector)}) !== null")
        self.run(f"(() => {{const f = document.querySelector({json.dumps(selector)}); f.focus(); f.select()}})()")
        self.tell("Input.insertText", text=words)

    def press_enter(self) -> None:
        """The Enter key."""
        for kind in ("keyDown", "keyUp"):
            self.tell(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                windowsVirtualKeyCode=13,
                text="\r" if kind == "keyDown" else "",
            )

    def picture(self, path: Path) -> None:
        """Save the whole page as PNG."""
        size = self.tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.tell("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


def main(url: str, file: str, prompt: str) -> None:
    """Ask, wait, save."""
    with Browser() as browser:
        browser.open(url)
        browser.type("textarea", prompt)
        browser.press_enter()
        browser.wait(ALL_WRITTEN, 120)
        browser.picture(Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
