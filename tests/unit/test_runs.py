"""The run folder: what is written is read back, and half-written checkpoints are passed over."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from helpers import write_checkpoint
from safetensors.torch import save_file

from grpo_launcher import runs
from grpo_launcher.config import load_config
from grpo_launcher.errors import UserError
from grpo_launcher.runs import Run, load_run, reward_weights


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with a file of a user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    return tmp_path


def test_weights_go_by_the_names_of_metrics():
    """An environment's reward, which no recipe names, has none here."""
    values = {"reward_funcs": ["dir/mine.py:short", "rewards.rouge.rouge_reward", "org/Some-1.5B"]}
    assert list(reward_weights(values).values()) == [1, 1, 1]
    weights = reward_weights(values | {"reward_weights": [2, 0, 0.5]})
    assert weights == {"short": 2, "rouge_reward": 0, "Some-1.5B": 0.5}


def test_run_json_and_recipe_give_the_same_values(work):
    """run.json holds all, and recipe.yaml what was given, so that it can be started again."""
    argv = ["--model_name_or_path", "m", "--dataset_name", "data/喜", "--reward_funcs", "mine.py:f", "--beta", "1e-2"]
    argv += ["--debug", "underflow_overflow", "--chat_template_kwargs", '{"a": 1}', "--save_strategy", "no"]
    config = load_config([*argv, "--output_dir", "out", "--guards", '{"kl": null}', "--bf16", "false"])
    run = Run(work / "out", "mine", config.values, config.given, "Be short: 喜", 7, {"ranks": 2}, {"sync": None})
    run.write()
    again = load_run(work / "out")
    assert again == run and again.versions["trl"] and again.versions["commit"]
    assert load_config(["--config", "out/recipe.yaml"]).values == config.values | {"output_dir": None}
    given = yaml.safe_load((work / "out/recipe.yaml").read_text(encoding="utf-8"))
    assert set(given) == set(config.given) - {"output_dir"} and given["reward_funcs"] == [f"{work}/mine.py:f"]
    assert sorted(path.name for path in (work / "out").iterdir()) == ["recipe.yaml", "run.json"], "no draft is left"


def test_what_a_run_writes_is_valid_whatever_it_holds(work):
    """Half of a surrogate pair, as some data have it, is kept."""
    run = Run(work / "a", "mine", {"run_name": "half \ud83d"}, ["run_name"], "喜 \udc00")
    run.write()
    assert load_run(work / "a").system_prompt == run.system_prompt and load_run(work / "a").values == run.values
    assert yaml.safe_load((work / "a/recipe.yaml").read_text(encoding="utf-8")) == run.values


def test_the_end_of_a_run_names_what_the_plan_said_of_its_memory(work):
    """With vLLM inside, its share too: a rank's peak holds both."""
    line = "memory: 1 million parameters; each rank: weights 1 = 1.27 of 55.8 GiB; vLLM 23.9 of the GPU's 79.6 GiB"
    run = Run(folder=work, recipe="r", values={}, given=[], plan=["Plan for r", line])
    assert run.planned_memory == " The plan said 1.27 of 55.8 GiB; vLLM 23.9 of the GPU's 79.6 GiB."
    run.plan = []
    assert run.planned_memory == ""


