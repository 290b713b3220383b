"""Scoring a run's completions by another reward."""

import json

import numpy as np
import pytest
from scipy import stats
from tiny_models import write_rollouts

from grpo_launcher import rescore, rollouts
from grpo_launcher.errors import EXIT_REFUSED

REWARD = '''
def questions(completions, reference, completion_ids, *, points=1.0, **columns):
    """One for each question mark; the rows' columns and the token ids are there."""
    assert set(reference) == {"gold"} and all(ids == [7] for ids in completion_ids)
    return [points * completion[-1]["content"].count("?") for completion in completions]


async def nothing(completions, **columns):
    """Rate nothing."""
    return [None] * len(completions)
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two steps of three groups of four, with random rewards and question marks."""
    random = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    for step in (3, 8):
        rows = [
            {
                "prompt": f"Prompt {number // 4}",
                "completion": "What" + "?" * random.integers(0, 5),
                "reference": "gold",
            }
            | {"points": random.normal(), rollouts.IDS: [7]}
            for number in range(12)
        ]
        write_rollouts(tmp_path / "run", step, rows, reward_funcs="points", num_generations=4)
    return tmp_path / "run"


def test_the_table_is_that_of_a_direct_computation(run, capsys):
    arguments = [str(run), "--reward_funcs", "mine.py:questions", "--reward_kwargs", '{"questions": {"points": 2}}']
    assert rescore.main(arguments) == 0
    text = capsys.readouterr().out
    written = json.loads((run / "rescore-questions.json").read_text())
    assert [row["step"] for row in written["steps"]] == [3, 8] and len(written["most"]) == 5
    for row in written["steps"]:
        frame = rollouts.load(run, row["step"])
        old = frame["reward"].to_numpy().reshape(3, 4)
        new = np.array([2.0 * text.count("?") for text in frame["text"]]).reshape(3, 4)
        within = [values - values.mean(axis=1, keepdims=True) for values in (old, new)]
        best = [new[group, old[group].argmax()] < new[group].max() for group in range(3)]
        expected = [old.mean(), old.std(axis=1).mean(), new.mean(), new.std(axis=1).mean()]
        expected += [stats.spearmanr(*map(np.ravel, within)).statistic, np.mean(best)]
        assert [row[name] for name in rescore.COLUMNS[1:]] == pytest.approx(expected)
    first = written["most"][0]
    assert first["text"] in text and (run / "rescore-questions.png").stat().st_size > 5000
    assert rescore.main(arguments) == EXIT_REFUSED and "--overwrite" in capsys.readouterr().err
    assert rescore.main([*arguments, "--overwrite"]) == 0


def test_a_reward_that_rates_nothing_gives_no_figures_and_no_nan(run):
    assert rescore.main([str(run), "--reward_funcs", "mine.py:nothing"]) == 0
    row = json.loads((run / "rescore-nothing.json").read_text())["steps"][0]
    assert row["new mean"] is None and row["rank correlation"] is None and row["old mean"] is not None


@pytest.mark.parametrize("name", ["mine.py:missing", "some/reward-model"])
def test_a_reward_that_cannot_be_called_is_refused(run, capsys, name):
    assert rescore.main([str(run), "--reward_funcs", name]) == EXIT_REFUSED
    assert "error: " in capsys.readouterr().err
