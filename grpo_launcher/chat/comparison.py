"""The same question to several checkpoints: who is asked what, how replies are drawn, and what does not fit."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset

from grpo_launcher.chat import checkpoints
from grpo_launcher.chat.checkpoints import Checkpoint, CheckpointError, Manner
from grpo_launcher.chat.engine import Engine
from grpo_launcher.data import load_rows, tokenizer_mark


class ComparisonError(ValueError):
    """A question that cannot be put: names what is wrong and what to do."""


@dataclass
class Comparison:
    """Who is asked what. Checkpoints that drop out on the way go from `asked` to `failed`, with the reason."""

    asked: list[Checkpoint]  # the others are held against the first
    rows: dict[str, Dataset]  # split → its rows; those whose prompt does not fit a context are taken out for all
    manner: Manner
    seed: int | None = None  # None: the likeliest token every time
    engine: Engine | None = None
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prompts: dict[Checkpoint, dict[str, list[list[int]]]] = field(default_factory=dict)  # → split → tokens of each row's prompt


def choose(names: list[str], base: str | None = None) -> tuple[list[Checkpoint], dict[str, str]]:
    """The checkpoints of folders, Hub ids and runs (a run meaning all of its own), each once and named apart; and by name why others are none."""
    found, failed = [], {}
    for name in names:
        try:
            run = Path(name) / "recipe.yaml"
            found += checkpoints.of_run(Path(name), base) if run.exists() else [checkpoints.find(name, base)]
        except CheckpointError as error:
            failed[name] = str(error)
    different = {}
    for checkpoint in found:
        different.setdefault((str(Path(checkpoint.path).resolve()), checkpoint.base), checkpoint)
    return checkpoints.told_apart(list(different.values())), failed


def read_rows(data: str, splits: list[str], limit: int | None) -> dict[str, Dataset]:
    """The first `limit` rows of some splits. Raises ComparisonError for a split that is missing, empty or without prompts."""
    try:
        there = load_rows(data)
    except Exception as error:  # the Hub, files and builders each raise their own
        if empty := re.match(r'Instruction "(.+)" corresponds to no data', str(error)):  # a file without rows hides all of its neighbours
            raise ComparisonError(f"--data {data}: its split {empty[1]} is empty; give it rows, or take its file away.") from error
        raise ComparisonError(f"--data {data}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0][:200]}") from error
    rows = {}
    for split in splits:
        if split not in there:
            raise ComparisonError(f"--splits: {data} has no split {split!r}, only {', '.join(there)}.")
        rows[split] = there[split]
        if len(rows[split]) == 0:
            raise ComparisonError(f"--splits: the split {split} of {data} is empty; choose another one, or leave it out.")
        if "prompt" not in rows[split].column_names:
            raise ComparisonError(f"--data {data}: there is no column `prompt`, only {', '.join(rows[split].column_names)}; rename yours to prompt.")
        rows[split] = rows[split].select(range(min(limit or len(rows[split]), len(rows[split]))))
    return rows


def decoding(run: Path | None, temperature: float | None, seed: int | None, max_new_tokens: int | None) -> tuple[Manner, int | None]:
    """How every checkpoint draws, and the seed: greedy (seed None), unless a seed or a temperature above 0 asks for drawing by lot as `run` did."""
    manner = checkpoints.manner_of(run)
    manner = replace(manner, max_new_tokens=max_new_tokens or manner.max_new_tokens)
    if temperature == 0 or (temperature is None and seed is None):
        return replace(manner, temperature=0.0, top_p=1.0, top_k=0, min_p=None), None
    return replace(manner, temperature=manner.temperature if temperature is None else temperature), seed or 0


def prepare(comparison: Comparison) -> None:
    """Read configs and tokenizers, and turn prompts into tokens; no weight is read.

    A row whose prompt leaves no room for a whole reply in the context of any checkpoint is taken out for all of them: what is compared stays paired.
    Raises ComparisonError where no checkpoint or no row is left.
    """
    if comparison.manner.tools and any(isinstance(rows["prompt"][0], str) for rows in comparison.rows.values()):
        raise ComparisonError("--data: plain-text prompts, and the run's tools need chat messages: a prompt as [{role: user, content: …}].")
    comparison.engine = engine = Engine(comparison.asked)
    for checkpoint in list(comparison.asked):
        with dropping(comparison, [checkpoint]):
            engine.config(checkpoint)
            engine.ends(checkpoint)
            comparison.prompts[checkpoint] = {
                split: [engine.prompt_ids(checkpoint, prompt, comparison.manner, room=False) for prompt in rows["prompt"]]
                for split, rows in comparison.rows.items()
            }
    require(comparison)
    for split, rows in comparison.rows.items():
        fits = [all(_fits(comparison, checkpoint, split, row) for checkpoint in comparison.asked) for row in range(len(rows))]
        if all(fits):
            continue
        tight = min(comparison.asked, key=lambda checkpoint: engine.context(checkpoint) or 10**9)
        said = f"{fits.count(False)} of {len(rows)} prompts of {split} leave no room for a reply of {comparison.manner.max_new_tokens} tokens in a context of "
        said += f"{engine.context(tight)}{' each' * engine.has_encoder(tight)} ({tight.name})"
        if not any(fits):
            raise ComparisonError(f"{said}: none is left. Allow fewer: --max_new_tokens.")
        comparison.notes.append(f"{said}: they are left out for all checkpoints.")
        comparison.rows[split] = rows.select([row for row, fit in enumerate(fits) if fit])
        for prompts in comparison.prompts.values():
            prompts[split] = [ids for ids, fit in zip(prompts[split], fits, strict=True) if fit]
    first = engine.tokenizer(comparison.asked[0])
    for checkpoint in comparison.asked[1:]:
        other = engine.tokenizer(checkpoint)
        if engine.has_encoder(checkpoint) != engine.has_encoder(comparison.asked[0]):
            said = "has an encoder, and {} has none" if engine.has_encoder(checkpoint) else "has no encoder, and {} has one"
            said = f"{checkpoint.name} {said.format(comparison.asked[0].name)}: each reads the same text, and is compared by its text; "
            comparison.notes.append(f"{said}their lengths in tokens cannot be compared.")
        elif other.chat_template != first.chat_template:
            comparison.notes.append(f"{checkpoint.name} has another chat template than {comparison.asked[0].name}: each is asked in its own.")
        elif tokenizer_mark("", other) != tokenizer_mark("", first):
            comparison.notes.append(f"{checkpoint.name} has another tokenizer than {comparison.asked[0].name}: their lengths in tokens cannot be compared.")


def require(comparison: Comparison) -> None:
    """Raise ComparisonError where every checkpoint has dropped out."""
    if not comparison.asked:
        raise ComparisonError("\n       ".join(["no checkpoint is left to compare:", *comparison.failed.values()]))


def _fits(comparison: Comparison, checkpoint: Checkpoint, split: str, row: int) -> bool:
    return comparison.engine.fits(checkpoint, len(comparison.prompts[checkpoint][split][row]), comparison.manner)


@contextmanager
def dropping(comparison: Comparison, group: list[Checkpoint]) -> Iterator[None]:
    """Whatever goes wrong with some checkpoints takes these out and leaves the others."""
    try:
        yield
    except Exception as error:
        said = f"{group[0].name}: {type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
        if isinstance(error, CheckpointError):
            said = str(error)
        for checkpoint in [each for each in group if each in comparison.asked]:
            comparison.asked.remove(checkpoint)
            comparison.prompts.pop(checkpoint, None)
            comparison.failed[checkpoint.name] = said
