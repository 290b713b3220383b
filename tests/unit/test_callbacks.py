"""callbacks.py: what guards stop, mark and warn of; what a run writes and prints."""

import json
import math
from types import SimpleNamespace

import pytest
from helpers import write_checkpoint
from transformers import TrainerControl, TrainerState

from grpo_launcher.callbacks import (
    GUARDS,
    SYNC_DIFFERENCE,
    Guards,
    RunLog,
    console,
    guard_limits,
    metric_changes,
    print_sample,
    print_summary,
    sync_limit,
)
from grpo_launcher.errors import UserError
from grpo_launcher.runs import checkpoints, last_checkpoint, read_metrics

NAN = float("nan")
HEALTHY = {
    "reward": -50.0,
    "loss": 0.1,
    "kl": 0.1,
    "grad_norm": 0.4,
    "entropy": 0.5,
    "completions/clipped_ratio": 0.0,
    "frac_reward_zero_std": 0.0,
}
ARGS = SimpleNamespace(world_size=1, fp16=False)


def watch(run, steps: list[dict], given: dict | None = None, first: int = 1) -> tuple[Guards, list[bool]]:
    """Train from step `first`, each step logging HEALTHY with its changes and saving a checkpoint where it may.

    Returns the guards, and whether each step was saved.
    """
    guards, log, saved = Guards(run, guard_limits(given, beta=0.1)), RunLog(run), []
    state = TrainerState(is_world_process_zero=True, logging_steps=1.0, max_steps=100, global_step=first - 1)
    for callback in (log, guards):
        callback.on_train_begin(ARGS, state, None)
    for step, changes in enumerate(steps, first):
        state.global_step = step
        control = TrainerControl(should_save=True)
        for callback in (log, guards):
            callback.on_log(ARGS, state, control, logs=HEALTHY | changes)
        if control.should_save:
            write_checkpoint(run / f"checkpoint-{step}", "trainer_state.json", "rng_state.pth")
        saved.append(control.should_save)
        if control.should_training_stop:
            break
    return guards, saved


def names(run) -> set[str]:
    """Return the names of the checkpoints, and of those that were set aside."""
    return {path.name for path in run.glob("*checkpoint-*")}


def test_kl_over_its_limit_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    """The weights of checkpoint-N make the figures of step N + 1: the one right before the first bad figure is bad."""
    (tmp_path / "best-checkpoint").symlink_to("checkpoint-6")
    guards, saved = watch(tmp_path, [{}] * 6 + [{"kl": 3.27}] * 5)
    assert saved == [True] * 8 + [False], "nothing but the step of the stop is left out"
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert {f"diverged-checkpoint-{step}" for step in (6, 7, 8)} < names(tmp_path)
    assert not (tmp_path / "best-checkpoint").is_symlink(), "it pointed at a diverged one"
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["checkpoint"] == "checkpoint-5" and stopped["step"] == 9 and "kl is 3.27" in stopped["why"]
    assert str(tmp_path / "checkpoint-5") in guards.stopped


def test_checkpoints_of_an_earlier_excursion_are_set_aside_too(tmp_path):
    """Also of one before a resume; and a diverged checkpoint of an earlier stop is replaced."""
    watch(tmp_path, [{}] * 5 + [{"kl": 2.0}, {}])
    assert len(checkpoints(tmp_path)) == 7, "one bad step stops nothing and marks nothing"
    (tmp_path / "diverged-checkpoint-5").mkdir()
    (tmp_path / "diverged-checkpoint-5/old").touch()
    guards, _ = watch(tmp_path, [{"kl": 2.0}] * 3, first=8)
    good = {f"checkpoint-{step}" for step in (1, 2, 3, 4, 6)}
    assert names(tmp_path) == good | {f"diverged-checkpoint-{step}" for step in (5, 7, 8, 9)}
    assert not (tmp_path / "diverged-checkpoint-5/old").exists() and str(tmp_path / "checkpoint-6") in guards.stopped


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("metric", ["reward", "grad_norm", "kl", "loss"])
def test_a_figure_that_is_not_finite_stops_at_once(metric, value, tmp_path):
    guards, saved = watch(tmp_path, [{}, {metric: value}, {}])
    assert saved == [True, False] and f"{metric} is {value}" in guards.stopped
    assert json.loads((tmp_path / "stopped.json").read_text())["checkpoint"] is None


def test_a_step_that_overflows_in_fp16_stops_nothing(tmp_path, monkeypatch):
    """DeepSpeed and torch look for the scale of the loss that way, and leave the step out."""
    monkeypatch.setattr(ARGS, "fp16", True)
    guards, saved = watch(tmp_path, [{"grad_norm": math.inf}] * 2 + [{}] * 2)
    assert not guards.stopped and all(saved)
    assert watch(tmp_path, [{"loss": math.nan}], first=5)[0].stopped


