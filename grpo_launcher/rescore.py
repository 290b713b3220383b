"""Score the completions of a run by another reward, without training.

python -m grpo_launcher.rescore RUN --reward_funcs my_reward.py:new [rewards.rouge.rouge_reward ...]

For every step that is kept: mean and spread of each new reward beside those of the run's reward, their rank
correlation within the groups, and the share of groups in which another completion is the best. Then the five
completions on which they differ most. Writes rescore-NAME.json and rescore-NAME.png into the run's folder.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from tqdm import tqdm

from grpo_launcher import plugins, rollouts, runs
from grpo_launcher.console import exit_status
from grpo_launcher.errors import UserError
from grpo_launcher.render import make_console

SHOWN = 5
COLUMNS = ["step", "old mean", "old spread", "new mean", "new spread", "rank correlation", "another best"]


def score(frame: pandas.DataFrame, reward) -> np.ndarray:
    """Return the scores of one step's completions by a reward, NaN where it gives none."""
    names = dict.fromkeys(name for row in frame.attrs["rows"] for name in row)
    columns = {name: [row.get(name) for row in frame.attrs["rows"]] for name in names}
    columns["trainer_state"] = SimpleNamespace(global_step=int(frame["step"].iloc[0]))
    batch = {"prompts": frame["prompt"].tolist(), "completions": frame["completion"].tolist()}
    if rollouts.IDS in frame:
        batch["completion_ids"] = frame[rollouts.IDS].tolist()
    return np.array(plugins.call_reward(reward, **batch, **columns), dtype=float)


def compare(frame: pandas.DataFrame) -> dict[str, float]:
    """Compare the columns `reward` and `new` of one step.

    Returns:
        A value for each of COLUMNS but the step. Spread is the mean standard deviation within a group. The rank
        correlation is Spearman's over all completions, after each group's mean was taken off. NaN where one of them
        has no spread.
    """
    both = frame[["reward", "new"]]
    groups = both.groupby(frame["group"])
    centred = both - groups.transform("mean")
    spread, varied = groups.std(ddof=0).mean(), centred.dropna()
    is_varied = (varied.abs().max() > 0).all() if len(varied) else False
    best = groups.max()
    at_best = both["reward"] >= frame["group"].map(best["reward"])
    keeps = at_best & (both["new"] >= frame["group"].map(best["new"]))  # a completion that both take for the best
    return {
        "old mean": both["reward"].mean(),
        "old spread": spread["reward"],
        "new mean": both["new"].mean(),
        "new spread": spread["new"],
        "rank correlation": varied["reward"].corr(varied["new"], method="spearman") if is_varied else np.nan,
        "another best": 1 - keeps.groupby(frame["group"]).any().mean(),
    }


def differences(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Return the completions of all steps on which the rewards differ most: by their ranks within their groups."""
    ranks = frame.groupby(["step", "group"])[["reward", "new"]].rank(pct=True)
    return frame.loc[(ranks["new"] - ranks["reward"]).abs().sort_values(ascending=False).index[:SHOWN]]


def picture(table: pandas.DataFrame, name: str) -> Figure:
    """Draw both rewards with their spread, and how far they agree, over the steps."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, which, title in zip(panels, ("old", "new"), ("reward of the run", name), strict=False):
        mean, spread = table[f"{which} mean"], table[f"{which} spread"]
        panel.plot(table["step"], mean, color="black", marker="o", markersize=3)
        panel.fill_between(table["step"], mean - spread, mean + spread, color="0.88", linewidth=0)
        panel.set_title(title if len(title) <= 36 else f"{title[:35]}…", fontsize="medium")
        panel.set_ylabel("mean ± spread in a group")
    for column, style in (("rank correlation", "-"), ("another best", "--")):
        panels[2].plot(
            table["step"], table[column], color="black", linestyle=style, marker="o", markersize=3, label=column
        )
    panels[2].set_title("agreement", fontsize="medium")
    panels[2].set_ylim(-1.05, 1.05)
    panels[2].legend(frameon=False, fontsize="small")
    for panel in panels:
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def show(table: pandas.DataFrame, most: pandas.DataFrame, name: str, chance: float, console) -> None:
    """Print the table and the completions on which the rewards differ most."""
    shown = Table(box=None, padding=(0, 1), title=f"{name} beside the reward of the run", title_justify="left")
    for column in table:
        shown.add_column(column, justify="right")
    for row in table.to_dict("records"):
        shown.add_row(f"{row['step']}", *(f"{row[column]:z.2f}" for column in table.columns[1:]))
    console.print(shown)
    console.print(f"another best: share of groups in which another completion is the best. By chance: {chance:.2f}.")
    console.print("They differ most on:")
    for row in most.to_dict("records"):
        scores = f"reward {row['reward']:z.2f}, {name} {row['new']:z.2f}"
        console.print(f"  step {row['step']}, prompt {row['group']}: {scores}", style="cyan")
        console.print(f"    {rollouts.one_line(row['text'], 400)}", markup=False, soft_wrap=True)


def rescore(run: Path, name: str, reward, console) -> None:
    """Score all kept steps of a run by one reward, show the table, and write it with its picture."""
    frames, rows = [], []
    for step in tqdm(rollouts.files(run), desc=name, unit="step"):
        frame = rollouts.load(run, step)
        frame["new"] = score(frame, reward)
        frames.append(frame[["step", "group", "reward", "new", "text"]])
        rows.append({"step": step, **compare(frame)})
    table = pandas.DataFrame(rows, columns=COLUMNS)
    scored = pandas.concat(frames, ignore_index=True)
    most, group_size = differences(scored), scored.groupby(["step", "group"]).size().mean()
    show(table, most, name, 1 - 1 / group_size, console)
    stem = run / f"rescore-{name}"
    content = {"reward": name, "steps": rows, "most": most.to_dict("records")}
    runs.write_json(stem.with_suffix(".json"), content)
    picture(table, name).savefig(stem.with_suffix(".png"), dpi=100)
    print(f"Wrote {stem}.json and {stem}.png")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m grpo_launcher.rescore", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder: trainOutput/quickstart/1")
    parser.add_argument("--reward_funcs", metavar="NAME", nargs="+", required=True, help="as in a recipe")
    parser.add_argument("--reward_kwargs", metavar="JSON", type=json.loads, help='as in a recipe: {"new": {"n": 1}}')
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier time")
    return parser.parse_args(argv)


def rescore_all(args: argparse.Namespace) -> None:
    """Score by the rewards that the command line names. All are checked before the first is used."""
    rows = rollouts.load(args.run, rollouts.kept_steps(args.run)[-1]).attrs["rows"]
    rewards = plugins.load_rewards(args.reward_funcs, args.reward_kwargs, columns=list(rows[0]) if rows else [])
    for reward in rewards:
        name = plugins.metric_name(reward)
        if isinstance(reward, str):
            raise UserError("--reward_funcs", f"{reward} is a reward model", "name a function: models need a run")
        if (args.run / f"rescore-{name}.json").exists() and not args.overwrite:
            raise UserError("--reward_funcs", f"rescore-{name}.json exists in the run's folder", "add --overwrite")
    for reward in rewards:
        rescore(args.run, plugins.metric_name(reward), reward, make_console())


def main(argv: list[str]) -> int:
    """Run the command line."""
    return exit_status(rescore_all, parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
