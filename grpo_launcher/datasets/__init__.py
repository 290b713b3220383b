"""Datasets, prepared for training: one module for each, which turns a raw row into a row with a prompt.

A new dataset is a new module here with a function `to_row` and one `DATASET = DatasetSpec(...)`.
`process_dataset.py` finds it by its file name. Heavy libraries are imported when there is work for them.
"""

import importlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grpo_launcher import hub
from grpo_launcher.errors import UserError, first_line
from grpo_launcher.runs import check_writable
from grpo_launcher.slow_imports import quick_imports

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
CUT = "prompts that lose their end"
BATCH = 1000  # rows in memory at once
TEST_ROWS = 1000  # at most, where a split is drawn from train; at most a tenth of train too


class SkipRow(Exception):
    """A raw row that cannot be used. The message is the cause that is counted."""


@dataclass
class Request:
    """What to prepare: the options of process_dataset.py. None stands for the dataset's own default."""

    name: str
    source: str | None = None
    steps: int | None = None
    output: Path | None = None
    tokenizer: str | None = None
    max_prompt_length: int | None = None
    too_long: str = "drop"
    article: str | None = None
    summary: str | None = None
    prefix: str | None = None
    limit: int | None = None
    seed: int = 0
    system_in_user: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """What is particular to a dataset."""

    to_row: Callable[..., dict]  # raw row -> row with the columns prompt and `columns`; raises SkipRow
    tokenizer: str  # what a request has by default: tokenizer, max_prompt_length and source
    max_prompt_length: int
    columns: dict[str, str | list[str]]  # name -> type, as datasets calls it; [type] for a list
    source: str | None = None  # Hub id
    config: str | None = None  # configuration of the Hub's dataset
    splits: tuple[str, ...] = ("train", "test")  # what is written
    # Reads or makes raw rows by split, and rows of further files by name. Raises OSError or ValueError.
    load: Callable[[Request], tuple[dict, dict]] | None = None
    options: tuple[str, ...] = ()  # options of a request that to_row takes, and no other dataset's


def load_spec(name: str) -> DatasetSpec:
    """Return the DATASET of the module `name`."""
    return importlib.import_module(f"grpo_launcher.datasets.{name}").DATASET


def text_of(raw: dict, column: str) -> str:
    """Return a column's text without the space around it. Raises SkipRow where there is none."""
    text = raw.get(column)
    if not isinstance(text, str):
        raise SkipRow(f"malformed: {column} must be text")
    if not text.strip():
        raise SkipRow(f"empty {column}")
    return text.strip()


def chat_prompt(system: str, user: str) -> list[dict]:
    """Return a prompt of two chat messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder, which becomes `output` once the block has ended without an error."""
    is_new = not output.parent.exists()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
            draft = Path(temporary) / "new"
            draft.mkdir()
            yield draft
            if output.exists():
                output.rename(Path(temporary) / "old")
            draft.rename(output)
    finally:
        if is_new and not any(output.parent.iterdir()):
            output.parent.rmdir()


def read_source(request: Request) -> dict:
    """Read the splits of a source: a Hub id, a folder, or a file of rows."""
    from datasets import get_dataset_config_names

    from grpo_launcher.data import load_splits

    spec = load_spec(request.name)
    config = spec.config
    if config and request.source != spec.source:  # a folder that was downloaded from the Hub has it too
        is_folder = Path(request.source).is_dir()
        config = config if is_folder and config in get_dataset_config_names(request.source) else None
    return load_splits(request.source, config)