def test_a_few_bad_steps_stop_nothing(tmp_path):
    guards, saved = watch(tmp_path, [{}, {"kl": 2.0}, {"kl": 2.0}, {}] * 5)
    assert guards.stopped is None and all(saved) and not (tmp_path / "stopped.json").exists()


WARNED = {
    "failed_ratings": {"rewards/judge_reward/failed": 0.9, "rewards/length_reward/failed": 0.0},
    "grad_norm": {"grad_norm": 1e4},
    "entropy": {"entropy": 0.001},
    "completions/clipped_ratio": {"completions/clipped_ratio": 1.0},
    "frac_reward_zero_std": {"frac_reward_zero_std": 1.0},
}


@pytest.mark.parametrize("name", WARNED)
def test_any_other_figure_is_warned_of_once_and_every_save_is_made(name, tmp_path, capsys):
    guards, saved = watch(tmp_path, [WARNED[name]] * 30)
    assert guards.stopped is None and all(saved) and last_checkpoint(tmp_path).name == "checkpoint-30"
    output = capsys.readouterr().out
    metric, value = next(iter(WARNED[name].items()))
    assert output.count("Warning: ") == 1 and f"{metric} is {value:.4g}" in output and ". Fix: " in output
    assert output.index("Warning: ") > output.index(f"step {GUARDS[name]['steps']:>3}/100")


def test_a_resumed_run_goes_on_counting(tmp_path, capsys):
    """As if it had not been interrupted: it warns in the same step, and no second time."""
    low = {"entropy": 0.0}
    watch(tmp_path, [low] * 4)
    assert "Warning" not in capsys.readouterr().out
    watch(tmp_path, [low], first=5)
    assert capsys.readouterr().out.count("Warning: entropy") == 1
    watch(tmp_path, [low] * 3, first=6)
    assert "Warning" not in capsys.readouterr().out


def test_guards_can_be_set_and_switched_off(tmp_path, capsys):
    limits = guard_limits({"kl": {"max": 0.2}, "entropy": None}, beta=0.1)
    assert limits["kl"] == {"max": 0.2, "steps": 3} and set(limits) == set(GUARDS) - {"entropy"}
    watch(tmp_path, [{"entropy": 0.0}] * 20, {"entropy": None})
    assert "Warning" not in capsys.readouterr().out
    (tmp_path / "strict").mkdir()
    assert "kl is 0.3" in watch(tmp_path / "strict", [{"kl": 0.3}] * 3, {"kl": {"max": 0.2}})[0].stopped


def test_server_and_trainer_may_differ_by_what_rounding_explains():
    limits = [sync_limit(*where) for where in (("float32", "cpu"), ("float32", "cuda"), ("bfloat16", "cuda"))]
    assert limits == [0.001, 0.03, 0.3]
    assert [guard_limits(None, 0.1, limit)[SYNC_DIFFERENCE]["max"] for limit in limits] == limits


@pytest.mark.parametrize(
    ("given", "beta"),
    [
        ({"kl": {"max": 1.0}}, 0.0),
        ({"kll": {"max": 1.0}}, 0.1),
        ({"kl": 1.0}, 0.1),
        ({"kl": {"max": "1e-2"}}, 0.1),
        ({"kl": {"steps": 3}}, 0.1),
        ({"kl": {"max": 1.0, "steps": 0}}, 0.1),
        ({"kl": {"maximum": 1.0}}, 0.1),
    ],
)
def test_a_guard_that_cannot_be_is_refused(given, beta):
    with pytest.raises(UserError) as refused:
        guard_limits(given, beta)
    assert refused.value.field == "guards" and refused.value.fix


def test_the_loss_of_a_supervised_run_is_guarded(tmp_path):
    guards, control = Guards(tmp_path, {}, metric="loss"), TrainerControl(should_save=True)
    state = TrainerState(is_world_process_zero=True, logging_steps=1, global_step=1)
    guards.on_log(ARGS, state, control, logs={"loss": NAN})
    assert control.should_training_stop and "loss is nan" in guards.stopped


