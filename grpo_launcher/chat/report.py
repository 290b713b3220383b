"""The same prompts put to some columns without a terminal: from the command line, a file, or the run's own test split."""

import json
import random
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from grpo_launcher.chat.checkpoints import Manner, locate, recipe_values
from grpo_launcher.chat.columns import Reply, draw
from grpo_launcher.chat.pages import Turn
from grpo_launcher.chat.scores import Scores


class PromptError(ValueError):
    """Prompts that cannot be had: names the file or dataset and says what to do."""


def read_prompts(path: Path, manner: Manner, system: str | None) -> list[dict]:
    """Rows with a `prompt` (and columns, where a .jsonl file gives them): a prompt a line, as chat messages behind the system prompt of `manner`.

    system: takes the place of the system message of rows that are chat messages already; None leaves those as they are.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--prompts {path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PromptError(f"--prompts {path}: line {number} is no JSON: {error}") from None
        if not isinstance(row, dict) or not _is_prompt(row.get("prompt")):
            raise PromptError(f'--prompts {path}: line {number} wants a `prompt`: text, or chat messages [{{"role": "user", "content": …}}].')
        prompt = row["prompt"] if isinstance(row["prompt"], list) else with_system(row["prompt"], manner.system_prompt)
        rows.append(row | {"prompt": with_system(prompt, system)})
    if not rows:
        raise PromptError(f"--prompts {path} holds no prompt.")
    return rows


def sample(run: Path | None, count: int, seed: int, system: str | None) -> list[dict]:
    """Rows drawn from a run's own test split, as they are, but for their system message where `system` is given."""
    from grpo_launcher.data import load_rows

    if run is None:
        raise PromptError("--sample draws from the test split of a run's dataset, and these checkpoints belong to no run here: use --prompts FILE.")
    values = recipe_values(run)
    name, split = values["dataset_name"], values.get("dataset_test_split") or "test"
    try:
        splits = load_rows(locate(name, run), values.get("dataset_config"))
    except Exception as error:  # the Hub, files and builders each raise their own
        raise PromptError(f"--sample: the run's dataset {name} cannot be read: {str(error).splitlines()[0][:200]}") from None
    if split not in splits or not len(splits[split]):
        raise PromptError(f"--sample: {name} has no rows in a split {split!r}, only {', '.join(splits)}: use --prompts FILE.")
    rows = splits[split]
    drawn = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    rows = rows.remove_columns([name for name in ("prompt_tokens", "prompt_tokenizer") if name in rows.column_names])  # process_dataset.py's own notes
    return [rows[index] | {"prompt": with_system(rows[index]["prompt"], system, text=True)} for index in drawn]


def with_system(prompt: str | list[dict], system: str | None, text: bool = False) -> str | list[dict]:
    """A prompt as chat messages with this system message; text=True leaves one that is to be continued as it is."""
    if isinstance(prompt, str):
        if text:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if system is None:
        return prompt
    return [{"role": "system", "content": system}] * bool(system) + [message for message in prompt if message["role"] != "system"]


def answer(columns: list, rows: list[dict], scores: Scores, manner: Manner, seed: int) -> list[Turn]:
    """Every column's reply to every row, one column after the other; the seed counts up with the rows."""
    turns = [Turn(row["prompt"], [], {name: value for name, value in row.items() if name != "prompt"}) for row in rows]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("drawing", total=len(columns) * len(rows))
        for column in columns:
            for number, turn in enumerate(turns):
                progress.update(bar, description=column.name, advance=1)
                (*_, reply) = draw(column, turn.prompt, manner, seed=seed + number)
                turn.replies.append(reply)
            _score([(turn, turn.replies[-1]) for turn in turns if not turn.replies[-1].problem], scores)
    return turns


def _score(said: list[tuple[Turn, Reply]], scores: Scores) -> None:
    if not said:
        return
    shared = set.intersection(*(set(turn.columns) for turn, _ in said))
    columns = {name: [turn.columns[name] for turn, _ in said] for name in shared}
    ids = [reply.ids for _, reply in said]
    found = scores.of([turn.prompt for turn, _ in said], [reply.messages or reply.text for _, reply in said], None if None in ids else ids, columns)
    for name, values in found.items():
        for (_, reply), value in zip(said, values, strict=True):
            reply.rewards[name] = value


def _is_prompt(value) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") for message in value)
    return isinstance(value, str) and bool(value.strip())
