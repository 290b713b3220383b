"""report.py: which curves are drawn, what is refused, and what the model card holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml
from huggingface_hub import ModelCard
from matplotlib.image import imread
from tiny_models import make_run

from grpo_launcher import report
from grpo_launcher.callbacks import print_summary
from grpo_launcher.report import figure, plot_run, write_card
from grpo_launcher.runs import Run


def step(number: int, **changes) -> dict:
    """Return a logged line of a run with two rewards."""
    reward = number - 10.0
    return {
        "step": number,
        "reward": reward,
        "reward_std": 2.0,
        "rewards/a/mean": reward - 1.0,
        "rewards/a/std": 2.0,
        "rewards/b/mean": 1.0,
        "rewards/b/std": 0.5,
        "completions/mean_length": 70.0,
        "completions/clipped_ratio": 0.0,
        "frac_reward_zero_std": 0.25,
        "kl": 0.1,
        "entropy": 0.4,
        "grad_norm": 0.2,
        "num_tokens": 1000.0 * number,
        "step_time": 2.0,
        **changes,
    }


def write_run(folder: Path, lines: list[dict], rest: str = "") -> Path:
    """Write a run of these logged lines; rest: the beginning of the next one."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return folder


def panels(*runs: Path) -> dict[str, list[tuple[list, list]]]:
    """Return title -> steps and values of every line in the panel."""
    axes = [axis for axis in figure(list(runs)).axes if axis.get_title()]
    return {
        axis.get_title(): [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] for axis in axes
    }


def test_every_watched_metric_has_a_panel(tmp_path):
    drawn = panels(write_run(tmp_path / "run", [step(n) for n in range(1, 6)]))
    assert drawn["reward (weighted sum)"] == [([1, 2, 3, 4, 5], [-9, -8, -7, -6, -5])]
    assert drawn["b"] == [([1, 2, 3, 4, 5], [1.0] * 5)]
    assert drawn["groups without variance (share)"][0][1] == [0.25] * 5
    titles = {"a", "length (tokens)", "KL (nats per token)", "entropy (nats per token)", "gradient norm"}
    assert titles | {"completions cut off (share)", "tokens per second"} < set(drawn)


def test_the_only_reward_with_a_weight_is_drawn_once(tmp_path):
    """The measure b beside it keeps its panel."""
    lines = [step(n, **{"rewards/a/mean": n - 10.0}) for n in (1, 2)]
    drawn = panels(write_run(tmp_path / "run", lines))
    assert {"reward (a)", "b"} <= set(drawn) and not {"a", "reward (weighted sum)"} & set(drawn)


def test_a_supervised_run_shows_its_loss(tmp_path):
    lines = [{"step": n, "loss": 1.0, "mean_token_accuracy": 0.5, "grad_norm": 1.0} for n in (1, 2)]
    assert set(panels(write_run(tmp_path / "run", lines))) == {*report.SFT_PANELS.values(), "gradient norm"}


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        pytest.param([step(1), step(2)], [1, 2], id="a line a step"),
        pytest.param([step(5), step(10)], [5, 10], id="a line every five steps"),
        pytest.param([step(1), step(2, num_tokens=1000.0), step(3)], [1, 3], id="generation at every second step"),
        pytest.param([step(1), {"step": 1, "eval_reward": 0.0, "eval_num_tokens": 1e9}, step(2)], [1, 2], id="eval"),
    ],
)
def test_tokens_per_second(lines, steps, tmp_path):
    """The tokens since they last rose, over the time of the steps since then."""
    assert panels(write_run(tmp_path / "run", lines))["tokens per second"] == [(steps, [500, 500])]


def test_standard_deviation_and_held_out_figures_are_drawn(tmp_path):
    lines = [step(1), step(2), {"step": 2, "eval_reward": -3.0, "eval_kl": 0.3}, step(3)]
    run = write_run(tmp_path / "run", lines)
    assert panels(run)["reward (weighted sum)"] == [([1, 2, 3], [-9, -8, -7]), ([2], [-3])]
    picture = figure([run])
    extents = picture.axes[0].collections[0].get_paths()[0].get_extents()
    assert (extents.ymin, extents.ymax) == (-11, -5)
    assert "held out" in [text.get_text() for text in picture.legends[0].get_texts()]


