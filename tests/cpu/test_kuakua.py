"""The praise bot in a real run, with an HTTP judge that fails for half of the completions."""

import json
import zlib
from pathlib import Path
from statistics import mean

import pandas
import pytest
import torch
import yaml
from helpers import ROOT, Launch, is_in_sync, run_here
from judge_server import JudgeServer

from rewards.perplexity import perplexity_reward

CONFIG = ROOT / "configs/kuakua.yaml"
NAMES = ["judge_reward", "perplexity_reward", "distinct_words_reward", "gaussian_length_reward", "chinese_reward"]


def rating(completion: str) -> int:
    """The judge's taste: long and loud praise."""
    return min(10, len(completion) // 40 + completion.count("！"))


def fails(completion: str) -> bool:
    """Whether the judge has no number for a completion: half of them."""
    return zlib.crc32(completion.encode()) % 2 == 0


@pytest.fixture(scope="module")
def run(module_workplace, launch, server_url) -> Launch:
    """Three steps of configs/kuakua.yaml with the quickstart's model."""
    folder: Path = module_workplace
    options = ["--tokenizer", "data/quickstart-model", "--output", "praise", "--limit", "90"]
    run_here(f"{ROOT}/process_dataset.py", "kuakua", *options, cwd=folder)

    def answer(completion, request):
        return "文笔很好，但是我不知道" if fails(completion) else f"{rating(completion)}分"

    with JudgeServer(answer=answer, model="tiny") as judge:
        endpoint = {
            "base_url": judge.url,
            "model": "tiny",
            "template": "judge_praise.txt",
            "retries": 0,
            "timeout": 60,
        }
        options = {"judge_reward": endpoint, "perplexity_reward": {"model": "data/quickstart-model"}}
        return launch(
            folder,
            str(CONFIG),
            *("--model_name_or_path", "data/quickstart-model", "--dataset_name", "praise"),
            *("--reward_kwargs", json.dumps(options), "--per_device_train_batch_size", "20"),
            *("--gradient_accumulation_steps", "1", "--max_completion_length", "64", "--max_steps", "3"),
            *("--learning_rate", "4e-4", "--lr_scheduler_type", "constant", "--gradient_checkpointing", "false"),
            *("--vllm_server_base_url", server_url),
        ).finish()


def tables(run: Launch) -> list[pandas.DataFrame]:
    """The completions of each step."""
    return [pandas.read_parquet(path) for path in sorted((run.run_folder() / "completions").glob("*.parquet"))]


def test_all_five_rewards_have_names(run):
    """Each has its mean in every step, and server and trainer are in step."""
    assert all(f"rewards/{name}/mean" in line for name in NAMES for line in run.metrics())
    assert is_in_sync(run.metrics())


def test_a_failed_rating_moves_no_advantage(run):
    """Groups lie astride two ranks. Every advantage is as if the failed ratings had been their group's mean."""
    weights = torch.tensor([float(weight) for weight in yaml.safe_load(CONFIG.read_text())["reward_weights"]])
    for table in tables(run):
        texts = [completion[-1]["content"] for completion in table["completion"]]
        judged = torch.tensor([float("nan") if fails(text) else float(rating(text)) for text in texts]).view(-1, 8)
        assert len(texts) == 40 and judged.isnan().any(), "groups of 8 on ranks of 20: the third lies astride"
        judged = torch.where(judged.isnan(), judged.nanmean(1, keepdim=True), judged).flatten()
        logged = torch.tensor(table["judge_reward"].to_numpy()).float()
        assert torch.allclose(logged, judged, atol=1e-4, equal_nan=True)
        groups = (torch.tensor(table[NAMES].to_numpy()).float().nan_to_num(0) @ weights).view(-1, 8)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        assert torch.allclose(torch.tensor(table["advantage"].to_numpy()).float(), advantages.flatten(), atol=1e-3)
    shares = [line["rewards/judge_reward/failed"] for line in run.metrics()]
    assert 0.3 < mean(shares) < 0.7 and run.metrics()[0]["rewards/chinese_reward/failed"] == 0


def test_perplexity_is_right_inside_zero3(run):
    """What two ZeRO-3 ranks logged is what one process computes: the frozen model was whole on both."""
    table = tables(run)[-1]
    prompts, completions = (
        [[dict(message) for message in messages] for messages in table[column]] for column in ("prompt", "completion")
    )
    alone = perplexity_reward(prompts, completions, model=str(run.folder / "data/quickstart-model"))
    assert table["perplexity_reward"].tolist() == pytest.approx(alone, abs=1e-3)


def test_without_its_judge_a_run_does_not_start(workplace, launch):
    """The message names address and model."""
    options = {"judge_reward": {"base_url": "http://127.0.0.1:9/v1", "model": "tiny"}}
    flags = ["--reward_funcs", "rewards.judge.judge_reward", "--reward_kwargs", json.dumps(options)]
    run = launch(workplace, str(ROOT / "configs/quickstart.yaml"), *flags).finish(2)
    assert "http://127.0.0.1:9/v1" in run.text() and "tiny" in run.text()
    assert "Traceback" not in run.text() and not (workplace / "trainOutput").exists()
