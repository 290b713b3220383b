"""Talk to checkpoints side by side: python demo_in_chat.py [CHECKPOINT …] [--prompt TEXT | --prompts FILE | --sample N] [--web]

Without CHECKPOINT: the newest run under trainOutput, with base, checkpoints and final. Replies are drawn as the run drew them, unless said otherwise.
"""

import argparse
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

from grpo_launcher.hub import use_cache_if_unreachable
from grpo_launcher.runs import label

MOST = 4  # columns of one run


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="folder or Hub id of a model or adapter, or a run's folder (its checkpoints)")
    parser.add_argument("--base", help="folder or Hub id of what the adapters stand on, where the one that they name is gone")
    parser.add_argument("--server", metavar="URL", action="append", default=[], help="an OpenAI-compatible server as one more column (URL#MODEL chooses one)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="ask this, write a report, and end")
    what.add_argument("--prompts", metavar="FILE", type=Path, help="the same for a prompt a line, or a .jsonl file of rows with `prompt`")
    what.add_argument("--sample", metavar="N", type=int, help="the same for N rows of the run's test split, drawn by --seed")
    what.add_argument("--web", action="store_true", help="the chat in a browser, on this machine alone")
    parser.add_argument("--port", type=int, default=0, help="of --web (default: a free one, which is printed)")
    parser.add_argument("--output", type=Path, help="report: STEM of .md, .html and .json, or one file, .svg too (default: a new chat-report-N)")
    parser.add_argument("--seed", type=int, help="of the draws (default: 0 for a report, none for a chat)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the run's)")
    parser.add_argument("--max_new_tokens", type=int, help="longest reply (default: the run's)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt; an empty one for none (default: the run's)")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= (args.temperature or 0) <= 100 or any(number is not None and number < 1 for number in (args.max_new_tokens, args.sample)):
        parser.error("--temperature must be from 0 to 100, --max_new_tokens and --sample at least 1")
    args.report = args.prompt is not None or args.prompts is not None or args.sample is not None
    if args.output and not args.report:
        parser.error("--output belongs to --prompt, --prompts or --sample; a chat is saved with /save FILE")
    return args


def main(argv: list[str]) -> int:
    """Checkpoints → columns → chat, page or report. 1 where a report lacks a column's replies."""
    args = arguments(argv)
    use_cache_if_unreachable()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    from grpo_launcher.chat import layout
    from grpo_launcher.chat.gather import gather
    from grpo_launcher.chat.scores import Scores
    from grpo_launcher.chat.terminal import Chat

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = layout.console()
    with console.status("Looking at the checkpoints"):
        columns, run, manner, notes = gather(args.checkpoints, args.base, args.server, MOST)
    given = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "system_prompt": args.system}
    manner = replace(manner, **{name: value for name, value in given.items() if value is not None})
    title = f"Replies of {label(run)}" if run else "Replies"
    about = {"title": title, "columns": {one.name: one.source for one in columns}, "seed": args.seed, "notes": notes}
    if args.report:
        return write_report(args, columns, run, manner, about, console)
    with console.status("Binding the rewards"):
        scores = Scores(run)
        if manner.tools:
            import grpo_launcher.chat.turns  # noqa: F401  # now, as it takes seconds and writes warnings, which would break a screen that is being redrawn
    notes += scores.left_out
    for note in notes:
        console.print(note, style="yellow", markup=False)
    if args.web:
        from grpo_launcher.chat.web import serve

        serve(columns, scores, manner, run, args.port)
    else:
        Chat(columns, scores, manner, console, about).run()
    return 0


def write_report(args: argparse.Namespace, columns: list, run: Path | None, manner, about: dict, console) -> int:
    """Put the prompts to every column, show the replies and write them. 1 where a reply is missing."""
    from grpo_launcher.chat import pages, report
    from grpo_launcher.chat.scores import Scores

    about["seed"] = seed = args.seed or 0
    paths = outputs(args.output, run)
    pages.check(paths)
    if args.prompt is not None:
        rows = [{"prompt": report.with_system(args.prompt, manner.system_prompt)}]
    elif args.prompts is not None:
        rows = report.read_prompts(args.prompts, manner, args.system)
    else:
        rows = report.sample(run, args.sample, seed, args.system)
    scores = Scores(run, columns=set.intersection(*(set(row) for row in rows)))
    turns = report.answer(columns, rows, scores, manner, seed)
    about["notes"] += scores.left_out
    pages.show(turns, about["notes"], console)
    pages.write(paths, turns, manner, about)
    print("Wrote", ", ".join(map(str, paths)))
    return int(any(reply.problem for turn in turns for reply in turn.replies))


def outputs(given: Path | None, run: Path | None) -> list[Path]:
    """The report's files: of the stem given, or of a new one in the run's folder or here; or the one file that was named with a suffix."""
    from grpo_launcher.chat.pages import FORMS

    if given and given.suffix in FORMS:
        return [given]
    stem = given or next(stem for number in itertools.count(1) if not (stem := (run or Path()) / f"chat-report-{number}").with_suffix(".md").exists())
    return [stem.with_name(stem.name + suffix) for suffix in (".md", ".html", ".json")]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