def test_parts_of_a_reward_are_stacked_and_measures_dashed(tmp_path):
    """One panel with 2 × a and 1 × b, of which b is negative; the measure c has no part in it."""
    make_run(tmp_path, "model", reward_funcs=["a", "b", "c"], reward_weights=[2, 1, 0])
    lines = [
        {"step": step, "reward": 2 * step - 1, "reward_std": 1.0}
        | {"rewards/a/mean": step, "rewards/b/mean": -1.0, "rewards/c/mean": 0.5}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = {axis.get_title(): axis for axis in figure([tmp_path]).axes}
    areas = panels["reward (weighted sum)"].collections
    assert [area.get_label() for area in areas] == ["2 × a", "1 × b"]
    extents = [area.get_paths()[0].get_extents().intervaly.tolist() for area in areas]
    assert extents == [[0, 4], [-1, 0]]
    assert panels["c"].lines[0].get_linestyle() == "--" and panels["a"].lines[0].get_linestyle() == "-"


def test_a_run_without_any_rating_is_drawn(tmp_path):
    """A reward that took too long each time rates nothing, and its figures are null in every line."""
    nothing = dict.fromkeys(["reward", "reward_std", "rewards/a/mean", "rewards/a/std"])
    run = write_run(tmp_path / "run", [step(number, **nothing) for number in range(9)])
    assert plot_run(run).exists() and panels(run)["b"] == [(list(range(9)), [1.0] * 9)]
    print_summary(run)  # of nothing


def test_several_runs_are_told_apart_without_colour(tmp_path):
    runs = [write_run(tmp_path / f"short/{n}", [step(s) for s in range(1, 3 + n)]) for n in range(1, 6)]
    picture = figure(runs)
    lines = picture.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [3, 4, 5, 6, 7]
    assert len({line.get_marker() for line in lines}) == 5 and len({line.get_linestyle() for line in lines}) > 3
    assert [text.get_text() for text in picture.legends[0].get_texts()] == [f"short/{n}" for n in range(1, 6)]


def test_a_run_in_progress_is_drawn_into_its_own_folder(tmp_path):
    """Half a line, NaN, infinity and None do not hinder it; an older picture is replaced."""
    lines = [step(1), step(2, reward=float("nan"), grad_norm=float("inf")), step(3, kl=None)]
    run = write_run(tmp_path / "run", lines, '{"step": 4, "rew')
    (run / "curves.svg").write_text("an older one")
    assert panels(run)["reward (weighted sum)"][0][0] == [1, 3]
    assert plot_run(run) == run / "curves.png"
    assert imread(run / "curves.png").shape[1] > 1000 and "<svg " in (run / "curves.svg").read_text()


def test_nothing_logged_yet_is_no_picture(tmp_path):
    run = write_run(tmp_path / "run", [], '{"step": 1')
    assert figure([run]) is None and plot_run(run) is None and not list(run.glob("curves*"))


def test_panels_of_many_rewards_do_not_overlap(tmp_path):
    many = {f"rewards/a_rather_long_reward_name_{n}/mean": 1e5 * n for n in range(6)}
    picture = figure([write_run(tmp_path / "run", [step(n, **many) for n in range(1, 1200)])])
    picture.draw_without_rendering()
    boxes = [axis.get_tightbbox() for axis in picture.axes if axis.axison]
    assert len(boxes) == 16
    for number, box in enumerate(boxes):
        assert picture.bbox.contains(box.x0, box.y0) and picture.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_the_command_draws_and_replaces_nothing_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        write_run(tmp_path / f"run{number}", [step(1), step(2)])
    assert report.main(["run1"]) == 0
    assert capsys.readouterr().out == "Wrote run1/curves.png\n"
    report.main(["run1", "run2", "--output", "both.svg"])
    assert (tmp_path / "both.svg").read_text().count("<svg ") == 1
    report.main(["run1", "--overwrite"])
    for argv, message in {
        ("run1", "run2"): "--output FILE is needed",
        ("run1", "--output", "a.txt"): "must be .png, .svg or .pdf",
    }.items():
        with pytest.raises(SystemExit) as refused:
            report.main([*argv])
        assert refused.value.code == 2 and message in capsys.readouterr().err
    (tmp_path / "full.svg").mkdir()
    for argv, message in {
        ("run1",): "run1/curves.png: exists already",
        ("nowhere",): "nowhere/metrics.jsonl: is not there",
        ("run1", "--output", "full.svg"): "full.svg: is a folder",
        ("run1", "--output", "run1/metrics.jsonl/a.svg"): "cannot be made or written: Not a directory",
    }.items():
        assert report.main([*argv]) == 2 and message in capsys.readouterr().err


def test_curves_are_drawn_without_torch():
    program = "import sys, grpo_launcher.report; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


VALUES = {
    "method": "grpo",
    "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dataset_name": "trl-lib/tldr",
    "reward_funcs": ["rewards.length.length_reward", "/home/jane/mine.py:judge"],
    "reward_kwargs": {"judge": {"template": "/home/jane/judge.txt", "model": "Qwen/Qwen2.5-7B-Instruct"}},
    "learning_rate": 1e-6,
    "hub_token": "hf_secret",
    "vllm_server_port": 1234,
    "deepspeed": "/home/jane/zero.json",
    "output_dir": "/home/jane/trainOutput/short/3",
}


def rows(number: int, *completions: tuple) -> list[dict]:
    """Return what TRL keeps of a step: (prompt, completion, advantage) each."""
    return [
        {
            "step": number,
            "prompt": prompt,
            "completion": text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],
            "advantage": advantage,
        }
        for prompt, text, advantage in completions
    ]


