"""The notebook as a user runs it: from a clean kernel, with the real job, in a folder that is not this clone."""

import ast
import base64
import io
import json
import os
import re
import signal
import sys
import uuid
from statistics import mean
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT, marked
from matplotlib.image import imread
from nbclient import NotebookClient

STORED = ROOT / "launch_train.ipynb"


def code_cells(notebook) -> list:
    """Its cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell) -> str:
    """All text under a cell, Markdown too."""
    kept = (output.get("data", {}) for output in cell.outputs)
    return "".join(output.get("text", "") for output in cell.outputs) + "".join(data.get("text/markdown", "") for data in kept)


def pictures(cell) -> list:
    """All pictures under a cell, as arrays (height, width, 4) from 0 to 1."""
    found = (output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return [imread(io.BytesIO(base64.b64decode(picture))) for picture in found]


def cell_with(notebook, text: str):
    """The one code cell in whose source `text` stands."""
    (found,) = (cell for cell in code_cells(notebook) if text in cell.source)
    return found


def test_it_defines_nothing():
    """What it does is done by the files of this project."""
    for cell in code_cells(nbformat.read(STORED, 4)):
        tree = ast.parse(re.sub(r"^([!%]|\w+ = !).*$", "", cell.source, flags=re.M))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)], cell.source


def test_its_stored_outputs_are_those_of_one_whole_run_and_small():
    """Readable where it is not run: a curve, no error, nothing of the machine on which it ran."""
    notebook = nbformat.read(STORED, 4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert STORED.stat().st_size < 300_000
    assert pictures(cell_with(notebook, '"--resume"'))
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/", "".join(map(shown, cells)))


@pytest.fixture(scope="module")
def executed(workplace):
    """The notebook after it was run once by a kernel of this Python, where it was run, and which processes it left."""
    folder, mark, before = workplace(), uuid.uuid4().hex, {path.name for path in ROOT.iterdir()}
    for path in ROOT.iterdir():
        if path.name not in ("data", "trainOutput") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    notebook = nbformat.read(STORED, 4)
    client = NotebookClient(notebook, timeout=900, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable
    try:
        client.execute(env=os.environ | {"GRPO_TEST_MARK": mark, "PYTHONPATH": "", "IPYTHONDIR": str(folder / ".ipython")})
        left = [process.cmdline() for process in marked(mark)]
    finally:
        nbformat.write(notebook, folder / "executed.ipynb")
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in marked(mark):
                process.send_signal(number)
    made = {path.name for path in ROOT.iterdir()} - before
    return SimpleNamespace(notebook=notebook, folder=folder, run=folder / "trainOutput/quickstart/1", left=left, made=made)


@pytest.mark.slow
def test_the_curve_holds_data(executed):
    """The one that was live at the stop, and the one of the whole run, which shows more."""
    stopped, whole = (pictures(cell_with(executed.notebook, text))[-1] for text in ("< 6", '"--resume"'))
    dark = [(picture[..., :3].max(axis=-1) < 0.3).mean() for picture in (stopped, whole)]
    assert min(dark) > 0.005
    assert not (stopped.shape == whole.shape and (stopped == whole).all())


@pytest.mark.slow
def test_the_job_was_stopped_and_went_on(executed):
    """Every step once, through the stop; to the end."""
    assert "exit status 130" in shown(cell_with(executed.notebook, "SIGINT"))
    console = (executed.folder / "trainOutput/notebook.txt").read_text()
    assert re.search(r"Run: trainOutput/quickstart/1, from checkpoint-(4|8)", console)
    lines = [json.loads(line) for line in (executed.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert mean(line["reward"] for line in lines[-3:]) > mean(line["reward"] for line in lines[:3]) + 25
    assert "Saved trainOutput/quickstart/1/final-checkpoint" in shown(cell_with(executed.notebook, '"--resume"'))
    assert (executed.run / "final-checkpoint/README.md").exists()


@pytest.mark.slow
def test_base_and_final_were_compared_and_answered(executed):
    """By the commands, on the run's own data."""
    table, replies = (shown(cell_with(executed.notebook, text)) for text in ("compare_checkpoints.py", "demo_in_chat.py"))
    assert "length_reward" in table and "final" in table
    assert replies.count(" characters, ") == 4 and "final" in replies and "\x1b" not in replies


@pytest.mark.slow
def test_nothing_is_left_and_the_clone_is_as_it_was(executed):
    """Neither a process nor a file outside the folder in which it ran."""
    assert executed.left == []
    assert executed.made <= {".pytest_cache", ".ruff_cache", ".hypothesis"}