def test_a_run_that_was_moved_is_read_from_where_it_is(work):
    Run(work / "a", "mine", {}, []).write()
    (work / "a").rename(work / "b")
    assert load_run(work / "b").folder == work / "b"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no run"), ("{", "cannot be read"), ('{"a": 1}', "cannot be read")]
)
def test_a_folder_without_a_whole_run_is_refused(content, message, work):
    if content:
        (work / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(work)


def test_runs_are_numbered_and_the_newest_is_found(work):
    """By the time of its run.json. A folder without one is not a run yet."""
    assert runs.newest_run() is None
    folders = [runs.new_run(name) for name in ("a", "b", "a")]
    assert [str(folder) for folder in folders] == [f"trainOutput/{name}" for name in ("a/1", "b/1", "a/2")]
    assert runs.newest_run() is None and os.readlink("trainOutput/a/latest") == "2"
    for time, folder in [(3, folders[1]), (2, folders[2])]:
        Run(folder, "x", {}, []).write()
        os.utime(folder / "run.json", (time, time))
    assert runs.newest_run() == folders[1] and runs.newest_run("a") == folders[2]
    assert runs.newest_run("c") is None
    assert runs.label(folders[2]) == runs.label(work / "trainOutput/a/latest") == "a/2"
    assert runs.label(work / "mine") == "mine"


def test_a_file_system_without_links_has_runs_too(work, monkeypatch):
    """`latest` and `best-checkpoint` are a convenience: runs are found by number and time."""

    def refuse(*arguments, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    for _ in range(11):
        folder = runs.new_run("a")
        Run(folder, "a", {}, []).write()
        os.utime(folder / "run.json", (1, 1))
    assert runs.newest_run("a") == folder == runs.ROOT / "a/11" and not (folder.parent / "latest").exists()
    runs.point(folder / runs.BEST, folder / "checkpoint-1")
    assert [path.name for path in folder.iterdir() if path.name != "recipe.yaml"] == ["run.json"]
    assert runs.newest_run().parent == runs.ROOT / "a"


def test_two_launches_in_one_moment_get_two_folders(work, monkeypatch):
    """Whichever makes its folder second takes the next number."""
    make = Path.mkdir

    def slow(path, *arguments, **options):
        if path.name == "1":
            make(path)  # the other launch
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", slow)
    assert runs.new_run("a").name == "2" and runs.new_run("b[1]").name == "2"
    Run(runs.ROOT / "b[1]/2", "b[1]", {}, []).write()
    assert runs.newest_run("b[1]") == runs.ROOT / "b[1]/2", "brackets are no pattern"


@pytest.mark.parametrize(("ranks", "steps"), [(1, [9, 100]), (2, [10])])
def test_half_written_checkpoints_are_passed_over(ranks, steps, work):
    """The trainer's state comes after the weights, and the random state of each rank last."""
    for name, files in {
        "checkpoint-9": ["trainer_state.json", "rng_state.pth"],
        "checkpoint-100": ["trainer_state.json", "rng_state.pth"],
        "checkpoint-10": ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"],
        "checkpoint-101": ["model.safetensors"],
        "checkpoint-102": ["trainer_state.json", "rng_state_0.pth"],
        "checkpoint-103-draft": ["trainer_state.json", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"],
        "diverged-checkpoint-104": ["trainer_state.json", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"],
    }.items():
        write_checkpoint(work / name, *files)
    assert runs.checkpoints(work, ranks) == [work / f"checkpoint-{step}" for step in steps]
    assert runs.last_checkpoint(work, ranks) == work / f"checkpoint-{steps[-1]}"
    assert runs.last_checkpoint(work / "nowhere", ranks) is None
    broken = runs.broken_checkpoints(work, ranks)
    assert broken[work / "checkpoint-101"] == "trainer_state.json is not there"
    assert len(broken) + len(steps) == 5, "drafts and what a guard has renamed are neither"


@pytest.mark.parametrize("lost", ["latest", "global_step5/zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_checkpoint_that_was_copied_in_part_is_not_whole(lost, work):
    """DeepSpeed would refuse it when the ranks are up, and an older one is whole."""
    shards = [f"global_step5/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    files = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "latest", *shards]
    (work / "checkpoint-5/global_step5").mkdir(parents=True)
    write_checkpoint(work / "checkpoint-5", *files)
    assert runs.checkpoints(work, 2) == [work / "checkpoint-5"]
    (work / "checkpoint-5" / lost).unlink()
    assert runs.checkpoints(work, 2) == []


@pytest.mark.parametrize("cut", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_of_which_a_file_was_cut_off_is_not_whole(cut, work):
    """As by a full disk, or by a machine that lost its power."""
    folder = work / "checkpoint-5"
    write_checkpoint(folder, "trainer_state.json", "rng_state.pth")
    save_file({"weight": torch.ones(100), "bias": torch.ones(3)}, folder / "model.safetensors", metadata={"a": "b"})
    torch.save({"exp_avg": torch.ones(100)}, folder / "optimizer.pt")
    assert runs.checkpoints(work) == [folder] and runs.broken_checkpoints(work) == {}
    for size in ((folder / cut).stat().st_size - 1, 5, 0):
        os.truncate(folder / cut, size)
        assert runs.checkpoints(work) == [] and runs.broken_checkpoints(work) == {folder: f"{cut} was cut off"}


def test_metrics_end_with_the_last_whole_line(work):
    assert runs.read_metrics(work) == []
    (work / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert runs.read_metrics(work) == [{"step": 1}, {"step": 2}]