def user(text: str) -> list[dict]:
    """Return a prompt as chat messages."""
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}]


@pytest.fixture
def card(tmp_path):
    """Return a function (values, rows of the first step, rows of the last step) -> text of the card."""

    def write(changes: dict, *steps: list[dict], config: dict | None = None) -> str:
        run, values = tmp_path / "short/3", VALUES | changes
        write_run(run, [{"step": n, "reward": float(n), "kl": 0.125} for n in range(1, 11)])
        (run / "final-checkpoint").mkdir()
        (run / "completions").mkdir()
        Run(
            run, "short", {"max_completion_length": 64, **values}, list(values), "Be short.", versions={"trl": "1"}
        ).write()
        for name, content in (config or {}).items():
            (run / "final-checkpoint" / name).write_text(json.dumps(content))
        for number, kept in enumerate(steps):
            pandas.DataFrame(kept).to_parquet(run / f"completions/completions_{number:05}.parquet")
        plot_run(run)
        write_card(run / "final-checkpoint")
        return (run / "final-checkpoint/README.md").read_text()

    return write


def test_the_card_says_what_was_done(card, tmp_path):
    text = card({})
    header = ModelCard(text).data.to_dict()
    assert header["base_model"] == "Qwen/Qwen2.5-1.5B-Instruct" and header["base_model_relation"] == "finetune"
    assert header["datasets"] == ["trl-lib/tldr"] and header["library_name"] == "transformers"
    assert "grpo" in header["tags"]
    assert "# short/3\n" in text and "| reward | 2 | 8 |" in text and "| kl | 0.125 | 0.125 |" in text
    assert "on the prompts of `trl-lib/tldr`" in text and "Made with trl 1." in text and "merge" not in text
    final = tmp_path / "short/3/final-checkpoint"
    assert (final / "curves.png").read_bytes() == (final.parent / "curves.png").read_bytes()


def test_the_card_keeps_this_machine_to_itself(card):
    """No folder, port or token; a local model or dataset is not in the header."""
    text = card({"model_name_or_path": "/home/jane/models/base", "dataset_name": "/home/jane/rows.jsonl"})
    assert not re.search("jane|hf_secret|1234", text)
    assert not {"base_model", "datasets", "base_model_relation"} & set(ModelCard(text).data.to_dict())
    assert "`base`, trained with" in text and "the prompts of `rows.jsonl`" in text
    assert yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.S)[1]) == {
        "method": "grpo",
        "reward_funcs": ["rewards.length.length_reward", "mine.py:judge"],
        "reward_kwargs": {"judge": {"template": "judge.txt", "model": "Qwen/Qwen2.5-7B-Instruct"}},
        "learning_rate": 1e-6,
        "deepspeed": "zero.json",
    }


def test_samples_are_typical_completions_to_prompts_that_are_alike(card):
    """Of the first and of the last step, the middle one of the group by advantage."""
    bike, soup = user("My brother sold my bike."), user("How is soup made?")
    first = rows(1, (soup, "worst", -1.0), (soup, "typical soup", 0.0), (soup, "best", 1.0), (bike, "x", 0.0))
    last = rows(10, (user("How is good soup made?"), "typical last", 0.1), (user("A cat."), "y", 0.0))
    text = card({}, first, last)
    positions = [text.index(part) for part in ("step 1:", "typical soup", "step 10:", "typical last")]
    assert positions == sorted(positions) and "12 characters" in text
    assert not re.search("worst|best|bike|cat", text.split("## Use")[0].split("## Samples")[1])
    assert '{"role": "system", "content": "Be short."}' in text


def test_completions_cannot_leave_their_frame(card):
    text = card({}, rows(1, ("Say:", "```\n# A heading\n````", 0.0)), rows(2, ("Say:", "fine", 0.0)))
    assert "`````text\n```\n# A heading\n````\n`````\n" in text
    assert 'tokenizer("...", return_tensors="pt")' in text, "plain-text prompts are no chat messages"


def test_the_card_of_a_seq2seq_adapter_by_sft(card):
    config = {"adapter_config.json": {"task_type": "SEQ_2_SEQ_LM"}}
    text = card({"method": "sft", "model_name_or_path": "google-t5/t5-small", "lora_dropout": 0.0}, config=config)
    header = ModelCard(text).data.to_dict()
    assert header["library_name"] == "peft" and header["base_model_relation"] == "adapter"
    assert {"lora", "sft"} < set(header["tags"]) and header["pipeline_tag"] == "summarization"
    assert "on the references of" in text and "lora_dropout: 0.0" in text
    assert "AutoPeftModelForSeq2SeqLM" in text and "merge_and_unload" in text
