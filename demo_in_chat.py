"""Talk to checkpoints side by side: python demo_in_chat.py [CHECKPOINT ...] [--prompt | --prompts | --sample | --web]

Without CHECKPOINT: the newest run under trainOutput, with base, checkpoints and final. Completions are sampled as in
the run, unless said otherwise.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

from grpo_launcher.chat import SERVER_HELP, check_least, run_command
from grpo_launcher.errors import UserError

PER_RUN = 4  # checkpoints of one run that are shown
SHOWN = 3  # prompts on the console. All are in the files


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="*", help="folder of a model, an adapter or a run; or a Hub id")
    add("--base", help="folder or Hub id that adapters stand on, where it is not the one they name")
    add("--server", metavar="URL", action="append", default=[], help=SERVER_HELP)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--prompt", metavar="TEXT", help="complete this, write a report, and end")
    mode.add_argument(
        "--prompts", metavar="FILE", type=Path, help="the same for a prompt a line, or rows with `prompt`"
    )
    mode.add_argument("--sample", metavar="N", type=int, help="the same for N rows of the run's test split")
    mode.add_argument("--web", action="store_true", help="the chat in a browser, on this machine alone")
    add("--port", type=int, default=0, help="of --web (default: a free one, which is printed)")
    add(
        "--output",
        type=Path,
        help="report: STEM of .md, .html and .json, or one file, .svg too (default: chat-report-N)",
    )
    add("--overwrite", action="store_true", help="replace a report that is there")
    add("--seed", type=int, help="of sampling and of --sample (default: 0 for a report, none for a chat)")
    add("--temperature", type=float, help="0 is greedy (default: the run's)")
    add("--max_new_tokens", type=int, help="longest completion (default: the run's)")
    add(
        "--system",
        dest="system_prompt",
        metavar="TEXT",
        help="system prompt; an empty one for none (default: the run's)",
    )
    args = parser.parse_intermixed_args(argv)
    check_least(parser, args, temperature=0, max_new_tokens=1, sample=1)
    args.report = args.prompt is not None or args.prompts is not None or args.sample is not None
    if args.output and not args.report:
        parser.error("--output belongs to --prompt, --prompts or --sample; a chat is saved with /save FILE")
    return args


def chat(args: argparse.Namespace) -> int:
    """Find the models, then chat, serve the page or write a report."""
    from grpo_launcher import evaluate, render, runs
    from grpo_launcher.chat import backends

    console = render.make_console()
    if not args.checkpoints and not args.server:
        newest = runs.newest_run()
        if newest is None:
            raise UserError(str(runs.ROOT), "holds no run yet", "bash launch_train.sh, or name checkpoints")
        args.checkpoints = [str(newest)]
    with console.status("Looking at the checkpoints"):
        lineup = backends.line_up(args.checkpoints, args.base, args.server, PER_RUN)
    given = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed", "system_prompt")}
    settings = replace(lineup.settings, **{name: value for name, value in given.items() if value is not None})
    title = f"Completions of {runs.label(lineup.run)}" if lineup.run else "Completions"
    facts = [*lineup.facts, f"system prompt: {settings.system_prompt or 'none'}", str(settings)]
    report = render.Report(title, facts, notes=[*lineup.problems.values(), *lineup.notes])
    if args.report:
        return write_report(args, lineup, settings, report, console)
    rewards = evaluate.RewardSet.of_run(lineup.run)
    if settings.tools:
        import trl  # noqa: F401  # takes seconds and writes warnings, which would break a screen that is being redrawn
    report.notes += rewards.problems
    for note in report.notes:
        console.print(note, style="yellow", markup=False)
    if args.web:
        from grpo_launcher.chat.web import Page

        Page(lineup.models, rewards, settings, lineup.run).serve(args.port)
    else:
        from grpo_launcher.chat.terminal import Chat

        Chat(lineup.models, rewards, settings, report, console).run()
    return 0


def write_report(args: argparse.Namespace, lineup, settings, report, console) -> int:
    """Put the prompts to every model, and show and write the completions. 1 where one is missing."""
    from grpo_launcher import evaluate, render
    from grpo_launcher.chat.backends import chat_prompt, system_message

    settings = replace(settings, seed=args.seed or 0)
    paths = outputs(args.output, lineup.run)
    render.check_outputs(paths, args.overwrite)
    if args.sample is not None:
        rows = evaluate.sample_rows(lineup.run, args.sample, settings.seed)
    else:
        rows = evaluate.file_rows(args.prompts) if args.prompts else [{"prompt": args.prompt}]
        is_seq2seq = any(model.is_seq2seq for model in lineup.models)
        for row in [row for row in rows if isinstance(row["prompt"], str)]:
            row["prompt"] = chat_prompt(is_seq2seq, settings.system_prompt, [], row["prompt"])
    for row in [row for row in rows if isinstance(row["prompt"], list) and args.system_prompt is not None]:
        others = [message for message in row["prompt"] if message["role"] != "system"]
        row["prompt"] = [*system_message(args.system_prompt), *others]
    rewards = evaluate.RewardSet.of_run(lineup.run, list(rows[0]))
    frame = evaluate.evaluate(lineup.models, {"prompts": rows}, rewards, settings)
    report.facts[-1] = str(settings)
    report.turns = render.turns_of(frame)
    report.notes += rewards.problems
    if len(rows) > 1:
        compared, report.failed, notes = evaluate.comparable(frame)
        shown = [*evaluate.KEYS, *rewards.functions, "characters", "tokens", "truncated"]
        report.summary = evaluate.summarize(compared[shown])
        report.notes += notes
    render.show(report, console, SHOWN)
    for path in paths:
        render.write(report, path)
    print("Wrote", ", ".join(map(str, paths)))
    return int(bool(lineup.problems) or bool(frame["error"].notna().any()))


def outputs(given: Path | None, run: Path | None) -> list[Path]:
    """Return the report's files: of the stem that was given, or of a new one in the run's folder or here."""
    if given and given.suffix in (".md", ".html", ".json", ".svg"):
        return [given]
    stems = ((run or Path()) / f"chat-report-{number}" for number in itertools.count(1))
    stem = given or next(stem for stem in stems if not stem.with_suffix(".md").exists())
    return [stem.with_name(stem.name + suffix) for suffix in (".md", ".html", ".json")]


def main(argv: list[str]) -> int:
    """Run the command line."""
    return run_command(chat, parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
