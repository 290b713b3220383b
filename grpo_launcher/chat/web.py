"""The page: models side by side, blind votes between two of them, and the curves of their run."""

import contextlib
import functools
import html
import json
import os
import random
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import gradio as gr
import pandas as pd
from scipy import stats
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from grpo_launcher import report, runs
from grpo_launcher.chat.backends import Completion, Turn, converse
from grpo_launcher.chat.models import GenerationSettings
from grpo_launcher.chat.rollouts_tab import RolloutsTab
from grpo_launcher.errors import UserError
from grpo_launcher.evaluate import RewardSet
from grpo_launcher.render import figures

HOST = "127.0.0.1"
VOTES_FILE = "votes.jsonl"
VOTES = {"A": "A is better", "B": "B is better", "tie": "Tie"}
CURVES_S = 5  # between two looks at the run's metrics


@dataclass
class Conversation:
    """What one page shows: models by name, from left to right. A blind pair is called A and B until its vote."""

    shown: list[str]
    blind: bool = False
    named: bool = True
    turns: list[Turn] = field(default_factory=list)
    settings: GenerationSettings | None = None
    can_vote: bool = False


class Page:
    """The parts of the page and what they do."""

    def __init__(self, models: list, rewards: RewardSet, settings: GenerationSettings, run: Path | None):
        self.models = {model.name: model for model in models}
        self.rewards, self.settings, self.run = rewards, settings, run
        self.votes = (run or Path()) / VOTES_FILE
        self.stops, self.address = {}, None  # session -> event that ends its completion

    def serve(self, port: int) -> None:
        """Show the page on this machine until Ctrl-C. Port 0: a free one."""
        only_here = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        blocks = self.blocks()
        try:
            _, self.address, _ = blocks.launch(
                server_name=HOST, server_port=port or None, ssr_mode=False, footer_links=[], quiet=True,
                prevent_thread_lock=True, app_kwargs={"middleware": [only_here]},
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )  # fmt: skip
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}", f"cannot be had: {error}", "name another, or none") from error
        print(f"Open {self.address} (Ctrl-C ends it). Blind votes go to {self.votes}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        # All is written. Python's own end waits for gradio's threads, and aborts while a model computes in one.
        sys.stdout.flush()
        os._exit(0)

    def blocks(self) -> gr.Blocks:
        """Lay the page out and connect its parts."""
        with gr.Blocks(title="Checkpoints side by side", analytics_enabled=False) as blocks:
            self.state = gr.State(self.new_conversation(False))
            with gr.Tab("Side by side"):
                with gr.Row():
                    self.chats = [
                        gr.Chatbot(label=name, render_markdown=False, buttons=[], min_width=220)
                        for name in self.models
                    ]
                with gr.Row(visible=False) as self.booth:
                    self.ballots = {vote: gr.Button(label, interactive=False) for vote, label in VOTES.items()}
                self.hint = gr.Markdown()
                self.prompt = gr.Textbox(
                    label="Prompt (Enter sends, Shift + Enter begins a line)", max_lines=12, autofocus=True
                )
                with gr.Row():
                    send, stop, reset = gr.Button("Send", variant="primary"), gr.Button("Stop"), gr.Button("Reset")
                    blind = gr.Checkbox(
                        label="Blind: two models as A and B, named after your vote", interactive=len(self.models) > 1
                    )
                with gr.Accordion("System prompt and temperature", open=False):
                    system = gr.Textbox(self.settings.system_prompt or "", label="System prompt", lines=2)
                    most = max(2, self.settings.temperature)
                    temperature = gr.Slider(
                        0, most, self.settings.temperature, step=0.05, label="Temperature (0: greedy)"
                    )
                self.rates = gr.Dataframe(lambda: win_rates(read_votes(self.votes)), label="Votes", interactive=False)
            timer = gr.Timer(CURVES_S)
            with gr.Tab("Curves", visible=self.run is not None) as tab:
                plot, seen = gr.Plot(show_label=False), gr.State()
            if self.run:
                with gr.Tab("Rollouts") as rollouts:
                    RolloutsTab(self.run, timer, rollouts)
            quiet = {"show_progress": "hidden"}
            one_at_a_time = {"concurrency_id": "models", "concurrency_limit": 1}
            drawn = [self.state, self.hint, *self.chats, *self.ballots.values()]
            inputs = [self.prompt, blind, system, temperature, self.state]
            gr.on([send.click, self.prompt.submit], self.send, inputs, [self.prompt, *drawn], **one_at_a_time, **quiet)
            gr.on([stop.click, reset.click, blind.input], self.stop, queue=False, **quiet)
            reset.click(self.reset, blind, drawn, **one_at_a_time, **quiet)
            blind.input(self.switch, [blind, self.state], [self.booth, *drawn], **one_at_a_time, **quiet)
            for vote, button in self.ballots.items():
                button.click(functools.partial(self.vote, vote), self.state, [self.rates, *drawn], **quiet)
            gr.on([tab.select, timer.tick], self.curves, seen, [seen, plot], **quiet)
        return blocks

    def new_conversation(self, blind: bool) -> Conversation:
        """Begin with all models, or with two that are drawn by lot."""
        if blind:
            return Conversation(random.sample(list(self.models), 2), blind=True, named=False)
        return Conversation(list(self.models))

    def send(
        self,
        prompt: str,
        blind: bool,
        system: str,
        temperature: float,
        conversation: Conversation,
        request: gr.Request,
    ) -> Iterator[dict]:
        """Let the models complete a prompt, one after the other. A blind pair is drawn anew for each prompt."""
        if not prompt.strip():
            return
        stop = self.stops[request.session_hash] = threading.Event()
        if blind:
            conversation = self.new_conversation(True)
        conversation.settings = replace(
            self.settings, system_prompt=system or None, temperature=temperature, seed=secrets.randbelow(2**31)
        )
        turn = Turn(prompt, {})
        conversation.turns.append(turn)
        yield {self.prompt: "", **self.draw(conversation)}
        for chat, name in zip(self.chats, conversation.shown, strict=False):
            if stop.is_set():
                turn.completions[name] = Completion(stopped=True)
                continue
            for _ in converse(self.models[name], conversation.turns, conversation.settings, self.rewards, stop):
                yield {chat: self.messages(conversation, name)}
        whole = not any(completion.error or completion.stopped for completion in turn.completions.values())
        conversation.can_vote = blind and whole
        conversation.named = not conversation.can_vote
        hint = " ".join(self.rewards.problems)
        if blind and not whole:
            hint = "No vote on this pair: a completion is not whole."
        yield self.draw(conversation, hint)

    def draw(self, conversation: Conversation, hint: str = "") -> dict:
        """Return the whole page."""
        updates = {self.state: conversation, self.hint: hint}
        for place, chat in enumerate(self.chats):
            if place >= len(conversation.shown):
                updates[chat] = gr.Chatbot(visible=False)
                continue
            name = label = conversation.shown[place]
            if conversation.blind:
                label = f"{'AB'[place]}: {name}" if conversation.named else "AB"[place]
            updates[chat] = gr.Chatbot(self.messages(conversation, name), label=label, visible=True)
        return updates | {button: gr.Button(interactive=conversation.can_vote) for button in self.ballots.values()}

    def messages(self, conversation: Conversation, name: str) -> list[dict]:
        """Return a model's side of the conversation. Before a vote rewards and seconds would tell who it is."""
        messages = []
        for turn in conversation.turns:
            messages.append({"role": "user", "content": html.escape(turn.prompt)})
            if name in turn.completions:
                completion = turn.completions[name]
                known = figures(completion) if conversation.named else figures(completion)[:1]
                below = " · ".join([*known, *filter(None, [completion.error])])
                text = html.escape(f"{completion.text}\n\n[{below or '…'}]")
                messages.append({"role": "assistant", "content": text})
        return messages

    def stop(self, request: gr.Request) -> None:
        """End the completion that this page is waiting for."""
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()

    def reset(self, blind: bool) -> dict:
        """Forget the conversation."""
        return self.draw(self.new_conversation(blind))

    def switch(self, blind: bool, conversation: Conversation) -> dict:
        """Begin anew in the other mode. A prompt that overtook this has done so already, and stays."""
        updates = {} if conversation.blind == blind else self.reset(blind)
        return {self.booth: gr.Row(visible=blind), **updates}

    def vote(self, vote: str, conversation: Conversation) -> dict:
        """Keep a vote, then say who was who. A second click on the same pair is no second vote."""
        if not conversation.can_vote:
            return {self.hint: "This pair has had its vote: send a prompt for another."}
        turn = conversation.turns[-1]
        a, b = conversation.shown
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "prompt": turn.prompt, "A": a, "B": b}
        line |= {"completion_A": turn.completions[a].text, "completion_B": turn.completions[b].text}
        try:
            append_vote(self.votes, line | {"vote": vote, "settings": asdict(conversation.settings)})
        except OSError as error:
            return {
                self.hint: f"The vote is not kept, as {self.votes} cannot be written: {error.strerror}. Vote again."
            }
        conversation.can_vote, conversation.named = False, True
        rates = win_rates(read_votes(self.votes))
        return {self.rates: rates, **self.draw(conversation, f"The vote is kept in {self.votes}.")}

    def curves(self, seen: int | None) -> tuple:
        """Draw the run's metrics, where there are more than the page has seen."""
        path = (self.run or Path()) / runs.METRICS
        modified = path.stat().st_mtime_ns if self.run and path.exists() else None
        if modified == seen:
            return gr.skip(), gr.skip()
        return modified, report.figure([self.run])