def test_a_line_a_step_and_metrics_go_on_behind_a_resumed_checkpoint(tmp_path, capsys):
    log, state = RunLog(tmp_path), TrainerState(is_world_process_zero=True, max_steps=20, global_step=0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 5}\n{"st')
    state.global_step = 4
    log.on_train_begin(ARGS, state, None)
    state.global_step = 5
    log.on_log(ARGS, state, None, logs=HEALTHY | {"completions/mean_length": 71.6, "step_time": 3.25})
    log.on_log(ARGS, state, None, logs={"eval_reward": -3.0, "eval_rewards/a/mean": 0.5, "eval_rewards/b/mean": None})
    log.on_log(ARGS, state, None, logs={"train_runtime": 1.0, "reward": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 5, 5]
    step_line, evaluation = capsys.readouterr().out.splitlines()
    assert step_line.startswith(
        "step  5/20  reward   -50.00  length   72 tokens  kl 0.100  entropy 0.50    3.2 s  0:0"
    )
    assert evaluation == "evaluation at step 5:  reward -3.000  a +0.500"
    state.best_model_checkpoint = str(tmp_path / "checkpoint-5")
    log.on_save(ARGS, state, None)
    assert (tmp_path / "best-checkpoint").readlink().name == "checkpoint-5"


def test_the_figures_of_all_steps_stand_below_each_other(tmp_path, capsys):
    log, state = RunLog(tmp_path), TrainerState(is_world_process_zero=True, max_steps=120, global_step=0)
    log.on_train_begin(ARGS, state, None)
    for step, reward, length, seconds in ((1, -112.09, 9, 9.2), (20, 0.5, 72.4, 10.1), (120, 1004.0, 1024, 131.0)):
        state.global_step = step
        logs = {"reward": reward, "completions/mean_length": length, "tools/failure_frequency": step / 120}
        log.on_log(ARGS, state, None, logs=logs | {"step_time": seconds})
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.index("tokens") for line in lines}) == len({line.index("left") for line in lines}) == 1


def test_the_micro_batches_of_a_step_are_told(tmp_path):
    """And what may take time behind it. Only the main rank says so."""
    args, control = SimpleNamespace(gradient_accumulation_steps=4, push_to_hub=False), TrainerControl()
    for is_main in (False, True):
        log, state = RunLog(tmp_path), TrainerState(is_world_process_zero=is_main, global_step=2)
        log.on_step_begin(args, state, control)
        log.on_substep_end(args, state, control)
        log.on_substep_end(args, state, control)
        assert (tmp_path / "progress.txt").exists() == is_main
    assert (tmp_path / "progress.txt").read_text() == "step 3: training micro-batch 3 of 4"
    control.should_save = True
    log.on_step_end(args, TrainerState(is_world_process_zero=True, global_step=3), control)
    assert (tmp_path / "progress.txt").read_text() == "step 3: saving a checkpoint"


def test_a_supervised_run_prints_its_loss(tmp_path, capsys):
    log, state = RunLog(tmp_path, is_sft=True), TrainerState(is_world_process_zero=True, max_steps=9, global_step=1)
    log.on_train_begin(ARGS, state, None)
    log.on_log(ARGS, state, None, logs={"loss": 2.5, "grad_norm": 1.0, "mean_token_accuracy": 0.5})
    log.on_log(ARGS, state, None, logs={"eval_loss": 2.25})
    output = capsys.readouterr().out
    assert "step 1/9  loss   2.500  token accuracy  50%  gradient norm   1.00" in output
    assert "evaluation at step 1:  loss +2.250" in output


def test_the_summary_compares_the_first_steps_with_the_last(tmp_path, capsys):
    lines = [{"step": n, "reward": float(n), "rewards/a/mean": None if n < 3 else 1.0} for n in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert metric_changes(tmp_path) == [("rewards/a/mean", 1.0, 1.0), ("reward", 2.0, 8.0)]
    print_summary(tmp_path)
    output = capsys.readouterr().out
    assert "10 steps" in output and output.splitlines()[-1].split() == ["reward", "2", "8"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "eval_loss": 2.0}\n')
    assert metric_changes(tmp_path) == [("loss", 2.0, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("")
    print_summary(tmp_path)
    assert capsys.readouterr().out == ""


def test_the_sample_is_the_best_and_the_worst_of_the_last_group(capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)
    prompts = [[{"role": "user", "content": "first"}]] * 2 + [[{"role": "user", "content": "second [x]"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in ("a", "b", "bad", "fair", "good [/b]")]
    print_sample(prompts, completions, {"length": [0, 1, 2, 3, 4]}, [9, -9, -1, 0, 1], step=10)
    output = capsys.readouterr().out
    assert "sample at step 10" in output and "second [x]" in output and "first" not in output
    assert "worst of 3 (3 characters; length 2.00)" in output and "best of 3 (9 characters; length 4.00)" in output
    assert output.index("bad") < output.index("good [/b]") and "fair" not in output
