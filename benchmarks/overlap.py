"""Seconds a step with and without overlap: `python benchmarks/overlap.py [--output FILE.json]`.

Beside a server that answers from a table after a set time, while a step is trained in a set time: nothing
competes for the processor. With overlap a step should take as long as the longer of the two, without it their sum.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pandas
from table_server import TableServer, train_beside
from tiny_models import make_model
from transformers import TrainerCallback

TOTAL = 2.0  # seconds of generation and training together
RATIOS = [(1, 3), (1, 1), (3, 1)]


class Train(TrainerCallback):
    """Makes a step take `seconds` to train, and keeps when it ended."""

    def __init__(self, seconds: float):
        self.seconds, self.ends = seconds, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Train, so to speak."""
        time.sleep(self.seconds)

    def on_step_end(self, args, state, control, **kwargs):
        """Keep the time."""
        self.ends.append(time.monotonic())


def beside_table(model: Path, folder: Path, generation: float, training: float, overlap: bool) -> float:
    """Return the median seconds between two steps of an epoch. The first of an epoch has nothing ahead."""
    train = Train(training)
    with TableServer(delay=generation) as server:
        flags = ["--overlap", str(overlap).lower(), "--max_steps", "4", "--max_completion_length", "4"]
        train_beside(server, model, folder, *flags, callbacks=[train])
    return statistics.median(end - start for start, end in itertools.pairwise(train.ends))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", seed=0)
        for generation_share, training_share in RATIOS:
            unit = TOTAL / (generation_share + training_share)
            seconds = generation_share * unit, training_share * unit
            off, on = (
                beside_table(folder / "model", folder / f"run-{len(rows)}-{overlap}", *seconds, overlap)
                for overlap in (False, True)
            )
            row = {"generation": seconds[0], "training": seconds[1], "without": off, "with overlap": on}
            rows.append(row | {"with / longer": on / max(seconds), "without / sum": off / sum(seconds)})
        print(pandas.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format), flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
