"""The main job as a user sees it: real servers, real ZeRO-3 ranks, on a CPU."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import yaml
from conftest import ROOT, test_data

from grpo_launcher.quickstart.corpus import vocabulary, words

pytestmark = pytest.mark.slow


def replies(data: Path, *checkpoints: Path) -> list[list[str]]:
    """The replies of each checkpoint to the held-out posts."""
    command = [sys.executable, str(ROOT / "tests/replies.py"), str(data), *map(str, checkpoints)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@pytest.mark.parametrize("seed", [0, 1])
def test_quickstart_teaches(quickstart_run, seed):
    """Reward up, KL small, no reply cut off, on the curve of the run."""
    lines = quickstart_run(seed).metrics()
    first, last = lines[:3], lines[-5:]
    assert mean(line["reward"] for line in last) - mean(line["reward"] for line in first) >= 25
    assert mean(line["kl"] for line in last) <= 0.5
    assert mean(line["completions/clipped_ratio"] for line in last) <= 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_quickstart_teaches_held_out_posts(quickstart_run, taught, seed):
    """On posts that it never saw the replies come nearer to 200 characters and still are words."""
    data = taught(seed) / "data"
    before, after = replies(data / "quickstart", data / "quickstart-model", quickstart_run(seed).run_folder() / "final-checkpoint")
    distance = [mean(abs(200 - len(text)) for text in texts) for texts in (before, after)]
    assert distance[1] <= 0.65 * distance[0], distance
    known = vocabulary()
    assert mean(word in known for text in after for word in words(text)) >= 0.95


def test_two_zero_ranks_and_a_server_ran(quickstart_run):
    """Both ranks and the server were processes of their own, and the checkpoint holds the shards of two ranks."""
    run = quickstart_run(0)
    assert {rank for rank, line in run.seen if "train.py --config" in line and "accelerate" not in line} == {"0", "1"}
    assert any("vllm.entrypoints.openai.api_server" in line for _, line in run.seen)
    shards = {path.name for path in (run.run_folder() / "checkpoint-10/global_step10").iterdir()}
    assert {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} <= shards


def test_server_and_trainer_hold_the_same_weights(quickstart_run):
    """The log-probabilities of server and trainer agree in every step."""
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-3 for line in quickstart_run(0).metrics())


def test_without_the_sync_they_differ(quickstart_run):
    """The same run with the sync switched off shows it, so that the test above can fail."""
    from grpo_launcher.launch.supervise import supervise

    folder = quickstart_run(0).run_folder()
    unsynced = folder.parent / "unsynced"
    unsynced.mkdir()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"output_dir": str(unsynced), "max_steps": 5, "model_name_or_path": str(folder.parents[2] / "data/quickstart-model")}
    recipe["dataset_name"] = str(folder.parents[2] / "data/quickstart")
    (unsynced / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (unsynced / "accelerate.yaml").write_text((folder / "accelerate.yaml").read_text())
    text = (folder / "plan.json").read_text().replace(str(ROOT / "train.py"), str(ROOT / "tests/train_without_sync.py"))
    plan = json.loads(text.replace('"data/quickstart-model"', json.dumps(recipe["model_name_or_path"])))
    assert supervise(plan, unsynced, []) == 0
    lines = [json.loads(line) for line in (unsynced / "metrics.jsonl").read_text().splitlines()]
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) > 1e-2


def test_the_run_folder_is_whole(quickstart_run):
    """All that chat, comparison and a repeat need lies in the run's folder."""
    run = quickstart_run(0)
    folder = run.run_folder()
    assert folder.relative_to(run.folder.resolve()) == Path("trainOutput/quickstart/1")
    for name in ["recipe.yaml", "plan.json", "accelerate.yaml", "metrics.jsonl", "train.log", "server.log", "curves.png"]:
        assert (folder / name).stat().st_size > 0, name
    for name in ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]:
        assert (folder / "final-checkpoint" / name).exists(), name
    assert len(list((folder / "completions").glob("*.parquet"))) == 20
    provenance = yaml.safe_load((folder / "recipe.yaml").read_text())["provenance"]
    assert provenance["versions"]["trl"] and "Summarise" in provenance["system_prompt"]
    assert [line["step"] for line in run.metrics()] == list(range(1, 21))


