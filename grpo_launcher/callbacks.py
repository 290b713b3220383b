"""What a run tells while it trains: a line a step on the console, every figure in metrics.jsonl, now and then a sample."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from transformers import TrainerCallback

from grpo_launcher.messages import reply, transcript
from grpo_launcher.runs import BEST, METRICS, point, read_metrics

console = Console(highlight=False)
COLUMNS = [  # metric, label, format
    ("reward", "reward", "{:+.2f}"),
    ("completions/mean_length", "length", "{:.0f} tokens"),
    ("tools/call_frequency", "calls", "{:.2f}"),
    ("tools/failure_frequency", "failed", "{:.0%}"),
    ("kl", "kl", "{:.3f}"),
    ("entropy", "entropy", "{:.2f}"),
    ("step_time", "", "{:.1f} s"),
]
TAUGHT = [("loss", "loss", "{:.3f}"), ("mean_token_accuracy", "right tokens", "{:.0%}"), ("grad_norm", "gradient norm", "{:.2f}")]  # of a supervised run
SUMMARY = [
    *("reward", "completions/mean_length", "completions/clipped_ratio", "kl", "entropy", "grad_norm"),
    *("tools/call_frequency", "tools/failure_frequency", "tools/turns", "tools/tokens"),  # where the recipe has tools
]


class RunLog(TrainerCallback):
    """Writes metrics.jsonl, one line a logged step, and prints the console line. Acts on the main rank alone."""

    def __init__(self, run: Path, taught: bool = False):
        self.run, self.taught = run, taught  # taught: a supervised run, which has a loss in place of a reward
        self.began = None

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run goes on behind its checkpoint: lines of steps that will be trained again are taken out."""
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.run) if line["step"] <= state.global_step]
        (self.run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.began = (time.monotonic(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        with open(self.run / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "time": round(time.time(), 3), **logs}) + "\n")
        if "reward" in logs or ("loss" in logs and self.taught):
            print(self._line(state, logs), flush=True)
        elif "eval_reward" in logs or "eval_loss" in logs:
            print(self._held_out(state, logs), flush=True)

    def on_save(self, args, state, control, **kwargs):
        """Keep the link to the best checkpoint where the recipe has a metric for it."""
        if state.is_world_process_zero and state.best_model_checkpoint:
            point(self.run / BEST, Path(state.best_model_checkpoint))

    def _line(self, state, logs) -> str:
        columns = TAUGHT if self.taught else COLUMNS
        shown = [f"{label} {form.format(logs[name])}".strip() for name, label, form in columns if logs.get(name) is not None]
        began, first = self.began
        left = (state.max_steps - state.global_step) * (time.monotonic() - began) / max(1, state.global_step - first)
        width = len(str(state.max_steps))
        return f"step {state.global_step:>{width}}/{state.max_steps}  " + "  ".join(shown) + f"  {_clock(left)} left"

    @staticmethod
    def _held_out(state, logs) -> str:
        means = {name.split("/")[1]: value for name, value in logs.items() if name.startswith("eval_rewards/") and name.endswith("/mean")}
        shown = {"reward": logs["eval_reward"], **means} if "eval_reward" in logs else {"loss": logs["eval_loss"]}
        return f"held out at step {state.global_step}:  " + "  ".join(f"{name} {value:+.3f}" for name, value in shown.items() if value is not None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def shorten(text: str, limit: int = 400) -> str:
    """A text of at most about `limit` characters: its middle is left out."""
    return text if len(text) <= limit else f"{text[: limit // 2]} […] {text[-limit // 2 :]}"


def sample_printer(every: int) -> Callable:
    """A function with the arguments of TRL's own print_prompt_completions_sample, which prints at the first and every `every`-th step.

    It shows the best and the worst reply to the last prompt of the batch, with their rewards: a hacked reward must be seen.
    """
    printed = None

    def print_sample(prompts, completions, rewards, advantages, step, num_samples=None, extra=None):
        nonlocal printed
        if not every or step == printed or (step != 1 and step % every):  # TRL logs the last step once more at the end
            return
        printed = step
        group = [index for index, prompt in enumerate(prompts) if prompt == prompts[-1]]
        order = sorted(group, key=lambda index: advantages[index])
        asked = prompts[-1] if isinstance(prompts[-1], str) else prompts[-1][-1]["content"]
        parts = [f"[dim]{escape(shorten(asked))}[/dim]"]
        for label, index in {"worst": order[0], "best": order[-1]}.items():
            scores = ", ".join(f"{name} {values[index]:.2f}" for name, values in rewards.items())
            length = len(reply(completions[index]))
            shown = escape(shorten(transcript(completions[index]), 800))
            parts.append(f"[bold]{label} of {len(group)}[/bold] ({length} characters; {scores})\n{shown}")
        console.print(Panel("\n\n".join(parts), title=f"sample at step {step}", title_align="left"))

    return print_sample


def first_and_last(run: Path) -> list[tuple[str, float, float]]:
    """Of every component of the reward and every figure that is watched: its name, its mean over the first three steps and over the last five."""
    logged = read_metrics(run)
    lines = [line for line in logged if "reward" in line]
    components = sorted(name for name in lines[-1] if name.startswith("rewards/") and name.endswith("/mean")) if lines else []
    watched = [*components, *SUMMARY] if lines else [name for name, *_ in TAUGHT]
    lines = lines or [line for line in logged if "loss" in line]
    rows = []
    for name in watched:
        ends = [[line[name] for line in part if line.get(name) is not None] for part in (lines[:3], lines[-5:])]
        if all(ends):
            rows.append((name, *(sum(values) / len(values) for values in ends)))
    return rows


def print_summary(run: Path) -> None:
    """A table of what changed between the first steps and the last."""
    rows = first_and_last(run)
    if not rows:
        return
    print(f"{run}, {read_metrics(run)[-1]['step']} steps:")
    table = Table()
    for heading in ["mean of", "the first three", "the last five"]:
        table.add_column(heading, justify="left" if heading == "mean of" else "right")
    for name, *means in rows:
        table.add_row(name, *(f"{mean:.4g}" for mean in means))
    console.print(table)
