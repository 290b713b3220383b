"""The praise bot and the guards in real runs: a real HTTP judge, two ZeRO-3 ranks, a vLLM server, on a CPU."""

import json
import re
import subprocess
import sys
import zlib
from statistics import mean

import pandas
import pytest
import torch
import yaml
from conftest import ROOT
from judge_server import JudgeServer

from rewards.perplexity import perplexity_reward

pytestmark = pytest.mark.slow
CONFIG = str(ROOT / "configs/kuakua.yaml")
NAMES = ["judge_reward", "perplexity_reward", "distinct_words_reward", "gaussian_length_reward", "chinese_reward"]
STEPS, GONE = 16, 12  # at the latter the second run's judge goes away


def rating(reply: str) -> int:
    """The judge's taste: long and loud praise."""
    return min(10, len(reply) // 40 + reply.count("！"))


def fails(reply: str) -> bool:
    """The replies that the first run's judge has no number for: half of them."""
    return zlib.crc32(reply.encode()) % 2 == 0


@pytest.fixture(scope="module")
def kuakua_run(taught, launch, tmp_path_factory):
    """kuakua_run(seed) → the finished run of configs/kuakua.yaml with the small model.

    The judge of seed 0 has no number for half of the replies, that of seed 1 goes away in mid-run.
    """
    finished = {}

    def run(seed: int):
        if seed in finished:
            return finished[seed]
        folder = tmp_path_factory.mktemp("kuakua")
        (folder / "data").symlink_to(taught(seed) / "data")
        command = [sys.executable, str(ROOT / "process_dataset.py"), "kuakua", "--tokenizer", "data/quickstart-model", "--output", "praise"]
        subprocess.run([*command, "--limit", "90"], cwd=folder, check=True, capture_output=True)

        def answer(reply, request):
            return "文笔很好，但是我不知道" if seed == 0 and fails(reply) else f"{rating(reply)}分"

        with JudgeServer(answer=answer, model="tiny") as judge:
            options = {
                "judge_reward": {"base_url": judge.url, "model": "tiny", "template": "judge_praise.txt", "retries": 0, "timeout": 20},
                "perplexity_reward": {"model": "data/quickstart-model"},
            }
            failed = {"max": 0.9, "steps": 2}  # half of them are meant to fail
            begun = finished[seed] = launch(
                folder, CONFIG, "--model_name_or_path", "data/quickstart-model", "--dataset_name", "praise", "--reward_kwargs", json.dumps(options),
                "--guards", json.dumps({"failed_ratings": failed}), "--learning_rate", "4e-4", "--beta", "0.2", "--lr_scheduler_type", "constant",
                "--per_device_train_batch_size", "36", "--gradient_accumulation_steps", "1", "--max_completion_length", "200",
                "--max_steps", str(STEPS), "--save_steps", "2", "--seed", str(seed), "--gradient_checkpointing", "false",
            )  # fmt: skip
            if seed == 1:
                begun.wait_for(f"step {GONE}/", 600)
            else:
                begun.finish(600)
        assert begun.finish(300) == (3 if seed else 0), begun.text()[-4000:]
        return begun

    return run


@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_of_chinese_rises(kuakua_run, seed):
    """By at least 0.1 of all letters from the first three steps to the last five with a judge, and all five rewards have names."""
    lines = kuakua_run(seed).metrics()[:GONE]
    assert all(f"rewards/{name}/mean" in line for name in NAMES for line in lines)
    share = [line["rewards/chinese_reward/mean"] for line in lines]
    assert mean(share[-5:]) - mean(share[:3]) >= 0.1, share
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-3


def test_a_failed_rating_moves_no_advantage(kuakua_run):
    """Half of the ratings fail on two ranks, groups astride both: every advantage is as if those had scored their group's mean."""
    run = kuakua_run(0)
    weights = torch.tensor([float(weight) for weight in yaml.safe_load((ROOT / "configs/kuakua.yaml").read_text())["reward_weights"]])
    for path in sorted((run.run_folder() / "completions").glob("*.parquet"))[:4]:
        table = pandas.read_parquet(path)
        texts = [completion[-1]["content"] for completion in table["completion"]]
        judged = torch.tensor([float("nan") if fails(text) else float(rating(text)) for text in texts]).view(-1, 8)
        assert len(texts) == 72 and judged.isnan().any(), "groups of 8 on ranks of 36: the fifth lies astride"
        judged = torch.where(judged.isnan(), judged.nanmean(1, keepdim=True), judged)
        assert torch.allclose(torch.tensor(table["judge_reward"].to_numpy()).float(), judged.flatten(), atol=1e-4, equal_nan=True)
        rewards = torch.tensor(table[NAMES].to_numpy()).float().nan_to_num(0) @ weights
        groups = rewards.view(-1, 8)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        assert torch.allclose(torch.tensor(table["advantage"].to_numpy()).float(), advantages.flatten(), atol=1e-3)
    share = [line["rewards/judge_reward/failed"] for line in run.metrics()]
    assert 0.3 < mean(share) < 0.7 and run.metrics()[0]["rewards/chinese_reward/failed"] == 0


def test_perplexity_is_right_inside_zero_3(kuakua_run):
    """What two ZeRO-3 ranks logged is what one process computes: the frozen model was whole on both."""
    run = kuakua_run(0)
    table = pandas.read_parquet(sorted((run.run_folder() / "completions").glob("*.parquet"))[-1])
    prompts, completions = ([[dict(message) for message in messages] for messages in table[column]] for column in ("prompt", "completion"))
    alone = perplexity_reward(prompts, completions, model=str(run.folder / "data/quickstart-model"))
    assert table["perplexity_reward"].tolist() == pytest.approx(alone, abs=1e-3)


def test_a_judge_that_goes_away_stops_the_run_with_its_checkpoint(kuakua_run):
    """It is said once, and the guard ends the run with the last good checkpoint; nothing is called final."""
    run = kuakua_run(1)
    text, folder = run.text(), run.run_folder()
    assert "Warning: rewards/judge_reward/failed is 1, over 0.9" in text and "Stopped by a guard at step" in text
    assert (folder / "train.log").read_text(errors="replace").count("judge_reward: no rating from") <= 2, "once a rank"
    kept = json.loads((folder / "stopped.json").read_text())["checkpoint"]
    assert (folder / kept / "model.safetensors").exists() and re.fullmatch(r"checkpoint-\d+", kept)
    assert not (folder / "final-checkpoint").exists()
    assert run.leftovers() == []


def test_a_run_without_its_judge_refuses_to_start(workplace, launch):
    """Naming URL and model."""
    folder = workplace()
    options = {"judge_reward": {"base_url": "http://127.0.0.1:9/v1", "model": "tiny"}}
    run = launch(
        folder, str(ROOT / "configs/quickstart.yaml"), "--reward_funcs", "rewards.judge.judge_reward", "--reward_kwargs", json.dumps(options)
    )  # fmt: skip
    assert run.finish(120) == 2 and "http://127.0.0.1:9/v1" in run.text() and "tiny" in run.text(), run.text()
    assert "Traceback" not in run.text() and not (folder / "trainOutput").exists()


def test_a_diverging_run_is_stopped_and_its_good_checkpoint_kept(workplace, launch):
    """The quickstart with a learning rate 100 times too high, warmed up so that its first steps are sound."""
    folder = workplace()
    run = launch(
        folder, str(ROOT / "configs/quickstart.yaml"), "--learning_rate", "4e-2", "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "30",
        "--max_steps", "40", "--save_steps", "1", "--sample_every", "0",
    )  # fmt: skip
    assert run.finish(600) == 3, run.text()[-4000:]
    assert "Stopped by a guard" in run.text() and "Traceback" not in run.text()
    told = json.loads((run.run_folder() / "stopped.json").read_text())
    step = int(told["checkpoint"].split("-")[1])
    assert run.metrics()[step]["kl"] <= 1, "the KL of checkpoint-N is measured in step N + 1"
    assert (run.run_folder() / told["checkpoint"] / "model.safetensors").exists()
    assert not (run.run_folder() / f"checkpoint-{told['step']}").exists()


def test_no_guard_fires_on_the_quickstart(quickstart_run):
    """Nor warns."""
    assert "guard" not in quickstart_run(0).text() and "Warning" not in quickstart_run(0).text()
