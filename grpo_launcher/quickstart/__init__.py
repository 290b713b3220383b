"""Small models and generated rows, so that every part of the project runs without a GPU and without a network.

python -m grpo_launcher.quickstart            a model that summarises posts, and posts
python -m grpo_launcher.quickstart.tools      a model that calls two tools; sums, and questions with their corpus
python -m grpo_launcher.quickstart.encoder    T5 and BART; articles with summaries
python -m grpo_launcher.quickstart.summaries  runs the recipes that use the latter, and compares the results
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_launcher.datasets import Request, new_folder, process


@dataclass(frozen=True)
class Task:
    """Generated rows, and the dataset that they are prepared as."""

    dataset: str  # module of grpo_launcher.datasets
    make_rows: Callable[[int], dict[str, list[dict]]]  # seed -> raw rows by split
    prefix: str | None = None  # of prompts that are plain text


def build(argv: list[str], doc: str, models: dict[str, Callable[[Path, int], None]], tasks: dict[str, Task]) -> None:
    """Run a command of this package: make the models and the rows that are not there yet.

    The package brings the models of seed 0, so that nobody has to wait for their pre-training. They are what the same
    command makes where the folder `models` is not there.

    Args:
        argv: its command line.
        doc: its description.
        models: by NAME of the folder quickstart-NAME, what writes a model into a folder, given a seed.
        tasks: by name of the folder, the rows. The last model's tokenizer counts their tokens.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=doc, formatter_class=formatter)
    parser.add_argument("--output", type=Path, default=Path("data"), help="where the folders are made (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0, whose models come with the package")
    parser.add_argument("--model", choices=models, nargs="+", default=[*models], help="models to make (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="make anew what is there")
    args = parser.parse_args(argv)
    for name in args.model:
        model = args.output / f"quickstart-{name}"
        if args.overwrite or not model.exists():
            brought = Path(__file__).parent / "models" / name
            with new_folder(model) as folder:
                if args.seed == 0 and brought.exists():
                    shutil.copytree(brought, folder, dirs_exist_ok=True)
                else:
                    models[name](folder, args.seed)
            print(f"Wrote {model}")
    for name, task in tasks.items():
        output = args.output / name
        if output.exists() and not args.overwrite:
            continue
        with tempfile.TemporaryDirectory() as source:
            for split, rows in task.make_rows(args.seed).items():
                Path(source, f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            options = {"seed": args.seed, "prefix": task.prefix, "overwrite": args.overwrite}
            process(Request(task.dataset, source=source, output=output, tokenizer=str(model), **options))