def test_the_console_tells_the_run(quickstart_run):
    """A line a step, samples, the table, and no flood of library messages."""
    text = quickstart_run(0).text()
    assert "No recipe given: quickstart.yaml" in text
    assert text.count("  reward ") >= 20 and "step 20/20" in text and "0:00 left" in text
    assert text.count("sample at step") == 5
    assert "the first three" in text and "Saved trainOutput/quickstart/1/final-checkpoint" in text
    assert "Warning" not in text and len(text.splitlines()) < 160


def test_nothing_is_left_after_success(quickstart_run):
    """No process and no file in shared memory."""
    assert quickstart_run(0).leftovers() == [] and quickstart_run(0).left_in_shared_memory == set()


def test_killed_run_resumes(workplace, launch):
    """After KILL nothing is left, not even a server that hears no TERM, and --resume goes on: steps continue, the reward does not jump."""
    folder = workplace()
    first = launch(folder, "--max_steps", "12", "--save_steps", "4")
    first.wait_for("step 10/12")
    for process in first.processes():
        if "vllm.entrypoints.openai.api_server" in process.cmdline():
            process.suspend()
    first.process.kill()
    assert first.leftovers(patience=45) == []
    assert not [path for path in first.shared_memory_left() if path.name.startswith("grpo-weights-")]
    before = first.metrics()
    half_written = first.run_folder() / "checkpoint-9"
    half_written.mkdir()
    second = launch(folder, "--resume", "--max_steps", "12")
    assert second.finish() == 0, second.text()[-4000:]
    assert "from checkpoint-8" in second.text()
    assert second.run_folder() == first.run_folder()
    lines = second.metrics()
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[:8] == before[:8]
    assert abs(mean(line["reward"] for line in lines[8:11]) - mean(line["reward"] for line in lines[5:8])) < 25
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-3


