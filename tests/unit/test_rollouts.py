"""The completions that a run keeps, and the command that shows them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_rollouts

from grpo_launcher import rollouts
from grpo_launcher.errors import EXIT_REFUSED, UserError


@pytest.fixture
def run(tmp_path):
    """A run of three steps: two prompts, two completions each. The reward is step + number, the measure counts."""
    for step in (1, 2, 3):
        rows = [
            {
                "prompt": f"Prompt {number // 2}?",
                "completion": f"Reply {number} of step {step}.\x1b[2J",
                "points": float(step + number),
                "measure": 10.0,
                "advantage": number - 1.5,
                "reference": f"gold {number // 2}",
                rollouts.IDS: [1] * (number + 1),
                rollouts.CUT_OFF: number == 3,
            }
            for number in range(4)
        ]
        fields = {"reward_funcs": ["points", "measure"], "reward_weights": [2, 0], "num_generations": 2}
        write_rollouts(tmp_path / "run", step, rows, **fields)
    return tmp_path / "run"


def show(run, capsys, *flags: str, status: int = 0) -> str:
    """Return what the command prints."""
    assert rollouts.main([str(run), *flags]) == status
    output = capsys.readouterr()
    return output.err if status else output.out


def test_a_step_is_loaded_with_groups_rewards_and_the_datasets_columns(run):
    frame = rollouts.load(run, 2)
    assert frame["reward"].tolist() == [4, 6, 8, 10] and frame["group"].tolist() == [0, 0, 1, 1]
    assert frame["tokens"].tolist() == [1, 2, 3, 4] and frame["question"][2] == "Prompt 1?"
    assert frame.attrs["weights"] == {"points": 2, "measure": 0}
    assert frame.attrs["rows"] == [{"reference": f"gold {number // 2}"} for number in range(4)]
    with pytest.raises(UserError, match="1, 2, 3"):
        rollouts.load(run, 7)


def test_the_newest_step_is_shown_and_the_worst_the_best_and_what_holds_a_text(run, capsys):
    text = show(run, capsys)
    assert text.count("Reply") == 4 and "of step 3" in text and "of step 2" not in text
    assert text.count("cut off") == 1 and "\x1b" not in text
    assert text.index("Prompt 0?") < text.index("Reply 1") < text.index("Prompt 1?") < text.index("Reply 2")
    worst = show(run, capsys, "--step", "1", "--worst", "2")
    assert "Reply 0 of step 1" in worst and "Reply 1" in worst and "Reply 2" not in worst
    assert "Reply 3" in (best := show(run, capsys, "--best", "1")) and best.count("Reply") == 1
    found = show(run, capsys, "--grep", "REPLY 2")
    assert found.count("Reply") == 3 and "of step 1" in found


def test_what_cannot_be_shown_is_refused(run, capsys, tmp_path):
    assert "--step" in show(run, capsys, "--step", "9", status=EXIT_REFUSED)
    assert "--best" in show(run, capsys, "--best", "-1", status=EXIT_REFUSED)
    assert "holds no completions" in show(tmp_path, capsys, status=EXIT_REFUSED)


def test_a_file_that_is_being_written_is_not_there_yet(run):
    half = (run / "completions/completions_00003.parquet").read_bytes()[:500]
    (run / "completions/completions_00004.parquet").write_bytes(half)
    (run / "completions/completions_00005.parquet").touch()
    assert list(rollouts.files(run)) == [1, 2, 3]


@given(st.integers(1, 12), st.integers(1, 60))
def test_what_is_kept_is_bounded_and_lies_evenly(keep, steps):
    """As a run calls it: after each step."""
    kept = []

    class Step:
        def __init__(self, number):
            self.number = number

        def unlink(self):
            kept.remove(self.number)

    patch = pytest.MonkeyPatch()
    patch.setattr(rollouts, "files", lambda run: {number: Step(number) for number in kept})
    for step in range(1, steps + 1):
        kept.append(step)
        rollouts.prune(None, keep)
    patch.undo()
    assert len(kept) == min(keep, steps) and (kept[0] == 1 or keep == 1) and kept[-1] == steps
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert not gaps or max(gaps) <= 4 * steps / max(1, len(gaps))
