"""What compare_checkpoints.py draws: the replies of model.generate, with transformers and with vLLM alike."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compared import TOKENS, Compare, spoil
from datasets import Dataset
from pyarrow import parquet
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_launcher.chat.checkpoints import find
from grpo_launcher.chat.engine import Engine


def test_a_seed_draws_by_lot_and_the_same_again(compare):
    """The same seed gives the same replies anew; another one others."""
    drawn = []
    for seed in ("1", "1", "2"):
        assert compare("one", "--data", "data", "--rewards", "--seed", seed)[0] == 0
        drawn.append([row["reply"] for row in compare.kept()])
        (compare.folder / "trainOutput/completions.parquet").unlink()
    assert drawn[0] == drawn[1] != drawn[2]


def greedy(folder: str, prompts: list, adapter: str | None = None) -> list[list[int]]:
    """What model.generate says to each prompt alone."""
    from peft import PeftModel

    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    network = PeftModel.from_pretrained(network, adapter).eval() if adapter else network
    said = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            said.append(network.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist())
    return said


def assert_agree(checkpoint: str, prompt_ids: list[int], one: list[int], other: list[int]) -> None:
    """Equal up to the first position whose two best log-probabilities are within 1e-4."""
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if one == other:
        return
    engine, found = Engine([find(checkpoint)]), find(checkpoint)
    with torch.inference_mode(), engine._switched_to(engine.model(found), found):
        logits = engine.model(found)(torch.tensor([prompt_ids + one[:at]])).logits[0, -1]
    best = logits.log_softmax(-1).topk(2).values
    assert best[0] - best[1] <= 1e-4, f"{checkpoint}: {one} and {other} part at {at}"


def test_greedy_replies_are_those_of_generate(compare):
    """In batches of unequal length, whole models and the adapter on one of them."""
    assert compare("one", "two", "adapter", "--data", "data", "--rewards", "--batch_size", "4")[0] == 0
    prompts = list(Dataset.from_parquet(str(compare.folder / "data/test.parquet"))["prompt"])
    for name, base in {"one": "one", "two": "two", "adapter": "one"}.items():
        rows = [row for row in compare.kept() if row["path"] == name]
        by_prompt = {row["prompt"]: row for row in rows}
        for prompt, ids in zip(prompts, greedy(base, prompts, name if name == "adapter" else None), strict=True):
            row = by_prompt[json.dumps(prompt, ensure_ascii=False)]
            assert_agree(name, row["prompt_ids"], row["reply_ids"], ids)
            assert row["cut_off"] == (ids[-1] != AutoTokenizer.from_pretrained(base).eos_token_id)


@pytest.mark.slow
def test_vllm_says_the_same(compare):
    """A model and its adapter in one process, and a checkpoint that vLLM cannot load beside them."""
    spoil(compare.folder, "weights cut short")
    asked = ["one", "adapter", "bad", "--data", "data", "--rewards"]
    status, said = compare(*asked, "--engine", "vllm")
    assert status == 1 and "Not compared: bad: vLLM cannot load bad" in said, said
    assert compare(*asked[:2], *asked[3:])[0] == 0
    rows = compare.kept()
    for name in ("one", "adapter"):
        by_vllm, others = ({row["prompt"]: row for row in rows if row["path"] == name and ('"vllm"' in row["decoding"]) is vllm} for vllm in (True, False))
        assert len(by_vllm) == len(others) == 7
        for prompt, row in by_vllm.items():
            assert_agree(name, row["prompt_ids"], row["reply_ids"], others[prompt]["reply_ids"])
            assert row["cut_off"] == others[prompt]["cut_off"]
    assert {row["reply"] for row in rows if row["path"] == "adapter"} != {row["reply"] for row in rows if row["path"] == "one"}


@pytest.mark.slow
def test_checkpoints_of_the_quickstart_and_an_adapter(quickstart_run, taught, tmp_path, monkeypatch, capfd):
    """Training shows in the reward, scipy draws the same intervals from the same scores, and the adapter is one among them."""
    scipy_stats = pytest.importorskip("scipy.stats")
    run, base = quickstart_run(0).run_folder(), taught(0) / "data/quickstart-model"
    make_adapter(tmp_path / "adapter", base, seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "data").symlink_to(taught(0) / "data")
    names = [str(base), *(str(run / name) for name in ("checkpoint-10", "final-checkpoint")), "adapter"]
    status, said = Compare(tmp_path, capfd)(*names, "--data", "data/quickstart", "--json", "out.json", "--max_new_tokens", "200")
    assert status == 0, said
    metrics = json.loads(Path("out.json").read_text())["splits"]["test"]["metrics"]
    first, _, final, _ = metrics["length_reward"].values()
    assert final["difference"] > 25 and final["p_holm"] < 0.05 and final["low"] > first["high"]
    rows = parquet.read_table("trainOutput/completions.parquet").to_pylist()
    prompts = [json.dumps(prompt) for prompt in Dataset.from_parquet("data/quickstart/test.parquet")["prompt"]]
    for path, figures in zip(names, metrics["length_reward"].values(), strict=True):
        said_to = {row["prompt"]: row["reply"] for row in rows if row["path"] == path}
        scores = np.array([-abs(200.0 - len(said_to[prompt])) for prompt in prompts])
        interval = scipy_stats.bootstrap((scores,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
        assert (figures["low"], figures["high"]) == pytest.approx(tuple(interval), rel=1e-9) and figures["n"] == len(scores) == 64
