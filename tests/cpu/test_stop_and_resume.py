"""A run that is stopped or killed leaves nothing, and goes on where it was."""

import signal
from statistics import mean

from helpers import ROOT, is_in_sync

SHORT = ["--max_completion_length", "100", "--sample_every", "0"]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def server_of(run):
    """The processes of a run's vLLM server."""
    return [process for process in run.processes() if "vllm.entrypoints.openai.api_server" in process.cmdline()]


def test_term_in_training_leaves_nothing(workplace, launch):
    """Exit status 128 + 15, and neither a process nor a file in shared memory."""
    run = launch(workplace, QUICKSTART, *SHORT, "--max_steps", "50")
    run.wait_for("step  2/")
    run.process.send_signal(signal.SIGTERM)
    run.finish(128 + signal.SIGTERM, timeout=90)
    assert run.leftovers() == [] and "--resume" in run.text()


def test_a_killed_run_resumes(workplace, launch):
    """After KILL nothing is left, not even a server that hears no TERM. --resume takes the last whole checkpoint."""
    first = launch(workplace, QUICKSTART, *SHORT, "--max_steps", "8", "--save_steps", "3")
    first.wait_for("step 5/8")
    for process in server_of(first):
        process.suspend()
    first.process.kill()
    assert first.leftovers(patience=60) == []
    before = first.metrics()
    (first.run_folder() / "checkpoint-4").mkdir()  # half-written
    second = launch(workplace, QUICKSTART, *SHORT, "--max_steps", "8", "--resume").finish()
    assert "from checkpoint-3" in second.text()
    assert second.run_folder() == first.run_folder()
    lines = second.metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[:3] == before[:3]
    rewards = [[line["reward"] for line in part[3:5]] for part in (before, lines)]
    assert abs(mean(rewards[0]) - mean(rewards[1])) < 35, "the weights of step 3 went on"
    assert is_in_sync(lines)
