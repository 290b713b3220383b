"""Guards and failed ratings: what stops a run, what it keeps, and what a failed rating does to the others."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from grpo_launcher.failed_rewards import FailedRewards
from grpo_launcher.guards import DEFAULTS, Guards, limits
from grpo_launcher.config import RecipeError

HEALTHY = {"reward": -50.0, "loss": 0.1, "kl": 0.1, "grad_norm": 0.4, "entropy": 0.5, "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.0}


def watch(run, changes: list[dict], given: dict | None = None, every: int = 1) -> tuple[Guards, list[bool]]:
    """A run whose step n logs HEALTHY with changes[n − 1], and saves a checkpoint every `every` steps where it may; what was saved when."""
    guards, saved = Guards(run, limits(given, beta=0.1)), []
    state = TrainerState(is_world_process_zero=True, logging_steps=1.0)  # a float in a real run too
    guards.on_train_begin(None, state, None)
    for step, change in enumerate(changes, 1):
        state.global_step = step
        control = TrainerControl(should_save=step % every == 0)
        guards.on_log(None, state, control, logs=HEALTHY | change)
        if control.should_save:
            (run / f"checkpoint-{step}").mkdir()
        saved.append(control.should_save)
        if control.should_training_stop:
            break
    return guards, saved


BAD = {
    "failed ratings": {"rewards/judge_reward/failed": 0.9, "rewards/length_reward/failed": 0.0},
    "kl": {"kl": 3.27},
    "gradient norm": {"grad_norm": 1e4},
    "entropy": {"entropy": 0.001},
    "cut off": {"completions/clipped_ratio": 1.0},
    "nothing to learn from": {"frac_reward_zero_std": 1.0},
}


@pytest.mark.parametrize("name", BAD)
def test_a_figure_outside_its_range_stops_the_run_after_its_steps(name, tmp_path, capsys):
    """A warning first; the steps are those of the guard."""
    steps = list(DEFAULTS.values())[list(BAD).index(name)]["steps"]
    guards, saved = watch(tmp_path, [{}] * 4 + [BAD[name]] * 30)
    said = capsys.readouterr().out
    assert len(saved) == 4 + steps and guards.stopped
    assert said.startswith("Warning: ") and f"Stopped by a guard at step {4 + steps}" in said
    label, value = next(iter(BAD[name].items()))
    assert f"{label} is {value:.4g}" in guards.stopped


def test_the_checkpoint_from_inside_the_range_is_kept_and_named(tmp_path):
    """Weights of checkpoint-N make the figures of step N + 1: the one right before the first bad figure is put aside."""
    guards, saved = watch(tmp_path, [{}] * 6 + [{"kl": 2.0}] * 5)
    assert saved == [True] * 6 + [False] * 3
    assert str(tmp_path / "checkpoint-5") in guards.stopped
    left = {path.name for path in tmp_path.iterdir()}
    assert "checkpoint-5" in left and "checkpoint-6" not in left and "diverged-checkpoint-6" in left
    told = json.loads((tmp_path / "stopped.json").read_text())
    assert told["checkpoint"] == "checkpoint-5" and told["step"] == 9 and "kl is 2" in told["why"]


def test_a_checkpoint_from_an_earlier_excursion_is_not_a_good_one(tmp_path):
    """One bad step between good ones does not stop the run, and yet its weights are none to go back to."""
    guards, _ = watch(tmp_path, [{}] * 5 + [{"kl": 2.0}, {}] + [{"kl": 2.0}] * 3)
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {
        *(f"checkpoint-{n}" for n in range(1, 5)),
        "diverged-checkpoint-5",
        "diverged-checkpoint-7",
    }
    assert str(tmp_path / "checkpoint-4") in guards.stopped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("figure", ["reward", "grad_norm"])
def test_a_figure_that_is_not_finite_stops_at_once(figure, value, tmp_path):
    """NaN is neither over nor under anything."""
    guards, saved = watch(tmp_path, [{}, {figure: value}, {}])
    assert len(saved) == 2 and f"{figure} is {value}" in guards.stopped


def test_a_few_bad_steps_are_no_reason_to_stop(tmp_path):
    """They must stand in a row; and saving goes on behind them."""
    guards, saved = watch(tmp_path, [{}, {"kl": 2.0}, {"kl": 2.0}, {}] * 5)
    assert guards.stopped is None and saved == [True, False, False, True] * 5
    assert not list(tmp_path.glob("diverged-*")) and not (tmp_path / "stopped.json").exists()


def test_a_guard_can_be_set_and_switched_off(tmp_path):
    """By the recipe."""
    assert limits({"kl": {"max": 0.2}, "entropy": None}, beta=0.1) == {name: DEFAULTS[name] for name in DEFAULTS if name not in ("kl", "entropy")} | {
        "kl": {"max": 0.2, "steps": 3}
    }
    guards, _ = watch(tmp_path, [{"entropy": 0.0}] * 20, {"entropy": None})
    assert guards.stopped is None


@pytest.mark.parametrize(
    ("given", "beta", "said"),
    [
        ({"kl": {"max": 1.0}}, 0.0, "with beta 0 no KL is measured"),
        ({"kll": {"max": 1.0}}, 0.1, "there is no guard 'kll', only failed_ratings, kl"),
        ({"kl": 1.0}, 0.1, "kl: 1.0: write {max: 1.0, steps: 3}"),
        ({"kl": {"max": "1e-2"}}, 0.1, "write {max: 1.0"),
        ({"kl": {"steps": 3}}, 0.1, "write {max: 1.0"),
        ({"kl": {"max": 1.0, "steps": 0}}, 0.1, "at least one step"),
        ({"kl": {"maximum": 1.0}}, 0.1, "write {max: 1.0"),
    ],
)
def test_a_bad_guard_is_refused(given, beta, said):
    """A KL guard without KL too."""
    with pytest.raises(RecipeError, match=re.escape(said)):
        limits(given, beta)


NAN = float("nan")


class Gathered:
    """In the place of GRPOTrainer: rewards as they are after the gather, (B, rewards)."""

    num_generations = num_generations_eval = 4
    reward_func_names = ("judge_reward", "length_reward")
    reward_weights = torch.ones(2)

    def __init__(self, rewards):
        self.rewards, self.model, self._metrics = torch.tensor(rewards), SimpleNamespace(training=True), {"train": {}, "eval": {}}
        self._metrics["train"] = {f"rewards/{name}/failed": [] for name in self.reward_func_names}

    def _calculate_rewards(self, *_):
        return self.rewards


class Trainer(FailedRewards, Gathered):
    """As grpo_launcher.trainer composes it."""


def test_a_failed_rating_takes_its_groups_mean():
    """Of that reward alone; a group without any good rating is left out, and each failure is counted."""
    trainer = Trainer([[8.0, -1.0], [NAN, -2.0], [4.0, -3.0], [NAN, NAN], [NAN, 1.0], [NAN, 1.0], [NAN, 1.0], [NAN, 1.0]])
    mended = trainer._calculate_rewards(None, None, None, None)
    assert mended[:4].tolist() == [[8.0, -1.0], [6.0, -2.0], [4.0, -3.0], [6.0, -2.0]]
    assert mended[4:, 0].isnan().all() and (mended[4:, 1] == 1).all()
    assert trainer._metrics["train"] == {"rewards/judge_reward/failed": [0.75], "rewards/length_reward/failed": [0.125]}


def test_a_best_checkpoint_that_diverged_is_not_pointed_at(tmp_path):
    """The link goes with it; one to a good checkpoint stays."""
    (tmp_path / "best-checkpoint").symlink_to("checkpoint-6")
    watch(tmp_path, [{}] * 6 + [{"kl": 2.0}] * 5)
    assert not (tmp_path / "best-checkpoint").is_symlink()
