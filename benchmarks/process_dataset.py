"""process_dataset.py beside a plain Dataset.map: `python benchmarks/process_dataset.py [--rows N] [--output FILE]`.

Both turn synthetic Reddit posts into chat prompts, count each prompt's tokens in the chat template, leave out those
over 768 tokens, and write Parquet. The plain way is a function of one row, as the documentation of datasets shows it.
"""

import random
import sys
import tempfile
from pathlib import Path

from common import parser, show, watch
from helpers import ROOT, TEST_DATA

ROWS = 116_722  # of trl-lib/tldr's training split
LIMIT = 768


def make_posts(path: Path, count: int) -> None:
    """Write rows in trl-lib/tldr's columns: posts of 60 to 300 words, whose words fall off by rank."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    choose = random.Random(0)
    syllables = ["".join(choose.choices("bcdfghlmnprst", k=1) + choose.choices("aeiou", k=1)) for _ in range(60)]
    words = ["".join(choose.choices(syllables, k=choose.randint(1, 3))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    schema = pyarrow.schema({"prompt": "string", "completion": "string"})
    with ParquetWriter(path, schema) as writer:
        for start in range(0, count, 1000):
            rows = []
            for _ in range(min(1000, count - start)):
                said = choose.choices(words, weights, k=choose.randint(60, 300) + 30)
                post = (
                    f"SUBREDDIT: r/{said[0]}\n\nTITLE: {' '.join(said[1:9])}\n\nPOST: {' '.join(said[30:])}\n\nTL;DR:"
                )
                rows.append({"prompt": post, "completion": " ".join(said[9:30])})
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def plain(source: str, tokenizer_name: str, output: str) -> None:
    """Do it row by row."""
    from datasets import disable_caching, load_dataset
    from transformers import AutoTokenizer

    from grpo_launcher.datasets.tldr import to_row

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)

    def convert(raw: dict) -> dict:
        row = to_row(raw)
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        return row | {"prompt_tokens": len(ids)}

    disable_caching()
    rows = load_dataset("parquet", data_files=source)["train"].map(convert, remove_columns=["completion"])
    rows.filter(lambda row: row["prompt_tokens"] <= LIMIT).to_parquet(output)


def main() -> None:
    """Print the table."""
    command = parser(__doc__)
    command.add_argument("--rows", type=int, default=ROWS, help=f"default: {ROWS}")
    folder, hub_id = TEST_DATA / "qwen2.5_tokenizer", "Qwen/Qwen2.5-0.5B-Instruct"
    default = str(folder if folder.exists() else hub_id)
    command.add_argument("--tokenizer", default=default, help=f"Hub id or folder (default: that of {hub_id})")
    command.add_argument("--ours", action="store_true", help="leave the plain way out")
    args = command.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source, rows = Path(name) / "posts.parquet", []
        make_posts(source, args.rows)
        own = [sys.executable, str(ROOT / "process_dataset.py"), "tldr", "--source", str(source)]
        own += ["--tokenizer", args.tokenizer, "--max_prompt_length", str(LIMIT), "--output", f"{name}/ours"]
        ways = {"process_dataset.py": own}
        if not args.ours:
            ways["Dataset.map"] = [
                sys.executable,
                __file__,
                "--plain",
                str(source),
                args.tokenizer,
                f"{name}/plain.parquet",
            ]
        for way, arguments in ways.items():
            found = watch(arguments, "^$")
            rows.append({"way": way, "rows": args.rows, "seconds": found["total"], "GiB": found["memory"]})
            print(f"{way}: {found['total']:.0f} s", flush=True)
        for row in rows:
            row["times as fast"] = rows[-1]["seconds"] / row["seconds"]
    show(rows, args.output)


if __name__ == "__main__":
    plain(*sys.argv[2:]) if sys.argv[1:2] == ["--plain"] else main()
