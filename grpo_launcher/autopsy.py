"""What a run's reward has paid for.

python -m grpo_launcher.autopsy RUN

Each reward's share of the advantage, and what goes together with it in the completions: rank correlations within the
groups, with 95 % bootstrap intervals over the groups. A run does this at its end. Writes autopsy.json and autopsy.png
into the run's folder.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas
from matplotlib.figure import Figure
from scipy import stats

from grpo_launcher import rollouts, runs
from grpo_launcher.console import exit_status
from grpo_launcher.messages import words
from rewards.repetition import ngram_repetition_reward

STEPS, ROWS = 50, 2000  # at most, evenly between the first and the newest; and about as many completions
READ = 1000  # characters of a completion in which repetition is looked for
MOST = 0.5  # share of the advantage's variance above which length is said to explain it
BINS, LEAST = 20, 10  # classes of length at most, and completions of each at least: fewer would explain chance
FEW = 3  # groups in which a feature varies; with fewer nothing is said of it
SHORT_RUN = 8  # steps below which nothing is said of what rises and falls
OPENINGS, OFTEN = 3, 0.05  # first words that are looked at: the most frequent, in this share of completions or more


def load(run: Path) -> pandas.DataFrame:
    """Return completions of a run with the features that are looked at, as columns named in attrs["features"]."""
    kept = rollouts.kept_steps(run)
    newest = rollouts.load(run, kept[-1])
    count = min(STEPS, len(kept), max(2, ROWS // len(newest)))
    chosen = sorted({kept[round(index)] for index in np.linspace(0, len(kept) - 1, count)})
    frames = [*(rollouts.load(run, step) for step in chosen[:-1]), newest]
    frame = pandas.concat(frames, ignore_index=True)
    frame["group"] = frame["step"] * (frame["group"].max() + 1) + frame["group"]
    features = {"length (characters)": frame["characters"]}
    if rollouts.CUT_OFF in frame:
        features["cut off"] = frame[rollouts.CUT_OFF]
    features["repeated three words"] = -pandas.Series(ngram_repetition_reward(frame["text"].str[:READ].tolist(), n=3))
    openings = frame["text"].map(lambda text: next(iter(words(text[:100])), ""))
    often = openings[openings != ""].value_counts().loc[lambda counts: counts >= OFTEN * len(frame)]
    for word in often.index[:OPENINGS]:
        features[f"begins with “{word}”"] = openings == word
    frame = frame.assign(**{name: values.astype(float) for name, values in features.items()})
    frame.attrs = {"weights": newest.attrs["weights"], "features": list(features)}
    return frame


def shares(frame: pandas.DataFrame) -> dict[str, float]:
    """Return each reward's share of the variance of the sum within the groups; they add up to 1."""
    weights = {name: weight for name, weight in frame.attrs["weights"].items() if weight}
    parts = frame[list(weights)].mul(weights).fillna(0.0)
    parts -= parts.groupby(frame["group"]).transform("mean")
    total = parts.sum(axis=1)
    return {name: (parts[name] * total).sum() / ((total**2).sum() or np.nan) for name in parts}


def correlation(frame: pandas.DataFrame, feature: str) -> dict[str, float]:
    """Return the mean over groups of the rank correlation with the advantage, its interval, and how many vary."""
    ranks = frame.groupby("group")[[feature, "advantage"]].rank()
    by_group = ranks.groupby(frame["group"]).apply(lambda group: group[feature].corr(group["advantage"])).dropna()
    found = {"groups": len(by_group), "correlation": by_group.mean(), "low": np.nan, "high": np.nan}
    if len(by_group) > 1 and by_group.std():
        sample = (by_group.to_numpy(),)
        options = {"method": "percentile", "n_resamples": 2000, "rng": np.random.default_rng(0)}
        low, high = stats.bootstrap(sample, np.mean, **options).confidence_interval
        found |= {"low": low, "high": high}
    return found


