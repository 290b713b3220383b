"""The page: checkpoints in columns, blind votes, and the run's curves on a second tab."""

import functools
import html
import random
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import gradio as gr

from grpo_launcher.chat import markup, votes
from grpo_launcher.chat.checkpoints import Manner
from grpo_launcher.chat.columns import Absent, Reply, draw
from grpo_launcher import report as plots
from grpo_launcher.runs import METRICS

BALLOTS = dict(zip(votes.VOTES, ("A is better", "B is better", "Tie"), strict=True))


@dataclass
class Talk:
    """What one page has been told so far."""

    shown: list[int]  # the columns on it, from left to right
    blind: bool = False  # a pair to vote on, headed A and B
    named: bool = True  # their names and rewards are shown
    open: bool = False  # both replies of a blind pair are whole, and the vote is not cast
    turns: list[tuple[str, dict[int, Reply]]] = field(default_factory=list)  # a prompt, and what each column replied
    manner: Manner | None = None  # of the last turn, as is its seed
    seed: int | None = None


class Page:
    """The page's parts and what they do."""

    def __init__(self, columns: list, rewards, manner: Manner, run: Path | None):
        self.columns, self.rewards, self.manner, self.run = columns, rewards, manner, run
        self.rivals = [index for index, column in enumerate(columns) if not isinstance(column, Absent)]  # who can stand in a blind pair
        self.votes = (run or Path()) / votes.FILE
        self.stops = {}  # page → the Event that ends its reply

    def blocks(self) -> gr.Blocks:
        """Lay it out and say what calls what."""
        with gr.Blocks(title="Checkpoints side by side", analytics_enabled=False) as blocks:
            self.talk = gr.State(self._fresh(False))
            with gr.Tab("Side by side"):
                with gr.Row(equal_height=True):
                    self.views = [gr.HTML(self._column(self.talk.value, place), container=True, min_width=200) for place in range(len(self.columns))]
                with gr.Row(visible=False) as self.booth:
                    self.ballots = {vote: gr.Button(words, interactive=False) for vote, words in BALLOTS.items()}
                self.hint = gr.HTML(elem_classes="hint")
                self.box = gr.Textbox(label="Prompt (Enter sends, Shift + Enter begins a line)", lines=1, max_lines=12, elem_id="prompt", autofocus=True)
                with gr.Row():
                    buttons = [gr.Button("Send", variant="primary"), gr.Button("Stop"), gr.Button("Reset")]
                    blind = gr.Checkbox(label="Blind: two of them as A and B, named after your vote", interactive=len(self.rivals) > 1, min_width=280)
                with gr.Accordion("System prompt and temperature", open=False):
                    system = gr.Textbox(self.manner.system_prompt or "", label="System prompt", lines=2, max_lines=8, elem_id="system")
                    temperature = gr.Slider(
                        0, max(2, self.manner.temperature), self.manner.temperature, step=0.05, label="Temperature (0: the likeliest token)"
                    )
                self.rates = gr.HTML(self.standings, elem_classes="rates")  # a function is called anew for every page
            with gr.Tab("Curves") as tab:
                self.state, self.plot, seen = gr.HTML(elem_classes="hint"), gr.Plot(show_label=False, container=False), gr.State()
            self._wire(buttons, blind, [self.box, blind, system, temperature, self.talk])
            for moment in (tab.select, gr.Timer(5).tick):
                moment(self.curves, seen, [seen, self.state, self.plot], show_progress="hidden", api_visibility="private")
        return blocks

    def _wire(self, buttons: list, blind, asked: list) -> None:
        send, stop, reset = buttons
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        alone = {"concurrency_id": "talk", "concurrency_limit": 1}  # all pages draw from the same models
        drawn = [self.talk, self.hint, *self.views, *self.ballots.values()]
        gr.on([send.click, self.box.submit], self.send, asked, [self.box, *drawn], **alone, **quiet)
        gr.on([stop.click, reset.click, blind.input], self.stop, queue=False, **quiet)
        reset.click(self.start_over, blind, drawn, **alone, **quiet)
        blind.input(self.switch, [blind, self.talk], [self.booth, *drawn], **alone, **quiet)
        for vote, button in self.ballots.items():
            button.click(functools.partial(self.vote, vote), self.talk, [self.rates, *drawn], concurrency_id="vote", **quiet)

    def send(self, prompt: str, blind: bool, system: str, temperature: float, talk: Talk, request: gr.Request) -> Iterator[dict]:
        """Ask the columns one after the other; blind, two that are drawn anew for each prompt, in an order that is drawn too."""
        if not prompt.strip():
            yield {self.hint: "Write a prompt first."}
            return
        stop = self.stops[request.session_hash] = threading.Event()
        talk = self._fresh(blind) if blind or talk.blind else talk
        talk.manner = replace(self.manner, system_prompt=system if system.strip() else None, temperature=float(temperature))
        talk.seed = secrets.randbelow(2**31)
        replies = {}
        talk.turns.append((prompt, replies))
        yield {self.box: "", self.hint: "", **self._drawn(talk)}
        for place, index in enumerate(talk.shown):
            for reply in self._reply(talk, index, stop):
                replies[index] = reply
                yield {self.views[place]: self._column(talk, place)}
        whole = not any(reply.problem or reply.stopped for reply in replies.values())
        talk.open, talk.named = blind and whole, not (blind and whole)
        said = ["No vote on this pair: one of the replies is not whole."] if blind and not whole else self.rewards.left_out
        yield {self.hint: html.escape(" ".join(said)), **self._drawn(talk)}

    def _reply(self, talk: Talk, index: int, stop: threading.Event) -> Iterator[Reply]:
        """A column's reply to the last prompt as it grows, twenty times a second at most, and at last with its rewards."""
        *before, (prompt, _) = talk.turns
        messages = [{"role": "system", "content": talk.manner.system_prompt}] if talk.manner.system_prompt else []
        for asked, replies in before:
            if not replies[index].problem and replies[index].text:
                messages += [{"role": "user", "content": asked}, *replies[index].said]
        messages.append({"role": "user", "content": prompt})
        reply, told = Reply(self.columns[index].name, stopped=True), 0
        if not stop.is_set():
            for reply in draw(self.columns[index], messages, talk.manner, stop, talk.seed):
                if time.monotonic() - told > 0.05:
                    yield reply
                    told = time.monotonic()
        if reply.text and not reply.problem:
            scores = self.rewards.of([messages], [reply.messages or reply.text], None if reply.ids is None else [reply.ids])
            reply.rewards = {name: score for name, (score,) in scores.items()}
        yield reply

    def stop(self, request: gr.Request) -> None:
        """End the reply that this page is being given."""
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()

    def start_over(self, blind: bool) -> dict:
        """Forget what was said."""
        return {self.hint: "", **self._drawn(self._fresh(blind))}

    def switch(self, blind: bool, talk: Talk) -> dict:
        """Begin anew in the other mode; a prompt that overtook this has done so already, and stays."""
        return {self.booth: gr.Row(visible=blind)} | ({} if talk.blind == blind else self.start_over(blind))

    def vote(self, vote: str, talk: Talk) -> dict:
        """Keep the vote, then say who was who. A second click on the same pair is no second vote."""
        if not talk.open:
            return {self.hint: "This pair has had its vote: send a prompt for another."}
        prompt, replies = talk.turns[-1]
        a, b = (replies[index] for index in talk.shown)
        sampling = asdict(talk.manner) | {"seed": talk.seed}
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "prompt": prompt, "system_prompt": sampling.pop("system_prompt")}
        line |= {"A": a.column, "B": b.column, "reply_A": a.text, "reply_B": b.text, "vote": vote, "sampling": sampling}
        try:
            votes.append(self.votes, line)
        except OSError as error:
            return {self.hint: html.escape(f"{self.votes} cannot be written ({error.strerror}), so the vote is not kept; mend that and vote again.")}
        talk.open, talk.named = False, True
        return {self.rates: self.standings(), self.hint: f"Kept in {html.escape(str(self.votes))}", **self._drawn(talk)}

    def standings(self) -> str:
        """The win rate of every pair in the file of votes."""
        cast, bad = votes.read(self.votes)
        return markup.standings(votes.standings(cast), f"{self.votes}: left out, as it is no vote: line {', '.join(map(str, bad))}." if bad else "")

    def curves(self, seen: int | None) -> tuple:
        """The run's figures up to now; nothing where there is none that the page has not seen."""
        if self.run is None:
            return None, "These columns belong to no run, so there are no curves.", None
        path = self.run / METRICS
        now = path.stat().st_mtime_ns if path.exists() else 0
        if now == seen:
            return gr.skip(), gr.skip(), gr.skip()
        drawn = plots.figure([self.run])
        said = f"{self.run}: as of {datetime.now().astimezone():%H:%M:%S}; looks for more every 5 s" if drawn else f"{path} holds no figures yet."
        return now, html.escape(said), drawn

    def _fresh(self, blind: bool) -> Talk:
        return Talk(random.sample(self.rivals, 2) if blind else list(range(len(self.columns))), blind, named=not blind)

    def _drawn(self, talk: Talk) -> dict:
        views = [gr.HTML(self._column(talk, place), visible=place < len(talk.shown)) for place in range(len(self.views))]
        return {self.talk: talk, **dict(zip(self.views, views, strict=True)), **{button: gr.Button(interactive=talk.open) for button in self.ballots.values()}}

    def _column(self, talk: Talk, place: int) -> str:
        if place >= len(talk.shown):
            return ""
        index = talk.shown[place]
        heads = (["AB"[place]] if talk.blind else []) + ([self.columns[index].name] if talk.named else [])
        return markup.column(": ".join(heads), [(prompt, replies.get(index)) for prompt, replies in talk.turns], talk.named)
