"""What one step says of a recipe."""

import numpy as np
import pandas
import pytest

from grpo_launcher.verdict import verdict


def step(rewards, tokens=40, cut_off=False) -> pandas.DataFrame:
    """Return completions. rewards: an array (groups, completions of each)."""
    rewards = np.asarray(rewards, dtype=float)
    frame = pandas.DataFrame({"reward": rewards.ravel(), "group": np.repeat(range(len(rewards)), rewards.shape[1])})
    return frame.assign(tokens=tokens, cut_off=cut_off)


SPREAD = [[0, 1, 1, 0]] * 4
WRONG, RIGHT = [[0] * 4] * 12, [[1] * 4] * 12


@pytest.mark.parametrize(
    ("frame", "kinds", "said"),
    [
        (step(SPREAD), [], ""),
        (step(SPREAD + WRONG[:4]), [], ""),
        (step(SPREAD + WRONG), ["no spread"], "all wrong"),
        (step(SPREAD + RIGHT), ["no spread"], "all right"),
        (step(WRONG), ["no spread"], "100% all wrong"),
        (step(RIGHT), ["no spread"], "100% all right"),
        (step([[0.3] * 4] * 8), ["no spread"], "100% all the same"),
        (step([[np.nan] * 4] * 8), ["no spread"], "100% not rated"),
        (step([[3] * 4] * 8), ["no spread"], "100% all the same: reward 3"),  # of a judge, from 0 to 10
        (step([[9] * 4] * 8 + [[9.5, 9.6, 9.7, 9.7]]), ["no spread"], "89% all the same: reward 9"),
        (step([[0, 0, 1.2, 0.2]] + [[0] * 4] * 4), ["no spread"], "80% all wrong: reward 0"),  # 1 and 0.2 for the form
        (
            step([[1, 2, 2, 2]] + [[1] * 4] * 4),
            ["no spread"],
            "80% all the same: reward 1",
        ),  # one point of several is no fault
        (step([[-1, 1, 1, 1]] + [[-1] * 4] * 4), ["no spread"], "80% all wrong: reward -1"),
        (step(SPREAD, tokens=64, cut_off=True), ["cut off"], "100% of the completions"),
        (step(WRONG, tokens=64, cut_off=True), ["cut off", "no spread"], "all cut off"),
        (step(RIGHT, tokens=64, cut_off=True), ["cut off", "no spread"], "all right"),
    ],
)
def test_what_keeps_a_step_from_teaching_is_named(frame, kinds, said):
    found = verdict(frame, limit=64, full_marks=1.0)
    assert list(found) == kinds and said in " ".join(found.values())
    assert all("Fix: " in text for text in found.values())
    assert verdict(frame, 64, 1.0, told=kinds) == dict.fromkeys(kinds)


def number_before(text: str, mark: str) -> float:
    """Return the number in front of a mark."""
    return float(text.partition(mark)[0].split().pop())


def test_the_share_with_twice_the_generations_is_near_the_truth():
    """Prompts of very different difficulty, 400 groups of 8; counted with 16."""
    random = np.random.default_rng(0)
    right = random.beta(0.15, 0.9, size=(400, 1))
    text = verdict(step(random.random((400, 8)) < right), 64, 1.0)["no spread"]
    again = (random.random((400, 16)) < right).sum(axis=1)
    truth = 100 * np.mean((again == 0) | (again == 16))
    assert "num_generations: 16" in text
    assert number_before(text.partition("num_generations: 16")[2], "%") == pytest.approx(truth, abs=5)


def test_the_length_that_would_do_is_near_the_truth():
    """Lognormal lengths, of which 70 % are cut off."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(6.0, 0.5, size=(64, 8))
    limit = int(np.quantile(lengths, 0.3))
    frame = step(random.random((64, 8)), np.minimum(lengths, limit).ravel(), (lengths > limit).ravel())
    text = verdict(frame, limit, 1.0)["cut off"]
    most = float(text.partition("90 % up to ")[2].partition(".")[0])
    assert most == pytest.approx(np.quantile(lengths, 0.9), rel=0.3)
