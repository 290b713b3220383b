"""Base → supervised LoRA → GRPO with LoRA → GRPO, and the table of all four: python -m quickstart.summaries [--seed N] [--model t5|bart] [--output FOLDER]

Each step is a command of this project, printed before it runs. What is there is not made again: the same command goes on where it was stopped. Both GRPO
runs start from the supervised one. Needs no GPU and no network.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from launcher.arguments import HOME
from training.run_folder import FINAL, last_checkpoint

ROWS = {"supervised": "quickstart_summaries_sft", "grpo-lora": "quickstart_summaries_lora", "grpo": "quickstart_summaries"}  # run → recipe


def main(argv: list[str]) -> int:
    """The exit status of the first command that failed, or of the comparison."""
    parser = argparse.ArgumentParser(prog="python -m quickstart.summaries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of models, rows and training (default: 0)")
    parser.add_argument("--model", choices=["t5", "bart"], default="t5", help="which of the two small base models (default: t5)")
    parser.add_argument("--output", type=Path, help="folder of data, runs and table (default: trainOutput/summaries/MODEL-SEED)")
    parser.add_argument("--limit", type=int, default=128, help="rows of each split in the table (default: 128)")
    args = parser.parse_args(argv)
    output = args.output or Path("trainOutput/summaries") / f"{args.model}-{args.seed}"
    base, rows, supervised = output / f"data/quickstart-{args.model}", output / "data/quickstart_summaries", output / "supervised" / FINAL
    steps = [[sys.executable, "-m", "quickstart.encoder", "--output", str(output / "data"), "--seed", str(args.seed)]]
    for name, recipe in ROWS.items():
        start = base if name == "supervised" else supervised
        steps.append(_training(output / name, recipe, start, rows, args.seed))
    finals = [str(output / name / FINAL) for name in ROWS]
    table = [sys.executable, str(HOME / "compare_checkpoints.py"), str(base), *finals, "--data", str(rows), "--splits", "train", "validation", "test"]
    steps.append([*table, "--limit", str(args.limit), "--output", str(output), "--overwrite"])
    for command in filter(None, steps):
        print(f"\n$ {shlex.join(command)}", flush=True)
        if status := subprocess.run(command, env=None).returncode:
            return status
    return 0


def _training(run: Path, recipe: str, start: Path, rows: Path, seed: int) -> list[str] | None:
    """The command that makes a run, or goes on with it; None where it is done."""
    if (run / FINAL / "README.md").exists():  # written last
        return None
    flags = {"model_name_or_path": start, "dataset_name": rows, "output_dir": run, "seed": seed}
    command = [
        "bash",
        str(HOME / "launch_train.sh"),
        str(HOME / f"configs/{recipe}.yaml"),
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]
    ranks = 2  # without a GPU
    return [*command, "--no-install", *(["--resume"] if last_checkpoint(run, ranks) else [])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
