"""Seconds a step with and without overlap: `python benchmarks/overlap.py [--quickstart] [--output FILE.json]`.

Beside a server that answers from a table after a set time, while a step is trained in a set time: nothing
competes for the processor. With overlap a step should take as long as the longer of the two, without it their sum.
--quickstart runs the real one instead, with its vLLM server on one core and both ranks on another.
"""

import contextlib
import itertools
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
from common import OWN_STEP, parser, show, table_server, watch
from helpers import ROOT, read_metrics
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
    table, train = table_server(), Train(training)
    with table.TableServer(delay=generation) as server:
        flags = ["--overlap", str(overlap).lower(), "--max_steps", "4", "--max_completion_length", "4"]
        table.train_beside(server, model, folder, *flags, callbacks=[train])
    return statistics.median(end - start for start, end in itertools.pairwise(train.ends))


def quickstart(folder: Path, overlap: bool) -> dict:
    """Run 6 steps of the quickstart and return the medians of its figures."""
    command = ["bash", str(ROOT / "launch_train.sh"), str(ROOT / "configs/quickstart.yaml"), "--no-install"]
    command += ["--max_steps", "6", "--sample_every", "0", "--overlap", str(overlap).lower()]
    done = threading.Event()
    pin = threading.Thread(target=_pin_to_cores, args=(done,))
    pin.start()
    try:
        step = watch([*command, "--output_dir", str(folder)], OWN_STEP, cwd=ROOT)["step"]
    finally:
        done.set()
        pin.join()
    lines = read_metrics(folder)
    names = ("overlap/trainer_waited_seconds", "overlap/server_idle_seconds")
    medians = {name: statistics.median(line[name] for line in lines if name in line) for name in names if overlap}
    return {"overlap": overlap, "a step, s": step} | medians


def _pin_to_cores(done: threading.Event) -> None:
    """Keep the threads of the server on the first core, and those of the ranks on the second."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    cores = {"grpo_launcher.vllm_server": first, "VLLM::": first, "train.py": second}
    while not done.wait(1.0):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):  # it has just ended
                command = " ".join(process.cmdline())
                for core in [core for name, core in cores.items() if name in command]:
                    for thread in process.threads():
                        os.sched_setaffinity(thread.id, {core})


def main() -> None:
    """Print the table."""
    command = parser(__doc__)
    command.add_argument("--quickstart", action="store_true", help="the real one, a core for each side")
    args = command.parse_args()
    rows = []
    if args.quickstart:
        with tempfile.TemporaryDirectory() as name:
            rows = [quickstart(Path(name) / str(overlap), overlap) for overlap in (False, True)]
        show(rows, args.output)
        return
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
    show(rows, args.output)


if __name__ == "__main__":
    main()
