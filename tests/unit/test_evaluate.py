"""evaluate.py and compare_checkpoints.py: completions, metrics, statistics, and what is refused."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chat_models import PREFIX, SHORT, TOKENS, WHOLE, chat, generated, spoil
from datasets import Dataset, DatasetDict
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from tiny_models import TEMPLATE, make_run
from transformers import AutoTokenizer

import compare_checkpoints
import demo_in_chat
from grpo_launcher import evaluate
from grpo_launcher.chat.backends import Completion, LocalModel, line_up
from grpo_launcher.chat.models import GenerationSettings
from grpo_launcher.errors import UserError
from grpo_launcher.evaluate import RewardSet

GREEDY = GenerationSettings(temperature=0, max_new_tokens=TOKENS)
METRICS = ["ROUGE-1", "characters", "tokens", "truncated", "distinct-1", "distinct-2", "distinct-3"]
pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def compare(capfd):
    """Return a function that runs compare_checkpoints.py and returns exit status, output and comparison.json."""

    def run(*argv: str) -> tuple[int, str, dict]:
        capfd.readouterr()
        try:
            tokens = [] if "--max_new_tokens" in argv else ["--max_new_tokens", str(TOKENS)]
            status = compare_checkpoints.main([*argv, *tokens, "--output", "out", "--overwrite"])
        except SystemExit as error:
            status = error.code
        text = " ".join("".join(capfd.readouterr()).split())
        path = Path("out/comparison.json")
        return status, text, json.loads(path.read_text()) if path.exists() else {}

    return run


def cached() -> list[dict]:
    """Return the rows of the file of completions."""
    return pd.read_parquet("trainOutput/completions.parquet").to_dict("records")


# Completions


def test_completions_in_batches_are_those_of_generate(compare):
    """Of a whole model, an adapter, T5 and BART, whose own file asks for beams; prompts have unlike lengths."""
    cases = {
        "rows": {
            "base": ("base", None),
            f"{WHOLE}/checkpoint-1": (f"{WHOLE}/checkpoint-1", None),
            "adapter": ("base", "adapter"),
        },
        "texts": {
            "t5": ("t5", None),
            "t5-adapter": ("t5", "t5-adapter"),
            "bart": ("bart", None),
            "bart-adapter": ("bart", "bart-adapter"),
        },
    }
    for data, models in cases.items():
        assert compare(*models, "--data", data, "--rewards", "--batch_size", "4")[0] == 0
        rows = [row for row in cached() if row["path"].split(" on ")[0] in models]
        for row in rows[::2]:
            completion, prompt = json.loads(row["completion"]), json.loads(row["prompt"])
            base, adapter = models[row["path"].split(" on ")[0]]
            assert completion["token_ids"] == generated(base, prompt, adapter)
            assert row["text"] == AutoTokenizer.from_pretrained(base).decode(
                completion["token_ids"], skip_special_tokens=True
            )
            assert completion["truncated"] == (
                completion["token_ids"][-1] != AutoTokenizer.from_pretrained(base).eos_token_id
            )
    assert len({row["text"] for row in cached()}) > 20


def test_nothing_is_generated_twice(compare):
    """Another reward takes the kept completions; changed weights, another length or a seed do not."""
    shutil.copytree("base", "copy")
    argv = ["base", "copy", "adapter", "--data", "rows", "--limit", "3", "--rewards"]
    assert "9 completions generated, 0 taken" in compare(*argv)[1]
    modified = Path("trainOutput/completions.parquet").stat().st_mtime_ns
    status, text, _ = compare(*argv, "rewards.length.length_reward")
    assert status == 0 and "0 completions generated, 9 taken" in text and "length_reward" in text
    assert Path("trainOutput/completions.parquet").stat().st_mtime_ns == modified
    os.utime("copy/model.safetensors")
    assert "3 completions generated, 6 taken" in compare(*argv)[1]
    assert "9 completions generated, 0 taken" in compare(*argv, "--max_new_tokens", "5")[1]
    Path("trainOutput/completions.parquet").write_text("no parquet")
    status, text, _ = compare(*argv)
    assert status == 2 and "trainOutput/completions.parquet: holds no completions" in text and "move it away" in text


def test_a_seed_samples_and_repeats(compare):
    """The same seed gives the same completions anew, another one others; equal prompts are sampled apart."""
    Path("twice.jsonl").write_text("\n".join([json.dumps({"prompt": chat("Where?")})] * 2))
    texts = []
    for seed in ("1", "1", "2"):
        assert compare("base", "--data", "twice.jsonl", "--splits", "train", "--rewards", "--seed", seed)[0] == 0
        texts.append([row["text"] for row in cached()])
        Path("trainOutput/completions.parquet").unlink()
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 2


def test_ctrl_c_keeps_what_was_generated(compare, monkeypatch):
    """And the command ends with status 130; the next one goes on from there."""
    complete, models = LocalModel.complete, []

    def interrupted(model, *args):
        models.append(model)
        if len(models) == 2:
            raise KeyboardInterrupt
        return complete(model, *args)

    monkeypatch.setattr(LocalModel, "complete", interrupted)
    argv = ["base", "adapter", "--data", "rows", "--rewards"]
    assert compare(*argv)[0] == 130 and len(cached()) == 6
    assert "6 completions generated, 6 taken" in compare(*argv)[1]


# What is compared


def test_figures_are_those_of_the_completions(compare):
    """Means by rouge_score itself and by hand; table and Markdown show them; every split is there."""
    status, text, result = compare("base", f"{WHOLE}/final-checkpoint", "--data", "rows")
    assert status == 0 and list(result["splits"]) == ["test"] and result["splits"]["test"]["prompts"] == 6
    figures = result["splits"]["test"]["metrics"]
    assert set(figures) == {"length_reward", "ROUGE-2", "ROUGE-L", *METRICS}
    references = {
        json.dumps(row["prompt"]): row["reference"]
        for row in map(json.loads, Path("rows/test.jsonl").read_text().splitlines())
    }
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    for name in ("base", "final"):
        rows = [row for row in cached() if row["checkpoint"] == name]
        lengths = [len(row["text"]) for row in rows]
        f1 = [scorer.score(references[row["prompt"]], row["text"])["rouge1"].fmeasure for row in rows]
        assert figures["characters"][name]["mean"] == pytest.approx(np.mean(lengths))
        assert figures["length_reward"][name]["mean"] == pytest.approx(np.mean([-abs(50 - n) for n in lengths]))
        assert figures["ROUGE-1"][name]["mean"] == pytest.approx(np.mean(f1))
    mean = f"{figures['characters']['final']['mean']:.2f}"
    assert (
        mean in text
        and mean in Path("out/comparison.md").read_text()
        and "| characters | final |" in Path("out/comparison.md").read_text()
    )
    assert (
        compare_checkpoints.main(
            ["base", "--data", "rows", "--json", "new/a.json", "--rewards", "--max_new_tokens", "2"]
        )
        == 0
    )
    assert compare_checkpoints.main(["base", "--data", "rows", "--json", "new/a.json"]) == 2
    assert compare_checkpoints.main(["base", "--data", "rows", "--json", "new/a.json/b.json"]) == 2


@pytest.mark.parametrize(
    ("kind", "words"),
    {
        "weights cut short": "bad: SafetensorError",
        "adapter without base": "bad: this adapter stands on moved/away",
        "half written": "checkpoint-10: this checkpoint is not whole",
        "no checkpoint": "bad: this folder holds no checkpoint",
        "adapter of another model": "bad: this adapter does not fit its base",
    }.items(),
)
def test_one_bad_checkpoint_costs_no_other(compare, kind, words):
    """Exit status 1, its reason, and the figures that the others have without it."""
    argv = ["base", "adapter", "--data", "rows", "--limit", "2", "--rewards"]
    bad = spoil(kind)
    status, text, result = compare(bad, *argv)
    assert status == 1 and words in text and words in " ".join(result["failed"].values())
    Path("trainOutput/completions.parquet").unlink()
    status, _, alone = compare(*argv)
    assert status == 0 and alone["splits"] == result["splits"] and alone["failed"] == {}


def test_a_prompt_that_is_too_long_for_one_is_left_out_for_all(compare):
    """So that all are compared on the same prompts."""
    status, text, result = compare("base", "narrow", "--data", "rows", "--rewards")
    assert status == 0 and "1 of 6 prompts of test are left out for all: narrow: the prompt's" in text
    assert "do not fit its context of 192" in text
    assert {row["n"] for row in result["splits"]["test"]["metrics"]["truncated"].values()} == {5}
    status, text, _ = compare("narrow", "--data", "rows", "--max_new_tokens", "192")
    assert status == 2 and "nothing is left to compare" in text


def test_models_of_two_kinds_on_the_same_text(compare):
    """Each gets the same text. Chat messages the one with an encoder cannot read, which costs the other nothing."""
    status, text, result = compare("base", "t5", "--data", "texts", "--rewards")
    assert status == 0 and "t5 is another kind of model than base" in text
    assert {row["n"] for row in result["splits"]["test"]["metrics"]["ROUGE-1"].values()} == {4}
    status, text, result = compare("base", "t5", "--data", "rows", "--rewards")
    assert status == 1 and "t5: the prompts are chat messages" in text
    assert list(result["splits"]["test"]["metrics"]["truncated"]) == ["base"]


def test_templates_that_differ_are_told(compare):
    """Each model is asked in its own."""
    shutil.copytree("base", "other")
    Path("other/chat_template.jinja").write_text(TEMPLATE.replace("helpful", "terse"))
    assert "other has another chat template than base" in compare("base", "other", "--data", "rows", "--rewards")[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["base", "--data", "rows", "--splits", "dev"], "there is no split 'dev', only test"),
        (["base", "--data", "empty"], "data empty: cannot be read: a split has no rows"),
        (["base", "--data", "nowhere"], "data nowhere: cannot be read"),
        (["base", "--data", "broken.jsonl"], "data broken.jsonl: cannot be read: line 2: Expecting value. Fix: "),
        (["base", "--data", "rows.txt"], "data rows.txt: cannot be read: unknown ending .txt. Fix: give .jsonl"),
        (["base", "--data", "rows", "--rewards", "rewards.length.lenght_reward"], "did you mean length_reward?"),
        (["base", "--data", "rows", "--rewards", "rewards.choice.choice_reward"], "needs the column answer"),
        (["./none", "./neither", "--data", "rows"], "./neither: there is no such folder"),
        (["base", "--data", "rows", "--max_new_tokens", "0"], "--max_new_tokens: 0 is less than 1"),
        (["--data", "rows"], "name a CHECKPOINT or a --server"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_weights_are_read(compare, monkeypatch, argv, words):
    """With exit status 2 and one sentence that names it."""
    monkeypatch.setattr(LocalModel, "complete", lambda *_: pytest.fail("a model generates"))
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": }\n')
    Path("rows.txt").write_text("a")
    status, text, _ = compare(*argv)
    assert status == 2 and words in text and "Traceback" not in text


# Rewards


MY_REWARD = """
import asyncio