def process(request: Request) -> None:
    """Prepare a dataset: print what is kept and why the rest is not, and write the folder as a whole.

    Raises:
        UserError: an option, the source or the tokenizer cannot be used. Nothing is written then.
    """
    spec = load_spec(request.name)
    _check(request, spec)
    hub.use_cache_if_unreachable()
    with quick_imports():
        from datasets import Dataset
        from transformers import AutoTokenizer

    try:
        splits, files = spec.load(request) if spec.load else (read_source(request), {})
    except UserError as error:
        raise UserError(f"--source {error.field}", error.problem, error.fix) from error
    except (OSError, ValueError) as error:
        fix = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"--source {request.source}", first_line(error), fix) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(request.tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {request.tokenizer}", first_line(error), hub.hint()) from error
    splits = {name: rows if isinstance(rows, Dataset) else Dataset.from_list(rows) for name, rows in splits.items()}
    splits = _complete(splits, spec.splits, request.seed)
    with new_folder(request.output) as folder:
        for split in spec.splits:
            first = _write(split, splits[split], request, tokenizer, folder / f"{split}.parquet")
        for file, rows in files.items():
            Dataset.from_list(rows).to_json(folder / file, force_ascii=False)
    print(f"\nOne row of {split}:")
    for column, value in first.items():
        print(f"  {column}: {value}")
    print(f"\nWrote {request.output}/{{{','.join(spec.splits)}}}.parquet", *files)


def _check(request: Request, spec: DatasetSpec) -> None:
    """Refuse what does not go together, and fill in the defaults."""
    for name in ("article", "summary", "prefix"):
        if getattr(request, name) is not None and name not in spec.options:
            raise UserError(f"--{name}", f"no option of {request.name}", "leave it out")
    if (request.article is None) != (request.summary is None):
        raise UserError("--article, --summary", "only one of the two columns is named", "name both")
    if request.steps and (request.source or request.name != "calculator"):
        raise UserError(
            "--steps", "makes sums for calculator, in place of reading a --source", "leave one of them out"
        )
    request.source = request.source or spec.source
    request.output = request.output or Path("data") / request.name
    request.tokenizer = request.tokenizer or spec.tokenizer
    if request.max_prompt_length is None:
        request.max_prompt_length = spec.max_prompt_length
    if request.max_prompt_length < 1 or (request.limit is not None and request.limit < 1):
        raise UserError("--max_prompt_length, --limit", "under 1", "give at least 1")
    if not request.output.exists():
        check_writable("--output", request.output)
        return
    if not request.overwrite:
        raise UserError(f"--output {request.output}", "exists", "add --overwrite to replace it")
    there = list(request.output.iterdir()) if request.output.is_dir() else [request.output]
    if others := sorted(path.name for path in there if path.suffix not in (".parquet", ".jsonl") or path.is_dir()):
        problem = f"it holds what this command has not written, such as {others[0]}"
        raise UserError(f"--output {request.output}", problem, "choose another name")


def _complete(splits: dict, names: tuple[str, ...], seed: int) -> dict:
    """Return splits of these names: test may be the source's validation split; what is missing is drawn from train."""
    splits = dict(splits)
    if "train" not in splits:
        splits = {"train": next(iter(splits.values()))}
    if "test" not in splits and "validation" in splits and "validation" not in names:
        splits["test"] = splits["validation"]
    for missing in [name for name in names if name not in splits]:
        rows = splits["train"]
        if len(rows) < 2:
            splits[missing] = rows
            continue
        parts = rows.train_test_split(test_size=max(1, min(TEST_ROWS, len(rows) // 10)), seed=seed)
        splits |= {"train": parts["train"], missing: parts["test"]}
        print(f"The source has no split {missing}: {len(parts['test'])} rows of train, drawn at random, become it")
    return splits


def _write(split: str, raw, request: Request, tokenizer, path: Path) -> dict:
    """Write the rows of a split that can be used, print why the others cannot, and return the first of them."""
    import numpy
    import pyarrow
    from datasets import Features, List, Value
    from pyarrow.parquet import ParquetWriter

    from grpo_launcher.data import tokenizer_mark

    spec = load_spec(request.name)
    if request.limit and request.limit < len(raw):
        raw = raw.shuffle(seed=request.seed).select(range(request.limit))
    mark = tokenizer_mark(request.tokenizer, tokenizer)
    message = {"role": Value("string"), "content": Value("string")}
    types = {"prompt": List(message) if request.prefix is None else Value("string")}
    for name, kind in (spec.columns | {"prompt_tokens": "int64", "prompt_tokenizer": "string"}).items():
        types[name] = List(Value(*kind)) if isinstance(kind, list) else Value(kind)
    schema = Features(types).arrow_schema
    left_out, lengths, first = Counter(), [], None
    prepared = (_prepare(rows, spec, request, tokenizer, left_out) for rows in _batches(split, raw))
    kept = (row | {"prompt_tokenizer": mark} for row in itertools.chain.from_iterable(prepared))
    with ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(kept, BATCH)):  # readers take it at once, and none that is empty
            first = first or group[0]
            if set(first) != set(schema.names):
                raise TypeError(f"{request.name}: a row has {', '.join(first)}; DATASET says {schema.names}")
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
            lengths += [row["prompt_tokens"] for row in group]
    if cut := left_out.pop(CUT, 0):
        print(f"{split}: {cut} prompts over {request.max_prompt_length} tokens lose their end")
    print(f"{split}: {len(lengths)} of {len(raw)} rows kept")
    for cause, count in left_out.most_common():
        print(f"  {count} left out: {cause}")
    if not lengths:
        causes = ", ".join(left_out) or "it is empty"
        raise UserError(f"--source {request.source}", f"no row of its split {split} can be used: {causes}")
    median, high, longest = numpy.percentile(lengths, [50, 95, 100])
    print(f"  prompt tokens: median {median:.0f}, 95th percentile {high:.0f}, longest {longest:.0f}")
    return first


def _batches(split: str, raw) -> Iterator[list[dict]]:
    """Yield the raw rows of a split, BATCH at a time."""
    from tqdm import tqdm

    with tqdm(total=len(raw), desc=f"reading {split}", unit="row", delay=2) as bar:
        for batch in raw.iter(BATCH):
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            bar.update(len(rows))
            yield rows


def _prepare(raw_rows: list[dict], spec: DatasetSpec, request: Request, tokenizer, left_out: Counter) -> list[dict]:
    """Return the rows that can be used, with their tokens counted, and count why the others cannot."""
    from grpo_launcher.data import count_tokens

    options = {name: getattr(request, name) for name in spec.options}
    rows, limit = [], request.max_prompt_length
    for raw_row in raw_rows:
        try:
            rows.append(spec.to_row(raw_row, **options))
        except SkipRow as cause:
            left_out[str(cause)] += 1
    if request.system_in_user:
        rows = [row | {"prompt": _system_in_user(row["prompt"])} for row in rows]
    lengths = count_tokens([row["prompt"] for row in rows], tokenizer)
    kept = []
    for row, length in zip(rows, lengths, strict=True):
        tokens = length
        if tokens > limit and request.too_long == "cut":
            row["prompt"] = _cut(row["prompt"], tokens - limit, tokenizer)
            (tokens,) = count_tokens([row["prompt"]], tokenizer)
            left_out[CUT] += 1
        if tokens > limit:
            left_out[f"prompt over {limit} tokens"] += 1
        else:
            kept.append(row | {"prompt_tokens": tokens})
    return kept


def _system_in_user(prompt: str | list[dict]) -> str | list[dict]:
    """Return a prompt whose system text stands before the user's."""
    if isinstance(prompt, str) or prompt[0]["role"] != "system":
        return prompt
    system, user, *rest = prompt
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _cut(prompt: str | list[dict], excess: int, tokenizer) -> str | list[dict]:
    """Return a prompt whose text, or last message, has lost its last `excess` tokens."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    text = text[: offsets[-excess][0]].rstrip() if excess < len(offsets) else ""
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
