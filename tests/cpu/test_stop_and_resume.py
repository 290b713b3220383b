"""A run that is killed or stopped leaves nothing, and goes on where it was."""

import shutil
import signal
import sys

import psutil
import pytest
from helpers import ROOT, is_in_sync, read_metrics, write_accelerate_config
from table_server import TableServer, curve
from tiny_models import make_model

from grpo_launcher.callbacks import SYNC_DIFFERENCE
from grpo_launcher.errors import EXIT_RESUME
from grpo_launcher.overlap import LAG
from grpo_launcher.runs import last_checkpoint

FLAGS = [str(ROOT / "configs/quickstart.yaml"), "--max_completion_length", "64"]
FLAGS += ["--per_device_train_batch_size", "8"]
FLAGS += ["--sample_every", "0", "--max_steps", "50", "--save_steps", "3", "--overlap", "true"]


def test_a_killed_run_resumes_and_stops(workplace, launch):
    """After KILL nothing is left, not even a server that hears no TERM. --resume takes the last whole checkpoint.

    Both runs generate one step ahead, and what was in flight at the checkpoint goes on. A server that is killed is
    started again, and makes the completions that the ranks wait for.

    TERM ends that run behind a checkpoint of its last step, and leaves neither a process nor a file in shared memory.
    """
    first = launch(workplace, *FLAGS)
    first.wait_for("step  5/50")
    connections = [each for process in first.processes() for each in process.net_connections("inet")]
    listening = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}, "a door is open to other machines"
    for process in first.servers():
        process.suspend()
    first.process.kill()
    assert first.leftovers(patience=60) == []
    before = first.metrics()
    (first.run_folder() / "checkpoint-4").mkdir()  # half-written
    second = launch(workplace, *FLAGS, "--resume")
    second.wait_for("step  6/50")
    for process in second.servers():
        process.kill()
    second.wait_for("step  9/50")
    second.process.send_signal(signal.SIGTERM)
    second.finish(EXIT_RESUME, timeout=120)
    assert second.leftovers() == [] and "--resume" in second.text()
    assert "from checkpoint-3" in second.text() and "broken-checkpoint-4" in second.text()
    assert second.text().count("The vLLM server is started again") == 1
    assert second.run_folder() == first.run_folder()
    lines = second.metrics()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert last_checkpoint(second.run_folder(), ranks=2).name == f"checkpoint-{len(lines)}"
    assert lines[:3] == before[:3]
    assert before[0]["kl"] < 1e-6 and lines[3]["kl"] > 1e-3, "the weights of step 3 went on, not those of the base"
    lags = [line[LAG] for line in lines]
    assert lags[:6] == [0, 1, 1, 1, 1, 1] and lags[6:].count(0) <= 1, "a block that was there is not made again"
    assert all(line[SYNC_DIFFERENCE] < 1e-3 for line in lines) and is_in_sync(lines[:1])
    assert all(0.5 < line["overlap/effective_sample_size"] <= 1 for line in lines)


TABLE_FLAGS = ["--steps_per_generation", "2", "--num_iterations", "2", "--overlap", "true", "--beta", "0.1"]
TABLE_FLAGS += ["--sync_ref_model", "true", "--ref_model_sync_steps", "2", "--save_steps", "3", "--max_steps", "8"]


def test_two_ranks_go_on_as_if_nothing_had_been(tmp_path, launch, monkeypatch):
    """Under ZeRO-3, beside a table whose completions depend on the weights, with a reference that follows the policy.

    A block is trained in four steps, and saves fall within it, so each rank needs its own completions again.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_model(tmp_path / "model", seed=0)
    write_accelerate_config(tmp_path / "machine.yaml", "zero3", 2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "machine.yaml"]
    command += [str(ROOT / "tests/table_server.py")]
    whole, again = tmp_path / "whole", tmp_path / "again"

    def train(folder):
        with TableServer(by_weights=True) as server:
            arguments = [server.url, str(tmp_path / "model"), str(folder), *TABLE_FLAGS]
            launch(tmp_path, command=[*command, *arguments]).finish()

    train(whole)
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")  # what a KILL after step 3 leaves
    shutil.copy(whole / "metrics.jsonl", again)
    train(again)
    assert [line["step"] for line in curve(whole)] == [*range(1, 9)]
    assert read_metrics(again)[:3] == read_metrics(whole)[:3], "they were not trained again"
    for line, other in zip(curve(whole), curve(again), strict=True):
        assert other == pytest.approx(line, abs=1e-6)
