"""A program in a terminal of the tests' own: a real pseudo-terminal, and what its screen shows after everything that was written to it."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

from rich.cells import cell_len

BEGUN = re.compile(r"\x1b(\[[0-9;?]*)?$")  # a control sequence whose end was not read yet
CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[()].|\x1b[=>]")


class Screen:
    """Lines of text, moved in as rich moves: carriage return, line feed, cursor up, erase line. Nothing scrolls out."""

    def __init__(self, width: int):
        self.width, self.lines, self.row, self.column, self.rest = width, [""], 0, 0, ""

    def feed(self, text: str) -> None:
        """Take what a program wrote."""
        text, at = self.rest + text, 0
        text, self.rest = (text[: begun.start()], begun[0]) if (begun := BEGUN.search(text)) else (text, "")
        while at < len(text):
            if control := CONTROL.match(text, at):
                self._move(control[1], control[2])
                at = control.end()
                continue
            char, at = text[at], at + 1
            if char == "\r":
                self.column = 0
            elif char == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif char == "\b":
                self.column = max(0, self.column - 1)
            elif char >= " ":
                if self.column + cell_len(char) > self.width:
                    self.row, self.column = self.row + 1, 0
                    self.lines += [""] * (self.row + 1 - len(self.lines))
                line = self.lines[self.row]
                assert cell_len(line) >= self.column or not line.strip(), "written behind the end of a line"
                before = line[: _place(line, self.column)]
                self.lines[self.row] = before + " " * (self.column - cell_len(before)) + char + line[_place(line, self.column + cell_len(char)) :]
                self.column += cell_len(char)

    def _move(self, numbers: str | None, what: str | None) -> None:
        if what == "A":
            self.row = max(0, self.row - int(numbers or 1))
        elif what == "K":
            line = self.lines[self.row]
            self.lines[self.row] = "" if numbers == "2" else line[: _place(line, self.column)]


def _place(line: str, column: int) -> int:
    """The index of the character at a column of cells."""
    cells = 0
    for index, char in enumerate(line):
        if cells >= column:
            return index
        cells += cell_len(char)
    return len(line)


class Terminal:
    """`with Terminal(command, folder, width) as terminal:` runs a program in a terminal of `width` columns until the block ends."""

    def __init__(self, command: list[str], folder: Path, width: int = 120, height: int = 40):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "DISPLAY")} | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(command, cwd=folder, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_own_terminal)
        os.close(slave)
        self.written, self.screen, self.decode = "", Screen(width), codecs.getincrementaldecoder("utf-8")("replace").decode

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        os.close(self.master)

    def text(self) -> str:
        """What the screen shows, and what has scrolled out of it."""
        return "\n".join(line.rstrip() for line in self.screen.lines)

    def type(self, text: str) -> None:
        """Type, as on a keyboard; chr(3) is Ctrl-C, chr(4) is Ctrl-D."""
        os.write(self.master, text.encode())

    def wait_for(self, found, timeout: float = 60) -> None:
        """Read until `found` (text, or a function of the screen's text) holds."""
        deadline = time.monotonic() + timeout
        while not (found in self.text() if isinstance(found, str) else found(self.text())):
            assert time.monotonic() < deadline, f"not within {timeout} s:\n{self.text()}"
            assert self.read() or self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text()}"

    def read(self) -> bool:
        """Take what was written meanwhile; False where there was nothing."""
        if not select.select([self.master], [], [], 0.1)[0]:
            return False
        try:
            text = self.decode(os.read(self.master, 65536))
        except OSError:  # the program has ended
            return False
        self.written += text
        self.screen.feed(text)
        return True

    def finish(self, timeout: float = 30) -> int:
        """The exit status, once it has ended."""
        deadline = time.monotonic() + timeout
        while self.read() or self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.text()}"
        return self.process.returncode


def _own_terminal() -> None:
    """Make the terminal the program's own, so that Ctrl-C reaches it, also where the tests themselves ignore it as a background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
