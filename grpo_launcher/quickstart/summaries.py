"""Train and compare four small summarisers: the base model, SFT with LoRA, GRPO with LoRA after that, and GRPO.

python -m grpo_launcher.quickstart.summaries [--model t5|bart] [--seed N] [--output FOLDER] [--key value …]

Further --key value go to all three runs. Each step is a command of this project, which is printed before it runs.
What is there is not made again: the same command goes on where it was stopped. No GPU and no network are needed.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from grpo_launcher.runs import FINAL, last_checkpoint

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = {  # folder of the run: recipe
    "supervised": "quickstart_summaries_sft",
    "grpo-lora": "quickstart_summaries_lora",
    "grpo": "quickstart_summaries",
}
RANKS = 2  # without a GPU


def main(argv: list[str]) -> int:
    """Run the commands. Return the exit status of the first that failed, or 0."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=formatter)
    parser.add_argument("--seed", type=int, default=0, help="of models, rows and training (default: 0)")
    parser.add_argument("--model", choices=["t5", "bart"], default="t5", help="which base model (default: t5)")
    parser.add_argument("--output", type=Path, help="folder of all (default: trainOutput/summaries/MODEL-SEED)")
    parser.add_argument("--limit", type=int, default=128, help="rows of each split that are compared (default: 128)")
    args, flags = parser.parse_known_args(argv)
    output = args.output or Path("trainOutput/summaries") / f"{args.model}-{args.seed}"
    base = output / f"data/quickstart-{args.model}"
    rows = output / "data/quickstart_summaries"
    finals = [output / run / FINAL for run in RECIPES]
    encoder = [sys.executable, "-m", "grpo_launcher.quickstart.encoder", "--output", output / "data"]
    commands = [[*encoder, "--model", args.model, "--seed", args.seed]]
    for run, recipe in RECIPES.items():
        if (output / run / FINAL / "README.md").exists():  # written last
            continue
        start = finals[0] if run == "grpo-lora" else base
        command = ["bash", PROJECT / "launch_train.sh", PROJECT / f"configs/{recipe}.yaml", "--no-install"]
        command += ["--output_dir", output / run, "--model_name_or_path", start, "--dataset_name", rows]
        command += ["--seed", args.seed, *flags]
        if last_checkpoint(output / run, RANKS):
            command.append("--resume")
        else:
            shutil.rmtree(output / run, ignore_errors=True)
        commands.append(command)
    compare = [sys.executable, PROJECT / "compare_checkpoints.py", base, *finals, "--data", rows]
    compare += ["--splits", "train", "validation", "test", "--limit", args.limit, "--output", output, "--overwrite"]
    for command in [*commands, compare]:
        words = [str(word) for word in command]
        print(f"\n$ {shlex.join(words)}", flush=True)
        status = subprocess.run(words).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
