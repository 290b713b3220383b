"""Replies that were drawn once, in a parquet file: one row a checkpoint, split and prompt."""

import os
from pathlib import Path

import pyarrow
from pyarrow import parquet

from grpo_launcher.chat.checkpoints import Checkpoint
from grpo_launcher.chat.comparison import ComparisonError
from grpo_launcher.chat.engine import Engine
from grpo_launcher import runs as run_folder

COMPLETIONS = run_folder.ROOT / "completions.parquet"
COLUMNS = pyarrow.schema(
    {
        **dict.fromkeys(["key", "checkpoint", "path", "split"], pyarrow.string()),
        "prompt": pyarrow.string(),  # as JSON: a text, or chat messages
        "prompt_ids": pyarrow.list_(pyarrow.int32()),
        "reply": pyarrow.string(),
        "reply_ids": pyarrow.list_(pyarrow.int32()),
        "cut_off": pyarrow.bool_(),
        "messages": pyarrow.string(),  # as JSON, where the model could call tools: calls, results and what was said; `reply` is the transcript
        "tokens": pyarrow.int32(),  # of reply_ids, those that the model drew: None for all
        "decoding": pyarrow.string(),  # as JSON
    }
)


class Replies:
    """The rows of a file, by key. What another process adds meanwhile stays."""

    def __init__(self, path: Path = COMPLETIONS):
        self.path, self.new = path, {}
        self.rows = self._read()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict:
        return self.rows[key]

    def add(self, row: dict) -> None:
        """Take in a row; it is on disk after the next `save`."""
        self.rows[row["key"]] = self.new[row["key"]] = {name: row[name] for name in COLUMNS.names}

    def save(self) -> None:
        """Write what is new, in one move."""
        if not self.new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        parquet.write_table(pyarrow.Table.from_pylist(list((self._read() | self.new).values()), schema=COLUMNS), draft)
        draft.replace(self.path)
        self.new = {}

    def _read(self) -> dict[str, dict]:
        if not self.path.exists():
            return {}
        try:
            return {row["key"]: row for row in parquet.read_table(self.path, schema=COLUMNS).to_pylist()}
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ComparisonError(f"{self.path} holds no kept replies that can be read: {reason} Move it away; what it held is drawn again.") from error


def mark(checkpoint: Checkpoint, engine: Engine) -> list:
    """What changes when the weights do: a folder's place, and its files' sizes and times; a Hub id and its commit."""
    marks = []
    for name in filter(None, (checkpoint.path, checkpoint.base)):
        folder = Path(name)
        if folder.is_dir():
            files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
            marks.append([str(folder.resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)])
        else:
            marks.append([name, getattr(engine.config(checkpoint), "_commit_hash", None)])
    return marks
