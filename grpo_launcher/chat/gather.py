"""From what was named on the command line to columns, and how they are to be asked."""

import contextlib
import os
from pathlib import Path

from grpo_launcher.chat.checkpoints import Checkpoint, CheckpointError, Manner, find, manner_of, newest_run, of_run, recipe_values, told_apart
from grpo_launcher.chat.columns import Absent, Local
from grpo_launcher.chat.served import Served
from grpo_launcher.runs import label


def gather(names: list[str], base: str | None, servers: list[str], most: int) -> tuple[list, Path | None, Manner, list[str]]:
    """(columns, the run whose recipe holds, its manner, notes) of folders, Hub ids, runs and servers; without any the newest run.

    most: columns of one run. What cannot be used is a column that says why; raises CheckpointError where nothing else is left.
    """
    found, notes = [], []  # checkpoints, and columns for what is none
    for name in names or ([] if servers else [os.path.relpath(newest_run())]):
        try:
            if (Path(name) / "recipe.yaml").exists():
                found += _spread(of_run(Path(name), base), most, notes)
            else:
                found.append(find(name, base))
        except CheckpointError as error:
            found.append(Absent(Path(name).name or name, str(error)))
    for server in servers:
        try:
            found.append(Served(server))
        except CheckpointError as error:
            found.append(Absent(server, str(error)))
    if all(isinstance(one, Absent) for one in found):
        raise CheckpointError("\n       ".join(one.problem for one in found))

    from grpo_launcher.chat.engine import Engine

    found = told_apart(list(dict.fromkeys(found)))
    checkpoints = [one for one in found if isinstance(one, Checkpoint)]
    engine = Engine(checkpoints)
    columns = [Local(one, engine) if isinstance(one, Checkpoint) else one for one in found]
    runs = list(dict.fromkeys(one.run.resolve() for one in checkpoints if one.run))
    manners = [manner_of(run) for run in runs] or [Manner()]
    if any(manner != manners[0] for manner in manners):
        notes.append(f"The runs spoke to their models in different ways; all are asked as {label(runs[0])} did.")
    if runs and recipe_values(runs[0]).get("environment_factory"):
        notes.append("The run's environment is not run here: its tools are not offered, and its reward is not given.")
    if manners[0].tools:
        notes += [f"{one.name} is asked without the run's tools, which run on this machine alone; name its folder to see it call them."
                  for one in columns if isinstance(one, Served)]  # fmt: skip
    if encoders := _encoders(columns):
        notes.append(f"With an encoder: {', '.join(encoders)}: each prompt is read alone, as text right behind the system prompt; no chat is remembered.")
    notes += _differing_templates(columns)
    return columns, runs[0] if runs else None, manners[0], notes


def _spread(checkpoints: list[Checkpoint], most: int, notes: list[str]) -> list[Checkpoint]:
    """Base, first, last, and from between them what keeps the steps even; the rest is told."""
    if len(checkpoints) <= most:
        return checkpoints
    base, *made = checkpoints
    chosen = [base, *(made[round(place * (len(made) - 1) / (most - 2))] for place in range(most - 1))]
    notes.append(f"Not shown: {', '.join(one.name for one in made if one not in chosen)}; name a checkpoint's folder to see it.")
    return chosen


def _encoders(columns: list) -> list[str]:
    """The names of local columns with an encoder."""
    found = []
    for column in columns:
        if isinstance(column, Local):
            with contextlib.suppress(CheckpointError):
                found += [column.name] * column.engine.has_encoder(column.checkpoint)
    return found


def _differing_templates(columns: list) -> list[str]:
    """A note where the chat templates of local columns differ; what cannot be read is left out, as its column will say so."""
    templates = {}
    for column in columns:
        if isinstance(column, Local) and column.name not in _encoders([column]):
            with contextlib.suppress(CheckpointError):
                templates[column.name] = column.engine.tokenizer(column.checkpoint).chat_template
    first, *others = templates or [None]
    others = [name for name in others if templates[name] != templates[first]]
    return [f"The chat template of {', '.join(others)} is another than that of {first}: each is asked in its own."] if others else []
