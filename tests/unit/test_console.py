"""Colours on a terminal and nowhere else, and the exit status of a command that refuses."""

import io
import re

import pytest

from grpo_launcher.console import coloured, exit_status
from grpo_launcher.errors import EXIT_REFUSED, UserError

TEXT = """\
Plan for quickstart: 2 ZeRO-3 ranks
step  1/20  reward    -1.50  0:02:56 left
Warning: 84% of 8 groups have no spread. Fix: harder prompts.
error: beta: 'a' is no number.
Saved trainOutput/quickstart/1/final-checkpoint
a completion about step 1/20 and an error: none
"""


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    return stream


def test_a_terminal_shows_what_matters_in_colours(terminal):
    """And the same text."""
    shown = coloured(TEXT, terminal)
    assert re.sub(r"\x1b\[\d+m", "", shown) == TEXT
    is_coloured = ["\x1b[" in line for line in shown.splitlines()]
    assert is_coloured == [True, True, True, True, True, False]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_shows_none_gets_none(terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert coloured(TEXT, terminal) == TEXT


def test_a_file_gets_plain_text(tmp_path):
    with open(tmp_path / "log", "w") as file:
        assert coloured(TEXT, file) == TEXT


def test_a_refusal_is_printed_with_its_status(capsys):
    def refuse(field: str):
        raise UserError(field, "is wrong", "mend it")

    def lose_a_connection():
        raise BrokenPipeError

    assert exit_status(refuse, "beta") == EXIT_REFUSED
    assert capsys.readouterr().err == "error: beta: is wrong. Fix: mend it.\n"
    with pytest.raises(BrokenPipeError):  # of a connection, say: a run that fails by it has not ended well
        exit_status(lose_a_connection)
    assert exit_status(lambda: 1) == 1 and exit_status(lambda: None) == 0
