"""Callbacks of a run: the console line and metrics.jsonl of each step, and the guards."""

import datetime
import json
import math
import re
import time
from pathlib import Path

import pandas
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from transformers import TrainerCallback

from grpo_launcher import overlap, resample
from grpo_launcher.errors import UserError, did_you_mean
from grpo_launcher.messages import last_reply, last_user_text, transcript
from grpo_launcher.runs import (
    BEST,
    END_REQUEST,
    METRICS,
    STOPPED,
    checkpoints,
    point,
    read_metrics,
    report_progress,
    set_aside,
    write_whole,
)

console = Console(highlight=False)

# Figures of the console line: metric, label, format.
GRPO_COLUMNS = [
    ("reward", "reward", "{:+8.2f}"),
    ("completions/mean_length", "length", "{:4.0f} tokens"),
    ("tools/call_frequency", "calls", "{:.2f}"),
    ("tools/failure_frequency", "failed", "{:4.0%}"),
    ("kl", "kl", "{:.3f}"),
    ("entropy", "entropy", "{:.2f}"),
    ("step_time", "", "{:5.1f} s"),
]
SFT_COLUMNS = [
    ("loss", "loss", "{:7.3f}"),
    ("mean_token_accuracy", "token accuracy", "{:4.0%}"),
    ("grad_norm", "gradient norm", "{:6.2f}"),
]
REWARD_MEAN = re.compile("(eval_)?rewards/.+/mean")
# Figures of the summary, behind the rewards.
SUMMARY = ["reward", "completions/mean_length", "completions/clipped_ratio", "kl", "entropy", "grad_norm"]
SUMMARY += ["tools/call_frequency", "tools/failure_frequency", "tools/turns", "tools/tokens"]


class RunLog(TrainerCallback):
    """Append every logged line to metrics.jsonl and print one line a step, on the main rank alone.

    Args:
        folder: the run's folder.
        is_sft: the console line shows a loss in place of a reward.
    """

    def __init__(self, folder: Path, is_sft: bool = False):
        self.folder, self.columns = folder, SFT_COLUMNS if is_sft else GRPO_COLUMNS
        self.start_time, self.start_step = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop the lines of steps behind the checkpoint that a run resumes from: they are trained again."""
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.folder) if line["step"] <= state.global_step]
        write_whole(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self.start_time, self.start_step = time.monotonic(), state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        """Count the micro-batches of a step."""
        self.micro_batch = 1
        if state.is_world_process_zero:
            report_progress(self.folder, f"step {state.global_step + 1}: training")

    def on_substep_end(self, args, state, control, **kwargs):
        """Say which micro-batch is trained."""
        self.micro_batch += 1
        if state.is_world_process_zero:
            batches = f"micro-batch {self.micro_batch} of {args.gradient_accumulation_steps}"
            report_progress(self.folder, f"step {state.global_step + 1}: training {batches}")

    def on_step_end(self, args, state, control, **kwargs):
        """Say that what follows a step may take time."""
        if state.is_world_process_zero and (control.should_save or control.should_evaluate):
            push = " and pushing" if args.push_to_hub else ""
            work = "evaluating" if control.should_evaluate else f"saving{push} a checkpoint"
            report_progress(self.folder, f"step {state.global_step}: {work}")

    def on_prediction_step(self, args, state, control, **kwargs):
        """Let the launcher see that an evaluation goes on."""
        if state.is_world_process_zero:
            report_progress(self.folder, f"step {state.global_step}: evaluating")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the line and print it."""
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "time": round(time.time(), 3), **logs}
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.columns[0][0] in logs:
            print(self._step_line(state, logs), flush=True)
        elif "eval_reward" in logs or "eval_loss" in logs:
            print(f"evaluation at step {state.global_step}:  {_evaluation(logs)}", flush=True)

    def on_save(self, args, state, control, **kwargs):
        """Point the link at the best checkpoint where the recipe has a metric for it."""
        if state.is_world_process_zero and state.best_model_checkpoint:
            point(self.folder / BEST, Path(state.best_model_checkpoint))

    def _step_line(self, state, logs: dict) -> str:
        shown = [(label, form.format(logs[name])) for name, label, form in self.columns if logs.get(name) is not None]
        figures = "  ".join(f"{label} {value}" if label else value for label, value in shown)
        seconds_per_step = (time.monotonic() - self.start_time) / max(1, state.global_step - self.start_step)
        left = datetime.timedelta(seconds=round((state.max_steps - state.global_step) * seconds_per_step))
        width = len(str(state.max_steps))
        return f"step {state.global_step:>{width}}/{state.max_steps}  {figures}  {left} left"


