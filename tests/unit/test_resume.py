"""A run that was killed goes on as if it had not been: real trainers beside a server that answers from a table.

The table gives other completions to other weights, so that the smallest difference would grow.
"""

import multiprocessing
import random
import time

import pytest
from helpers import ROOT
from table_server import TableServer, curve, train_at, train_beside
from transformers import TrainerCallback

from grpo_launcher.callbacks import EndOnRequest
from grpo_launcher.runs import END_REQUEST, last_checkpoint, read_metrics

STEPS, KILLS = 16, 3  # 4 steps are an epoch, and nothing is in flight at its end


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported the trainer already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["table_server"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # the server knows nothing of this process's path
        yield context


RUNS = {
    "plain": ["--save_steps", "2"],
    "overlap": ["--save_steps", "3", "--overlap", "true"],
    "blocks of four steps": ["--save_steps", "3", "--steps_per_generation", "2", "--num_iterations", "2"],
    "reference that follows": ["--save_steps", "3", "--sync_ref_model", "true", "--ref_model_sync_steps", "2"],
}
RUNS["overlap of such blocks"] = [*RUNS["blocks of four steps"], "--overlap", "true"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_run_killed_at_random_moments_is_the_uninterrupted_one(flags, model, processes, tmp_path):
    """Each KILL comes somewhere within a step, also within a save."""
    flags = [*flags, "--max_steps", str(STEPS), "--beta", "0.1"]
    moments = random.Random(0)
    with TableServer(by_weights=True) as server:
        train_beside(server, model, tmp_path / "whole", *flags)
    with TableServer(by_weights=True) as server:
        for target in sorted(moments.sample(range(2, STEPS - 5), KILLS)):
            arguments = server.url, model, tmp_path / "killed", flags
            process = processes.Process(target=train_at, args=arguments)
            metrics, before = tmp_path / "killed/metrics.jsonl", None
            if metrics.exists():
                before = metrics.stat().st_ino
            process.start()
            while process.is_alive() and not (
                metrics.exists() and metrics.stat().st_ino != before and len(read_metrics(metrics.parent)) >= target
            ):
                time.sleep(0.01)
            assert process.is_alive(), process.exitcode
            time.sleep(moments.random() * 0.2)
            process.kill()
            process.join()
        train_at(server.url, model, tmp_path / "killed", flags)
    whole, killed = curve(tmp_path / "whole"), curve(tmp_path / "killed")
    assert [line["step"] for line in whole] == [*range(1, STEPS + 1)]
    for line, other in zip(whole, killed, strict=True):
        assert other == pytest.approx(line, abs=1e-6)


class Ask(TrainerCallback):
    """Asks for the end of a run in one of its steps, as the launcher does after a TERM."""

    def __init__(self, folder, step: int):
        self.folder, self.step = folder, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            (self.folder / END_REQUEST).touch()


BY_EPOCH = ["--save_strategy", "epoch", "--eval_strategy", "epoch"]
BEST = ["--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--save_total_limit", "1"]
BEST += ["--load_best_model_at_end", "true", "--metric_for_best_model", "reward"]


@pytest.mark.parametrize(
    ("flags", "asked", "ended"),
    [(["--save_steps", "100"], 3, 3), (BY_EPOCH, 3, 3), (BY_EPOCH, 4, 5), (BEST, 3, 3)],
    ids=["", "within an epoch", "at its end", "best"],
)
def test_a_run_that_is_asked_to_ends_behind_a_checkpoint(flags, asked, ended, model, tmp_path):
    """Nothing more is done, the checkpoint stays whatever else may be deleted, and a resumed run is the whole one."""
    folder, ending = tmp_path / "asked", EndOnRequest(tmp_path / "asked")
    with TableServer(by_weights=True) as server:
        train_beside(server, model, tmp_path / "whole", *flags)
        train_beside(server, model, folder, *flags, callbacks=[ending, Ask(folder, asked)])
        assert ending.has_ended and not (folder / END_REQUEST).exists()
        assert last_checkpoint(folder).name == f"checkpoint-{ended}"
        assert [line["step"] for line in read_metrics(folder) if "reward" in line] == [*range(1, ended + 1)]
        train_at(server.url, model, folder, flags)
    assert curve(folder) == curve(tmp_path / "whole")
