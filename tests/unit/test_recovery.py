"""A vLLM server that dies and comes back: a real trainer beside one that answers from a table."""

import functools

import pytest
from table_server import TableServer, completions, train_beside

from grpo_launcher import recovery
from grpo_launcher.overlap import LAG
from grpo_launcher.runs import read_metrics

ADAPTER = ["--weight_sync", "adapter", "--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear"]
EVALUATION = ["--eval_strategy", "steps", "--eval_steps", "1"]


CASES = {  # a step asks whose weights they are, pushes, empties the cache, compares, and generates: 5 requests
    "first request": ([], {"deaths": [0]}),
    "question": ([], {"deaths": [4]}),
    "push": ([], {"deaths": [5]}),
    "cache": ([], {"deaths": [6]}),
    "comparison": ([], {"deaths": [7]}),
    "generation, thrice": ([], {"deaths": [8, 12, 16]}),
    "evaluation": (EVALUATION, {"deaths": [8]}),
    "another server behind an evaluation": (EVALUATION, {"changes": [8]}),
    "another server in a step": ([], {"changes": [3]}),
    "dead engine": ([], {"errors": [5, 6]}),
    "first adapter": (ADAPTER, {"deaths": [0]}),
    "adapter": (ADAPTER, {"deaths": [3]}),  # load, compare, generate; later load, unload, compare, generate
    "adapters": (ADAPTER, {"deaths": [4, 8]}),
    "another server for an adapter": (ADAPTER, {"changes": [2]}),
}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Returns what a run beside a server that lives logs, by its flags."""

    @functools.cache
    def train(by_weights: bool, *flags: str) -> list[tuple]:
        folder = tmp_path_factory.mktemp("whole") / "run"
        with TableServer(by_weights=by_weights) as server:
            train_beside(server, model, folder, *flags)
        return completions(folder)

    return train


@pytest.fixture(autouse=True)
def short_pause(monkeypatch):
    monkeypatch.setattr(recovery, "PAUSE", 0.05)


@pytest.mark.parametrize(("flags", "server"), CASES.values(), ids=CASES)
def test_the_steps_are_those_of_a_server_that_lives(flags, server, model, whole, tmp_path):
    """A new server has none of the trained weights: it gets them again before it is asked again."""
    flags = [*flags, "--max_steps", "3"]
    with TableServer(by_weights=True, **server) as dying:
        train_beside(dying, model, tmp_path / "lost", *flags)
    assert all(block["has_weights"] for block in dying.generations)
    assert completions(tmp_path / "lost") == whole(True, *flags)


@pytest.mark.parametrize("flags", [[], EVALUATION], ids=["", "evaluation"])
@pytest.mark.parametrize("death", range(4, 11))
def test_with_overlap_the_block_is_made_again(flags, death, model, whole, tmp_path):
    """Whatever the server was doing. The new block has the newest weights, so its lag is 0."""
    flags = [*flags, "--overlap", "true", "--max_steps", "4", "--save_steps", "1"]
    with TableServer(deaths=[death]) as dying:
        train_beside(dying, model, tmp_path / "lost", *flags)
    assert all(block["has_weights"] for block in dying.generations)
    assert completions(tmp_path / "lost") == whole(False, *flags)
    lags = [line[LAG] for line in read_metrics(tmp_path / "lost") if LAG in line]
    assert len(lags) == 4 and set(lags) <= {0, 1}


def test_a_server_that_is_lost_again_and_again_ends_the_run(model, tmp_path):
    with TableServer(deaths=range(5, 99)) as server, pytest.raises(RuntimeError, match=r"was lost .*again and again"):
        train_beside(server, model, tmp_path / "lost")


def test_a_server_that_does_not_come_back_ends_the_run(model, tmp_path):
    """After vllm_server_timeout seconds."""

    def before(number: int) -> None:
        if number == 1:
            server.__exit__()  # no new connection; this one goes on until the next step's push

    server = TableServer(before=before, deaths=[10])
    with server, pytest.raises(RuntimeError, match=r"was lost .*can't be reached"):
        train_beside(server, model, tmp_path / "lost", "--vllm_server_timeout", "1")
