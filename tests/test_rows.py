"""Rows that come as a stream: a file that grows, and prompts that would not fit."""

import json

import pytest

from grpo_launcher.quickstart.pretrain import make_tokenizer
from grpo_launcher.data import column_names, load_rows, short_prompts


@pytest.fixture
def stream(tmp_path):
    """stream() → a file of three posts as a stream; the second is long."""
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"post {number} " * (200 if number == 1 else 1), "mood": "glad"}) + "\n" for number in range(3)))
    return path, load_rows(str(path), streaming=True)["train"]


def test_what_is_added_to_a_file_is_read_when_the_stream_begins_anew(stream):
    """Which it does after its last row."""
    path, rows = stream
    assert len(list(rows)) == 3
    with open(path, "a") as file:
        file.write(json.dumps({"prompt": "post 3", "mood": "sad"}) + "\n")
    assert [row["mood"] for row in rows] == ["glad", "glad", "glad", "sad"]


def test_long_prompts_are_left_out_and_told(stream, tmp_path, capsys):
    """They would end the run; the columns are known all the same."""
    make_tokenizer(["post 0 1 2 3"], "{{ messages }}").save_pretrained(tmp_path / "model")
    rows = short_prompts(stream[1], str(tmp_path / "model"), 20)
    assert column_names(rows) == ["prompt", "mood"]
    assert [row["prompt"].split()[1] for row in rows] == ["0", "2"]
    assert "Left out of the stream: a prompt of" in capsys.readouterr().out