async def vowels(completions, *, most: int = 9, **kwargs):
    await asyncio.sleep(0)
    return [float(min(most, sum(c in "aeiou" for c in each[-1]["content"]))) for each in completions]

def broken(completions, **kwargs):
    raise KeyError("gold")

def gold(completions, gold, **kwargs):
    return [float(len(each)) for each in gold]

def tokens(completion_ids, **kwargs):
    return [None if not ids else float(len(ids)) for ids in completion_ids]
"""


def test_rewards_score_as_in_a_run_and_what_cannot_is_left_out():
    """By keyword, asynchronous ones too, with options, columns and tokens. A fault shows its file and line."""
    Path("my_reward.py").write_text(MY_REWARD)
    names = [f"my_reward.py:{name}" for name in ("vowels", "broken", "gold", "tokens", "nothing")]
    names += ["owner/model", "rewards.judge.judge_reward", "rewards.length.length_reward"]
    options = {"vowels": {"most": 2}}
    rewards = RewardSet(names, options)
    assert list(rewards.functions) == ["vowels", "broken", "tokens", "length_reward"]
    for name in ("gold", "nothing", "model", "judge_reward"):
        assert any(problem.startswith(f"{name} is left out: ") for problem in rewards.problems)
    rewards = RewardSet(names[:4], options, ["gold", "other"])
    prompts, columns = [chat("a"), chat("b")], {"gold": ["four", "fives"], "other": [1, 2]}
    completions = [Completion("aeiou", token_ids=[1, 2]), Completion("xyz", token_ids=[])]
    assert rewards.score(prompts, completions, columns) == {"vowels": [2, 0], "gold": [4, 5], "tokens": [2, None]}
    [problem] = rewards.problems
    assert problem.startswith("broken is left out: ") and "my_reward.py:9: KeyError" in problem
    completions = [replace(each, token_ids=None) for each in completions]
    assert rewards.score(prompts, completions, columns)["tokens"] == [None, None]


def test_a_reward_that_leaves_the_working_directory_harms_nothing(place):
    Path("my_reward.py").write_text("import os\ndef f(completions, **k):\n    os.chdir('/')\n    return [1.0]\n")
    rewards = RewardSet(["my_reward.py:f"])
    assert rewards.score([chat("a")], [Completion("b")], {}) == {"f": [1.0]} and Path.cwd() == place


# Reports of the chat


def test_a_report_on_a_seq2seq_run(capsys):
    """Its prompts are text behind the prefix of the run."""
    make_run(Path(SHORT), "t5", dataset_name="texts", temperature=0.5)
    run_file = Path(SHORT, "run.json")
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"system_prompt": PREFIX}))
    shutil.copytree("t5-adapter", f"{SHORT}/final-checkpoint")
    assert demo_in_chat.main([SHORT, "--prompt", "A cat.", "--temperature", "0", "--output", "it.json"]) == 0
    [turn] = json.loads(Path("it.json").read_text())["turns"]
    assert turn["completions"]["base"]["token_ids"] == generated("t5", f"{PREFIX}A cat.")
    assert turn["completions"]["final"]["token_ids"] == generated("t5", f"{PREFIX}A cat.", "t5-adapter")


def test_a_sample_comes_from_the_runs_own_test_split(place, monkeypatch, capsys):
    """The same rows and completions for the same seed, also from another folder; means stand below them."""
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    turns = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        argv = [str(place / WHOLE / "checkpoint-1"), "--sample", "3", "--seed", seed, "--output", f"{name}.json"]
        assert demo_in_chat.main(argv) == 0
        turns.append(json.loads(Path(f"{name}.json").read_text())["turns"])
        shutil.rmtree("trainOutput")
    prompts = [[turn["prompt"][-1]["content"] for turn in each] for each in turns]
    assert prompts[0] == prompts[1] != prompts[2] and turns[0] == turns[1]
    assert all(turn["prompt"][0]["role"] == "system" and turn["columns"]["reference"] for turn in turns[0])
    assert "characters" in capsys.readouterr().out
    assert (
        demo_in_chat.main([str(place / WHOLE / "checkpoint-1"), "--sample", "1", "--system", "", "--output", "d.json"])
        == 0
    )
    [turn] = json.loads(Path("d.json").read_text())["turns"]
    assert [message["role"] for message in turn["prompt"]] == ["user"]


def test_prompts_of_a_file(capsys):
    """One a line, or rows with further columns."""
    Path("prompts.txt").write_text("Hello?\n\nAnd you?\n")
    assert demo_in_chat.main(["base", "--prompts", "prompts.txt", "--system", "Bark.", "--max_new_tokens", "2"]) == 0
    turns = json.loads(Path("chat-report-1.json").read_text())["turns"]
    assert [turn["prompt"][0]["content"] for turn in turns] == ["Bark."] * 2 and turns[1]["prompt"][1][
        "content"
    ] == "And you?"
    last = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi"}]
    Path("last.jsonl").write_text(json.dumps({"prompt": last}))
    assert demo_in_chat.main(["base", "--prompts", "last.jsonl", "--system", "Bark.", "--max_new_tokens", "2"]) == 0
    (turn,) = json.loads(Path("chat-report-2.json").read_text())["turns"]
    assert turn["prompt"] == [{"role": "system", "content": "Bark."}, *last]
    Path("rows.jsonl").write_text('{"prompt": "Hello?", "gold": "hi"}')
    assert demo_in_chat.main(["base", "--prompts", "rows.jsonl", "--max_new_tokens", "2"]) == 0
    assert json.loads(Path("chat-report-3.json").read_text())["turns"][0]["columns"] == {"gold": "hi"}


# Statistics


def frame_of(scores: dict[str, dict[str, list]]) -> pd.DataFrame:
    """Return a frame as evaluate gives it: metric -> checkpoint -> values."""
    names = list(next(iter(scores.values())))
    rows = len(scores[next(iter(scores))][names[0]])
    frame = pd.DataFrame([{"checkpoint": name, "split": "test", "row": row} for name in names for row in range(rows)])
    for key in set(evaluate.KEYS) - {"checkpoint", "split", "row"}:
        frame[key] = None
    for metric, of in scores.items():
        frame[metric] = [value for name in names for value in of[name]]
    return frame.astype(dict.fromkeys(scores, float))


def test_a_planted_difference_is_found_and_equal_scores_give_none():
    """The pairs decide: a small steady gain is seen through a wide spread."""
    first = np.random.default_rng(7).normal(0, 50, 64)
    better = first + np.random.default_rng(8).normal(1, 1, 64)
    summary = evaluate.summarize(frame_of({"reward": {"base": first, "better": better, "same": first}}))
    base, better, same = summary.to_dict("records")
    assert (
        better["p_holm"] < 0.01 and 0 < better["difference_low"] < better["difference"] < better["difference_high"] < 2
    )
    assert base["low"] < better["mean"] < base["high"], "the intervals of the means alone would not tell"
    assert [same[name] for name in ("difference", "difference_low", "difference_high", "p", "p_holm")] == [
        0,
        0,
        0,
        1,
        1,
    ]
    assert np.isnan(base["p"]) and np.isnan(base["difference"])


def test_what_could_not_be_judged_is_left_out():
    """It is no zero in any figure. A metric that nobody could judge has no mean and no test."""
    scores = {
        "judge": {"base": [1.0, None, 3.0, 2.0, 4.0], "other": [2.0, 5.0, None, 3.0, 5.0]},
        "down": {"base": [None] * 5, "other": [None] * 5},
    }
    base, other, _, down = evaluate.summarize(frame_of(scores)).to_dict("records")
    assert (base["n"], base["mean"], other["mean"], other["difference"]) == (4, 2.5, 3.75, 1)
    assert 1 <= base["low"] < 2.5 < base["high"] <= 4
    assert down["n"] == 0 and np.isnan([down["mean"], down["p"], down["p_holm"]]).all()


def test_the_statistics_are_scipys_and_repeat():
    """Intervals and p by hand, with the same seed; small samples are tested exactly."""
    values = np.random.default_rng(2).exponential(5, 40)
    summary = evaluate.summarize(frame_of({"reward": {"base": values, "other": values[::-1] + 1}}))
    interval = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (summary["low"][0], summary["high"][0]) == pytest.approx(tuple(interval))
    assert evaluate.permutation_p(pd.Series([1.0, 2.0, 3.0, 4.0])) == 2 / 16
    assert list(evaluate.holm(pd.Series([0.04, 0.01, np.nan, 0.03]))) == pytest.approx(
        [0.06, 0.03, np.nan, 0.06], nan_ok=True
    )
    assert list(evaluate.holm(pd.Series([0.9, 0.5]))) == [1, 1]


def test_what_nobody_completed_cannot_be_compared():
    """The reason is told."""
    frame = frame_of({"reward": {"base": [1.0, 2.0]}}).assign(error="base: out of memory")
    with pytest.raises(UserError, match="base: out of memory"):
        evaluate.comparable(frame)


def test_rows_of_save_to_disk_and_of_tables_are_read():
    rows = [{"prompt": "a", "reference": "b"}, {"prompt": "c", "reference": "d"}]
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk("saved")
    Path("rows.tsv").write_text("prompt\treference\na\tb\nc\td\n")
    assert evaluate.data_rows("saved", ["test"]) == {"test": rows}
    assert evaluate.data_rows("rows.tsv", ["train"]) == {"train": rows}


def test_a_frame_has_a_row_for_each_model_and_prompt():
    """With its completion and all metrics."""
    lineup = line_up(["base", "adapter"], None, [])
    rows = evaluate.data_rows("rows", ["test"], limit=2)
    frame = evaluate.evaluate(lineup.models, rows, RewardSet(["rewards.length.length_reward"]), GREEDY)
    assert list(frame["checkpoint"]) == ["base", "base", "adapter", "adapter"] and list(frame["row"]) == [0, 1, 0, 1]
    assert set(frame.columns) >= {*evaluate.KEYS, "length_reward", *METRICS} and frame["error"].isna().all()
    assert frame["completion"][0].rewards == {"length_reward": frame["length_reward"][0]}
    assert list(frame["characters"]) == [len(text) for text in frame["text"]]
