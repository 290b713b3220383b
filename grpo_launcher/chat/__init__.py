"""Talking to checkpoints. Here is what demo_in_chat.py and compare_checkpoints.py share, without heavy imports."""

import argparse
import os
import sys
from collections.abc import Callable

from grpo_launcher import hub
from grpo_launcher.console import exit_status
from grpo_launcher.runs import expand_home

EXIT_INTERRUPTED = 130
SERVER_HELP = "an OpenAI-compatible server as one more model (URL#MODEL chooses one of its models)"


def check_least(parser, args, **least) -> None:
    """Refuse numbers that are less than the least that makes sense."""
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and not given >= value:
            parser.error(f"--{name}: {given} is less than {value}")


def run_command(command: Callable, args) -> int:
    """Run a command and return its exit status: that of the command, or 2 where it is refused."""
    hub.use_cache_if_unreachable()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stderr.isatty():
        print("Loading …", file=sys.stderr)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        return exit_status(command, argparse.Namespace(**expand_home(vars(args))))
    except KeyboardInterrupt:
        print("Stopped. Completions so far are kept: the same command goes on from there.", file=sys.stderr)
        return EXIT_INTERRUPTED
