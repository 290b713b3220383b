"""What one step says of a recipe: whether its groups can teach anything, and what to change where they cannot."""

from collections.abc import Collection

import numpy as np
import pandas

FLAT, CUT = 0.5, 0.5  # shares of groups without spread, and of completions that are cut off, above which it is told
SAME = 1e-6  # rewards that differ by less are the same
FIXES = {
    "all wrong": "easier prompts, supervised fine-tuning before, or a reward that gives parts of the points",
    "all right": "harder prompts, or a reward that still tells such completions apart",
    "all cut off": "a larger max_completion_length, or prompts that ask for less",
    "not rated": "see in train.log why the reward gave no rating",
    "all the same": "python -m grpo_launcher.reward_check check NAME, as the reward does not tell completions apart",
}


def verdict(
    frame: pandas.DataFrame, limit: int, full_marks: float, told: Collection[str] = ()
) -> dict[str, str | None]:
    """Judge the completions of one step.

    Args:
        frame: one row a completion: `group` (its prompt), `reward` (NaN where it was not rated), `tokens`, `cut_off`.
        limit: max_completion_length.
        full_marks: the reward of a completion that gets 1 from every reward function.
        told: kinds that need no sentence. Its estimates take up to a tenth of a second.

    Returns:
        What is wrong: a sentence with a remedy, or None, for each kind. Empty where the step can teach.
    """
    problems = {}
    cut = frame["cut_off"].mean()
    if cut > CUT:
        text = f"{cut:.0%} of the completions are cut off at {limit} tokens. "
        problems["cut off"] = None if "cut off" in told else text + _length_needed(frame)
    groups = frame.groupby("group")
    rewards = groups["reward"].agg(["min", "max"])
    is_flat = ~(rewards["max"] - rewards["min"] > SAME)
    if is_flat.mean() > FLAT:
        values = rewards[is_flat]["max"]
        kinds = _kinds(frame["reward"].dropna(), values, groups["cut_off"].all()[is_flat], full_marks)
        problems["no spread"] = None if "no spread" in told else _no_spread(frame, values, kinds)
    return problems


def _no_spread(frame: pandas.DataFrame, values: pandas.Series, kinds: pandas.Series) -> str:
    """Say how many groups have no spread, and why. `values` and `kinds` are of these groups."""
    sizes = frame.groupby("group").size()
    shares = (kinds.value_counts() / len(sizes)).to_dict()
    split = ", ".join(f"{share:.0%} {kind}{_value(values[kinds == kind])}" for kind, share in shares.items())
    text = f"{len(kinds) / len(sizes):.0%} of {len(sizes)} groups have no spread ({split}) and teach nothing."
    return f"{text}{_more_generations(frame, sizes.iloc[0])} Fix: {FIXES[next(iter(shares))]}."


def _kinds(rated: pandas.Series, values: pandas.Series, is_cut: pandas.Series, full_marks: float) -> pandas.Series:
    """Return why each group has no spread. `rated` are all rewards of the step, `values` the one of each group.

    Right and wrong are told apart where a step's rewards are two values, of which one is 0 or less, or lie between 0
    and full marks.
    """
    lowest, highest = rated.min(), rated.max()
    if rated.nunique() != 2 or lowest > 0:
        lowest, highest = (0.0 if lowest >= 0 else np.nan), (full_marks if highest <= full_marks + SAME else np.nan)
    kinds = pandas.Series("all the same", index=values.index)
    kinds = kinds.mask((values - lowest).abs() <= SAME, "all wrong").mask(
        (values - highest).abs() <= SAME, "all right"
    )
    return kinds.mask(is_cut & (kinds != "all right"), "all cut off").mask(values.isna(), "not rated")


def _value(values: pandas.Series) -> str:
    """Return the one reward of groups that have the same."""
    return f": reward {values.iloc[0]:g}" if values.nunique() == 1 else ""


def _length_needed(frame: pandas.DataFrame) -> str:
    """Estimate how long completions would be: a lognormal distribution of which the long ones were cut off."""
    from scipy import stats

    ended, cut = (frame["tokens"][frame["cut_off"] == is_cut].to_numpy(float) for is_cut in (False, True))
    if len(ended) < 2 or np.ptp(ended) == 0:
        return "Too few ended to say how many they need. Fix: double max_completion_length, or reward shorter ones."
    shape, _, scale = stats.lognorm.fit(stats.CensoredData(uncensored=ended, right=cut), floc=0)
    half, most = stats.lognorm.ppf([0.5, 0.9], shape, scale=scale)
    fix = "raise max_completion_length, or reward shorter completions"
    return f"Half would need up to {half:.0f}, and 90 % up to {most:.0f}. Fix: {fix}."


def _more_generations(frame: pandas.DataFrame, size: int) -> str:
    """Say how many groups twice as many completions would leave without spread, where rewards are right or wrong.

    The share of right ones is taken to vary between prompts like a beta distribution.
    """
    from scipy import optimize, stats

    rewards = frame["reward"].dropna()
    is_right = rewards > rewards.min() + SAME
    if rewards.nunique() != 2:
        return ""
    counts = is_right.groupby(frame["group"]).sum()
    if counts.isin([0, size]).all():  # nothing says how near the others are
        return ""

    def surprise(logs: np.ndarray) -> float:
        return -stats.betabinom.logpmf(counts, size, *np.exp(logs)).sum()

    a, b = np.exp(optimize.minimize(surprise, [0.0, 0.0], bounds=[(-7, 7)] * 2).x)
    flat = stats.betabinom.pmf([0, 2 * size], 2 * size, a, b).sum()
    return f" With num_generations: {2 * size} about {flat:.0%} would have none."
