"""The rewards from the command line: list them, try one on a reply, hold one of your own against what a run asks of it."""

import argparse
import difflib
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable

import rewards

HELP = """\
A reward is a function that gets the replies of a batch and returns one score each. A recipe names it:

  reward_funcs: [rewards.length.length_reward]
  reward_kwargs:
    length_reward: {target: 200}

This command lists those that are here, scores one reply with one of them, and checks one of your
own before a run depends on it.

  python -m grpo_launcher.rewards_command list
  python -m grpo_launcher.rewards_command try length_reward "The cat sat on the mat." --target 60
  python -m grpo_launcher.rewards_command check my_rewards.politeness_reward
"""
TRY = """\
Scores one reply, as the answer in a chat. NAME is a dotted name (rewards.length.length_reward,
my_rewards.mine), or the function's name alone for one of those in `list`. Options of the reward
are given as in a recipe: --target 60, --words '[please, thanks]'.

  python -m grpo_launcher.rewards_command try length_reward "The cat sat on the mat." --target 60
  python -m grpo_launcher.rewards_command try rouge_reward "$(cat summary.txt)" --reference "A cat sits on a mat."
"""
CHECK = """\
Calls the reward as TRL does, with batches that a run may bring: chat and plain text, empty, odd and
very long replies, tool calls, several prompts, large batches; and says what it saw. FAIL: a run
would end or learn nothing. warn: look at it. Exit status 1 with a FAIL. It gets about 50 replies,
then 64 and, where it is quick, 768 at once: mind what a judge costs.

  python -m grpo_launcher.rewards_command check my_rewards.politeness_reward
  python -m grpo_launcher.rewards_command check my_rewards.near_reward --column gold=42 --column gold=43 --tolerance 0.5
  python -m grpo_launcher.rewards_command check my_rewards.one_reward my_rewards.other_reward     do their names clash?

A column given twice has the second value for the second prompt. my_rewards.py stands in the folder
that you are in, or in one of PYTHONPATH:

  def politeness_reward(completions, *, word: str = "please", **columns) -> list[float]:
      return [float(word in reply(c)) for c in completions]     # reply: from grpo_launcher.messages

Left of * come the columns of the dataset that it needs, right of * its options; **columns takes
all else that TRL passes.
"""
# What TRL passes beside the row's columns; grpo_launcher.plugins has the same, but takes five seconds to import.
PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
FLAGS = {"--reference", "--prompt", "--column"}


class Wrong(ValueError):
    """What was asked for cannot be done: one line, exit status 2."""


def library() -> dict[str, Callable]:
    """Every reward of this folder by dotted name: functions defined here whose name ends in _reward."""
    found = {}
    for module in pkgutil.iter_modules(rewards.__path__, "rewards."):
        if not module.name.endswith("__main__"):
            for name, value in vars(importlib.import_module(module.name)).items():
                if inspect.isfunction(value) and value.__module__ == module.name and name.endswith("_reward") and name[0] != "_":
                    found[f"{module.name}.{name}"] = value
    return found


