"""List the rewards of this project, try one on a text, and check one of your own before a run depends on it.

  python -m grpo_launcher.reward_check list
  python -m grpo_launcher.reward_check try length_reward "The cat sat on the mat." --target 60
  python -m grpo_launcher.reward_check check my_reward.py:questions --column gold=42

NAME is file.py:function, package.module.function, or the function's name alone for one in `list`. Its options are
flags, as --target above. `check` calls it as TRL does, on 5 completions of 2 prompts, as chat messages, as plain text
and with tool calls. FAIL means that a run would stop or learn nothing (exit status 1); warn means: look at it.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from grpo_launcher.console import exit_status
from grpo_launcher.errors import UserError, did_you_mean, first_line

# (prompt, completion): several completions of a prompt, a short, an empty and an odd one.
ROWS = (
    ("What did the cat do last night?", "The cat sat on the mat and looked at the moon for an hour. Then it slept."),
    ("What did the cat do last night?", "No."),
    ("What did the cat do last night?", ""),
    ("How high is the moon?", "今天天气很好 🙂👩‍👧 שלום e\u0301\x00\u202e\ufffd\n"),
    ("How high is the moon?", "Far? Yes! It is 384,400 km away.\n\n- far\n- far away\n\nThe answer is 42 (and 8/10)."),
)
TOOL_CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "moon"}}}
TOOL_TURNS = [
    {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
    {"role": "tool", "name": "search", "content": "The moon is 384,400 km away."},
]
# How rows look, and how serious it is when a reward cannot score such rows: our datasets hold chat messages.
FORMATS = {
    "chat": (lambda prompt, text: (_message("user", prompt), _message("assistant", text)), "FAIL"),
    "text": (lambda prompt, text: (prompt, text), "warn"),
    "tools": (lambda prompt, text: (_message("user", prompt), TOOL_TURNS + _message("assistant", text)), "warn"),
}
READ = "read completions with grpo_launcher.messages.last_reply, which takes text and lists of chat messages"
OWN_FLAGS = {"--help", "--prompt", "--column"}


def library() -> dict[str, Callable]:
    """Return the rewards and measures of the package `rewards` by dotted name."""
    import rewards

    found = {}
    for module in pkgutil.iter_modules(rewards.__path__, "rewards."):
        for name, function in vars(importlib.import_module(module.name)).items():
            is_own = inspect.isfunction(function) and function.__module__ == module.name and name[0] != "_"
            if is_own and "completions" in inspect.signature(function).parameters:
                found[f"{module.name}.{name}"] = function
    return found


def show_list() -> None:
    """Print name, purpose, columns and options of every reward of this project."""
    from grpo_launcher.plugins import required_columns

    for name, function in library().items():
        parameters = inspect.signature(function).parameters.values()
        options = [f"{p.name}={p.default!r}" for p in parameters if p.kind is p.KEYWORD_ONLY]
        print(f"{name}\n    {inspect.getdoc(function).splitlines()[0]}")
        for title, listed in (("columns", required_columns(function)), ("options", options)):
            if listed:
                print(f"    {title}: {', '.join(listed)}")


def load(names: list[str], options: dict, columns: dict[str, list]) -> list[Callable]:
    """Bind rewards as a run does.

    Raises:
        UserError: unknown name or option, a column that is not given, a service that is not there.
    """
    from grpo_launcher import plugins

    known = {dotted.rpartition(".")[2]: dotted for dotted in library()}
    for name in names:
        if name not in known and not re.search(r"[.:/]", name):
            raise UserError("NAME", f"there is no reward {name}", did_you_mean(name, known))
        if plugins.is_reward_model(name):
            raise UserError(
                "NAME", f"{name} is a reward model", "try it in a run: TRL loads it. Only functions can be tried"
            )
    functions = [re.split(r"[.:]", name)[-1] for name in names]
    reward_kwargs = {function: options for function in functions if options}
    loaded = plugins.load_rewards([known.get(name, name) for name in names], reward_kwargs)
    for name, reward in zip(names, loaded, strict=True):
        for column in plugins.required_columns(reward):
            if column not in columns:
                raise UserError("--column", f"{name} needs the column {column}", f"add --column {column}=VALUE")
        if hasattr(reward, "ready"):
            try:
                reward.ready()
            except ValueError as error:
                raise UserError("reward_funcs", first_line(error)) from error
    return loaded


def score(reward: Callable, rows: list[tuple[str, str]], columns: dict[str, list], format: str, logged=None) -> list:
    """Return the scores of one call as TRL makes it. A column with two values has the second for the second prompt."""
    from grpo_launcher.plugins import call_reward

    pairs = [FORMATS[format][0](*row) for row in rows]
    batch = {"prompts": [prompt for prompt, _ in pairs], "completions": [completion for _, completion in pairs]}
    batch["completion_ids"] = [list(text.encode()) for _, text in rows]
    for name, values in columns.items():
        batch[name] = [values[0] if prompt == ROWS[0][0] else values[-1] for prompt, _ in rows]
    logged = [] if logged is None else logged
    state = SimpleNamespace(epoch=0.0, global_step=0, max_steps=100, log_history=[])

    def log(name, value):
        logged.append(f"logged {name}: {value}")

    return call_reward(reward, **batch, trainer_state=state, log_extra=log, log_metric=log)


def check(reward: Callable, columns: dict[str, list]) -> Iterator[tuple[str, str, str]]:
    """Yield findings about one reward: verdict, format of the rows, text. What it raises is printed whole."""
    seen = {}
    for format, (_, severity) in FORMATS.items():
        try:
            alone = [score(reward, [row], columns, format)[0] for row in ROWS]
            together = score(reward, ROWS, columns, format)
            again = score(reward, ROWS, columns, format)
            backwards = score(reward, ROWS[::-1], columns, format)[::-1]
        except Exception:
            traceback.print_exc()
            yield (severity, format, f"the error above would end a run with such rows; {READ}")
            continue
        seen[format] = together
        yield ("ok", format, _show(together))
        if all(value is None for value in together):
            yield ("warn", format, "None for every completion: if it asks a server, is that one up?")
        if not _same(together, again):
            yield ("warn", format, f"the same batch again: {_show(again)}. Noise cannot be learned: fix the seed")
        elif not _same(together, backwards):
            yield ("FAIL", format, f"in another order: {_show(backwards)}. Score each completion by its own row")
        elif not _same(together, alone):
            yield ("warn", format, f"one at a time: {_show(alone)}. A rank may see only a part of a group")
    for format, other in (("chat", "text"), ("tools", "chat")):
        if format in seen and len(set(seen[format])) == 1 < len(set(seen.get(other, []))):
            yield (FORMATS[format][1], format, f"all completions score alike; {READ}")


def _message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def _same(first: list, second: list) -> bool:
    pairs = [
        [math.inf if value is None else float(value) for value in pair] for pair in zip(first, second, strict=True)
    ]
    return all(math.isclose(*pair, rel_tol=1e-4, abs_tol=1e-6) for pair in pairs)


def _show(scores: list) -> str:
    return ", ".join("None" if value is None else f"{float(value):.6g}" for value in scores)


def _yaml(text: str):
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML") from None


def _column(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, list], dict]:
    """Return the arguments, the columns with their values, and the options of the reward."""
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="python -m grpo_launcher.reward_check", **raw)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", **raw)
    try_one, check_all = commands.add_parser("try", **raw), commands.add_parser("check", **raw)
    try_one.add_argument("names", metavar="NAME", nargs=1)
    try_one.add_argument("text", metavar="TEXT", help="the completion")
    try_one.add_argument("--prompt", metavar="TEXT", default="", help="its prompt")
    check_all.add_argument("names", metavar="NAME", nargs="+")
    flags = {token.partition("=")[0] for token in argv if re.match(r"--[A-Za-z]\w*(-\w+)*(=|$)", token)}
    for command in (try_one, check_all):
        text = "a column of the dataset, as JSON or text; a second value is for the second prompt"
        command.add_argument("--column", metavar="NAME=VALUE", action="append", type=_column, default=[], help=text)
        for flag in flags - OWN_FLAGS:  # the options of a reward are known only when it is loaded
            dest = "option " + flag.lstrip("-").replace("-", "_")
            command.add_argument(flag, dest=dest, metavar="VALUE", type=_yaml, default=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    options = {name.removeprefix("option "): value for name, value in vars(args).items() if name.startswith("option ")}
    columns: dict[str, list] = {}
    for name, value in getattr(args, "column", []):
        columns.setdefault(name, []).append(value)
    return args, columns, options


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return exit_status(run, *parse(sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace, columns: dict[str, list], options: dict) -> int:
    """Do what the command line asks for. Returns 1 where a reward failed."""
    if args.command == "list":
        show_list()
        return 0
    rewards = load(args.names, options, columns)
    if args.command == "try":
        logged = []
        (value,) = score(rewards[0], [(args.prompt, args.text)], columns, "chat", logged)
        print(f"{rewards[0].__name__}: {value}", *logged, sep="\n  ")
        return 0
    failed = False
    for name, reward in zip(args.names, rewards, strict=True):
        print(name)
        for verdict, format, text in check(reward, columns):
            failed |= verdict == "FAIL"
            print(f"  {verdict:5} {format:6} {text}", flush=True)
    return int(failed)


if __name__ == "__main__":
    if sys.path[0] == os.getcwd():
        sys.path.pop(0)  # a file rewards.py or datasets.py of the user's must not hide the installed module
    sys.exit(main())
