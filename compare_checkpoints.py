"""Compare checkpoints on the same prompts: python compare_checkpoints.py CHECKPOINT ... --data data/NAME [option ...]

A CHECKPOINT is a folder with a model or an adapter, a Hub id, or a run's folder, which stands for its base, its
checkpoints and its final one. Each is compared with the first. Completions are kept in trainOutput/completions.parquet
and generated once. Exit status 1 where a checkpoint could not be compared.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from grpo_launcher.chat import SERVER_HELP, check_least, run_command
from grpo_launcher.errors import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. An output that is there is refused before anything is generated."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="*", help="folder of a model, an adapter or a run; or a Hub id")
    add("--server", metavar="URL", action="append", default=[], help=SERVER_HELP)
    add("--data", required=True, help="prepared folder (data/NAME), file of rows or Hub id")
    add("--splits", nargs="+", default=["test"], help="splits of it (default: test)")
    add("--limit", type=int, help="take only the first rows of each split, this many")
    add("--rewards", nargs="*", metavar="NAME", help="rewards by name (default: those of the first run)")
    add("--seed", type=int, help="sample with this seed, as the run did (default: greedy)")
    add("--temperature", type=float, help="sample at this temperature, with seed 0 where none is given")
    add("--max_new_tokens", type=int, help="longest completion (default: the run's max_completion_length, else 256)")
    add("--batch_size", type=int, default=32, help="completions generated at once (default: 32)")
    add("--base", help="folder or Hub id that adapters stand on, where it is not the one they name")
    add("--output", type=Path, metavar="FOLDER", help="write comparison.json and comparison.md into this folder")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add("--markdown", type=Path, metavar="FILE", help="write the tables here")
    add("--overwrite", action="store_true", help="replace outputs that are there")
    args = parser.parse_args(argv)
    if not args.checkpoints and not args.server:
        parser.error("name a CHECKPOINT or a --server")
    if args.output:
        args.json = args.json or args.output / "comparison.json"
        args.markdown = args.markdown or args.output / "comparison.md"
    check_least(parser, args, limit=1, max_new_tokens=1, batch_size=1, temperature=0)
    return args


def compare(args: argparse.Namespace) -> int:
    """Generate, score, test and show. 1 where a checkpoint could not be compared."""
    from grpo_launcher import evaluate, render, runs
    from grpo_launcher.chat import backends

    for path in filter(None, (args.json, args.markdown)):
        runs.check_new_file(path, args.overwrite)
    lineup = backends.line_up(args.checkpoints, args.base, args.server)
    for problem in lineup.problems.values():
        print(f"Left out: {problem}", file=sys.stderr, flush=True)
    settings = lineup.settings
    if args.max_new_tokens:
        settings = replace(settings, max_new_tokens=args.max_new_tokens)
    if args.temperature == 0 or (args.temperature is None and args.seed is None):
        settings = replace(settings, temperature=0.0, top_p=1.0, top_k=0, min_p=None)
    else:
        temperature = settings.temperature if args.temperature is None else args.temperature
        settings = replace(settings, temperature=temperature, seed=args.seed or 0)
    rows = evaluate.data_rows(args.data, args.splits, args.limit)
    columns = list(set.intersection(*(set(split[0]) for split in rows.values())))
    if args.rewards is None:
        rewards = evaluate.RewardSet.of_run(lineup.run, columns)
    else:
        options = runs.load_run(lineup.run).values["reward_kwargs"] if lineup.run else None
        rewards = evaluate.RewardSet(args.rewards, options, columns)
        if rewards.problems:
            raise UserError("--rewards", " ".join(rewards.problems))
    frame = evaluate.evaluate(lineup.models, rows, rewards, settings, args.batch_size)
    compared, failed, notes = evaluate.comparable(frame)
    report = render.Report(f"Comparison on {args.data}", [*lineup.facts, str(settings)])
    report.summary, report.failed = evaluate.summarize(compared), lineup.problems | failed
    report.notes = [*lineup.notes, *notes, *rewards.problems]
    report.notes += [f"Not compared: {problem}" for problem in report.failed.values()]
    render.show(report, render.make_console())
    for path, text in ((args.json, render.as_json), (args.markdown, render.markdown)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(report), encoding="utf-8")
            print(f"Wrote {path}")
    return int(bool(report.failed))


def main(argv: list[str]) -> int:
    """Run the command line."""
    return run_command(compare, parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
