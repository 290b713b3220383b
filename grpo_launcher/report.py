"""Curves and model card of a run.

python -m grpo_launcher.report RUN [RUN ...] [--output FILE] draws metrics.jsonl, also while the run goes on. Several
runs are drawn over one another. FILE ends in .png, .svg or .pdf. Default for one run: curves.png in its folder.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pandas
import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from grpo_launcher.console import exit_status
from grpo_launcher.errors import UserError
from grpo_launcher.messages import last_reply, last_user_text, words
from grpo_launcher.runs import METRICS, RUN_FILE, check_new_file, label, load_run, read_metrics, reward_weights

PANELS = {  # metric -> title with unit, behind the rewards
    "completions/mean_length": "length (tokens)",
    "kl": "KL (nats per token)",
    "entropy": "entropy (nats per token)",
    "completions/clipped_ratio": "completions cut off (share)",
    "frac_reward_zero_std": "groups without variance (share)",
    "grad_norm": "gradient norm",
    "tools/call_frequency": "tool calls per completion",
    "tools/failure_frequency": "failed calls (share)",
    "tools/turns": "turns per completion",
    "tokens_per_second": "tokens per second",
}
SFT_PANELS = {"loss": "loss (nats per token)", "mean_token_accuracy": "token accuracy (share)"}
# Runs differ in dash and marker too, so that they can be told apart without colour.
STYLES = [
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": "--", "marker": "s"},
    {"color": "#0072b2", "linestyle": "-.", "marker": "D"},
    {"color": "#56b4e9", "linestyle": ":", "marker": "^"},
    {"color": "#999999", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "v"},
]
HELD_OUT = {"linestyle": (0, (1, 2)), "markerfacecolor": "white"}
CARD = Path(__file__).with_name("card.md")  # a Jinja template
BAND = {"color": "0.88", "linewidth": 0}
GREYS = ["0.82", "0.6", "0.7", "0.5", "0.76"]  # of the parts of a reward


def figure(runs: list[Path]) -> Figure | None:
    """Draw one panel for each metric, over the steps; None where nothing was logged yet.

    Held-out figures (eval_...) stand in the panel of their training figure. For one run alone the standard deviation
    of the rewards is shaded, the weighted parts of a sum of rewards are stacked, and measures are dashed.
    """
    names = [label(run) for run in runs]
    names = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    frames = [_metrics(run) for run in runs]
    panels = _panels(frames)
    if not panels:
        return None
    weights = _weights(runs[0], frames[0]) if len(runs) == 1 else {}
    parts = {metric: weight for metric, weight in weights.items() if weight}
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    picture = Figure(figsize=(3.7 * columns, 2.6 * rows + 0.5), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).flatten()
    for axis, (metric, title) in zip(axes, panels.items(), strict=False):
        for frame, style in zip(frames, itertools.cycle(STYLES)):
            _draw(axis, frame, metric, style | ({"linestyle": "--"} if weights.get(metric) == 0 else {}))
            _draw(axis, frame, f"eval_{metric}", {**style, **HELD_OUT})
        if metric == "reward" and len(parts) > 1:
            _stack(axis, frames[0], parts)
        elif len(runs) == 1 and metric.startswith("reward"):
            _shade(axis, frames[0], metric, "reward_std" if metric == "reward" else metric.replace("/mean", "/std"))
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.spines[["top", "right"]].set_visible(False)
        if title.endswith("(share)"):
            axis.set_ylim(-0.003, max(1.05 * axis.dataLim.y1, 0.1))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], label=name, **style) for name, style in zip(names, itertools.cycle(STYLES))]
    if any(name.startswith("eval_") for frame in frames for name in frame):
        handles.append(Line2D([], [], label="held out", **{**STYLES[0], **HELD_OUT}))
    if len(runs) == 1 and "reward_std" in frames[0]:
        handles.append(Patch(label="± one standard deviation of the completions", **BAND))
    picture.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return picture


def plot_run(run: Path) -> Path | None:
    """Draw a run into its own curves.png and curves.svg; None where nothing was logged yet."""
    picture = figure([run])
    if picture is None:
        return None
    picture.savefig(run / "curves.svg")
    picture.savefig(run / "curves.png", dpi=100)
    return run / "curves.png"


def _metrics(run: Path) -> pandas.DataFrame:
    """Return the logged lines as rows, with `tokens_per_second`."""
    frame = pandas.DataFrame(read_metrics(run)).apply(pandas.to_numeric, errors="coerce")  # null, where none is rated
    if not {"step_time", "num_tokens"} <= set(frame):
        return frame
    train = frame[["step", "step_time", "num_tokens"]].dropna()
    # step_time is a mean over the steps since the line before; tokens rise only at steps that generate.
    seconds = (train.step_time * train.step.diff().fillna(train.step)).cumsum()
    generated = train.num_tokens.diff().fillna(train.num_tokens)
    seconds = seconds[generated > 0]
    frame["tokens_per_second"] = generated[generated > 0] / seconds.diff().fillna(seconds)
    return frame


def _panels(frames: list[pandas.DataFrame]) -> dict[str, str]:
    """Return metric -> title of what was logged. A reward that is the whole sum gets no panel of its own."""
    logged = {name for frame in frames for name in frame}
    rewards = sorted(name for name in logged if re.fullmatch("rewards/[^/]+/mean", name))
    titles = {"reward": "reward (weighted sum)"} | {name: name.split("/")[1] for name in rewards}
    for name in rewards:
        if all(name in frame and frame[name].equals(frame.get("reward")) for frame in frames):
            titles["reward"] = f"reward ({titles.pop(name)})"
            break
    if not {"reward", "eval_reward"} & logged:
        titles = SFT_PANELS  # the loss of GRPO means nothing
    return {metric: title for metric, title in (titles | PANELS).items() if {metric, f"eval_{metric}"} & logged}


def _draw(axis, frame: pandas.DataFrame, metric: str, style: dict) -> None:
    if metric in frame:
        values = frame.set_index("step")[metric].dropna()
        axis.plot(values, **style, markersize=3.5, markevery=max(1, len(values) // 20), linewidth=1.2)


def _shade(axis, frame: pandas.DataFrame, metric: str, spread: str) -> None:
    if {metric, spread} <= set(frame):
        rows = frame.dropna(subset=[metric, spread])
        axis.fill_between(rows.step, rows[metric] - rows[spread], rows[metric] + rows[spread], **BAND)


def _weights(run: Path, frame: pandas.DataFrame) -> dict[str, float]:
    """Return the weight of each reward's metric; nothing where the run's folder does not say it."""
    rewards = [name for name in frame if re.fullmatch("rewards/[^/]+/mean", name)]
    if not (run / RUN_FILE).exists():
        return {}
    weights = reward_weights(load_run(run).values)
    return {metric: weights.get(metric.split("/")[1], 1.0) for metric in rewards}


def _stack(axis, frame: pandas.DataFrame, parts: dict[str, float]) -> None:
    """Shade the weighted parts of a reward on top of one another, negative ones below 0."""
    above = below = 0.0
    rows = frame.dropna(subset=list(parts))
    for (metric, weight), grey in zip(parts.items(), itertools.cycle(GREYS)):
        values = weight * rows[metric]
        start = above + 0 * values
        start = start.where(values > 0, below)
        text = f"{weight:g} × {metric.split('/')[1]}"
        axis.fill_between(rows.step, start, start + values, color=grey, linewidth=0, label=text)
        above, below = above + values.clip(lower=0), below + values.clip(upper=0)
    axis.legend(frameon=False, fontsize="x-small")


# Fields that the card shows elsewhere, or that concern this machine alone.
HIDDEN_FIELDS = re.compile(
    "hub_|vllm_|model_name|dataset_|(output_dir|run_name|prepare|use_cpu|push_to_hub|weight_sync|sample_every|report_to)$"
)


def write_card(folder: Path, hub_id: str | None = None) -> None:
    """Write README.md and curves.png into a final checkpoint. Reads the run's folder, where the curves are drawn.

    Args:
        folder: the final checkpoint, in its run's folder.
        hub_id: its name on the Hub, where it is pushed. No path of this machine gets into the card.
    """
    # Imported here so that curves are drawn without torch and transformers.
    from huggingface_hub import ModelCard, ModelCardData

    from grpo_launcher.callbacks import metric_changes
    from grpo_launcher.seq2seq import is_seq2seq_checkpoint

    run = load_run(folder.parent)
    if has_curves := (run.folder / "curves.png").exists():
        shutil.copy(run.folder / "curves.png", folder)
    base, dataset = run.values["model_name_or_path"], run.values["dataset_name"]
    hub_base = base if _is_hub_id(base) else None
    is_adapter, is_seq2seq = (folder / "adapter_config.json").exists(), is_seq2seq_checkpoint(folder)
    samples, is_chat = _samples(run.folder / "completions")
    messages = [{"role": "user", "content": "..."}]
    if run.system_prompt:
        messages.insert(0, {"role": "system", "content": run.system_prompt})
    recipe = {name: _public(run.values[name]) for name in run.given if not HIDDEN_FIELDS.match(name)}
    if is_adapter:
        recipe["lora_dropout"] = run.values["lora_dropout"]  # the one training field whose default is not TRL's
    card_data = ModelCardData(
        base_model=hub_base,
        base_model_relation=hub_base and ("adapter" if is_adapter else "finetune"),
        datasets=[dataset] if _is_hub_id(dataset) else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="summarization" if is_seq2seq else "text-generation",
        tags=["trl", run.values["method"], *(["lora"] if is_adapter else [])],
    )
    card = ModelCard.from_template(
        card_data,
        template_str=CARD.read_text(encoding="utf-8"),
        name=hub_id or label(run.folder),
        base=_public(base),
        dataset=_public(dataset),
        values=run.values,
        is_grpo=run.values["method"] == "grpo",
        is_adapter=is_adapter,
        changes=metric_changes(run.folder),
        has_curves=has_curves,
        samples=samples,
        model_kind="Seq2SeqLM" if is_seq2seq else "CausalLM",
        location=hub_id or _public(str(folder)),
        messages=json.dumps(messages, ensure_ascii=False) if is_chat and not is_seq2seq else None,
        recipe=_fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(), "yaml"),
        versions=", ".join(f"{name} {version}" for name, version in run.versions.items()),
    )
    card.save(folder / "README.md")


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _public(value):
    """Return a value without folders of this machine: of an absolute path the last part."""
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "..", "file:")) else value


def _samples(folder: Path) -> tuple[list[dict], bool]:
    """Return a typical completion of the first and of the last step, and whether prompts are chat messages.

    Of both steps those two prompts are taken that have most words in common.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        return [], True
    steps = [pandas.read_parquet(file) for file in (files[0], files[-1])]
    for step in steps:
        step["text"] = step.prompt.map(last_user_text)
    pairs = itertools.product(*(step.text.unique()[:32] for step in steps))
    samples = []
    for step, text in zip(steps, max(pairs, key=_word_overlap), strict=True):
        group = step[step.text == text].sort_values("advantage", kind="stable")
        row = group.iloc[len(group) // 2]
        completion = last_reply(row.completion)
        sample = {"prompt": _fenced(text[:400]), "completion": _fenced(completion[:800]), "length": len(completion)}
        samples.append({"step": row.step, **sample})
    return samples, not isinstance(row.prompt, str)


def _word_overlap(texts: tuple[str, str]) -> float:
    first, last = (set(words(text)) for text in texts)
    return len(first & last) / max(1, len(first | last))


def _fenced(text: str, language: str = "text") -> str:
    """Put a text into a code block that nothing in it can end."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def main(argv: list[str]) -> int:
    """Draw the curves that the command line names. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_launcher.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder: trainOutput/quickstart/1")
    parser.add_argument("--output", metavar="FILE", type=Path, help="picture to write, needed for several runs")
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / "curves.png"
    if not args.output and len(args.runs) > 1:
        parser.error("--output FILE is needed for several runs")
    if output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {output}: the ending must be .png, .svg or .pdf")
    return exit_status(draw, args.runs, output, args.overwrite)


def draw(runs: list[Path], output: Path, overwrite: bool) -> None:
    """Write the curves of runs into a new file."""
    check_new_file(output, overwrite)
    for run in runs:
        if figure([run]) is None:
            raise UserError(str(run / METRICS), "is not there or holds no step yet", "name trainOutput/quickstart/1")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure(runs).savefig(output, dpi=100)
    print(f"Wrote {output}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
