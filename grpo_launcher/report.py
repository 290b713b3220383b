"""Curves of runs, from their metrics.jsonl alone, also in mid-run: python -m grpo_launcher.report RUN [RUN …] [--output FILE]

Several runs are drawn over one another. FILE ends in .png, .svg or .pdf; for one run it is by default its own curves.png.
"""

import argparse
import itertools
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from grpo_launcher.runs import METRICS, label, read_metrics

PANELS = {  # metric → title with unit
    "completions/mean_length": "length (tokens)",
    "kl": "KL (nats per token)",
    "entropy": "entropy (nats per token)",
    "completions/clipped_ratio": "replies cut off (share)",
    "frac_reward_zero_std": "groups without variance (share)",
    "grad_norm": "gradient norm",
    "tools/call_frequency": "tool calls a reply",
    "tools/failure_frequency": "failed calls (share)",
    "tools/turns": "the model's turns a reply",
    "tokens_per_second": "tokens per second",
}
TAUGHT = {"loss": "loss (nats per token)", "mean_token_accuracy": "right tokens (share)"}  # of a supervised run; a rewarded one's loss says nothing
# Runs differ in dash, marker and lightness, so that they can be told apart without colour too.
STYLES = list(zip(["black", "#d55e00", "#0072b2", "#56b4e9", "#999999"], ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1))], "osD^v", strict=True))
HELD_OUT = {"linestyle": (0, (1, 2)), "markerfacecolor": "white"}


def figure(runs: list[Path]) -> Figure | None:
    """One panel a figure that was logged, over the steps; None where nothing was logged yet.

    Held-out figures (eval_…) stand in the panel of their training figure. The replies' standard deviation is shaded where one run is drawn alone.
    """
    names = [label(run) for run in runs]
    curves = {name if names.count(name) == 1 else str(run): _curves(read_metrics(run)) for name, run in zip(names, runs, strict=True)}
    panels = _panels(list(curves.values()))
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(3.7 * columns, 2.6 * rows + 0.5), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    for axis, (metric, title) in zip(axes, panels.items(), strict=False):
        for curve, style in zip(curves.values(), itertools.cycle(STYLES)):
            _line(axis, curve.get(metric), _look(style))
            _line(axis, curve.get(f"eval_{metric}"), _look(style, **HELD_OUT))
            if len(runs) == 1 and metric.startswith("reward"):
                _band(axis, curve.get(metric), curve.get("reward_std" if metric == "reward" else metric.replace("/mean", "/std")))
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.spines[["top", "right"]].set_visible(False)
        if title.endswith("(share)"):
            axis.set_ylim(-0.003, max(1.05 * axis.dataLim.y1, 0.1))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    drawn.legend(handles=_legend(curves), loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return drawn


def plot_run(run: Path) -> Path | None:
    """Draw a run into its own curves.png and curves.svg, over those that were there; None where nothing was logged yet."""
    drawn = figure([run])
    if drawn is None:
        return None
    for ending in ("svg", "png"):
        drawn.savefig(run / f"curves.{ending}", dpi=100)
    return run / "curves.png"


def _curves(lines: list[dict]) -> dict[str, tuple[list, list]]:
    """Every metric's steps and values, oldest first, and the tokens per second."""
    curves, tokens, seconds, last = {}, 0, 0.0, 0
    for line in lines:
        if line.get("step_time") is not None and line.get("num_tokens") is not None:
            seconds += line["step_time"] * (line["step"] - last)  # a line holds the mean over the steps since the one before
            last = line["step"]
            if line["num_tokens"] > tokens:  # it rises where replies are drawn, which need not be at every step
                line["tokens_per_second"] = (line["num_tokens"] - tokens) / seconds
                tokens, seconds = line["num_tokens"], 0.0
        for name, value in line.items():
            if isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return curves


def _panels(curves: list[dict]) -> dict[str, str]:
    """Metric → title of the panels that have something to show. A single reward that is the whole reward gets no second panel."""
    logged = set().union(*curves)
    rewards = sorted(name for name in logged if name.startswith("rewards/") and name.endswith("/mean"))
    if len(rewards) == 1 and all(curve.get(rewards[0]) == curve.get("reward") for curve in curves):
        titles = {"reward": f"reward ({rewards[0].split('/')[1]})"}
    else:
        titles = {"reward": "reward (weighted sum)"} | {name: name.split("/")[1] for name in rewards}
    titles = titles if {"reward", "eval_reward"} & logged else TAUGHT
    return {metric: title for metric, title in (titles | PANELS).items() if {metric, f"eval_{metric}"} & logged}


def _look(style: tuple, **changes) -> dict:
    return dict(zip(["color", "linestyle", "marker"], style, strict=True)) | {"markersize": 3.5} | changes


def _line(axis, curve, look: dict) -> None:
    if curve:
        axis.plot(*curve, **look, markevery=max(1, len(curve[0]) // 20), linewidth=1.2)


def _band(axis, curve, spread) -> None:
    if curve and spread and spread[0] == curve[0]:
        low, high = ([v + sign * s for v, s in zip(curve[1], spread[1], strict=True)] for sign in (-1, 1))
        axis.fill_between(curve[0], low, high, color="0.88", linewidth=0)


def _legend(curves: dict[str, dict]) -> list:
    handles = [Line2D([], [], label=name, **_look(style)) for name, style in zip(curves, itertools.cycle(STYLES))]
    if any(name.startswith("eval_") for curve in curves.values() for name in curve):
        handles.append(Line2D([], [], label="held out", **_look(STYLES[0], **HELD_OUT)))
    if ["reward_std" in curve for curve in curves.values()] == [True]:
        handles.append(Patch(color="0.88", label="± one standard deviation of the replies"))
    return handles


def main(argv: list[str]) -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m grpo_launcher.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, such as trainOutput/quickstart/1 or …/latest")
    parser.add_argument("--output", metavar="FILE", type=Path, help="picture to write; its ending says of which kind (needed for several runs)")
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / "curves.png"
    if not args.output and len(args.runs) > 1:
        parser.error("--output FILE is needed for several runs")
    if empty := [run for run in args.runs if figure([run]) is None]:
        parser.error(f"{empty[0] / METRICS} is not there or holds no step yet; name a run's folder, such as trainOutput/quickstart/1")
    if output.exists() and not args.overwrite:
        parser.error(f"{output} exists; add --overwrite to replace it, or name another --output")
    if output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {output}: the ending must be .png, .svg or .pdf")
    figure(args.runs).savefig(output, dpi=100)
    print(f"Wrote {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
