"""Curves from metrics.jsonl alone: what is drawn, for which runs, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib.image import imread

from grpo_launcher.report import figure, plot_run


def write_run(folder: Path, lines: list[dict], rest: str = "") -> Path:
    """A run of these logged lines; `rest` is what a kill or a mid-run look leaves of the next one."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return folder


def step(number: int, **changes) -> dict:
    """A logged line as a run of two rewards has it."""
    reward = number - 10.0
    shares = {"completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.25}
    speed = {"num_tokens": 1000.0 * number, "step_time": 2.0}
    rewards = {"reward": reward, "reward_std": 2.0, "rewards/a/mean": reward, "rewards/a/std": 2.0, "rewards/b/mean": 1.0, "rewards/b/std": 0.5}
    return {"step": number, "completions/mean_length": 70.0, "kl": 0.1, "entropy": 0.4, "grad_norm": 0.2} | shares | speed | rewards | changes


def curves(runs: list[Path]) -> dict[str, list[tuple[list, list]]]:
    """Title of a panel → steps and values of every line in it."""
    return {axis.get_title(): [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] for axis in figure(runs).axes if axis.get_title()}


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python -m grpo_launcher.report` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "grpo_launcher.report", *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_every_figure_that_is_watched_has_a_panel(tmp_path):
    """With the very values of the log, and units."""
    drawn = curves([write_run(tmp_path / "run", [step(n) for n in range(1, 6)])])
    assert drawn["reward (weighted sum)"] == [([1, 2, 3, 4, 5], [-9, -8, -7, -6, -5])]
    assert drawn["b"] == [([1, 2, 3, 4, 5], [1.0] * 5)]
    assert drawn["groups without variance (share)"][0][1] == [0.25] * 5
    assert {"a", "length (tokens)", "KL (nats per token)", "entropy (nats per token)", "replies cut off (share)", "gradient norm"} < set(drawn)


@pytest.mark.parametrize(
    ("lines", "steps", "speed"),
    [
        pytest.param([step(1), step(2)], [1, 2], [500, 500], id="a line a step"),
        pytest.param([step(5), step(10)], [5, 10], [500, 500], id="a line every five steps holds their mean time"),
        pytest.param([step(1), step(2, num_tokens=1000.0), step(3)], [1, 3], [500, 500], id="replies drawn at every second step alone"),
        pytest.param([step(1), {"step": 1, "eval_reward": 0.0, "eval_num_tokens": 1e9}, step(2)], [1, 2], [500, 500], id="held-out lines between"),
    ],
)
def test_tokens_per_second(lines, steps, speed, tmp_path):
    """Tokens since they last rose, over the step times since then."""
    assert curves([write_run(tmp_path / "run", lines)])["tokens per second"] == [(steps, speed)]


def test_a_single_reward_is_drawn_once(tmp_path):
    """The panel of the reward names it."""
    lines = [{name: value for name, value in step(n).items() if "/b/" not in name} for n in (1, 2)]
    titles = curves([write_run(tmp_path / "run", lines)])
    assert "reward (a)" in titles and "a" not in titles


def test_the_spread_of_the_replies_is_shaded(tmp_path):
    """Around the reward and each component of it, one standard deviation."""
    axis = figure([write_run(tmp_path / "run", [step(1), step(2)])]).axes[0]
    extents = axis.collections[0].get_paths()[0].get_extents()
    assert (extents.ymin, extents.ymax) == (-11, -6)


def test_held_out_figures_stand_beside_those_of_training(tmp_path):
    """eval_… in the same panel, over its own steps, and named in the legend."""
    run = write_run(tmp_path / "run", [step(1), step(2), {"step": 2, "eval_reward": -3.0, "eval_kl": 0.3}, step(3)])
    assert curves([run])["reward (weighted sum)"] == [([1, 2, 3], [-9, -8, -7]), ([2], [-3])]
    assert "held out" in [text.get_text() for text in figure([run]).legends[0].get_texts()]


def test_several_runs_lie_over_one_another_and_are_told_apart_without_colour(tmp_path):
    """Each with its own dash and marker, and its name in the legend."""
    runs = [write_run(tmp_path / f"trainOutput/short/{n}", [step(s) for s in range(1, 3 + n)]) for n in range(1, 6)]
    lines = figure(runs).axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [3, 4, 5, 6, 7]
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in lines}) == 5 == len({line.get_marker() for line in lines})
    assert [text.get_text() for text in figure(runs).legends[0].get_texts()] == [f"short/{n}" for n in range(1, 6)]


@pytest.mark.parametrize(
    ("lines", "rest", "steps"),
    [
        pytest.param([step(1), step(2)], '{"step": 3, "rew', [1, 2], id="half a line at the end"),
        pytest.param([step(1), step(2, reward=float("nan")), step(3, kl=None)], "", [1, 2, 3], id="nan and None"),
        pytest.param([step(1)], "", [1], id="one step"),
    ],
)
def test_a_run_in_the_middle_is_drawn(lines, rest, steps, tmp_path):
    """Whatever the file holds at that moment."""
    run = write_run(tmp_path / "run", lines, rest)
    assert curves([run])["reward (weighted sum)"][0][0] == steps


def test_a_run_draws_into_its_own_folder(tmp_path):
    """Both kinds, over those that are there; figures that are none do not hinder it."""
    run = write_run(tmp_path / "run", [step(1), step(2, reward=float("nan"), grad_norm=float("inf")), step(3, kl=None)], '{"step": 3, "rew')
    (run / "curves.svg").write_text("an older one")
    assert plot_run(run) == run / "curves.png"
    assert imread(run / "curves.png").shape[1] > 1000 and "<svg " in (run / "curves.svg").read_text()


def test_nothing_logged_yet_is_no_picture(tmp_path):
    """As a run is before its first step."""
    run = write_run(tmp_path / "run", [], '{"step": 1')
    assert figure([run]) is None and plot_run(run) is None and not list(run.glob("curves*"))


def test_a_run_of_many_rewards_and_steps_stays_inside_the_picture(tmp_path):
    """No title or tick runs into another panel's."""
    many = {f"rewards/a_rather_long_reward_name_{n}/mean": 1e5 * n for n in range(6)}
    drawn = figure([write_run(tmp_path / "run", [step(n) | many for n in range(1, 1200)])])
    drawn.draw_without_rendering()
    boxes = [axis.get_tightbbox() for axis in drawn.axes if axis.axison]
    assert len(boxes) == 16
    for number, box in enumerate(boxes):
        assert drawn.bbox.contains(box.x0, box.y0) and drawn.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_the_command_writes_and_replaces_nothing_unasked(tmp_path):
    """One run into its own folder, several into a file that was named; no torch and no trl is loaded for it."""
    for number in (1, 2):
        write_run(tmp_path / f"run{number}", [step(1), step(2)])
    assert command(tmp_path, "run1").stdout == "Wrote run1/curves.png\n"
    again = command(tmp_path, "run1")
    assert again.returncode == 2 and "run1/curves.png exists; add --overwrite" in again.stderr
    assert command(tmp_path, "run1", "run2", "--output", "both.svg").returncode == 0
    assert (tmp_path / "both.svg").read_text().count("<svg ") == 1
    loaded = "import sys, grpo_launcher.report; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["run", "run"], "--output FILE is needed for several runs", id="several runs and no file"),
        pytest.param(["run", "--output", "a.txt"], "a.txt: the ending must be .png, .svg or .pdf", id="not a picture"),
        pytest.param(["nowhere"], "nowhere/metrics.jsonl is not there or holds no step yet", id="not a run"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, said, tmp_path):
    """With the remedy."""
    write_run(tmp_path / "run", [step(1)])
    done = command(tmp_path, *arguments)
    assert done.returncode == 2 and said in done.stderr
