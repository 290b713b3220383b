"""Turn a dataset into rows for training: python process_dataset.py NAME [--source …] [--output …]

Writes {train,test}.parquet (summarization: validation.parquet too) with the columns prompt (chat messages, or text behind a --prefix), reference, answer
or answers (where there is one), prompt_tokens and prompt_tokenizer; calculator: needs_tool too; search_qa: passage_id too, and corpus.jsonl, the passages to
search. Rows that are empty, malformed or too long are left out and counted. HF_ENDPOINT (a mirror) and HF_HUB_OFFLINE=1 work as everywhere.
"""

import argparse
import functools
import importlib
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

from grpo_launcher import hub

OPTIONS = {
    "article": "column with the text (default: that of CNN/DailyMail, XSum or another known pair)",
    "summary": "column with its summary",
    "prefix": "what stands before each article, 'summarize: ' say, or '': prompts are plain text, for T5 and BART (default: chat messages)",
}
NAMES = sorted(path.stem for path in (Path(__file__).parent / "prepare").glob("[a-z]*.py"))


class DataError(ValueError):
    """Data that cannot become rows: names the source, what is wrong and what to do."""


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, with the dataset's own defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"one of: {', '.join(NAMES)}")
    parser.add_argument(
        "--source", help="Hub id, folder of parquet files, or a jsonl, json (SQuAD's too), csv or parquet file; kuakua: a text file of prompts; mcq: a CSV file"
    )
    parser.add_argument("--steps", type=int, choices=range(1, 9), metavar="N", help="calculator: make sums of N (1 to 8) operations and read no source")
    parser.add_argument("--output", type=Path, help="folder to write (default: data/NAME)")
    parser.add_argument("--tokenizer", help="Hub id or folder whose tokenizer counts the prompts' tokens")
    parser.add_argument("--max_prompt_length", type=int, help="tokens; longer prompts are left out")
    parser.add_argument("--too_long", choices=["drop", "cut"], default="drop", help="whether longer prompts are left out (default) or lose their end")
    for option, said in OPTIONS.items():
        parser.add_argument(f"--{option}", metavar="TEXT", help=f"summarization: {said}")
    parser.add_argument("--limit", type=int, help="use at most so many raw rows of each split, drawn at random; kuakua, --steps: rows to make (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the test split (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    args = parser.parse_args(argv)
    module = importlib.import_module(f"grpo_launcher.datasets.{args.name}")
    if args.steps and (not hasattr(module, "sums") or args.source):
        parser.error("--steps is for calculator, and without --source: it makes sums in place of reading them")
    args.options = {option: given for option in OPTIONS if (given := getattr(args, option)) is not None}
    if args.options and not hasattr(module, "COLUMNS"):
        parser.error(f"--{next(iter(args.options))} is for summarization")
    if len({"article", "summary"} & set(args.options)) == 1:
        parser.error("--article and --summary go together: the two columns")
    args.source = args.source or module.SOURCE
    args.output = args.output or Path("data") / args.name
    args.tokenizer = args.tokenizer or module.TOKENIZER
    args.max_prompt_length = module.MAX_PROMPT_LENGTH if args.max_prompt_length is None else args.max_prompt_length
    if args.max_prompt_length < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--max_prompt_length and --limit must be at least 1")
    if args.output.exists() and not args.overwrite:
        parser.error(f"{args.output} exists; add --overwrite to replace it, or choose another --output")
    return args


def process(
    name: str,
    source: str | None,
    output: Path,
    tokenizer_name: str,
    max_prompt_length: int,
    limit: int | None,
    seed: int,
    steps: int | None = None,
    too_long: str = "drop",
    options: dict | None = None,
) -> None:
    """Read `source`, print what was kept and why the rest was not, and put the folder `output` in place in one move.

    options: of the dataset's own `to_row`.
    """
    hub.use_cache_if_unreachable()
    from datasets import Dataset
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from grpo_launcher.data import count_tokens, load_rows, tokenizer_mark

    module = importlib.import_module(f"grpo_launcher.datasets.{name}")
    origin = f"--steps {steps}" if steps else f"--source {source}"
    try:
        splits = module.sums(steps, limit, seed) if steps else load_rows(source, _config(module, source)) if module.SOURCE else module.make(source, limit)
        splits, beside = module.arrange(splits) if hasattr(module, "arrange") else (splits, {})
    except Exception as error:
        raise DataError(f"{origin}: {_first_line(error)}. {hub.hint() if module.SOURCE and not (steps or Path(source).exists()) else ''}".strip()) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    except Exception as error:
        raise DataError(f"--tokenizer {tokenizer_name}: {_first_line(error)}. {hub.hint()}") from error
    names, to_row = getattr(module, "SPLITS", ("train", "test")), functools.partial(module.to_row, **options or {})
    splits = _held_out(splits, names, seed)

    output.parent.mkdir(parents=True, exist_ok=True)
    draft, tables = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent)), {}
    try:
        for split in names:
            raw = splits[split]
            if limit and limit < len(raw):
                raw = raw.shuffle(seed=seed).select(range(limit))
            rows = [to_row(row) for row in tqdm(raw, desc=f"reading {split}", unit="row", disable=len(raw) < 20_000)]
            left_out = Counter(row for row in rows if isinstance(row, str))
            rows = [row for row in rows if not isinstance(row, str)]
            lengths = count_tokens([row["prompt"] for row in rows], tokenizer) if rows else []
            if too_long == "cut" and (long := [at for at, tokens in enumerate(lengths) if tokens > max_prompt_length]):
                for at in long:
                    rows[at]["prompt"], lengths[at] = _cut(rows[at]["prompt"], lengths[at], tokenizer, max_prompt_length)
                print(f"{split}: {len(long)} prompts over {max_prompt_length} tokens lose their end")
            kept = [(row, tokens) for row, tokens in zip(rows, lengths, strict=True) if tokens <= max_prompt_length]
            if len(kept) < len(rows):
                left_out[f"prompt over {max_prompt_length} tokens"] = len(rows) - len(kept)
            _report(split, len(raw), kept, left_out)
            if not kept:
                raise DataError(f"{origin}: no row of its split {split} can be used: {dict(left_out) or 'it is empty'}")
            mark = tokenizer_mark(tokenizer_name, tokenizer)
            tables[split] = [{**row, "prompt_tokens": tokens, "prompt_tokenizer": mark} for row, tokens in kept]
        types = Dataset.from_list([row for table in tables.values() for row in table]).features  # a column of empty lists in one split has the other's type
        for split, table in tables.items():
            Dataset.from_list(table, features=types).to_parquet(draft / f"{split}.parquet")
        for file, lines in beside.items():
            Dataset.from_list(lines).to_json(draft / file, force_ascii=False)
        draft.chmod(0o755)
        old = draft.with_name(f"{draft.name}-old")
        if output.exists():
            output.rename(old)
        draft.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sample = tables["test"][0]
    print("\nOne row of test:")
    for message in [{"role": "text", "content": sample["prompt"]}] if isinstance(sample["prompt"], str) else sample["prompt"]:
        print(f"  {message['role']}: {message['content'][:300]}")
    for column in sample.keys() - {"prompt", "prompt_tokens", "prompt_tokenizer"}:
        print(f"  {column}: {sample[column]}")
    print(f"\nWrote {output}/{{{','.join(names)}}}.parquet", *beside)


