"""The chat in a terminal: the replies of some checkpoints side by side, drawn one column after the other, since they share memory."""

import contextlib
import signal
import sys
import termios
import threading
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from grpo_launcher.chat import pages
from grpo_launcher.chat.checkpoints import Manner
from grpo_launcher.chat.columns import Reply, draw
from grpo_launcher.chat.layout import fits, side_by_side
from grpo_launcher.chat.pages import Turn
from grpo_launcher.chat.scores import Scores

HELP = """\
/reset            forget what was said
/system TEXT      another system prompt, and forget what was said; without TEXT none
/temperature N    0 is greedy: the likeliest token every time
/save FILE        what was said, as .md, .html, .json or .svg; a file that is there is not replaced
/quit             leave (Ctrl-D too)
Ctrl-C ends the reply that is being drawn; at the prompt it leaves. A prompt that begins with / wants a space before it."""


class Chat:
    """A chat with some columns at once; each goes on from its own replies."""

    def __init__(self, columns: list, scores: Scores, manner: Manner, console: Console, about: dict):
        """about: what the pages of /save say of this chat (see pages.write); its seed, where there is one, counts up with every prompt."""
        self.columns, self.scores, self.manner, self.console, self.about = columns, scores, manner, console, about
        self.turns, self.histories, self.told = [], [[] for _ in columns], len(scores.left_out)

    def run(self) -> None:
        """Ask for prompts until the reader leaves."""
        self.console.print(Text(self._introduction(), "dim"))
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives the prompt its arrow keys

        with contextlib.suppress(AttributeError):
            sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end a chat
        while True:
            try:
                line = input("> ")
            except (KeyboardInterrupt, EOFError):
                self.console.print()
                return
            if line.startswith("/"):
                if line.split()[0] == "/quit":
                    return
                self.command(*line.split(maxsplit=1))
            elif line.strip():
                self.turn(line.strip())

    def _introduction(self) -> str:
        manner = self.manner
        names = ", ".join(reward.__name__ for reward in self.scores.rewards)
        tools = ", ".join(name.rpartition(".")[2] for name in manner.tools or [])
        return (
            f"{self.about['title']}: {', '.join(column.name for column in self.columns)}\n"
            f"temperature {manner.temperature:g}, at most {manner.max_new_tokens} tokens; rewards: {names or 'none'}{tools and f'; tools: {tools}'}\n"
            f"system prompt: {manner.system_prompt or 'none'}\n"
            "/help lists the commands; Ctrl-C ends a reply, Ctrl-D leaves"
        )

    def command(self, name: str, value: str = "") -> None:
        """One of the commands of HELP, less /quit."""
        system, value = value, value.strip()
        if name == "/help":
            said = HELP
        elif name == "/reset":
            self.histories = [[] for _ in self.columns]
            said = "Forgotten."
        elif name == "/system":
            self.manner = replace(self.manner, system_prompt=system if value else None)  # "summarize: " ends in a space
            self.histories = [[] for _ in self.columns]
            said = f"System prompt: {value or 'none'}. What was said is forgotten."
        elif name == "/temperature":
            said = self._temperature(value)
        elif name == "/save":
            said = self._save(value)
        else:
            said = f"There is no command {name}; /help lists them. A prompt that begins with / wants a space before it."
        self.console.print(Text(said, "dim"))

    def _temperature(self, value: str) -> str:
        try:
            temperature = float(value)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature <= 100:
            return f"/temperature {value}: give a number from 0 (greedy) up; it is {self.manner.temperature:g}."
        self.manner = replace(self.manner, temperature=temperature)
        return f"Temperature {temperature:g}."

    def _save(self, value: str) -> str:
        if not value or not self.turns:
            return "/save FILE: give a file." if self.turns else "/save: nothing was said yet."
        try:
            pages.write([Path(value).expanduser()], self.turns, self.manner, self.about)
        except (OSError, ValueError) as error:
            return f"/save {value}: {error}"
        return f"Saved {value}"

    def turn(self, prompt: str) -> None:
        """Ask every column and show what it says while it says it."""
        turn = Turn(prompt, [Reply(column.name) for column in self.columns])
        seed = None if self.about["seed"] is None else self.about["seed"] + len(self.turns)
        self.turns.append(turn)
        everyone = range(len(self.columns))
        for together in [everyone] if fits(len(self.columns), self.console.width) else [[index] for index in everyone]:
            self._show(turn, together, seed)
        for sentence in self.scores.left_out[self.told :]:
            self.console.print(Text(sentence, "yellow"))
            self.about["notes"].append(sentence)
        self.told = len(self.scores.left_out)

    def _show(self, turn: Turn, together: list[int], seed: int | None) -> None:
        """Draw the replies of some columns, which stand beside each other."""
        growing = True

        def screen():
            return side_by_side([turn.replies[index] for index in together], self.console, growing)

        with _silent_keys(), Live(get_renderable=screen, console=self.console, vertical_overflow="crop", refresh_per_second=8):
            for index in together:
                self._ask(index, turn, seed)
            growing = False

    def _ask(self, index: int, turn: Turn, seed: int | None) -> None:
        system = [{"role": "system", "content": self.manner.system_prompt}] if self.manner.system_prompt else []
        history, stop = self.histories[index], threading.Event()
        messages = [*system, *history, {"role": "user", "content": turn.prompt}]
        with _ctrl_c_sets(stop):
            for reply in draw(self.columns[index], messages, self.manner, stop, seed):
                turn.replies[index] = reply
        if reply.problem and not reply.text:
            return
        history += [messages[-1], *reply.said]
        with contextlib.suppress(KeyboardInterrupt):  # a judge may take long
            found = self.scores.of([messages], [reply.messages or reply.text], reply.ids and [reply.ids])
            reply.rewards = {name: values[0] for name, values in found.items()}


@contextlib.contextmanager
def _ctrl_c_sets(stop: threading.Event):
    """While a reply is drawn Ctrl-C ends it and nothing else: an exception could strike in the middle of a screen's redrawing."""
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _silent_keys():
    """While the screen is being redrawn no key is echoed into it, and Ctrl-C throws away nothing that is on its way there.

    What is typed meanwhile stands at the next prompt.
    """
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO | termios.NOFLSH, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
