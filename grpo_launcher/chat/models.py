"""Checkpoints: which there are, what each is made of, and how its run generated. Loads no model."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from grpo_launcher import runs
from grpo_launcher.errors import UserError

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # one file, or several
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # or .bin
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SAMPLING += ("chat_template_kwargs", "tools", "max_tool_calling_iterations")


@dataclass(frozen=True)
class Checkpoint:
    """A whole model, or an adapter on one.

    Attributes:
        name: heading of its column.
        path: folder or Hub id of the model or of the adapter.
        base: folder or Hub id of the adapter's base model. None for a whole model.
        run: folder of the run that wrote it.
        revision: of the whole model, where that is on the Hub.
    """

    name: str
    path: str
    base: str | None = None
    run: Path | None = None
    revision: str = "main"

    @property
    def model(self) -> str:
        """The folder or Hub id of the whole model that has to be in memory."""
        return self.base or self.path

    @property
    def model_key(self) -> str:
        """The same for each revision of it."""
        return self.model if self.revision == "main" else f"{self.model}@{self.revision}"


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are generated, in TRL's words. A temperature of 0 is greedy. Without a seed nothing repeats."""

    system_prompt: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    tools: list[str] = field(default_factory=list)
    tool_kwargs: dict = field(default_factory=dict)
    max_tool_calling_iterations: int | None = None

    def __str__(self) -> str:
        sampling = f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k}, seed {self.seed}"
        words = ["greedy" if self.temperature == 0 else sampling, f"at most {self.max_new_tokens} tokens"]
        if self.tools:
            words.append(f"tools {', '.join(re.split('[.:]', name)[-1] for name in self.tools)}")
        return ", ".join(words)


def choose_checkpoints(
    names: list[str], base: str | None = None, per_run: int | None = None
) -> tuple[list[Checkpoint], dict[str, str], list[str]]:
    """Find the checkpoints that a command line names, each once, with names that differ.

    Args:
        names: folders, Hub ids and run folders. A run stands for its base model, its checkpoints and its final one.
        base: what adapters stand on, in place of the base that they name.
        per_run: how many of a run's checkpoints are taken at most. The steps stay as even as possible.

    Returns:
        The checkpoints, the problem of each name that is none, and notes on what was left out.
    """
    chosen, problems, notes = [], {}, []
    for name in names:
        try:
            if (Path(name) / runs.RUN_FILE).exists():
                chosen += _thin_out(run_checkpoints(Path(name), base, notes), per_run, notes)
            else:
                chosen.append(find_checkpoint(name, base))
        except UserError as error:
            problems[name] = str(error)
    distinct = {}
    for each in chosen:
        distinct.setdefault((str(Path(each.path).resolve()), each.base, each.revision), each)
    return _distinct_names(list(distinct.values())), problems, notes


def run_checkpoints(run: Path, base: str | None, notes: list[str]) -> list[Checkpoint]:
    """Return a run's base model, its checkpoints by step and the final one, as far as they are whole.

    The checkpoint of the last step is left out with a note where the final one holds the same weights.
    """
    folders = [*runs.checkpoint_folders(run), run / runs.FINAL]
    whole = [path for path in folders if path.is_dir() and _problem(path, base) is None]
    values = runs.load_run(run).values
    model = base or locate(values["model_name_or_path"], run)
    last = max((line["step"] for line in runs.read_metrics(run)), default=0)
    twin, final = run / f"checkpoint-{last}", run / runs.FINAL
    are_there = {twin, final} <= {*whole} and not values["load_best_model_at_end"]
    if are_there and twin.stat().st_mtime <= final.stat().st_mtime:  # newer in a run that goes on behind its end
        whole.remove(twin)
        notes.append(f"Not shown: {twin.name}, whose weights are those of the final checkpoint.")
    revision = "main" if base else values["model_revision"]
    return [
        Checkpoint("base", model, run=run, revision=revision),
        *(find_checkpoint(str(path), base) for path in whole),
    ]