def _held_out(splits, names: tuple[str, ...], seed: int) -> dict:
    """The splits by these names; of those that the source lacks, test is its validation split where nobody wants that, else each is drawn from train."""
    splits = dict(splits) if len(splits) > 1 else {"train": next(iter(splits.values()))}
    if "test" not in splits and "validation" in splits and "validation" not in names:
        splits["test"] = splits["validation"]
    for missing in [name for name in names if name not in splits]:
        train = splits.get("train", next(iter(splits.values())))
        if len(train) < 2:
            splits[missing] = train
            continue
        parts = train.train_test_split(test_size=max(1, min(1000, len(train) // 10)), seed=seed)
        splits["train"], splits[missing] = parts["train"], parts["test"]
        print(f"The source has no split {missing}: {len(splits[missing])} of its rows, drawn at random, become it")
    return splits


def _cut(prompt: str | list[dict], tokens: int, tokenizer, limit: int) -> tuple[str | list[dict], int]:
    """A prompt of `tokens` tokens that lost the end of its text, or of its last message, until it has `limit` at most; and how many it has."""
    from grpo_launcher.data import count_tokens

    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    while tokens > limit and text:
        places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        text = text[: places[limit - tokens][0]].rstrip() if tokens - limit < len(places) else ""
        prompt = text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
        (tokens,) = count_tokens([prompt], tokenizer)
    return prompt, tokens


def _config(module, source: str) -> str | None:
    """The dataset's own configuration: the Hub's dataset has it, a folder downloaded from there may."""
    from datasets import get_dataset_config_names

    wanted = getattr(module, "CONFIG", None)
    return wanted if source == module.SOURCE or (wanted and Path(source).is_dir() and wanted in get_dataset_config_names(source)) else None


def _report(split: str, count: int, kept: list, left_out: Counter) -> None:
    print(f"{split}: {len(kept)} of {count} rows kept")
    for cause, number in left_out.most_common():
        print(f"  {number} left out: {cause}")
    if len(kept) > 1:
        cuts = statistics.quantiles([tokens for _, tokens in kept], n=100, method="inclusive")
        longest = max(tokens for _, tokens in kept)
        print(f"  prompt tokens: median {cuts[49]:.0f}, 95th percentile {cuts[94]:.0f}, longest {longest}")


def _first_line(error: Exception) -> str:
    said = (str(error) or "no reason given").splitlines()[0][:300]
    return said if type(error) is ValueError else f"{type(error).__name__}: {said}"


if __name__ == "__main__":
    given = arguments(sys.argv[1:])
    try:
        process(
            given.name,
            given.source,
            given.output,
            given.tokenizer,
            given.max_prompt_length,
            given.limit,
            given.seed,
            given.steps,
            given.too_long,
            given.options,
        )
    except DataError as error:
        sys.exit(f"error: {error}")