def show_list() -> int:
    """Print a table of the library."""
    from rich.text import Text

    table = _table("reward", "what it gives, and what it takes")
    for name, function in library().items():
        parameters = inspect.signature(function).parameters.values()
        options = [f"{p.name}={p.default!r}" for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
        columns = [p.name if p.default is p.empty else f"{p.name} (optional)" for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in PASSED]
        said = Text((inspect.getdoc(function) or "").split("\n")[0])
        if options:
            said.append(f"\noptions: {', '.join(options)}", "cyan")
        if columns:
            said.append(f"\ncolumns: {', '.join(columns)}", "green")
        table.add_row(Text(name), said)
    _console().print(table)
    return 0


def try_one(name: str, reply: str, prompt: str, columns: dict[str, list], options: dict) -> int:
    """Print the score of one reply, and what the reward logs of it."""
    import asyncio

    from grpo_launcher import plugins as bind, reward_check

    reward = reward_check.load(full_name(name), options)
    for column in bind.needs(reward):
        if column not in columns:
            raise Wrong(f"{name} needs the column `{column}`: add {_remedy(column)}. In a run the dataset must have it.")
    chat = {"prompts": [[{"role": "user", "content": prompt}]], "completions": [[{"role": "assistant", "content": reply}]]}
    batch = {**chat, "completion_ids": [list(reply.encode())], **{column: values[:1] for column, values in columns.items()}}
    logged = []
    try:
        getattr(reward, "ready", bool)()
    except ValueError as error:  # a server or a model is not there
        raise Wrong(str(error)) from None
    try:
        with asyncio.Runner() as runner:
            (score,) = reward_check.call(reward, batch, runner, logged)
    except KeyError as error:
        missing = error.args[0]
        raise Wrong(f"{reward_check.where(error)}. If that is a column: add {_remedy(missing)}.") from None
    except Exception as error:
        raise Wrong(reward_check.where(error)) from None
    print(f"{reward.__name__}: {score}", *(f"  logged {what}: {value}" for what, value in logged), sep="\n")
    return 0


def check(names: list[str], columns: dict[str, list], options: dict) -> int:
    """Print a table of findings for each reward; 1 where a run would break."""
    from rich.text import Text

    from grpo_launcher import reward_check

    if len(names) > 1 and options:
        raise Wrong(f"--{next(iter(options))}: options are for one reward; check it alone.")
    found = reward_check.check([full_name(name) for name in names], options, columns)
    console = _console()
    for name, rows in found.items():
        table = _table("case", "seen", "verdict", title=name)
        for row in rows:
            seen = Text(row.seen)
            if row.remedy:
                seen.append(f"\n→ {row.remedy}", "italic")
            table.add_row(Text(row.case), seen, Text(row.verdict, {"ok": "green", "warn": "yellow"}.get(row.verdict, "bold red")))
        console.print(table)
    verdicts = [row.verdict for rows in found.values() for row in rows]
    print(f"{verdicts.count('FAIL')} FAIL, {verdicts.count('warn')} warn, {verdicts.count('ok')} ok.")
    return int("FAIL" in verdicts)


def full_name(name: str) -> str:
    """The dotted name of a reward that is given by its function's name alone."""
    if "." in name or "/" in name:
        return name
    known = {dotted.rpartition(".")[2]: dotted for dotted in library()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"here are {', '.join(known)}; one of your own is written module.function."
        raise Wrong(f"there is no reward {name}; {hint}")
    return known[name]


def split_options(argv: list[str]) -> tuple[list[str], dict]:
    """Argv without the options of the reward, and those, read as YAML as in a recipe."""
    import yaml

    rest, options = [], {}
    tokens = iter(argv)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if not re.fullmatch(r"--[A-Za-z]\w*(-\w+)*", flag) or flag == "--help":
            rest.append(token)
            continue
        value = value if equals else next(tokens, None)
        if value is None:
            raise Wrong(f"{flag}: give a value.")
        if flag in FLAGS:
            rest.append(f"{flag}={value}")
            continue
        try:
            options[flag[2:].replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise Wrong(f"{flag}: {value!r} is not valid YAML; put text with : # [ or {{ in quotes of its own.") from None
    return rest, options


def read_columns(given: list[str], reference: str | None = None) -> dict[str, list]:
    """NAME=VALUE … as columns: a value that is JSON (42, [1, 2], true) as such, any other as text."""
    columns = {} if reference is None else {"reference": [reference]}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise Wrong(f"--column {item}: write --column NAME=VALUE.")
        if name in PASSED:
            raise Wrong(f"--column {item}: TRL itself passes {name}; a column of the dataset must be called otherwise.")
        try:
            columns.setdefault(name, []).append(json.loads(value))
        except json.JSONDecodeError:
            columns[name].append(value)
    return columns


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    top = argparse.ArgumentParser(prog="python -m grpo_launcher.rewards_command", description=HELP, **form)
    commands = top.add_subparsers(dest="command", metavar="{list,try,check}")
    commands.add_parser("list", help="every reward of this project, its options and the columns that it needs", **form)
    one = commands.add_parser("try", help="score one reply", description=TRY, **form)
    one.add_argument("name", metavar="NAME")
    one.add_argument("reply", metavar="REPLY")
    one.add_argument("--reference", metavar="TEXT", help="the column `reference`, such as a gold summary")
    one.add_argument("--prompt", metavar="TEXT", default="", help="what the reply answers")
    many = commands.add_parser("check", help="hold a reward of your own against what a run asks of it", description=CHECK, **form)
    many.add_argument("names", metavar="MODULE.FUNCTION", nargs="+")
    for command in (one, many):
        command.add_argument("--column", metavar="NAME=VALUE", action="append", default=[], help="a column of the dataset; numbers and lists as JSON")
        command.add_argument_group("options of the reward").add_argument("--OPTION", metavar="VALUE", help="any keyword right of *, read as YAML")
    return top


def main(argv: list[str]) -> int:
    """Run a command; its exit status."""
    if not argv:
        parser().print_help()
        return 2
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a run looks for the user's own modules too
    try:
        argv, options = split_options(argv)
        args = parser().parse_args(argv)
        if args.command == "list":
            return show_list()
        if args.command == "try":
            return try_one(args.name, args.reply, args.prompt, read_columns(args.column, args.reference), options)
        return check(args.names, read_columns(args.column), options)
    except ValueError as error:
        if not isinstance(error, Wrong) and type(error).__name__ != "RecipeError":  # training is not imported here
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _remedy(column: str) -> str:
    return "--reference TEXT" if column == "reference" else f"--column {column}=VALUE"


def _table(*headings: str, title: str | None = None):
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
