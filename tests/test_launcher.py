"""The launcher's answer to bad input and to --dry-run, through the command itself: nothing expensive starts."""

import json
import socket

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
QUICKSTART = str(ROOT / "configs/quickstart.yaml")

REFUSED = {
    "unknown flag": (["--learning_rat", "1"], "did you mean --learning_rate"),
    "unknown reward": (["--reward_funcs", "rewards.lenght.x"], "there is no module `rewards.lenght`"),
    "value of an enumeration": (["--loss_type", "dr_grp"], "'dr_grp' is none of"),
    "missing dataset": (["--dataset_name", "data/tldr"], "process_dataset.py tldr"),
    "no prompt column": (["--dataset_name", "texts.jsonl"], "has no column `prompt`, only text"),
    "too few prompts": (["--dataset_name", "seven.jsonl"], "7 prompts, and one generation takes 8"),
    "a prompt beyond the context": (["--vllm_max_model_length", "300"], "--max_prompt_length 100"),
    "a model that is not there": (["--model_name_or_path", "data/nothing"], "data/nothing is no folder with a model"),
    "an output folder in use": (["--output_dir", "mine"], "output_dir: mine is not empty"),
    "a reporter that is not installed": (["--report_to", "wandb"], "wandb"),
    "resume without a run": (["--resume"], "there is no run of quickstart"),
    "a flag against the machine": (["--use_cpu", "false"], "--use_cpu False: this layout needs True"),
    "a checkpoint by hand": (["--resume_from_checkpoint", "x"], "--resume, with --output_dir"),
    "a reward model that is not there": (["--reward_funcs", "owner/nothing", "--reward_kwargs", "{}"], "reward_funcs: owner/nothing is no reward model"),
    "colocate without a GPU": (["--colocate"], "there is no GPU to share"),
}


@pytest.fixture(scope="module")
def folder(workplace):
    """A folder with the quickstart's data and a few bad files."""
    place = workplace()
    (place / "texts.jsonl").write_text(json.dumps({"text": "a"}))
    (place / "seven.jsonl").write_text("\n".join(json.dumps({"prompt": f"post {i}"}) for i in range(7)))
    (place / "mine").mkdir()
    (place / "mine/recipe.yaml").write_text("another run")
    return place


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_remedy(case, folder, launch):
    """Exit status 2, one message, no run's folder, no process."""
    flags, said = REFUSED[case]
    run = launch(folder, QUICKSTART, *flags)
    assert run.finish(120) == 2 and said in run.text(), run.text()
    assert "Traceback" not in run.text()
    assert not (folder / "trainOutput").exists() and run.leftovers() == []


def test_a_named_port_that_is_taken(folder, launch):
    """A free one is found where none is named."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = launch(folder, QUICKSTART, "--vllm_server_port", str(taken.getsockname()[1]))
        assert run.finish(120) == 2 and "is taken; leave the field out" in run.text()


@pytest.mark.parametrize(
    ("gpus", "memory", "status", "said"),
    [
        ("1", "24", 2, "Remedies: 3 such GPUs"),
        ("4", "24", 0, "CUDA_VISIBLE_DEVICES=3"),
        ("8", "80", 0, "num_processes: 7"),
    ],
)
def test_dry_run_for_hardware_that_is_not_there(gpus, memory, status, said, tmp_path, launch):
    """The plan with every command, or the refusal; nothing is started or written."""
    run = launch(tmp_path, str(ROOT / "configs/tldr_length.yaml"), "--dry-run", "--assume-gpus", gpus, "--assume-memory", memory)
    assert run.finish(120) == status and said in run.text(), run.text()
    assert not (tmp_path / "trainOutput").exists() and run.leftovers() == []


def test_dry_run_does_not_prepare(tmp_path, launch):
    """It says what is still to be made."""
    run = launch(tmp_path, "--dry-run")
    assert run.finish(120) == 0 and "Before it can run: model_name_or_path: data/quickstart-model" in run.text()
    assert not (tmp_path / "data").exists()
