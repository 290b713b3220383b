"""Base → supervised LoRA → GRPO with LoRA behind it; base → GRPO; and the table of all four: python -m grpo_launcher.quickstart.summaries [--seed N] [--model t5|bart]

Further --key value go to all three runs. Each step is a command of this project, printed before it runs. What is there is not made again: the same command
goes on where it was stopped. Needs no GPU and no network.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from grpo_launcher.launch.arguments import HOME
from grpo_launcher.runs import FINAL, last_checkpoint

ROWS = {"supervised": "quickstart_summaries_sft", "grpo-lora": "quickstart_summaries_lora", "grpo": "quickstart_summaries"}  # run → recipe
RANKS = 2  # without a GPU


def main(argv: list[str]) -> int:
    """The exit status of the first command that failed, or of the comparison."""
    parser = argparse.ArgumentParser(prog="python -m grpo_launcher.quickstart.summaries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of models, rows and training (default: 0)")
    parser.add_argument("--model", choices=["t5", "bart"], default="t5", help="which of the two small base models (default: t5)")
    parser.add_argument("--output", type=Path, help="folder of data, runs and table (default: trainOutput/summaries/MODEL-SEED)")
    parser.add_argument("--limit", type=int, default=128, help="rows of each split in the table (default: 128)")
    args, flags = parser.parse_known_args(argv)
    output = args.output or Path("trainOutput/summaries") / f"{args.model}-{args.seed}"
    base, rows, supervised = output / f"data/quickstart-{args.model}", output / "data/quickstart_summaries", output / "supervised" / FINAL
    steps = [[sys.executable, "-m", "grpo_launcher.quickstart.encoder", "--output", str(output / "data"), "--model", args.model, "--seed", str(args.seed)]]
    for name, recipe in ROWS.items():
        start = supervised if name == "grpo-lora" else base
        steps.append(_training(output / name, recipe, {"model_name_or_path": start, "dataset_name": rows, "seed": args.seed}, flags))
    finals = [str(output / name / FINAL) for name in ROWS]
    table = [sys.executable, str(HOME / "compare_checkpoints.py"), str(base), *finals, "--data", str(rows), "--splits", "train", "validation", "test"]
    steps.append([*table, "--limit", str(args.limit), "--output", str(output), "--overwrite"])
    for command in filter(None, steps):
        print(f"\n$ {shlex.join(command)}", flush=True)
        if status := subprocess.run(command).returncode:
            return status
    return 0


def _training(run: Path, recipe: str, fields: dict, flags: list[str]) -> list[str] | None:
    """The command that makes a run, or goes on with it; None where it is done."""
    if (run / FINAL / "README.md").exists():  # written last
        return None
    given = [word for name, value in {"output_dir": run, **fields}.items() for word in (f"--{name}", str(value))]
    resumed = ["--resume"] if last_checkpoint(run, RANKS) else []
    if not resumed:
        shutil.rmtree(run, ignore_errors=True)
    return ["bash", str(HOME / "launch_train.sh"), str(HOME / f"configs/{recipe}.yaml"), *given, *flags, *resumed, "--no-install"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
