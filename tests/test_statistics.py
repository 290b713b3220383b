"""The figures of a comparison: scipy's to rounding, differences found where they are planted, and None no zero."""

import numpy as np
import pytest

from grpo_launcher.chat import statistics

SAMPLES = {
    "lengths": np.random.default_rng(1).normal(200, 30, 64),
    "a skewed reward": -np.random.default_rng(2).exponential(5, 40),
    "shares cut off": np.random.default_rng(3).integers(0, 2, 25).astype(float),
    "more prompts than one chunk of resamples holds": np.random.default_rng(4).normal(0, 1, 2500),
    "all alike": np.full(10, 0.5),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_intervals_are_scipys(sample):
    """The percentile method's to rounding, and BCa's to a tenth of their width."""
    scipy_stats = pytest.importorskip("scipy.stats")
    ours = statistics.bootstrap(sample[:, None])[0]
    if sample.std() == 0:
        assert list(ours) == [0.5, 0.5]
        return
    settings = {"n_resamples": statistics.RESAMPLES, "batch": max(1, 10**7 // len(sample)), "axis": -1}
    percentile, bca = (
        scipy_stats.bootstrap((sample,), np.mean, method=method, rng=np.random.default_rng(0), **settings).confidence_interval
        for method in ("percentile", "BCa")
    )
    assert ours == pytest.approx(list(percentile), rel=1e-9)
    assert ours == pytest.approx(list(bca), abs=0.1 * (ours[1] - ours[0]))


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_the_paired_test_is_scipys(shift):
    """Up to the luck of either's draw of signs."""
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(5).normal(shift, 1, 60)
    theirs = scipy_stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=99_999, batch=1000, rng=np.random.default_rng(6)
    ).pvalue
    assert statistics.permutation(differences[:, None])[0] == pytest.approx(theirs, abs=0.02)


def test_a_planted_difference_is_found_and_equal_scores_give_none():
    """The pairs decide: the same scores in another order differ nowhere in the mean, and a small steady gain is seen through a wide spread."""
    first = np.random.default_rng(7).normal(0, 50, 64)
    scores = {"reward": {"base": first, "better": first + np.random.default_rng(8).normal(1, 1, 64), "same": first}}
    found = statistics.compare(scores)["reward"]
    better, same = found["better"], found["same"]
    assert better["p_holm"] < 0.01 and 0 < better["difference_low"] < better["difference"] < better["difference_high"] < 2
    assert found["base"]["low"] < better["mean"] < found["base"]["high"], "the intervals of the means alone would not tell"
    assert (same["difference"], same["difference_low"], same["difference_high"], same["p"], same["p_holm"]) == (0, 0, 0, 1, 1)
    assert "p" not in found["base"]


def test_what_could_not_be_judged_is_left_out():
    """None is no zero, in no figure; and a metric that nobody could judge is no number."""
    first = [1.0, None, 3.0, 2.0, 4.0]
    other = [2.0, 5.0, None, 3.0, 5.0]
    found = statistics.compare({"judge": {"base": first, "other": other}, "down": {"base": [None] * 5, "other": [None] * 5}})
    assert (found["judge"]["base"]["n"], found["judge"]["base"]["mean"], found["judge"]["other"]["mean"]) == (4, 2.5, 3.75)
    assert found["judge"]["other"]["difference"] == 1 and 1 <= found["judge"]["base"]["low"] < 2.5 < found["judge"]["base"]["high"] <= 4
    assert found["down"]["other"]["mean"] is None and found["down"]["other"]["p"] is None and "p_holm" not in found["down"]["other"]


def test_holms_correction():
    """By hand: the smallest three times, the next twice or as much as the one before."""
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
