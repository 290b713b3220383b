"""Seconds and memory of a weight sync: `python benchmarks/sync.py [--output FILE.json]`.

Two ZeRO-3 ranks on the CPU and random weights. All weights of a model, a LoRA adapter that is merged into it, and the
adapter alone go to a server that takes the files and does not read them: vLLM's part is not in these figures.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import GIB, SHAPES, make_model, parser, run_ranks, show, status, table_server

from grpo_launcher.launch.processes import exit_at_once

SIZES = ("1 M", "135 M", "0.5 B")
LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "16"]
WAYS = {
    "all weights": ["--weight_sync", "disk"],
    "LoRA, merged": ["--weight_sync", "disk", *LORA],
    "LoRA, adapter": ["--weight_sync", "adapter", *LORA],
}


def rank(model: str, folder: str, url: str, *flags: str) -> None:
    """Sync three times as one of the ranks, before anything is trained. The main one writes what each took."""
    table = table_server()
    from grpo_launcher import weight_sync
    from grpo_launcher.trainer import Trainer

    figures, save_file = [], weight_sync.save_file

    def save(tensors, *args):
        figures[-1]["bytes"] += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, *args)

    def measure(self, send_weights):
        for _ in range(3):
            figures.append({"bytes": 0, "between": status("VmRSS")})
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            start = time.monotonic()
            send_weights()
            figures[-1] |= {"seconds": time.monotonic() - start, "peak": status("VmHWM")}
        if self.is_world_process_zero():
            Path(folder, "sync.json").write_text(json.dumps(figures), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        os._exit(0)

    weight_sync.save_file, Trainer._sync = save, measure
    table.train_beside(table.TableServer.at(url), Path(model), Path(folder), *flags)


def measure(model: Path, folder: Path, flags: list[str]) -> dict:
    """Return the figures of the last sync: in the first memory still grows."""
    with table_server().TableServer() as server:
        run_ranks(__file__, folder, str(model), str(folder), server.url, *flags)
    sync = json.loads((folder / "sync.json").read_text())[-1]
    return {
        "sent, MiB": sync["bytes"] / 2**20,
        "seconds": sync["seconds"],
        "between, GiB": sync["between"],
        "peak, GiB": sync["peak"],
    }


def main() -> None:
    """Print the table."""
    command = parser(__doc__)
    command.add_argument(
        "--sizes", nargs="+", choices=SHAPES, default=SIZES, help="models (default: 1 M, 135 M, 0.5 B)"
    )
    args = command.parse_args()
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as name:
            model = Path(name) / "model"
            make_model(model, size)
            whole = (model / "model.safetensors").stat().st_size / GIB
            for way, flags in WAYS.items():
                if size == "0.5 B" and way == "all weights":
                    continue  # two ranks with gradients and Adam's moments need more than 24 GiB
                folder = Path(name) / way.replace(", ", "-").replace(" ", "-")
                folder.mkdir()
                row = {"parameters": size, "way": way} | measure(model, folder, flags)
                row |= {
                    "s per GiB of model": row["seconds"] / whole,
                    "peak / between": row["peak, GiB"] / row["between, GiB"],
                }
                rows.append(row)
                print(f"{size}, {way}: {row['seconds']:.2f} s", flush=True)
    show(rows, args.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
        exit_at_once(0)  # as train.py does: gloo's threads may abort behind it
    main()
