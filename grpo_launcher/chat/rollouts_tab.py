"""The tab of the page that shows a run's completions: a step, a prompt across steps, and how the reward spreads."""

import html
from collections.abc import Iterable
from pathlib import Path

import gradio as gr
import pandas
from matplotlib.figure import Figure
from pyarrow import parquet

from grpo_launcher import rollouts
from grpo_launcher.messages import last_user_text

COLUMNS = ["row", "group", "reward", "advantage", "tokens", "cut off", "completion", "prompt"]
WIDTHS = {"completion": "430px", "prompt": "190px"}  # the numbers' is NARROW
NARROW = "98px"
SHOWN = {"completion": 500, "prompt": 160}  # characters of a text in the table


class RolloutsTab:
    """The parts of the tab and what they do. The page may be open before the first step is there.

    Args:
        run: the run's folder.
        timer: a gradio Timer that looks for new steps.
        tab: the tab, whose opening does so too.
    """

    def __init__(self, run: Path, timer: gr.Timer, tab: gr.Tab):
        self.run = run
        steps = list(rollouts.files(run)) or [0]
        self.slider = gr.Slider(steps[0], max(steps[-1], steps[0] + 1), steps[-1], step=1, label="Step")
        rows = self.rows(steps[-1])
        self.table = gr.Dataframe(
            rows, column_widths=[WIDTHS.get(name, NARROW) for name in rows], interactive=False, wrap=True,
            max_height=420, show_search="search",
            label="Completions: sort by the ⋮ of a heading, click on a row to see its prompt in all steps",
        )  # fmt: skip
        self.prompt = gr.HTML()
        self.plot = gr.Plot(show_label=False)
        self.newest, self.last = steps[-1], gr.State(-1)  # as the page opened, and as the histogram was drawn
        quiet = {"show_progress": "hidden"}
        self.slider.change(self.rows, self.slider, self.table, **quiet)
        self.table.select(self.across_steps, self.slider, self.prompt, **quiet)
        gr.on(
            [tab.select, timer.tick], self.look, [self.last, self.slider], [self.last, self.slider, self.plot], **quiet
        )

    def look(self, last: int, shown: int) -> tuple:
        """Take up new steps. The slider goes with them where it stood at the newest."""
        steps = list(rollouts.files(self.run))
        if not steps or steps[-1] == last:
            return gr.skip(), gr.skip(), gr.skip()
        value = steps[-1] if shown >= max(last, self.newest) else shown
        slider = gr.Slider(minimum=steps[0], maximum=max(steps[-1], steps[0] + 1), value=value)
        return steps[-1], slider, histogram(self.run)

    def _nearest(self, steps: Iterable[int], step: float) -> pandas.DataFrame:
        """Return the completions of the kept step that is nearest."""
        return rollouts.load(self.run, min(steps, key=lambda kept: abs(kept - step)))

    def rows(self, step: float) -> pandas.DataFrame:
        """Return the table of the kept step that is nearest."""
        steps = rollouts.files(self.run)
        if not steps:
            return pandas.DataFrame(columns=COLUMNS)
        frame = self._nearest(steps, step)
        frame = frame.assign(row=range(len(frame)), prompt=frame["question"], completion=frame["text"])
        frame["cut off"] = frame.get(rollouts.CUT_OFF)
        frame["tokens"] = frame.get("tokens", frame["characters"])
        rewards = [name for name in frame.attrs["weights"] if len(frame.attrs["weights"]) > 1]
        frame = frame[[*COLUMNS[:4], *rewards, *COLUMNS[4:]]]
        return frame.round(3).assign(**{name: frame[name].str.slice(0, SHOWN[name]) for name in SHOWN})

    def across_steps(self, step: float, chosen: gr.SelectData) -> str:
        """Return the completions of a row's prompt in each step that asked it, side by side."""
        steps = rollouts.files(self.run)
        question = self._nearest(steps, step)["question"][int(chosen.row_value[0])]
        cells, headings = "", ""
        for kept, path in steps.items():
            prompts = parquet.read_table(path, columns=["prompt"])["prompt"].to_pylist()
            if question not in map(last_user_text, prompts):
                continue
            frame = rollouts.load(self.run, kept)
            group = frame[frame["question"] == question].sort_values("reward", ascending=False)
            headings += f"<th>step {kept}</th>"
            texts = (f"<p><b>{row.reward:z.2f}</b> {html.escape(row.text)}</p>" for row in group.itertuples())
            cells += f"<td style='vertical-align: top; min-width: 220px'>{''.join(texts)}</td>"
        table = f"<table><tr>{headings}</tr><tr>{cells}</tr></table>"
        return f"<p>{html.escape(question)}</p><div style='overflow-x: auto'>{table}</div>"


def histogram(run: Path) -> Figure:
    """Draw how the reward spreads in the first, the middle and the newest step."""
    steps = list(rollouts.files(run))
    chosen = list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]))
    rewards = {step: rollouts.load(run, step)["reward"].dropna() for step in chosen}
    rated = [values for values in rewards.values() if len(values)] or [pandas.Series([0.0])]
    lowest, highest = (pick(map(pick, rated)) for pick in (min, max))
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axis, (step, values) in zip(axes, rewards.items(), strict=True):
        axis.hist(values, bins=20, range=(lowest, max(highest, lowest + 1e-6)), color="0.4")
        axis.set_title(f"step {step}", fontsize="medium")
        axis.set_xlabel("reward")
        axis.spines[["top", "right"]].set_visible(False)
    return figure
