"""Seconds a step and memory of a rank as model, batch and completions grow: `python benchmarks/scale.py`.

Two ZeRO-3 ranks on the CPU and random weights, beside a server that answers at once from a table: training alone is
measured. The slope is that of log seconds over log size between two rows: 1 is linear.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

from common import SHAPES, make_model, parser, run_ranks, show, status, table_server
from helpers import read_metrics

from grpo_launcher.launch.processes import exit_at_once

SIZES = ("1 M", "8 M", "32 M", "135 M")
GROWTH = {  # what grows: (model, completions of a rank's step, tokens of a completion)
    "model": [(size, 8, 32) for size in SIZES],
    "batch": [("8 M", batch, 32) for batch in (4, 8, 16)],
    "completion": [("8 M", 8, tokens) for tokens in (32, 64, 128, 256)],
}


def rank(model: str, folder: str, url: str, batch: str, tokens: str) -> None:
    """Train three steps as one of the ranks. The main one writes the figures."""
    table = table_server()
    flags = ["--per_device_train_batch_size", batch, "--per_device_eval_batch_size", batch, "--max_steps", "3"]
    flags += ["--max_completion_length", tokens, "--gradient_checkpointing", "false"]
    table.train_beside(table.TableServer.at(url), Path(model), Path(folder), *flags)
    steps = [line["step_time"] for line in read_metrics(Path(folder)) if "step_time" in line]
    (Path(folder) / f"memory-{status('VmHWM'):.3f}").touch()
    Path(folder, "seconds.json").write_text(json.dumps(min(steps[1:])), encoding="utf-8")


def measure(models: Path, folder: Path, size: str, batch: int, tokens: int) -> dict:
    """Return seconds of a step, the faster of two behind the first, and the memory of the larger rank."""
    model = models / size.replace(" ", "")
    if not model.exists():
        make_model(model, size)
    folder.mkdir()
    with table_server().TableServer() as server:
        run_ranks(__file__, folder, str(model), str(folder), server.url, str(batch), str(tokens))
    memory = max(float(path.name.partition("-")[2]) for path in folder.glob("memory-*"))
    return {"seconds a step": json.loads((folder / "seconds.json").read_text()), "GiB a rank": memory}


def main() -> None:
    """Print the table."""
    command = parser(__doc__)
    command.add_argument("--grow", nargs="+", choices=GROWTH, default=[*GROWTH], help="what grows (default: all)")
    args = command.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for what in args.grow:
            before = None
            for size, batch, tokens in GROWTH[what]:
                row = {"what grows": what, "model": size, "completions": batch, "tokens": tokens}
                row |= measure(Path(name), Path(name) / f"run-{len(rows)}", size, batch, tokens)
                amount = {"model": _parameters(size), "batch": batch, "completion": tokens}[what]
                row["slope"] = math.nan
                if before:
                    row["slope"] = math.log(row["seconds a step"] / before[1]) / math.log(amount / before[0])
                before = amount, row["seconds a step"]
                rows.append(row)
                print(f"{what}: {size}, {batch} × {tokens}: {row['seconds a step']:.2f} s", flush=True)
    show(rows, args.output)


def _parameters(size: str) -> float:
    """Return the parameters of a Qwen2 model with tied embeddings, biases and norms left out."""
    layers, width, inner, heads, key_value_heads, vocabulary = SHAPES[size]
    attention = 2 * width * width * (1 + key_value_heads / heads)
    return layers * (attention + 3 * width * inner) + vocabulary * width


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
        exit_at_once(0)  # as train.py does: gloo's threads may abort behind it
    main()
