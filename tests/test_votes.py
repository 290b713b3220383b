"""The file of blind votes, the win rates that are counted from it, and their intervals."""

import json
import threading

import pytest

from grpo_launcher.chat import votes


@pytest.mark.parametrize(
    ("won", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1)],
    ids=["many votes", "few won", "none won", "one won", "all won"],
)
def test_the_interval_is_wilsons(won, of, low, high):
    """The published figures: R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and its mirror image."""
    assert votes.wilson(won, of) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_is_scipys():
    """For every result of up to 12 votes."""
    stats = pytest.importorskip("scipy.stats")
    for of in range(1, 13):
        for won in range(of + 1):
            wanted = stats.binomtest(won, of).proportion_ci(method="wilson")
            assert votes.wilson(won, of) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def cast(a: str, b: str, vote: str) -> dict:
    """A vote as the file holds it."""
    return {"A": a, "B": b, "vote": vote}


def test_a_win_counts_for_the_checkpoint_wherever_it_stood():
    """And ties are counted apart: they move neither rate nor interval."""
    file = [cast("base", "final", "B"), cast("final", "base", "A"), cast("final", "base", "B"), cast("base", "final", "tie"), cast("a", "base", "tie")]
    tied, decided = votes.standings(file)
    assert (decided.name, decided.other, decided.won, decided.lost, decided.tied) == ("final", "base", 2, 1, 1)
    assert decided.rate == 2 / 3 and decided.interval == votes.wilson(2, 3)
    assert (tied.name, tied.tied, tied.rate, tied.interval) == ("base", 1, None, None)


def test_two_pages_that_vote_at_once_lose_nothing(tmp_path):
    """Long lines, in Chinese, from two threads."""
    path = tmp_path / "votes.jsonl"

    def vote(a):
        for number in range(50):
            votes.append(path, cast(a, "final", "A") | {"reply_A": f"{number}夸\u2028" * 2000})

    threads = [threading.Thread(target=vote, args=(name,)) for name in ("base", "other")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    kept, bad = votes.read(path)
    assert bad == [] and [one.lost + one.won for one in votes.standings(kept)] == [50, 50]
    assert "夸" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "broken",
    ['{"A": "base", "B"', "[]", "null", '{"A": "base", "B": "final", "vote": "C"}', '{"A": 1, "B": "final", "vote": "A"}'],
    ids=["cut off", "a list", "nothing", "an unknown vote", "a name that is none"],
)
def test_a_broken_line_of_the_file_is_named_and_the_others_count(tmp_path, broken):
    """Also where it is the last one and has no end, as a full disk leaves it."""
    path = tmp_path / "votes.jsonl"
    path.write_text(f"{json.dumps(cast('base', 'final', 'B'))}\n\n{broken}")
    votes.append(path, cast("base", "final", "B"))
    kept, bad = votes.read(path)
    assert (len(kept), bad) == (2, [3])
