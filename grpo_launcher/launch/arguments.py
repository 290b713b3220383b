"""The launcher's command line. Standard library only, so that it answers before anything is installed."""

from __future__ import annotations  # any python3 may answer --help

import argparse
import difflib
import itertools
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent.parent

HELP = """\
Train a recipe: a vLLM server generates, ZeRO-3 ranks train, with or without a GPU.

  bash launch_train.sh                                   the default recipe of this machine
  bash launch_train.sh configs/tldr_length.yaml          a recipe
  bash launch_train.sh configs/tldr_length.yaml --beta 0.1 --max_steps 200
  bash launch_train.sh configs/tldr_length.yaml --dry-run --assume-gpus 4 --assume-memory 24
  bash launch_train.sh --doctor                          does this machine work? A report to send with a question

The hardware decides the layout. No GPU: two ZeRO-3 ranks and a vLLM server on the CPU. One GPU: vLLM inside the
trainer (colocate). Two or more: the last for the vLLM server, the others for ZeRO-3. The run's folder is
trainOutput/RECIPE/N: checkpoints, final-checkpoint, metrics.jsonl, curves.png, logs, and run.json.
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the launcher's options, and the flags that are fields of the recipe, which are checked later."""
    parser = argparse.ArgumentParser(
        prog="launch_train.sh",
        usage="bash launch_train.sh [CONFIG] [option …] [--key value …]",
        description=HELP,
        epilog="--key value: any field of the recipe; it wins over the YAML. `python train.py --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    parser.add_argument(
        "--assume-gpus", type=int, metavar="N", help="with --dry-run: plan for N GPUs that need not be there"
    )
    parser.add_argument(
        "--assume-memory", type=float, metavar="GIB", help="with --assume-gpus: memory of each (default: 24)"
    )
    parser.add_argument(
        "--colocate", action="store_true", help="train and generate on every GPU, without a dedicated server"
    )
    parser.add_argument(
        "--vllm_gpus",
        type=int,
        metavar="N",
        help="GPUs of the server (default: 1): one copy of the model, or several by vllm_tensor_parallel_size",
    )
    parser.add_argument(
        "--sync",
        choices=["nccl", "disk", "adapter"],
        help="how the server gets new weights (default: nccl; without a GPU: disk; adapter: of LoRA, alone)",
    )
    parser.add_argument("--num_nodes", type=int, default=1, metavar="N", help="machines that train (default: 1)")
    parser.add_argument("--node_rank", type=int, default=0, metavar="R", help="which of them this is, from 0 on")
    parser.add_argument(
        "--serve", action="store_true", help="run the vLLM server that vllm_server_base_url names, and train nothing"
    )
    parser.add_argument("--main_address", metavar="A", help="address at which the others reach node 0")
    parser.add_argument("--main_port", type=int, default=29500, metavar="P", help="its port (default: 29500)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the recipe's newest run (or --output_dir) from its last checkpoint",
    )
    parser.add_argument(
        "--force", action="store_true", help="with --resume: go on although recipe or dataset have changed"
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="print a report on this machine and a rehearsal of the recipe, for an issue; a minute or two",
    )
    parser.add_argument(
        "--no-install",
        action="store_true",
        help="use the active Python environment as it is (conda, container, cluster)",
    )
    config = str(Path(argv[0]).expanduser()) if argv and not argv[0].startswith("-") else None
    options, flags = parser.parse_known_args(argv[1:] if config else argv)
    if config and not Path(config).is_file():
        known = sorted(str(path.relative_to(HOME)) for path in (HOME / "configs").glob("*.yaml"))
        near = difflib.get_close_matches(config, known, n=1, cutoff=0.5)
        hint = f"there are: {', '.join(known)}."
        if near:
            path = near[0] if Path(near[0]).is_file() else HOME / near[0]
            hint = f"did you mean {path}?"
        parser.error(f"there is no recipe {config}; {hint}")
    if options.assume_gpus is not None and not options.dry_run:
        parser.error("--assume-gpus plans for hardware that is not there: it needs --dry-run")
    if options.force and not options.resume:
        parser.error("--force says that a changed run goes on: it needs --resume")
    if options.assume_memory is not None and options.assume_gpus is None:
        parser.error("--assume-memory needs --assume-gpus")
    if (options.vllm_gpus is not None and options.vllm_gpus < 1) or (options.assume_gpus or 0) < 0:
        parser.error("--vllm_gpus must be at least 1, --assume-gpus at least 0")
    if not 0 <= options.node_rank < options.num_nodes:
        parser.error(f"--node_rank is {options.node_rank}: the nodes are 0 to --num_nodes - 1")
    if (options.num_nodes > 1) != (options.main_address is not None):
        parser.error("--num_nodes and --main_address belong together")
    if flags and not flags[0].startswith("--"):
        parser.error(f"unexpected {flags[0]!r}: the recipe comes first, then options, then --key value")
    options.config = config
    return options, flags


def named_fields(flags: list[str]) -> dict[str, str]:
    """Return the recipe's fields among the flags, by their names in YAML, with the word that follows each."""
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    pairs = itertools.pairwise([*words, ""])
    return {word[2:].replace("-", "_"): following for word, following in pairs if word.startswith("--")}


if __name__ == "__main__":
    parse(sys.argv[1:])
