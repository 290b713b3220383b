"""Compare checkpoints on the same prompts: python compare_checkpoints.py CHECKPOINT … --data data/NAME [option …]

A CHECKPOINT is a folder with a model or an adapter, a Hub id, or a run's folder, which means its base, its checkpoints and its final one. Each is
held against the first. Replies are kept in trainOutput/completions.parquet and drawn once. Exit status 1 where a checkpoint could not be compared.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from grpo_launcher import hub


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; an output that is there is refused before anything is drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="folder of a model, an adapter or a run; or a Hub id")
    parser.add_argument("--data", required=True, help="prepared folder (data/NAME), file of rows or Hub id")
    parser.add_argument("--splits", nargs="+", default=["test"], help="splits of it (default: test)")
    parser.add_argument("--limit", type=int, help="take the first rows of each split only, this many")
    parser.add_argument(
        "--rewards", nargs="*", metavar="NAME", help="rewards by dotted name (default: those of the recipe of the first run among the checkpoints)"
    )
    parser.add_argument("--seed", type=int, help="draw by lot with this seed, as the run did (default: greedy, the likeliest token every time)")
    parser.add_argument("--temperature", type=float, help="draw by lot at this temperature, with seed 0 where none is given")
    parser.add_argument("--max_new_tokens", type=int, help="length of a reply at most (default: the run's max_completion_length, else 256)")
    parser.add_argument("--batch_size", type=int, default=32, help="replies that transformers draws at once (default: 32)")
    parser.add_argument("--engine", choices=["transformers", "vllm"], help="who draws (default: vllm where there is a GPU, transformers elsewhere)")
    parser.add_argument("--base", help="folder or Hub id that adapters stand on, where it is not the one they name")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write comparison.json and comparison.md into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    args = parser.parse_args(argv)
    if args.output:
        args.json, args.markdown = args.json or args.output / "comparison.json", args.markdown or args.output / "comparison.md"
    for path in filter(None, (args.json, args.markdown)):
        if path.exists() and not args.overwrite:
            parser.error(f"{path} exists; add --overwrite to replace it, or name another file")
    for name, least in {"limit": 1, "max_new_tokens": 1, "batch_size": 1, "temperature": 0}.items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            parser.error(f"--{name}: {getattr(args, name)} is less than {least}")
    if args.engine == "vllm" and not importlib.util.find_spec("vllm"):
        parser.error("--engine vllm: vLLM is not installed here; requirements/cpu.lock and gpu.lock have it")
    return args


def compare(args: argparse.Namespace) -> dict:
    """Everything that is printed and written."""
    import datasets
    import torch
    import transformers

    from grpo_launcher.chat import comparison, metrics, statistics
    from grpo_launcher.chat.drawing import draw
    from grpo_launcher.chat.kept import Replies
    from grpo_launcher.chat.scores import Scores

    datasets.disable_progress_bars()  # one bar a checkpoint is enough
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    chosen, failed = comparison.choose(args.checkpoints, args.base)
    run = next((checkpoint.run for checkpoint in chosen if checkpoint.run), None)
    manner, seed = comparison.decoding(run, args.temperature, args.seed, args.max_new_tokens)
    if manner.tools and args.engine == "vllm":
        raise comparison.ComparisonError("--engine vllm: it draws one turn, and the run's tools want several; leave it out, and transformers draws.")
    asked = comparison.Comparison(chosen, comparison.read_rows(args.data, args.splits, args.limit), manner, seed, failed=failed)
    scores = Scores(run, args.rewards, metrics.columns(asked))
    if args.rewards and scores.left_out:
        raise comparison.ComparisonError("\n       ".join(["--rewards:", *scores.left_out]))
    comparison.prepare(asked)
    for reason in asked.failed.values():
        print(f"Left out: {reason}", file=sys.stderr, flush=True)
    encoders = [each.name for each in asked.asked if asked.engine.has_encoder(each)]
    if encoders and args.engine == "vllm":
        raise comparison.ComparisonError(
            f"--engine vllm: {', '.join(encoders)} has an encoder, and vLLM runs models without one only; leave it out, and transformers draws."
        )
    turn = torch.cuda.is_available() and importlib.util.find_spec("vllm") and not manner.tools and not encoders
    engine = args.engine or ("vllm" if turn else "transformers")
    drawn = draw(asked, Replies(), engine == "vllm", args.batch_size)
    how = "greedy" if seed is None else f"temperature {manner.temperature:g}, seed {seed}"
    tools = ", ".join(name.rpartition(".")[2] for name in manner.tools or [])
    measured = metrics.measure(asked, drawn, scores)
    return {
        "data": args.data,
        "drawn": f"{how}, {manner.max_new_tokens} tokens at most, by {engine}{tools and f', with {tools}'}",
        "checkpoints": [{"name": each.name, "path": each.path, "base": each.base} for each in asked.asked],
        "splits": {split: {"prompts": len(asked.rows[split]), "metrics": statistics.compare(of)} for split, of in measured.items()},
        "method": statistics.METHOD,
        "notes": [*asked.notes, *scores.left_out],
        "failed": asked.failed,
    }


def main(argv: list[str]) -> int:
    """0, or 1 where a checkpoint could not be compared; the others were."""
    args = arguments(argv)
    hub.use_cache_if_unreachable()
    sys.path.append(os.getcwd())  # for rewards of the user's own
    from rich.console import Console

    from grpo_launcher.chat import table
    from grpo_launcher.chat.checkpoints import CheckpointError
    from grpo_launcher.chat.comparison import ComparisonError
    from grpo_launcher.config import RecipeError

    try:
        result = compare(args)
    except (CheckpointError, ComparisonError, RecipeError) as error:
        sys.exit(f"error: {error}")
    table.show(result, Console(highlight=False))
    for path, text in ((args.json, table.as_json), (args.markdown, table.markdown)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(result), encoding="utf-8")
            print(f"Wrote {path}")
    for reason in result["failed"].values():
        print(f"Not compared: {reason}", file=sys.stderr)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("Stopped. Replies that were drawn are kept: the same command goes on from there.")
