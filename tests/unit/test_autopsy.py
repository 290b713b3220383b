"""What a run's reward has paid for."""

import json

import numpy as np
import pytest
from tiny_models import write_rollouts

from grpo_launcher import autopsy, rollouts
from grpo_launcher.errors import EXIT_REFUSED


def write(run, reward, measure=None, steps=8):
    """Write a run. reward: of (length in characters, number of the step); so is measure."""
    random = np.random.default_rng(0)
    for step in range(1, steps + 1):
        rows = []
        for number in range(40):
            words = int(random.integers(1, 60))
            text = " ".join(["The", *random.choice(["cat", "sat", "mat", "moon", "on"], words)])
            row = {"prompt": f"Prompt {number // 8}", "completion": text, rollouts.CUT_OFF: words > 50}
            row["points"] = float(reward(len(text), step))
            if measure:
                row["measure"] = float(measure(len(text), step))
            rows.append(row)
        points = np.array([row["points"] for row in rows]).reshape(-1, 8)
        for row, advantage in zip(rows, (points - points.mean(axis=1, keepdims=True)).ravel(), strict=True):
            row["advantage"] = advantage
        fields = {"reward_funcs": ["points", "measure"], "reward_weights": [1, 0]} if measure else {}
        write_rollouts(run, step, rows, num_generations=8, **fields or {"reward_funcs": "points"})


def examine(run, capsys) -> tuple[str, dict]:
    """Return what the command prints and writes."""
    assert autopsy.main([str(run)]) == 0
    return capsys.readouterr().out, json.loads((run / "autopsy.json").read_text())


def test_a_reward_for_length_is_named_and_a_random_one_is_not(tmp_path, capsys):
    """The first pays for a length of 100 characters, on both sides of it."""
    random = np.random.default_rng(1)
    write(tmp_path / "length", lambda length, step: -abs(length - 100))
    write(tmp_path / "random", lambda length, step: random.normal(), steps=2)
    text, found = examine(tmp_path / "length", capsys)
    assert "Warning: Length explains" in text and found["length explains"] > 0.9
    assert (tmp_path / "length/autopsy.png").stat().st_size > 5000
    text, found = examine(tmp_path / "random", capsys)
    assert "Warning" not in text and found["length explains"] < 0.2 and found["warnings"] == []
    length = next(row for row in found["features"] if row["feature"].startswith("length"))
    assert abs(length["correlation"]) < 0.3 and length["low"] < 0 < length["high"]


def test_shorter_is_better_and_cut_off_is_worse_have_their_signs(tmp_path, capsys):
    write(tmp_path / "run", lambda length, step: -length)
    _, found = examine(tmp_path / "run", capsys)
    rows = {row["feature"]: row for row in found["features"]}
    assert rows["length (characters)"]["correlation"] == pytest.approx(-1)
    assert rows["cut off"]["high"] < 0
    assert not any(name.startswith("begins") for name in rows), "all begin with the same word"


def test_a_reward_that_rises_while_every_measure_falls_is_named(tmp_path, capsys):
    write(tmp_path / "hacked", lambda length, step: length + 100 * step, lambda length, step: -step)
    assert "measure" in " ".join(examine(tmp_path / "hacked", capsys)[1]["warnings"])
    write(tmp_path / "honest", lambda length, step: length + 100 * step, lambda length, step: step)
    assert "measure" not in " ".join(examine(tmp_path / "honest", capsys)[1]["warnings"])


def test_shares_of_the_advantage_are_those_of_the_weighted_rewards(tmp_path):
    rows = [
        {"prompt": "One?", "completion": "a", "large": large, "small": small, "measure": 100.0 * large}
        for large in (0.0, 3.0)
        for small in (0.0, 1.0)
    ]
    fields = {"reward_funcs": ["large", "small", "measure"], "reward_weights": [1, 2, 0], "num_generations": 4}
    write_rollouts(tmp_path / "run", 1, rows, **fields)
    shares = autopsy.shares(rollouts.load(tmp_path / "run", 1))
    assert shares == pytest.approx({"large": 9 / 13, "small": 4 / 13})


def test_a_reward_that_never_differs_has_paid_for_nothing(tmp_path, capsys):
    write(tmp_path / "flat", lambda length, step: 1.0)
    text, found = examine(tmp_path / "flat", capsys)
    assert "hardly a group had spread" in text and "nan" not in text.lower()
    assert found["length explains"] is None and found["warnings"] == []


def test_a_run_without_completions_is_refused(tmp_path, capsys):
    assert autopsy.main([str(tmp_path)]) == EXIT_REFUSED
    assert "no completions" in capsys.readouterr().err
