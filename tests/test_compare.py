"""compare_checkpoints.py: figures that other libraries confirm, replies drawn once, and one bad checkpoint that costs no other."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from compared import TOKENS, spoil
from datasets import Dataset
from tiny_models import TEMPLATE

from grpo_launcher.chat.engine import Engine


def test_nothing_is_drawn_twice(compare):
    """The same question, or one with another reward, takes the kept replies; changed weights, another length or a seed do not."""
    shutil.copytree(compare.folder / "two", compare.folder / "copy")
    asked = ["one", "copy", "adapter", "--data", "data", "--splits", "test", "train", "--rewards"]
    assert "30 replies to draw, 0 are kept" in compare(*asked)[1]
    before = (compare.folder / "trainOutput/completions.parquet").stat().st_mtime_ns
    status, said = compare(*asked, "rewards.length.length_reward", "--json", "figures.json")
    assert status == 0 and "0 replies to draw, 30 are kept" in said and "length_reward" in said
    assert (compare.folder / "trainOutput/completions.parquet").stat().st_mtime_ns == before
    os.utime(compare.folder / "copy/model.safetensors")
    assert "10 replies to draw, 20 are kept" in compare(*asked)[1]
    assert len({row["key"] for row in compare.kept()}) == len(compare.kept()) >= 40
    assert "3 replies to draw, 0 are kept" in compare(*asked[:5], "--limit", "1", "--rewards", "--seed", "1")[1]


def test_the_figures_are_those_of_the_replies(compare):
    """Means from the kept replies by rouge_score itself and by hand; the table fits 80 columns; Markdown and JSON say the same."""
    from rouge_score.rouge_scorer import RougeScorer

    status, said = compare("one", "two", "adapter", "--data", "data", "--rewards", "rewards.length.length_reward", "--output", "out")
    assert status == 0
    figures = json.loads((compare.folder / "out/comparison.json").read_text())["splits"]["test"]
    rows = Dataset.from_parquet(str(compare.folder / "data/test.parquet"))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("one", "two", "adapter"):
        said_to = {row["prompt"]: row["reply"] for row in compare.kept() if row["path"] == name}
        texts = [said_to[json.dumps(prompt)] for prompt in rows["prompt"]]
        scores = [scorer.score(reference, text) for reference, text in zip(rows["reference"], texts, strict=True)]
        for kind in ("1", "2", "L"):
            assert figures["metrics"][f"ROUGE-{kind}"][name]["mean"] == np.mean([score[f"rouge{kind}"].fmeasure for score in scores])
        assert figures["metrics"]["length, characters"][name]["mean"] == np.mean([len(text) for text in texts])
        assert figures["metrics"]["length_reward"][name]["mean"] == np.mean([-abs(200 - len(text)) for text in texts])
    assert figures["prompts"] == 7 and len({str(figures["metrics"]["length, characters"][name]) for name in ("one", "two", "adapter")}) == 3
    table = said[said.index("test: 7 prompts") : said.index("Means over prompts")]
    assert max(map(len, table.splitlines())) <= 80 and table.count("adapter") == len(figures["metrics"])
    mean = figures["metrics"]["ROUGE-1"]["adapter"]["mean"]
    assert f"{mean:.3f}" in table and "| ROUGE-1 |" in (markdown := (compare.folder / "out/comparison.md").read_text()) and f"{mean:.3f}" in markdown
    status, said = compare("one", "two", "--data", "data", "--output", "out")
    assert (
        status == 2
        and "out/comparison.json exists; add --overwrite" in said
        and json.loads((compare.folder / "out/comparison.json").read_text())["splits"]["test"] == figures
    )
    assert compare("one", "two", "--data", "data", "--rewards", "--output", "out", "--overwrite")[0] == 0


def test_a_run_means_its_base_checkpoints_and_final(compare):
    """With its own reward, options and length of replies; a checkpoint that is still being written is not offered, and the best one is called so."""
    (compare.folder / "trainOutput/made/1/checkpoint-4").mkdir()
    (compare.folder / "trainOutput/made/1/best-checkpoint").symlink_to("checkpoint-2")
    status, _ = compare("trainOutput/made/1", "one", "--data", "data", "--limit", "2", "--json", "out.json", "--max_new_tokens", "8")
    result = json.loads((compare.folder / "out.json").read_text())
    assert status == 0 and [one["name"] for one in result["checkpoints"]] == ["base", "checkpoint-2 (best)", "final"]
    texts = [row["reply"] for row in compare.kept() if row["path"].endswith("checkpoint-2")]
    assert result["splits"]["test"]["metrics"]["length_reward"]["checkpoint-2 (best)"]["mean"] == np.mean([-abs(50 - len(text)) for text in texts])
    assert all(len(row["reply_ids"]) <= 8 for row in compare.kept())


def test_a_prompt_that_is_too_long_for_one_is_left_out_for_all(compare):
    """So that all of them answer the same prompts."""
    status, said = compare("one", "short", "--data", "data", "--rewards", "--json", "out.json")
    left = json.loads((compare.folder / "out.json").read_text())["splits"]["test"]
    assert status == 0 and 1 <= left["prompts"] < 7 and {one["n"] for one in left["metrics"]["cut off"].values()} == {left["prompts"]}
    assert f"{7 - left['prompts']} of 7 prompts of test leave no room for a reply of {TOKENS} tokens in a context of 192 (short)" in " ".join(said.split())
    status, said = compare("one", "short", "--data", "data", "--max_new_tokens", "192")
    assert status == 1 and "none is left" in said and "--max_new_tokens" in said


SPOILT = {
    "weights cut short": "bad: SafetensorError",
    "base gone": "bad: this adapter stands on moved/away, which cannot be read",
    "still being written": "checkpoint-2: this checkpoint is still being written",
    "no checkpoint": "bad: this folder holds no checkpoint",
    "adapter of another model": "bad: this adapter does not fit its base",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_one_bad_checkpoint_costs_no_other(compare, kind):
    """Named at the end with its reason, exit status 1, and all figures of the others, which are those that they have without it."""
    bad, question = spoil(compare.folder, kind), ["--data", "data", "--limit", "2", "--rewards", "--overwrite", "--output", "out"]
    if kind == "adapter of another model":
        question += ["--base", "one"]  # the model beside it, in the same words, so that the two share it in memory
    status, said = compare(bad, "one", "two", "adapter", *question)
    result = json.loads(Path("out/comparison.json").read_text())
    assert status == 1 and SPOILT[kind] in said[said.index("Not compared:") :] and SPOILT[kind] in Path("out/comparison.md").read_text()
    assert list(result["splits"]["test"]["metrics"]["ROUGE-L"]) == ["one", "two", "adapter"] and len(result["failed"]) == 1
    Path("trainOutput/completions.parquet").unlink()
    assert compare("one", "two", "adapter", *question)[0] == 0
    assert json.loads(Path("out/comparison.json").read_text())["splits"] == result["splits"]
    if kind == "base gone":
        assert "--base FOLDER_OR_HUB_ID" in said and compare(bad, "--base", "one", *question)[0] == 0


REFUSED = {
    "a split that is not there": (["one", "--data", "data", "--splits", "dev"], "data has no split 'dev', only"),
    "an empty split": (["one", "--data", "empty"], "--data empty: its split test is empty"),
    "no such data": (["one", "--data", "nowhere"], "--data nowhere: cannot be read"),
    "a misspelt reward": (["one", "--data", "data", "--rewards", "rewards.length.lenght_reward"], "did you mean length_reward?"),
    "a reward whose column is not there": (["one", "--data", "data", "--rewards", "rewards.choice.choice_reward"], "needs the column answer"),
    "no checkpoint at all": (["./none", "./neither", "--data", "data"], "./neither: there is no such folder"),
    "no tokens": (["one", "--data", "data", "--max_new_tokens", "0"], "--max_new_tokens: 0 is less than 1"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused_before_a_model_loads(compare, monkeypatch, arguments, words):
    """Each says what is wrong; no weight is read."""
    monkeypatch.setattr(Engine, "model", lambda *_: pytest.fail("a model was loaded"))
    status, said = compare(*arguments)
    assert status in (1, 2) and words in said and "Traceback" not in said


def test_templates_that_differ_are_said(compare):
    """Each is asked in its own."""
    shutil.copytree(compare.folder / "two", compare.folder / "other")
    (compare.folder / "other/chat_template.jinja").write_text(TEMPLATE.replace("helpful", "terse"))
    said = compare("one", "other", "--data", "data", "--limit", "2", "--rewards")[1]
    assert "other has another chat template than one: each is asked in its own." in " ".join(said.split())