def find_checkpoint(name: str, base: str | None = None) -> Checkpoint:
    """Return the checkpoint that a folder or Hub id names.

    Raises:
        UserError: there is no such folder, it holds no checkpoint, or one that is not whole.
    """
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~", str(runs.ROOT))) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise UserError(name, "there is no such folder")
        return Checkpoint(name, name)
    if problem := _problem(folder, base):
        raise UserError(name, *problem)
    parents = (folder.resolve().parent, folder.parent)
    run = next((parent for parent in parents if (parent / runs.RUN_FILE).exists()), None)
    label = str(folder)
    if run:
        label = folder.resolve().name.removesuffix("-checkpoint")
        if (run / runs.BEST).resolve() == folder.resolve():
            label += " (best)"
    if not (folder / ADAPTER_CONFIG).exists():
        return Checkpoint(label, str(folder), run=run)
    if base:
        return Checkpoint(label, str(folder), base, run)
    name, revision = _named_base(folder)
    return Checkpoint(label, str(folder), locate(name, run), run, revision)


def run_settings(run: Path) -> GenerationSettings:
    """Return how a run generated."""
    run_file = runs.load_run(run)
    values = {name: value for name, value in run_file.values.items() if name in SAMPLING and value is not None}
    tool_kwargs = {
        tool: {name: locate(value, run) if isinstance(value, str) else value for name, value in kwargs.items()}
        for tool, kwargs in (run_file.values.get("tool_kwargs") or {}).items()
    }
    tokens = run_file.values["max_completion_length"]
    return GenerationSettings(run_file.system_prompt, max_new_tokens=tokens, tool_kwargs=tool_kwargs, **values)


def locate(name: str, run: Path | None) -> str:
    """Return a path as seen from here. The run may have written it relative to where it was started."""
    if run and not os.path.isabs(name) and not os.path.exists(name):
        for folder in run.resolve().parents:
            if os.path.exists(folder / name):
                return str(folder / name)
    return name


def _problem(folder: Path, base: str | None) -> tuple[str, str] | None:
    """Return why a folder is no checkpoint, and the fix. The trainer writes trainer_state.json last."""
    if (folder / runs.RUN_FILE).exists():
        return "this is a run", f"name one of its checkpoints, such as {folder / runs.FINAL}"
    in_run = (folder.parent / runs.RUN_FILE).exists() and re.fullmatch(r"checkpoint-\d+", folder.name)
    if in_run and not (folder / "trainer_state.json").exists():
        return "this checkpoint is not whole: it is still being written, or its run was killed", "take an earlier one"
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if is_adapter and not any(folder.glob("adapter_model.*")):
        return f"{ADAPTER_CONFIG} is there and {ADAPTER_WEIGHTS} is not", "take another checkpoint"
    if is_adapter and not (base or _named_base(folder)[0]):
        return f"its {ADAPTER_CONFIG} names no base model", "name it: --base MODEL"
    if not is_adapter and not any(file for name in WEIGHTS for file in folder.glob(name)):
        return f"this folder holds no checkpoint ({', '.join(WEIGHTS)} or {ADAPTER_CONFIG})", ""
    return None


def _named_base(adapter: Path) -> tuple[str | None, str]:
    """Return what the file of an adapter names as its base, and its revision; None where it names none."""
    with suppress(ValueError, AttributeError):
        config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return config.get("base_model_name_or_path"), config.get("revision") or "main"
    return None, "main"


def _thin_out(checkpoints: list[Checkpoint], limit: int | None, notes: list[str]) -> list[Checkpoint]:
    """Keep the base, the first, the last, and from between them what keeps the steps even."""
    if limit is None or len(checkpoints) <= limit:
        return checkpoints
    base, *trained = checkpoints
    kept = [trained[round(place * (len(trained) - 1) / (limit - 2))] for place in range(limit - 1)]
    left_out = ", ".join(each.name for each in trained if each not in kept)
    notes.append(f"Not shown: {left_out}. Name a checkpoint's folder to see it.")
    return [base, *kept]


def _distinct_names(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Put the run or the folder before names that several checkpoints share."""
    names = [each.name for each in checkpoints]

    def long_name(checkpoint: Checkpoint) -> str:
        return f"{runs.label(checkpoint.run)} {checkpoint.name}" if checkpoint.run else checkpoint.path

    return [replace(each, name=long_name(each)) if names.count(each.name) > 1 else each for each in checkpoints]
