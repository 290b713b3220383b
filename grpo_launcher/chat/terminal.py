"""The chat in a terminal: several models side by side, each of which goes on from its own completions."""

import contextlib
import re
import readline  # noqa: F401  # gives input() its arrow keys and a history
import signal
import sys
import termios
import threading
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from grpo_launcher import render
from grpo_launcher.chat.backends import Completion, Turn, converse, with_seed
from grpo_launcher.chat.models import GenerationSettings
from grpo_launcher.errors import UserError
from grpo_launcher.evaluate import RewardSet

HELP = """\
/reset            forget the conversation
/system TEXT      change the system prompt and forget the conversation; without TEXT there is none
/temperature N    0 is greedy
/save FILE        write the conversation as .md, .html, .json or .svg; no file is replaced
/quit             leave (Ctrl-D too)
Ctrl-C ends the completion that is being generated; at the prompt it leaves.
A prompt that begins with / needs a space before it."""


class Chat:
    """A chat with several models at once."""

    def __init__(
        self, models: list, rewards: RewardSet, settings: GenerationSettings, report: render.Report, console: Console
    ):
        self.models, self.rewards, self.settings = models, rewards, settings
        self.report, self.console = report, console
        self.reset()

    def run(self) -> None:
        """Ask for prompts until the user leaves."""
        self.say("\n".join([f"{self.report.title}, rewards: {', '.join(self.rewards.functions) or 'none'}",
                            *self.report.facts, "/help lists the commands"]))  # fmt: skip
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end a chat
        while True:
            try:
                line = input("> ")
            except (KeyboardInterrupt, EOFError):
                print()
                return
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                name, _, value = line.partition(" ")
                self.say(self.command(name, value))
            elif line.strip():
                self.turn(line.strip())

    def say(self, text: str) -> None:
        """Print a line that is no completion."""
        self.console.print(Text(text, "dim"))

    def reset(self) -> None:
        """Forget the conversation."""
        self.start = len(self.report.turns)

    def command(self, name: str, value: str) -> str:
        """Run one of the commands of HELP and return what to say."""
        if name == "/reset":
            self.reset()
            return "The conversation is forgotten."
        if name == "/system":
            self.settings = replace(self.settings, system_prompt=value if value.strip() else None)
            self.reset()
            return f"System prompt: {value.strip() or 'none'}. The conversation is forgotten."
        if name == "/temperature":
            if not re.fullmatch(r"\s*\d{1,2}(\.\d*)?\s*", value):
                return f"/temperature: give a number from 0 (greedy) up. It is {self.settings.temperature:g}."
            self.settings = replace(self.settings, temperature=float(value))
            return f"Temperature {self.settings.temperature:g}."
        if name == "/save" and value.strip() and self.report.turns:
            path = Path(value.strip()).expanduser()
            try:
                render.check_outputs([path], overwrite=False)
                render.write(self.report, path)
            except (OSError, UserError) as error:
                return f"/save: {error}"
            return f"Saved {path}"
        if name == "/save":
            return "/save FILE: writes the conversation, once there is one."
        return HELP if name == "/help" else f"There is no command {name}. /help lists them."

    def turn(self, prompt: str) -> None:
        """Let every model complete a prompt, one after the other, and show the completions while they grow."""
        settings = with_seed(self.settings, len(self.report.turns))
        turn = Turn(prompt, {model.name: Completion() for model in self.models})
        self.report.turns.append(turn)
        known = len(self.rewards.problems)

        def screen():
            return render.side_by_side(turn.completions, self.console, self.console.height)

        with _keys_unseen(), Live(get_renderable=screen, console=self.console, transient=True, refresh_per_second=8):
            for model in self.models:
                stop = threading.Event()
                before = signal.signal(signal.SIGINT, lambda *_: stop.set())  # noqa: B023  # rich must not be interrupted
                try:
                    for _ in converse(model, self.report.turns[self.start :], settings, self.rewards, stop):
                        pass
                finally:
                    signal.signal(signal.SIGINT, before)
        self.console.print(render.side_by_side(turn.completions, self.console))
        for problem in self.rewards.problems[known:]:
            self.say(problem)


@contextlib.contextmanager
def _keys_unseen():
    """While the screen is redrawn no key is echoed into it, and Ctrl-C throws away nothing that is on its way there.

    What is typed meanwhile stands at the next prompt.
    """
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    unseen = [*before]
    unseen[3] = before[3] & ~termios.ECHO | termios.NOFLSH
    termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
