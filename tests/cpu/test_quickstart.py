"""The main job as a user sees it: bash launch_train.sh, with a real server and real ZeRO-3 ranks on the CPU."""

import json
import re
from statistics import mean, median

import pytest
import torch
from datasets import load_dataset
from helpers import Launch, is_in_sync, means, memory_held_and_planned, read_metrics, run_again, run_code
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_launcher import runs
from grpo_launcher.callbacks import SYNC_DIFFERENCE
from grpo_launcher.config import load_config
from grpo_launcher.errors import EXIT_GUARD
from grpo_launcher.quickstart.corpus import vocabulary, words


@pytest.fixture(scope="module")
def run(module_workplace, launch) -> Launch:
    """The finished `bash launch_train.sh`."""
    return launch(module_workplace).finish()


def test_it_learns(run):
    """The reward rises by 60 % of what was seen, KL stays small, and no completion is cut off."""
    lines = run.metrics()
    first, last = means(lines, "reward")
    assert last - first >= 40, (first, last)
    assert median(line["kl"] for line in lines[-5:]) <= 0.15, "in the mean one token may outweigh the rest"
    assert means(lines, "completions/clipped_ratio")[1] <= 0.05


def complete(checkpoint, prompts: list) -> list[str]:
    """Sample a completion of each prompt, without this project's code."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = tokenizer.apply_chat_template(prompts, **options)
    torch.manual_seed(0)
    ids = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=1.0, top_k=0)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_learns_for_posts_that_it_never_saw(run):
    """The completions come nearer to 200 characters and still are words."""
    data = run.folder / "data"
    prompts = list(load_dataset(str(data / "quickstart"), split="test")["prompt"])
    before, after = (complete(path, prompts) for path in (data / "quickstart-model", run.run_folder() / runs.FINAL))
    distances = [mean(abs(200 - len(text)) for text in texts) for texts in (before, after)]
    assert distances[1] <= 0.65 * distances[0], distances
    known = vocabulary()
    assert mean(word in known for text in after for word in words(text)) >= 0.95


def test_two_ranks_and_a_server_ran(run):
    """Both ranks and the server were processes of their own, and the checkpoint holds the shards of two ranks."""
    lines = run.command_lines
    assert {rank for rank, line in lines if "train.py --run" in line and "accelerate" not in line} == {"0", "1"}
    assert any("grpo_launcher.vllm_server" in line for _, line in lines)
    shards = {path.name for path in (run.run_folder() / "checkpoint-12/global_step12").iterdir()}
    assert {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} <= shards


def test_server_and_trainer_hold_the_same_weights(run):
    """Their log-probabilities agree in every step."""
    assert len(run.metrics()) == 24 and is_in_sync(run.metrics())


def test_without_the_sync_they_do_not(run):
    """The same run with the sync switched off: the test above can fail, and the run ends in the step that needs it."""
    status, folder = run_again(run, "train_without_sync.py", 300, max_steps=3, per_device_train_batch_size=8)
    assert status == EXIT_GUARD
    stopped = json.loads((folder / runs.STOPPED).read_text())
    assert stopped["step"] == 2 and SYNC_DIFFERENCE in stopped["why"]
    first, second = read_metrics(folder)
    assert first[SYNC_DIFFERENCE] < 1e-3 and second["sampling/sampling_logp_difference/max"] > 1e-2


def test_the_run_folder_is_whole(run):
    """It holds all that chat, comparison and a repeat need."""
    folder = run.run_folder()
    assert folder.relative_to(run.folder.resolve()).as_posix() == "trainOutput/quickstart/1"
    for name in [
        "recipe.yaml",
        "run.json",
        "accelerate.yaml",
        "metrics.jsonl",
        "train.log",
        "server.log",
        "curves.png",
    ]:
        assert (folder / name).stat().st_size > 0, name
    for name in ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]:
        assert (folder / runs.FINAL / name).exists(), name
    assert len(list((folder / "completions").glob("*.parquet"))) == 24
    loaded = runs.load_run(folder)
    assert loaded.versions["trl"] and "Summarise" in loaded.system_prompt
    assert [line["step"] for line in run.metrics()] == list(range(1, 25))


def test_the_console_shows_the_run(run):
    """A line a step, samples and a table. One warning, of what the reward pays for; no flood of library messages."""
    text = run.text()
    assert "quickstart.yaml" in text
    assert text.count("  reward ") >= 24 and "step 24/24" in text and "0:00 left" in text
    assert text.count("sample at step") == 3
    assert "Saved trainOutput/quickstart/1/final-checkpoint" in text
    assert text.count("Warning") == 1 and "\nWarning: Length explains" in text
    # A sample is as long as its post, and a slow machine waits longer for the server.
    others = [line for line in text.splitlines() if not re.match("[╭│╰]|Waiting for the vLLM server", line)]
    assert "Verdict" not in text and len(others) < 60, others


def test_the_plan_knew_the_memory(run):
    held, planned = memory_held_and_planned(run.text())
    assert 0.9 * held <= planned <= 1.25 * held


def test_nothing_is_left(run):
    """No process, and no file in shared memory."""
    assert run.leftovers() == []


def test_the_card_loads_the_model(run):
    """The final checkpoint has a model card of this run, and its Python code works as it stands."""
    final = run.run_folder() / runs.FINAL
    text = (final / "README.md").read_text()
    assert "# quickstart/1" in text and "## Samples" in text and (final / "curves.png").exists()
    program = re.search("```python\n(.*?)```", text, re.S)[1]
    assert len(run_code(program, run.folder).split()) > 3


def test_its_recipe_starts_the_same_run(run, monkeypatch):
    """recipe.yaml in the run folder gives the values of the run."""
    monkeypatch.chdir(run.folder)
    again = load_config(["--config", str(run.run_folder() / "recipe.yaml")]).values
    values = runs.load_run(run.run_folder()).values
    for name in ("beta", "learning_rate", "reward_kwargs", "per_device_train_batch_size", "dataset_name"):
        assert again[name] == values[name], name


def test_the_doctor_rehearses_without_model_and_data(tmp_path, launch):
    """In an empty folder: the machine, the plan with what is missing, and two real steps."""
    text = launch(tmp_path, "--doctor").finish(timeout=300).text()
    assert "processor:" in text and "Fix:" in text and "evaluation at step 2" in text
    difference = re.search(r"server and trainer differ by at most (\S+) in", text)
    assert float(difference[1]) < 1e-3