def explained_by_length(frame: pandas.DataFrame) -> float:
    """Return how much of the differences within the groups follows from length alone, from 0 to 1.

    A length predicts the mean reward of its class, of up to BINS classes of all completions. This is the squared
    correlation of prediction and reward, both without their group's mean.
    """
    bins = max(2, min(BINS, len(frame) // LEAST))
    classes = frame["characters"].rank(method="first").floordiv(len(frame) / bins + 1)
    both = pandas.DataFrame(
        {"reward": frame["reward"], "predicted": frame.groupby(classes)["reward"].transform("mean")}
    )
    both -= both.groupby(frame["group"]).transform("mean")
    return both["reward"].corr(both["predicted"]) ** 2


def warnings(run: Path, frame: pandas.DataFrame, share: float) -> list[str]:
    """Return what a person should look at, in words. share: of explained_by_length."""
    found = []
    if share > MOST:
        found.append(
            f"Length explains {share:.0%} of the reward's differences within a group, also where the best length lies "
            "in the middle. If you did not want to reward length, change the reward."
        )
    measures = [name for name, weight in frame.attrs["weights"].items() if not weight]
    logged = pandas.DataFrame(runs.read_metrics(run)).dropna(subset=["reward"])
    changes = {
        name: logged[column].tail(5).mean() - logged[column].head(3).mean()
        for name, column in {"reward": "reward", **{name: f"rewards/{name}/mean" for name in measures}}.items()
    }
    rise = changes.pop("reward")
    if measures and len(logged) >= SHORT_RUN and rise > 0 and all(change < 0 for change in changes.values()):
        found.append(
            f"The reward rose by {rise:.3g}, and every measure fell ({', '.join(measures)}): read completions."
        )
    return found


def picture(rows: list[dict]) -> Figure:
    """Draw the correlations with their intervals."""
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        axis.plot([row["low"], row["high"]], [place, place], color="0.6", linewidth=4, solid_capstyle="butt")
        axis.plot(row["correlation"], place, "ko")
    axis.set_yticks(range(len(rows)), [row["feature"] for row in reversed(rows)])
    axis.set_xlim(-1, 1)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.axvline(0, color="0.8", zorder=0)
    axis.set_xlabel("rank correlation with the advantage, within groups (95 % interval)")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def examine(run: Path) -> None:
    """Print what the reward of a run has paid for, and write it with a picture."""
    frame = load(run)
    parts = shares(frame)
    rows = [{"feature": name, **correlation(frame, name)} for name in frame.attrs["features"]]
    rows = [row for row in rows if row["groups"] >= FEW]
    print(f"What the reward has paid for, in {frame['step'].nunique()} steps:")
    if not rows:
        print("  nothing that can be told: hardly a group had spread")
    elif len(parts) > 1:
        print("  share of the advantage: " + ", ".join(f"{name} {share:.0%}" for name, share in parts.items()))
    if rows:
        print("  rank correlation with the advantage within a group (95 % interval), groups in which it varies:")
    for row in rows:
        interval = "" if np.isnan(row["low"]) else f" ({row['low']:+.2f} to {row['high']:+.2f})"
        print(f"  {row['feature']:24} {row['correlation']:+.2f}{interval}, {row['groups']} groups")
    explained = explained_by_length(frame)
    found = warnings(run, frame, explained)
    for text in found:
        print(f"Warning: {text}", flush=True)
    content = {"shares": parts, "length explains": explained, "features": rows, "warnings": found}
    runs.write_json(run / "autopsy.json", content)
    if rows:
        picture(rows).savefig(run / "autopsy.png", dpi=100)
    print(f"Wrote {run / 'autopsy.json'}" + (" and autopsy.png" if rows else ""))


def main(argv: list[str]) -> int:
    """Examine the run that the command line names."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m grpo_launcher.autopsy", description=__doc__, formatter_class=kind)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder: trainOutput/quickstart/1")
    args = parser.parse_args(argv)
    return exit_status(examine, args.run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
