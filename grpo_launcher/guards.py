"""Guards: a run whose figures leave a stated range for some steps is stopped, and its last checkpoint from inside the range kept."""

import json
import math
import shutil
from pathlib import Path

from transformers import TrainerCallback

from grpo_launcher.config import RecipeError
from grpo_launcher.runs import BEST, STOPPED

FAILED = "failed_ratings"  # the largest rewards/NAME/failed; the other names are those of metrics.jsonl
DEFAULTS = {
    FAILED: {"max": 0.5, "steps": 5},
    "kl": {"max": 1.0, "steps": 3},  # per token; a published run drifted to 3.27 unnoticed
    "grad_norm": {"max": 100.0, "steps": 3},
    "entropy": {"min": 0.01, "steps": 5},
    "completions/clipped_ratio": {"max": 0.95, "steps": 20},
    "frac_reward_zero_std": {"max": 0.95, "steps": 20},
}
FINITE = ("loss", "reward", "grad_norm", "kl")  # none of these may be nan or inf in any step


def limits(given: dict | None, beta: float) -> dict[str, dict]:
    """The recipe's guards over the defaults: metric → {"min" and/or "max", "steps"}; null switches one off.

    Raises RecipeError: an unknown guard or bound, a value that is no number, a KL guard where beta 0 means that no KL is measured.
    """
    found = dict(DEFAULTS)
    for name, wanted in (given or {}).items():
        if name not in DEFAULTS:
            raise RecipeError(f"guards: there is no guard {name!r}, only {', '.join(DEFAULTS)}.")
        if wanted is None:
            del found[name]
        elif _valid(wanted):
            found[name] = {"steps": DEFAULTS[name]["steps"]} | wanted
        else:
            raise RecipeError(f"guards: {name}: {wanted!r}: write {{max: 1.0, steps: 3}}, with min, max or both, and at least one step.")
    if (given or {}).get("kl") and beta == 0:
        raise RecipeError("guards: kl: with beta 0 no KL is measured; set beta (0.04, say), or leave the guard out.")
    return found


def _valid(limit) -> bool:
    if not isinstance(limit, dict) or not set(limit) <= {"min", "max", "steps"} or not {"min", "max"} & set(limit):
        return False
    return all(type(value) in (int, float) for value in limit.values()) and limit.get("steps", 1) >= 1


class Guards(TrainerCallback):
    """Watches the logged figures: a warning at the first step outside a range, a stop after `steps` of them in a row.

    While a figure is outside, nothing is saved. At the stop every checkpoint whose weights made such a figure is renamed to
    diverged-checkpoint-STEP, so that neither --resume nor a comparison takes it, and STOPPED tells why and what is left.
    `stopped` is that message, or None.
    """

    def __init__(self, run: Path, limits: dict[str, dict], judged: str = "reward"):
        self.run, self.limits, self.judged = run, limits, judged  # judged: the figure by which a line to look at is known
        self.outside = {}  # metric → the steps in a row in which it was outside
        self.bad = set()  # every step in which one was
        self.stopped = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (self.run / STOPPED).unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.judged not in logs or "train_runtime" in logs or self.stopped:
            return
        wrong = {name: f"{name} is {logs[name]}" for name in FINITE if not math.isfinite(logs.get(name) or 0)}
        fatal = list(wrong.values())
        for name, limit in self.limits.items():
            if said := _outside(name, limit, logs):
                wrong[name] = said
        self.outside = {name: [*self.outside.get(name, []), state.global_step] for name in wrong}
        for name, steps in self.outside.items():
            enough = name in self.limits and len(steps) >= self.limits[name]["steps"]
            if enough:
                fatal.append(f"{wrong[name]}, for {len(steps)} steps")
            elif len(steps) == 1 and name in self.limits and state.is_world_process_zero:
                print(f"Warning: {wrong[name]}; the run stops after {self.limits[name]['steps']} such steps in a row.", flush=True)
        if self.outside:
            control.should_save = False
            self.bad.add(state.global_step)
        if fatal:
            self._stop(state, control, "; ".join(fatal))

    def _stop(self, state, control, why: str) -> None:
        """Weights of checkpoint-N are judged by the figures that are logged next, in step N + 1 as a rule."""
        control.should_training_stop = True
        self.stopped = f"Stopped by a guard at step {state.global_step}: {why}."
        if not state.is_world_process_zero:
            return
        good = []
        for step, folder in sorted((int(path.name.split("-")[1]), path) for path in self.run.glob("checkpoint-*")):
            if not any(step < bad <= step + state.logging_steps for bad in self.bad):
                good.append(folder.name)
            else:
                aside = folder.with_name(f"diverged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        if not (best := self.run / BEST).exists():
            best.unlink(missing_ok=True)  # a link to one of those
        self.stopped += f" The last checkpoint from inside the range: {self.run / good[-1]}." if good else " No checkpoint is from inside the range."
        (self.run / STOPPED).write_text(json.dumps({"why": why, "step": state.global_step, "checkpoint": good[-1] if good else None}), encoding="utf-8")
        print(self.stopped, flush=True)


def _outside(name: str, limit: dict, logs: dict) -> str | None:
    """What is wrong with a figure, or None."""
    if name == FAILED:
        shares = {key: value for key, value in logs.items() if key.startswith("rewards/") and key.endswith("/failed")}
        label = max(shares, key=shares.get, default=None)
    else:
        label = name
    value = logs.get(label)
    if value is None:
        return None
    if value > limit.get("max", math.inf):
        return f"{label} is {value:.4g}, over {limit['max']}"
    if value < limit.get("min", -math.inf):
        return f"{label} is {value:.4g}, under {limit['min']}"
    return None
