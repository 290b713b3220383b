"""The completions of a run, step by step.

python -m grpo_launcher.rollouts RUN [--step N] [--worst N | --best N] [--grep TEXT]

Without --step: the newest step, or with --grep all that are kept. Completions stand under their prompts.
It works while the run goes on.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import pandas
from pyarrow import parquet
from rich.console import Console
from rich.text import Text

from grpo_launcher import runs
from grpo_launcher.console import exit_status
from grpo_launcher.errors import UserError
from grpo_launcher.messages import last_user_text, printable, transcript

# Columns that the trainer adds to TRL's
IDS, CUT_OFF, LOGP_DIFFERENCE, WEIGHTS_STEP = "completion_ids", "cut_off", "logp_difference", "weights_step"
ROW = "dataset_row"  # the dataset's other columns, as JSON


def files(run: Path) -> dict[int, Path]:
    """Return the files of a run by step, in their order, without one that is being written."""
    found = sorted((run / "completions").glob("completions_*.parquet"))
    return {int(re.findall(r"\d+", path.stem)[-1]): path for path in found if _is_whole(path)}


def kept_steps(run: Path) -> list[int]:
    """Return the steps whose completions are kept.

    Raises:
        UserError: there are none.
    """
    steps = list(files(run))
    if not steps:
        raise UserError(str(run), "holds no completions", "name a run of GRPO: trainOutput/quickstart/1")
    return steps


def _is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            return file.read() == b"PAR1"
    except OSError:  # shorter than that, or just pruned
        return False


def prune(run: Path, keep: int) -> None:
    """Delete files until at most `keep` are left: always the one whose neighbours are nearest to each other."""
    kept = files(run)
    while len(kept) > keep:
        steps = list(kept)
        gaps = [after - before for before, after in zip(steps, steps[2:], strict=False)]
        kept.pop(steps[1 + gaps.index(min(gaps))] if gaps else steps[0]).unlink()


def load(run: Path, step: int) -> pandas.DataFrame:
    """Return the completions of one step, one a row.

    Args:
        run: the run's folder.
        step: one that files() names.

    Returns:
        The columns of the file, and: `group` (number of the prompt within the step), `question` and `text` (what
        people read of prompt and completion), `characters`, `tokens`, `reward` (the weighted sum of the rewards that
        were given). frame.attrs has `weights`, by reward, and `rows`, the dataset's columns of each row.

    Raises:
        UserError: the step is not kept.
    """
    if step not in (kept := files(run)):
        known = ", ".join(map(str, kept)) or "none"
        raise UserError("--step", f"the completions of step {step} are not kept", f"one of: {known}")
    try:
        records = parquet.read_table(kept[step]).to_pylist()  # messages as lists, and not as arrays
    except FileNotFoundError:
        raise UserError(
            "--step", f"step {step} was just pruned", "choose another step, or raise keep_rollouts"
        ) from None
    frame = pandas.DataFrame(map(_without_empty_arguments, records))
    values = runs.load_run(run).values
    logged = {name for line in runs.read_metrics(run) for name in line}
    rewards = [name for name in frame if f"rewards/{name}/mean" in logged]
    weights = {name: runs.reward_weights(values).get(name, 1.0) for name in rewards}
    frame["reward"] = frame[rewards].mul(weights).sum(axis=1, min_count=1)
    frame["group"] = pandas.RangeIndex(len(frame)) // values["num_generations"]
    frame["question"], frame["text"] = frame["prompt"].map(last_user_text), frame["completion"].map(transcript)
    frame["characters"] = frame["text"].str.len()
    if IDS in frame:
        frame["tokens"] = frame[IDS].map(len)
    frame.attrs = {"weights": weights, "rows": list(map(json.loads, frame.get(ROW, [])))}
    return frame


def _without_empty_arguments(record: dict) -> dict:
    """Parquet gives every tool call the arguments of all: take away those that a call did not have."""
    for message in record["completion"] if isinstance(record["completion"], list) else ():
        for call in message.get("tool_calls") or ():
            arguments = call["function"]["arguments"]
            if isinstance(arguments, dict):
                call["function"]["arguments"] = {name: value for name, value in arguments.items() if value is not None}
    return record


def show(frame: pandas.DataFrame, rewards: list[str], console: Console) -> None:
    """Print completions with what is known of them, under their prompts. rewards: the columns of each reward."""
    for (step, group), rows in frame.groupby(["step", "group"], sort=False):
        console.print(Text(f"step {step}, prompt {group}: {one_line(rows['question'].iloc[0], 200)}", "bold"))
        for row in rows.to_dict("records"):
            parts = ", ".join(f"{name} {row[name]:z.2f}" for name in rewards if row[name] is not None)
            known = [f"reward {row['reward']:z.2f}" + (f" ({parts})" if len(rewards) > 1 else "")]
            known += [f"advantage {row['advantage']:+z.2f}", f"{row['characters']} characters"]
            known += [f"{row['tokens']} tokens"] if "tokens" in row else []
            known += ["cut off"] if row.get(CUT_OFF) else []
            console.print(Text(f"  {', '.join(known)}", "cyan"))
            console.print(Text(f"    {one_line(row['text'], 600)}"))


def one_line(text: str, limit: int) -> str:
    """Return a text on one line, cut behind `limit` characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[:limit]} […]"


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m grpo_launcher.rollouts", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder: trainOutput/quickstart/1")
    parser.add_argument("--step", type=int, help="of this step (default: the newest, or with --grep all)")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--worst", metavar="N", type=int, help="the N completions of the lowest reward")
    ends.add_argument("--best", metavar="N", type=int, help="the N completions of the highest reward")
    parser.add_argument("--grep", metavar="TEXT", help="completions or prompts that hold TEXT, in any case")
    return parser.parse_args(argv)


def print_completions(args: argparse.Namespace) -> None:
    """Print what the command line asks for."""
    kept = kept_steps(args.run)
    steps = [args.step] if args.step is not None else kept if args.grep else kept[-1:]
    found = []
    for step in steps:
        whole = load(args.run, step)
        texts = whole["question"] + "\n" + whole["text"]
        shown = whole.drop(columns=["prompt", "completion", IDS, ROW], errors="ignore")
        found.append(shown[texts.str.contains(args.grep, case=False, regex=False)] if args.grep else shown)
    frame = pandas.concat(found, ignore_index=True)
    if args.worst is not None or args.best is not None:
        count = args.best if args.worst is None else args.worst
        if count < 1:
            raise UserError("--worst, --best", f"{count} is under 1", "give the number of completions")
        frame = frame.sort_values("reward", ascending=args.best is None, kind="stable").head(count)
    console = Console(highlight=False, soft_wrap=True)
    show(frame, list(whole.attrs["weights"]), console)
    place = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    console.print(f"{len(frame)} completions of {place}")


def main(argv: list[str]) -> int:
    """Run the command line."""
    return exit_status(print_completions, parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
