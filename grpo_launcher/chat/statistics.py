"""Means over prompts with bootstrap intervals, and tests of each checkpoint against the first one, pair by pair. Needs numpy alone."""

import numpy as np

RESAMPLES = 9999
LEVEL = 0.05  # of a difference that is called one, after correction
METHOD = (
    f"Means over prompts with 95 % percentile bootstrap intervals ({RESAMPLES} resamples of the prompts, seed 0); the difference from the first checkpoint, "
    "its interval likewise over pairs; and p of a two-sided paired permutation test (random signs of the differences), Holm-corrected over all p of a "
    "split; * below 0.05. A prompt that a metric could not judge is left out of that metric. distinct-1/2/3: mean over the replies, not of the whole corpus."
)


def compare(scores: dict[str, dict[str, list[float | None]]], seed: int = 0) -> dict[str, dict[str, dict]]:
    """Figures by metric and checkpoint, from the scores of each, which are those of the same prompts in the same order (None: not judged).

    Figures: n, mean, low and high; for all checkpoints but the first `difference`, its low and high, p and p_holm too. None where too few were judged.
    """
    columns = [(metric, checkpoint) for metric, of in scores.items() for checkpoint in of]
    first = {metric: next(iter(of)) for metric, of in scores.items()}
    table = np.array([scores[metric][checkpoint] for metric, checkpoint in columns], dtype=float).T  # prompts × columns; None becomes nan
    differences = table - np.stack([table[:, columns.index((metric, first[metric]))] for metric, _ in columns], axis=1)
    intervals, difference_intervals = bootstrap(table, seed), bootstrap(differences, seed)
    p = permutation(differences, seed)
    found = {metric: {} for metric in scores}
    for at, (metric, checkpoint) in enumerate(columns):
        figures = {"n": int((~np.isnan(table[:, at])).sum()), "mean": _mean(table[:, at]), **_named("", intervals[at])}
        if checkpoint != first[metric]:
            figures |= {"difference": _mean(differences[:, at]), **_named("difference_", difference_intervals[at]), "p": _number(p[at])}
        found[metric][checkpoint] = figures
    tested = [figures for of in found.values() for figures in of.values() if figures.get("p") is not None]
    for figures, corrected in zip(tested, holm([figures["p"] for figures in tested]), strict=True):
        figures["p_holm"] = corrected
    return found


def bootstrap(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % percentile intervals (columns, 2) of the mean of each column (prompts, columns), nan being left out; nan for fewer than two scores.

    One draw of prompts serves all columns. It is that of scipy.stats.bootstrap(method="percentile"), so that the two agree but for rounding.
    """
    rng, count = np.random.default_rng(seed), len(scores)
    judged, filled = (~np.isnan(scores)).astype(float), np.nan_to_num(scores)
    means = []
    for size in _chunks(count):
        drawn = rng.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)  # that each prompt was drawn
        with np.errstate(invalid="ignore"):
            means.append(times @ filled / (times @ judged))
    intervals = np.full((scores.shape[1], 2), np.nan)
    enough = judged.sum(0) > 1
    if enough.any():
        intervals[enough] = np.nanpercentile(np.concatenate(means)[:, enough], [2.5, 97.5], axis=0).T
    return intervals


def permutation(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """The p (columns) of a mean paired difference as large as that of each column (pairs, columns) if signs were chance; nan for fewer than two pairs."""
    rng, count = np.random.default_rng(seed), len(differences)
    filled = np.nan_to_num(differences)
    seen = np.abs(filled.sum(0))
    as_large = np.zeros(differences.shape[1])
    for size in _chunks(count):
        signs = rng.integers(0, 2, (size, count)) * 2.0 - 1
        as_large += (np.abs(signs @ filled) >= seen - 1e-9 * np.abs(filled).sum(0)).sum(0)
    return np.where((~np.isnan(differences)).sum(0) > 1, (as_large + 1) / (RESAMPLES + 1), np.nan)


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction: the chance of one false difference among all of them stays under the level."""
    corrected, highest = [0.0] * len(p), 0.0
    for place, at in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, p[at] * (len(p) - place)))
        corrected[at] = highest
    return corrected


def _chunks(count: int) -> list[int]:
    """Resamples at a time, so that no table has more than about ten million cells."""
    size = max(1, 10**7 // count)
    return [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]


def _mean(column: np.ndarray) -> float | None:
    judged = column[~np.isnan(column)]
    return float(judged.mean()) if len(judged) else None


def _named(prefix: str, interval: np.ndarray) -> dict[str, float | None]:
    return {f"{prefix}low": _number(interval[0]), f"{prefix}high": _number(interval[1])}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
