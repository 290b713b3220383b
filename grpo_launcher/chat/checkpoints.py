"""Which checkpoints there are, what each is made of, and how its run spoke to it. Loads no model."""

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from grpo_launcher import runs as run_folder

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER = "adapter_config.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names it, says what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can answer: a whole model, or an adapter on one."""

    name: str  # as a column is headed
    path: str  # folder or Hub id of the weights, or of the adapter
    base: str | None = None  # folder or Hub id of the model that an adapter stands on; None for a whole model
    run: Path | None = None  # the run that made it


@dataclass(frozen=True)
class Manner:
    """How replies are drawn, and what a run put before every prompt."""

    system_prompt: str | None = None
    temperature: float = 1.0  # 0: the likeliest token every time (greedy)
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    template_options: dict = field(default_factory=dict)  # chat_template_kwargs of the recipe
    tools: list[str] | None = None  # by dotted name, with their settings and how often a reply goes on after calls, None being without end
    tool_kwargs: dict | None = None
    max_tool_calling_iterations: int | None = None


def newest_run(root: Path = run_folder.ROOT) -> Path:
    """The run that was begun last, of all recipes. Raises CheckpointError where there is none."""
    latest = [link for link in root.glob("*/latest") if link.exists()]
    if not latest:
        raise CheckpointError(f"{root} holds no run yet: train one (bash launch_train.sh), or name checkpoints.")
    return max(latest, key=lambda link: (link.resolve() / "recipe.yaml").stat().st_mtime if (link.resolve() / "recipe.yaml").exists() else 0).resolve()


def of_run(run: Path, base: str | None = None) -> list[Checkpoint]:
    """Base, checkpoint-STEP in order, and final of a run, as far as they are whole.

    base: a folder or Hub id to take in place of the one that the run names.
    """
    values = recipe_values(run)
    steps = sorted((p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)), key=lambda p: int(p.name.split("-")[1]))
    made = [find(str(folder), base) for folder in [*steps, run / run_folder.FINAL] if folder.is_dir() and not _unfinished(folder)]
    model = base or locate(values["model_name_or_path"], run)
    return [Checkpoint("base", model, run=run), *made]


def find(name: str, base: str | None = None) -> Checkpoint:
    """The checkpoint that a folder or Hub id names.

    base: what an adapter stands on, in place of what its adapter_config.json names. Raises CheckpointError.
    """
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~", str(run_folder.ROOT))) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise CheckpointError(f"{name}: there is no such folder.")
        return Checkpoint(name, name)
    if (folder / "recipe.yaml").exists():
        inside = ", ".join(path.name for path in sorted(folder.iterdir()) if _kind(path)) or "none yet"
        raise CheckpointError(f"{name} is a run; name one of its checkpoints: {inside}.")
    if problem := _unfinished(folder):
        raise CheckpointError(f"{name}: {problem}")
    run = next((parent for parent in (folder.resolve().parent, folder.parent) if (parent / "recipe.yaml").exists()), None)
    label = folder.resolve().name.removesuffix("-checkpoint") if run else str(folder)
    if run and (run / run_folder.BEST).resolve() == folder.resolve():
        label += " (best)"
    if _kind(folder) == "whole":
        return Checkpoint(label, str(folder), run=run)
    stands_on = base or json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return Checkpoint(label, str(folder), base=base or locate(stands_on, run), run=run)


def told_apart(found: list) -> list:
    """The same columns, but where two would be headed alike a checkpoint's run or folder stands in its name."""
    names = [one.name for one in found]

    def longer(one: Checkpoint) -> str:
        return f"{run_folder.label(one.run)} {one.name}" if one.run else one.path

    return [replace(one, name=longer(one)) if isinstance(one, Checkpoint) and names.count(one.name) > 1 else one for one in found]


def locate(name: str, run: Path | None) -> str:
    """The folder or file of a model or dataset as seen from here: a relative path was written where the run was started. A Hub id stays as it is."""
    if run and not Path(name).is_absolute() and not os.path.exists(name):  # unlike Path.exists it takes a text of any length
        for start in run.resolve().parents:
            if os.path.exists(start / name):
                return str(start / name)
    return name


def recipe_values(run: Path) -> dict:
    """The fields of a run's recipe.yaml. Raises CheckpointError where it cannot be read."""
    import yaml

    try:
        return yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{run}/recipe.yaml cannot be read: {error}") from None


def manner_of(run: Path | None) -> Manner:
    """How the run drew its replies; the defaults where there is no run."""
    if run is None:
        return Manner()
    values = recipe_values(run)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    drawn = {name: values[name] for name in names if values.get(name) is not None}
    system = (values.get("provenance") or {}).get("system_prompt")
    options = values.get("chat_template_kwargs") or {}
    tools = {name: values.get(name) for name in ("tools", "tool_kwargs", "max_tool_calling_iterations")}
    for settings in (tools["tool_kwargs"] or {}).values():  # which may name a corpus
        settings.update({name: locate(value, run) for name, value in settings.items() if isinstance(value, str)})
    return Manner(system, max_new_tokens=values["max_completion_length"], template_options=options, **drawn, **tools)


def _kind(folder: Path) -> str | None:
    if (folder / ADAPTER).exists():
        return "adapter"
    return "whole" if any((folder / name).exists() for name in WEIGHTS) else None


def _unfinished(folder: Path) -> str | None:
    """Why a folder is no checkpoint yet, or None. The trainer writes weights first and trainer_state.json behind them."""
    kind = _kind(folder)
    in_run = re.fullmatch(r"checkpoint-\d+", folder.name) and (folder.parent / "recipe.yaml").exists()
    if in_run and not (folder / "trainer_state.json").exists():
        return "this checkpoint is still being written, or its run was killed while it was; try again, or take an earlier one."
    if kind is None:
        return f"this folder holds no checkpoint (neither {WEIGHTS[0]} nor {ADAPTER})."
    if kind == "adapter" and not (folder / "adapter_model.safetensors").exists():
        return "adapter_config.json is there and adapter_model.safetensors is not: still being written, or cut short."
    return None
