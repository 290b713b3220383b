"""Turn a dataset into rows for training: python process_dataset.py NAME [--source …] [--output …]

Writes {train,test}.parquet with the columns prompt, prompt_tokens and prompt_tokenizer, and
  calculator     answer, needs_tool
  everyday       reference
  gsm8k          answer
  mcq            answer
  search_qa      answers, passage_id; and corpus.jsonl, the passages to search
  summarization  reference; and validation.parquet
  tldr           reference
Rows that are empty, malformed or too long are left out and counted.
HF_ENDPOINT (a mirror of the Hub) and HF_HUB_OFFLINE=1 work as everywhere.
"""

import argparse
import sys
from pathlib import Path

from grpo_launcher.console import exit_status
from grpo_launcher.datasets import NAMES, Request, process


def main(argv: list[str]) -> int:
    """Run the command. Return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"one of: {', '.join(NAMES)}")
    parser.add_argument(
        "--source",
        help="Hub id, folder of parquet files or of save_to_disk, or a jsonl, json (SQuAD's too), csv, tsv or parquet "
        "file; kuakua: a text file of prompts; mcq: a CSV file",
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: data/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--tokenizer", help="Hub id or folder; its tokenizer counts the tokens of prompts")
    parser.add_argument("--max_prompt_length", type=int, help="in tokens; longer prompts are left out")
    parser.add_argument(
        "--too_long", choices=["drop", "cut"], default="drop", help="cut: longer prompts lose their end"
    )
    parser.add_argument(
        "--limit", type=int, help="raw rows of a split, drawn at random; kuakua, --steps: rows to make"
    )
    in_user = "write the system text before the user's, for chat templates without a system role (Gemma 2, Mistral)"
    parser.add_argument("--system_in_user", action="store_true", help=in_user)
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the test split (default: 0)")
    own = parser.add_argument_group("calculator")
    own.add_argument("--steps", type=int, choices=range(1, 9), metavar="N", help="make sums of 1 to 8 operations")
    own = parser.add_argument_group("summarization")
    own.add_argument("--article", metavar="COLUMN", help="column with the text (default: that of a known dataset)")
    own.add_argument("--summary", metavar="COLUMN", help="column with its summary")
    own.add_argument(
        "--prefix",
        help="text before each article, such as 'summarize: ' or '': prompts are plain text, for T5 and BART "
        "(default: chat messages)",
    )
    return exit_status(process, Request(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