class EndOnRequest(TrainerCallback):
    """Save a checkpoint and end at the end of a step where the launcher asks for it, on all ranks after the same step.

    Args:
        folder: the run's folder.

    Attributes:
        has_ended: whether it did.
    """

    def __init__(self, folder: Path):
        self.folder, self.has_ended = folder, False

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget a request that an earlier run has left."""
        if state.is_world_process_zero:
            (self.folder / END_REQUEST).unlink(missing_ok=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Look for the request, where this step is not the last of the run or of an epoch that has more to do."""
        is_asked = [(self.folder / END_REQUEST).exists()]
        broadcast_object_list(is_asked)
        has_more = state.global_step >= state.max_steps
        has_more |= control.should_evaluate and args.save_strategy == "best"
        by_epoch = "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy)
        has_more |= by_epoch and float(state.epoch).is_integer()
        if is_asked[0] and not has_more:
            self.has_ended = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Tell the launcher, and keep this checkpoint: at a run's end transformers may keep the best one alone."""
        if self.has_ended:
            args.save_total_limit, args.load_best_model_at_end = None, False
            if state.is_world_process_zero:
                (self.folder / END_REQUEST).unlink()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Do nothing more: transformers ends the epoch too, in the middle of it."""
        if self.has_ended:
            control.should_save = control.should_evaluate = control.should_log = False


def _evaluation(logs: dict) -> str:
    if "eval_reward" not in logs:
        return f"loss {logs['eval_loss']:+.3f}"
    figures = {"reward": logs["eval_reward"]}
    figures |= {name.split("/")[1]: value for name, value in logs.items() if REWARD_MEAN.fullmatch(name)}
    return "  ".join(f"{name} {value:+.3f}" for name, value in figures.items() if value is not None)


def shorten(text: str, limit: int = 400) -> str:
    """Return a text of about `limit` characters at most, with its middle left out."""
    return text if len(text) <= limit else f"{text[: limit // 2]} […] {text[-limit // 2 :]}"


def print_sample(prompts, completions, rewards: dict[str, list], advantages: list[float], step: int) -> None:
    """Print the best and the worst completion of the last group, with their rewards: a hacked reward must be seen."""
    group = [index for index, prompt in enumerate(prompts) if prompt == prompts[-1]]
    group.sort(key=lambda index: advantages[index])
    parts = [f"[dim]{escape(shorten(last_user_text(prompts[-1])))}[/dim]"]
    for label, index in (("worst", group[0]), ("best", group[-1])):
        scores = ", ".join(f"{name} {values[index]:z.2f}" for name, values in rewards.items())
        length = len(last_reply(completions[index]))
        text = escape(shorten(transcript(completions[index]), 800))
        parts.append(f"[bold]{label} of {len(group)}[/bold] ({length} characters; {scores})\n{text}")
    console.print(Panel("\n\n".join(parts), title=f"sample at step {step}", title_align="left"))


def metric_changes(folder: Path) -> list[tuple[str, float, float]]:
    """Return (metric, mean of the first three steps, mean of the last five) of all rewards and watched figures."""
    frame = pandas.DataFrame(read_metrics(folder))
    names = [*sorted(name for name in frame if REWARD_MEAN.fullmatch(name)), *SUMMARY]
    if "reward" not in frame:
        names = [name for name, *_ in SFT_COLUMNS]
    names = [name for name in names if name in frame]
    steps = frame.dropna(subset=["reward" if "reward" in frame else "loss"]) if names else frame
    changes = [(name, steps[name].head(3).mean(), steps[name].tail(5).mean()) for name in names]
    return [change for change in changes if not any(map(math.isnan, change[1:]))]


def print_summary(folder: Path) -> None:
    """Print a table of what changed between the first steps and the last."""
    changes, lines = metric_changes(folder), read_metrics(folder)
    if changes:
        print(f"{folder}, {lines[-1]['step']} steps:")
        columns = ["mean of", f"the first {min(3, len(lines))}", f"the last {min(5, len(lines))}"]
        table = pandas.DataFrame(changes, columns=columns)
        print(table.to_string(index=False, float_format="{:.4g}".format), flush=True)
    for part in (overlap, resample):
        if text := part.summary(lines):
            print(text)


FINITE = ("loss", "reward", "grad_norm", "kl")  # NaN or infinity in any of these stops a run at once
FAILED_RATINGS = "failed_ratings"  # the largest rewards/NAME/failed; the other guards are metrics of metrics.jsonl
SYNC_DIFFERENCE = "weight_sync/logp_difference"  # nats per token, between server and trainer after a push
STOPPING = ("kl", SYNC_DIFFERENCE)  # the other guards warn
GUARDS = {
    "kl": {"max": 1.0, "steps": 3},  # nats per token
    SYNC_DIFFERENCE: {"max": 1e-3, "steps": 1},
    FAILED_RATINGS: {"max": 0.5, "steps": 5},
    "grad_norm": {"max": 100.0, "steps": 3},
    "entropy": {"min": 0.01, "steps": 5},
    "completions/clipped_ratio": {"max": 0.95, "steps": 20},
    "frac_reward_zero_std": {"max": 0.95, "steps": 20},
}
HOPELESS = {"max": 0.95, "steps": 2}
ADVICE = {
    FAILED_RATINGS: "see in train.log why the reward gave no rating",
    "grad_norm": "lower learning_rate or max_grad_norm",
    "entropy": "the policy hardly varies any more: raise beta or temperature, or lower learning_rate",
    "completions/clipped_ratio": "raise max_completion_length, or reward shorter completions",
    "frac_reward_zero_std": "the rewards in a group are all equal: raise num_generations or temperature, "
    "or take a reward with more than two values",
}


def sync_limit(dtype: str, device: str) -> float:
    """Return the SYNC_DIFFERENCE that a run may have: in 16 bits rounding alone makes some hundredths.

    Args:
        dtype: in which the server computes.
        device: type of the trainer's device. The kernels of a GPU may round their factors (TF32).
    """
    if dtype != "float32":
        return 0.3
    return 0.03 if device == "cuda" else GUARDS[SYNC_DIFFERENCE]["max"]


def guard_limits(
    given: dict | None, beta: float, max_sync: float = GUARDS[SYNC_DIFFERENCE]["max"], refuse_hopeless: bool = False
) -> dict[str, dict]:
    """Merge the recipe's guards into the defaults: metric -> {"min" and/or "max", "steps"}; null switches one off.

    max_sync is that of SYNC_DIFFERENCE. With refuse_hopeless that of the groups without spread stops a run, after two
    steps.

    Raises:
        UserError: an unknown guard or bound, a bound that is no number, a KL guard with beta 0.
    """
    limits = GUARDS | {SYNC_DIFFERENCE: {"max": max_sync, "steps": 1}}
    for name, limit in (given or {}).items():
        if name not in GUARDS:
            raise UserError("guards", f"there is no guard {name!r}", did_you_mean(name, GUARDS))
        if limit is None:
            del limits[name]
        elif _is_limit(limit):
            limits[name] = {"steps": GUARDS[name]["steps"], **limit}
        else:
            problem = f"{name}: {limit!r} is no range"
            raise UserError("guards", problem, "write {max: 1.0, steps: 3}, with min, max or both, and steps from 1")
    if refuse_hopeless:
        if "frac_reward_zero_std" in (given or {}):
            raise UserError("guards", "frac_reward_zero_std: refuse_hopeless sets it", "leave one of them out")
        limits["frac_reward_zero_std"] = HOPELESS
    if beta == 0 and (given or {}).get("kl"):
        raise UserError("guards", "kl: with beta 0 no KL is measured", "set beta (0.04, say), or leave the guard out")
    return limits


def _is_limit(limit) -> bool:
    if not isinstance(limit, dict) or not set(limit) <= {"min", "max", "steps"} or not {"min", "max"} & set(limit):
        return False
    return all(type(value) in (int, float) for value in limit.values()) and limit.get("steps", 1) >= 1


class Guards(TrainerCallback):
    """Stop a run at figures that are not finite, and at STOPPING out of range; warn once about any other figure.

    At a stop the checkpoints whose weights made such a figure are renamed to diverged-checkpoint-STEP, so that neither
    --resume nor a comparison takes them, and stopped.json says why: {why, step, checkpoint}.

    Args:
        folder: the run's folder.
        limits: metric -> range, from `guard_limits`.
        metric: a logged line with this metric is a training step.

    Attributes:
        stopped: the message of the stop, or None.
    """

    def __init__(self, folder: Path, limits: dict[str, dict], metric: str = "reward"):
        self.folder, self.limits, self.metric = folder, limits, metric
        self.steps_outside = dict.fromkeys(limits, 0)  # in a row
        self.warned = set()
        self.stopped = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Go on with the counts of a run that is resumed, and forget its stop."""
        for line in read_metrics(self.folder):
            if line["step"] <= state.global_step and self.metric in line:
                self.warned |= set(self._exceeded(line))
        if state.is_world_process_zero:
            (self.folder / STOPPED).unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Judge a training step."""
        if self.metric not in logs or "train_runtime" in logs or self.stopped:
            return
        reasons = _not_finite(logs, args.fp16)
        for name, message in self._exceeded(logs).items():
            if name in STOPPING or self.limits[name] is HOPELESS:
                reasons.append(message)
            elif name not in self.warned:
                self.warned.add(name)
                if state.is_world_process_zero:
                    print(f"Warning: {message}. Fix: {ADVICE[name]}.", flush=True)
        if reasons:
            self._stop(args, state, control, logs, "; ".join(reasons))

    def _exceeded(self, logs: dict) -> dict[str, str]:
        """Count a training step. Returns what is out of range for long enough: metric -> message."""
        messages = {}
        for name, limit in self.limits.items():
            problem = _out_of_range(name, limit, logs)
            self.steps_outside[name] = self.steps_outside[name] + 1 if problem else 0
            if self.steps_outside[name] >= limit["steps"]:
                messages[name] = f"{problem} for {limit['steps']} steps"
        return messages

    def _stop(self, args, state, control, logs: dict, why: str) -> None:
        control.should_training_stop = True
        # The weights of this step are known to be bad: sampling from NaN crashes, and nobody resumes from them.
        control.should_save = control.should_evaluate = False
        self.stopped = f"Stopped by a guard at step {state.global_step}: {why}."
        if not state.is_world_process_zero:
            return
        last_good = self._set_diverged_aside(args, state, logs)
        if last_good:
            self.stopped += f" The last checkpoint from inside the range: {last_good}."
        else:
            self.stopped += " No checkpoint is from inside the range."
        record = {"why": why, "step": state.global_step, "checkpoint": last_good.name if last_good else None}
        (self.folder / STOPPED).write_text(json.dumps(record), encoding="utf-8")
        print(self.stopped, flush=True)

    def _set_diverged_aside(self, args, state, logs: dict) -> Path | None:
        """Rename the checkpoints from outside the range and return the last from inside.

        Earlier excursions count too, also those before a resume. The weights of checkpoint-N make the figures of the
        line that is logged next.
        """
        lines = [*read_metrics(self.folder), {"step": state.global_step, **logs}]
        kl_limit = self.limits.get("kl", {})
        bad_steps = {
            line["step"] for line in lines if _not_finite(line, args.fp16) or _out_of_range("kl", kl_limit, line)
        }
        last_good = None
        for folder in checkpoints(self.folder, args.world_size):
            step = int(folder.name.split("-")[1])
            if any(step < bad_step <= step + state.logging_steps for bad_step in bad_steps):
                set_aside(folder, "diverged")
            else:
                last_good = folder
        return last_good


def _not_finite(logs: dict, is_fp16: bool) -> list[str]:
    # With fp16 the scale of the loss is sought by overflows: such a step is left out, and its gradient is infinite.
    names = [name for name in FINITE if not (is_fp16 and name == "grad_norm")]
    return [f"{name} is {logs[name]}" for name in names if not math.isfinite(logs.get(name) or 0)]


def _out_of_range(name: str, limit: dict, logs: dict) -> str | None:
    """Return what is wrong with a figure, or None."""
    if name == FAILED_RATINGS:
        shares = {key: value for key, value in logs.items() if key.startswith("rewards/") and key.endswith("/failed")}
        name = max(shares, key=shares.get, default=name)
    value = logs.get(name)
    if value is None:
        return None
    if value > limit.get("max", math.inf):
        return f"{name} is {value:.4g}, over {limit['max']}"
    if value < limit.get("min", -math.inf):
        return f"{name} is {value:.4g}, under {limit['min']}"
    return None