def append_vote(path: Path, vote: dict) -> None:
    """Add a vote in one write, so that two pages that vote at once do not mix their lines."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(vote, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def read_votes(path: Path) -> list[dict]:
    """Return the votes of a file, without lines that are none."""
    votes = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            vote = json.loads(line)
        except ValueError:
            continue
        if isinstance(vote, dict) and vote.get("vote") in VOTES and {"A", "B"} <= vote.keys():
            votes.append(vote)
    return votes


def win_rates(votes: list[dict]) -> pd.DataFrame:
    """Return how often each model won against each other one, with Wilson's interval. Ties count for neither."""
    counts = Counter()
    for vote in votes:
        against, name = sorted((vote["A"], vote["B"]))
        winner = vote.get(vote["vote"])
        counts[name, against, {name: "won", against: "lost"}.get(winner, "tied")] += 1
    rows = []
    for name, against in sorted({pair[:2] for pair in counts}):
        won, lost, tied = (counts[name, against, result] for result in ("won", "lost", "tied"))
        rate, interval = "", ""
        if won + lost:
            test = stats.binomtest(won, won + lost).proportion_ci(method="wilson")
            rate, interval = f"{won / (won + lost):.0%}", f"{test.low:.0%} to {test.high:.0%}"
        rows.append([name, against, won, lost, tied, rate, interval])
    columns = ["checkpoint", "against", "won", "lost", "tied", "win rate", "95 % interval (Wilson)"]
    return pd.DataFrame(rows, columns=columns)