STAGES = {"reading the recipe": "No recipe given", "teaching the base": "Preparing what", "loading": "Run: ", "training": "step  2/"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_signals_leave_nothing(stage, number, tmp_path, workplace, launch):
    """Ctrl-C, TERM and HUP at any stage: exit status 128 + signal, and no process is left."""
    folder = tmp_path if stage == "teaching the base" else workplace()
    run = launch(folder, "--max_steps", "50")
    run.wait_for(STAGES[stage])
    run.process.send_signal(number)
    assert run.finish(60) == 128 + number, run.text()[-2000:]
    assert run.leftovers() == [] and run.shared_memory_left() == set()
    assert "--resume" in run.text()
    assert not list(tmp_path.glob("data/*")), "a half-made folder"


def test_lost_server_ends_the_run(workplace, launch):
    """A server that dies takes the run down with its last words, and nothing is left."""
    run = launch(workplace(), "--max_steps", "50")
    run.wait_for("step  2/")
    for process in run.processes():
        if "vllm.entrypoints.openai.api_server" in process.cmdline():
            process.kill()
    assert run.finish(90) == 1
    assert "The vLLM server ended with exit status -9" in run.text()
    assert run.leftovers() == [] and run.shared_memory_left() == set()


def test_failing_reward_ends_the_run(workplace, launch):
    """An error in the trainer is shown as its own traceback, and nothing is left."""
    folder = workplace()
    (folder / "mine.py").write_text("def broken(completions, **columns):\n    raise RuntimeError('the judge is asleep')\n")
    run = launch(folder, "--reward_funcs", "mine.broken", "--reward_kwargs", "{}")
    assert run.finish(300) == 1
    assert "RuntimeError: the judge is asleep" in run.text() and "train.log" in run.text()
    assert run.leftovers() == []


def test_own_reward_on_own_rows_with_lora(workplace, launch):
    """Two files of the user's own, outside the repository, with the recipe for LoRA; in step with the server."""
    folder = workplace()
    (folder / "mine.py").write_text(
        "def shout(completions, mood, *, mark='!', **columns):\n"
        "    return [float(c[-1]['content'].count(mark)) for c, m in zip(completions, mood, strict=True)]\n"
    )
    (folder / "rewards.py").write_text("raise RuntimeError('a user may call a file so')")
    rows = [{"prompt": [{"role": "user", "content": f"My day number {i}"}], "mood": "glad"} for i in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = launch(
        folder, str(ROOT / "configs/tldr_lora.yaml"), "--model_name_or_path", "data/quickstart-model", "--dataset_name", "rows.jsonl",
        "--reward_funcs", "mine.shout", "--reward_kwargs", '{"shout": {"mark": "."}}', "--max_steps", "3", "--learning_rate", "1e-3",
        "--warmup_steps", "0", "--gradient_accumulation_steps", "1",
    )  # fmt: skip
    assert run.finish() == 0, run.text()[-4000:]
    assert all("rewards/shout/mean" in line for line in run.metrics())
    assert max(line["sampling/sampling_logp_difference/max"] for line in run.metrics()) < 1e-3
    assert (run.run_folder() / "final-checkpoint/adapter_model.safetensors").exists()
    assert not (run.run_folder() / "final-checkpoint/model.safetensors").exists()


def test_real_reddit_rows_are_trained_on(workplace, launch):
    """Real posts through process_dataset.py and configs/tldr_length.yaml, with the small model in place of Qwen: the reward rises."""
    source, folder = test_data("tldr/tldr.jsonl"), workplace()
    command = [sys.executable, str(ROOT / "process_dataset.py"), "tldr", "--source", str(source), "--tokenizer", "data/quickstart-model"]
    subprocess.run([*command, "--output", "tldr", "--max_prompt_length", "512"], cwd=folder, check=True, capture_output=True)
    run = launch(
        folder, str(ROOT / "configs/tldr_length.yaml"), "--model_name_or_path", "data/quickstart-model", "--dataset_name", "tldr",
        "--learning_rate", "4e-4", "--beta", "0.2", "--warmup_steps", "0", "--max_steps", "20", "--gradient_checkpointing", "false",
    )  # fmt: skip
    assert run.finish(1200) == 0, run.text()[-4000:]
    *lines, held_out = run.metrics()
    assert held_out["step"] == 20 and 0 < held_out["eval_rewards/rouge_reward/mean"] < 1, "evaluated at the end too"
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert mean(line["reward"] for line in lines[-5:]) - mean(line["reward"] for line in lines[:3]) >= 20
    assert mean(line["kl"] for line in lines[-5:]) <= 0.5
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-2 for line in lines)


def test_real_pretrained_model_is_trained_by_train_py_alone(tmp_path):
    """train.py in one process, without a server, on plain story openings: reward up, entropy not collapsed."""
    model = test_data("models/stories260K_hf")
    names, animals = (
        ["Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Tim", "Anna", "Sam", "Lucy"],
        ["dog", "cat", "bird", "frog", "fish", "bear", "duck", "rabbit"],
    )
    rows = [{"prompt": f"One day, {name} saw a {animal}"} for name in names for animal in animals]
    (tmp_path / "openings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, str(ROOT / "train.py"), "--model_name_or_path", str(model), "--dataset_name", "openings.jsonl"]
    command += ["--reward_funcs", "rewards.length.length_reward", "--reward_kwargs", '{"length_reward": {"target": 300}}']
    command += ["--beta", "0.1", "--learning_rate", "7e-4", "--lr_scheduler_type", "constant", "--max_steps", "20"]
    command += ["--per_device_train_batch_size", "64", "--max_completion_length", "200", "--gradient_checkpointing", "false"]
    command += ["--output_dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = lines[:3], lines[-5:]
    assert mean(line["reward"] for line in last) > mean(line["reward"] for line in first) + 25
    assert mean(line["entropy"] for line in last) > 0.5 * mean(line["entropy"] for line in first)
    assert mean(line["kl"] for line in last) > 0
    assert (tmp_path / "run/final-checkpoint/model.safetensors").exists()


def test_a_reward_model_may_stand_among_the_rewards(workplace):
    """A folder with a sequence classifier, as TRL takes it, beside a function."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    folder = workplace()
    tokenizer = AutoTokenizer.from_pretrained(folder / "data/quickstart-model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None, **sizes)
    Qwen2ForSequenceClassification(config).save_pretrained(folder / "judge/model")
    tokenizer.save_pretrained(folder / "judge/model")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs/quickstart.yaml"), "--max_steps", "1", "--output_dir", "run"]
    command += ["--reward_funcs", "rewards.length.length_reward", "judge/model", "--reward_weights", "1", "0.5"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    line = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[0])
    assert {"rewards/length_reward/mean", "rewards/model/mean"} <= set(line)
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert again.returncode == 1 and "output_dir: run holds another run" in again.stderr, again.stderr[-2000:]
