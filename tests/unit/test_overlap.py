"""Overlap: a real trainer beside a server that answers from a table, so that only the order of things can differ."""

import threading
from types import SimpleNamespace

import pytest
from table_server import TableServer, completions, train_beside
from transformers import TrainerCallback

from grpo_launcher import overlap
from grpo_launcher.callbacks import SYNC_DIFFERENCE, RunLog, print_summary
from grpo_launcher.runs import read_metrics

STEPS_AN_EPOCH = 4  # of 2 prompts


class Ended(TrainerCallback):
    """Sets an event for each step that has ended."""

    def __init__(self):
        self.events = [threading.Event() for _ in range(20)]

    def on_step_end(self, args, state, control, **kwargs):
        """Let whoever waits for this step go on."""
        self.events[state.global_step].set()


@pytest.fixture
def train(model, tmp_path):
    """Return a function (server, flags) that trains beside the server, and gives the run's folder."""

    def run(server: TableServer, *flags: str, name="run", **options):
        train_beside(server, model, tmp_path / name, *flags, **options)
        return tmp_path / name

    return run


def steps(folder) -> list[dict]:
    """Return the lines of the training steps."""
    return [line for line in read_metrics(folder) if "reward" in line]


def test_the_rows_are_those_of_the_stock_class(train):
    """With overlap and without: the order of data and completions does not change."""
    rows = []
    for name, options in {"stock": {"stock": True}, "off": {}, "on": {}}.items():
        with TableServer() as server:
            flags = ["--overlap", str(name == "on").lower()]
            rows.append(completions(train(server, *flags, name=name, **options)))
    assert len(rows[0]) == 6 * 8 and rows[0] == rows[1] == rows[2]


def test_a_block_is_made_while_the_one_before_is_trained(train):
    """The server gives no second block before the first step has begun, and no step waits for a block to be made."""
    ended = Ended()

    def before(number: int) -> str | None:
        # The request for the next block comes in the step before it, so that step can end while it is answered.
        if 0 < number < STEPS_AN_EPOCH and not ended.events[number].wait(60):
            return f"step {number} did not end beside request {number}"
        return None

    with TableServer(before=before) as server:
        folder = train(server, "--overlap", "true", callbacks=[ended])
    lines = steps(folder)
    assert [line[overlap.LAG] for line in lines] == [0, 1, 1, 1, 0, 1], "a new epoch begins without one ahead"
    assert [block["version"] for block in server.generations] == [1, 1, 2, 3, 5, 5]
    assert all(0 < line["overlap/effective_sample_size"] <= 1 for line in lines)
    assert all(0 <= line["overlap/capped"] <= 1 for line in lines)
    assert len(server.generations) == 6, "none is made that is not trained"


def test_weights_never_meet_a_running_request(train):
    """A push waits for the block ahead, which takes longer than a step here."""
    with TableServer(delay=0.3) as server:
        train(server, "--overlap", "true")
    ends = [block["end"] for block in server.generations]
    assert all(block["start"] >= end for end, block in zip(ends, server.generations[1:], strict=False))


@pytest.mark.parametrize("flags", [["--gradient_accumulation_steps", "2"], ["--num_iterations", "2"]])
def test_a_block_of_several_batches(train, flags):
    """The rows are still those of a run without overlap."""
    rows = []
    for name in ("false", "true"):
        with TableServer() as server:
            rows.append(completions(train(server, "--overlap", name, *flags, name=name)))
    assert rows[0] == rows[1]


def test_two_blocks_a_step(train):
    """A step that generates twice looks one block ahead, into its own second half."""
    flags = ["--gradient_accumulation_steps", "2", "--steps_per_generation", "1"]
    with TableServer() as server:
        lines = steps(train(server, "--overlap", "true", *flags, "--max_steps", "2"))
    assert [block["version"] for block in server.generations] == [1, 1, 1, 2]
    assert [line[overlap.LAG] for line in lines] == [0, 0.5]


def test_an_evaluation_in_mid_flight(train):
    """It is made by the newest weights, and the block ahead stays for the next step."""
    with TableServer() as server:
        flags = ["--overlap", "true", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "3"]
        folder = train(server, *flags)
    assert [line[overlap.LAG] for line in steps(folder)] == [0, 1, 1]
    assert all(SYNC_DIFFERENCE in line for line in steps(folder)), "a push before an evaluation counts too"
    evaluations = [block for block in server.generations if block["prompts"] == server.generations[2]["prompts"]]
    assert [block["version"] for block in evaluations] == [2, 3, 4]
    assert sum("eval_reward" in line for line in read_metrics(folder)) == 3


def test_a_resumed_run_goes_through_the_same_prompts(train):
    """Nothing is in flight where a run has come to its end, so the next block is made by newer weights."""
    flags = ["--overlap", "true", "--save_steps", "2"]
    with TableServer() as server:
        whole = completions(train(server, *flags, name="whole"))
    with TableServer() as server:
        folder = train(server, *flags, "--max_steps", "2", name="part")
        assert completions(train(server, *flags, name="part", resume=str(folder / "checkpoint-2"))) == whole
    assert [line[overlap.LAG] for line in steps(folder)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_run_resumed_in_its_second_epoch_has_the_order_of_that_epoch(train, overlap):
    """An epoch has 4 steps. The stock sampler would begin with the order of the first one."""
    flags = ["--overlap", overlap, "--save_steps", "5", "--max_steps", "9"]
    with TableServer() as server:
        whole = completions(train(server, *flags, name="whole"))
    with TableServer() as server:
        folder = train(server, *flags, "--max_steps", "5", name="part")
        assert completions(train(server, *flags, name="part", resume=str(folder / "checkpoint-5"))) == whole


def test_an_error_of_the_server_ends_the_run(train):
    """The message says what the server said. A thread that fails in silence would leave the ranks waiting."""
    fails = TableServer(before=lambda number: "no memory left" if number == 2 else None)
    with fails as server, pytest.raises(RuntimeError, match="no memory left"):
        train(server, "--overlap", "true")


def test_prompts_that_were_not_sent_are_not_trained():
    """Completions of other prompts would be rated, and nothing else would show it."""

    class Client:
        def generate(self, prompts, **options):
            return {"completion_ids": prompts}

    client = Client()
    ahead = overlap.NextBlock(client)
    ahead.step = 0
    client.generate(prompts=[[1]])
    ahead.request([[2]])
    with pytest.raises(RuntimeError, match="prompts"):
        client.generate(prompts=[[3]])


@pytest.mark.parametrize(("waited", "idle", "side"), [(3.0, 1.0, "the server more"), (1.0, 3.0, "the ranks more")])
def test_the_end_says_which_side_waited(tmp_path, capsys, waited, idle, side):
    """And nothing of it without overlap."""
    for lines in ([{"reward": 1.0}], [{"reward": 1.0, overlap.LAG: 1, overlap.WAITED: waited, overlap.IDLE: idle}]):
        log = RunLog(tmp_path)
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        for step, line in enumerate(lines * 3, 1):
            state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=3)
            log.on_log(None, state, None, logs=line)
        print_summary(tmp_path)
    output = capsys.readouterr().out
    assert output.count("Overlap:") == 1 and side in output
