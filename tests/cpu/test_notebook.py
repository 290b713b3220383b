"""The notebook as a user runs it: from a clean kernel, with the real job, in a folder that is not this clone."""

import ast
import base64
import io
import os
import re
import sys
import uuid
from statistics import mean
from types import SimpleNamespace

import nbformat
import pytest
from helpers import MARK, ROOT, marked, read_metrics
from matplotlib.image import imread
from nbclient import NotebookClient

STORED = ROOT / "launch_train.ipynb"

pytestmark = pytest.mark.timeout(1800)  # two starts of a server, a comparison and a chat in one fixture


def code_cells(notebook) -> list:
    """Return the cells that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_text(cell) -> str:
    """Return all text in a cell's output, Markdown too."""
    printed = "".join(output.get("text", "") for output in cell.outputs)
    return printed + "".join(output.get("data", {}).get("text/markdown", "") for output in cell.outputs)


def pictures(cell) -> list:
    """Return all pictures in a cell's output, as arrays (height, width, 4) from 0 to 1."""
    encoded = [output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [imread(io.BytesIO(base64.b64decode(picture))) for picture in encoded]


def cell_with(notebook, text: str):
    """Return the one code cell whose source holds `text`."""
    (cell,) = (cell for cell in code_cells(notebook) if text in cell.source)
    return cell


def test_it_defines_nothing():
    """Everything is done by the project's own files."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in code_cells(nbformat.read(STORED, 4)):
        tree = ast.parse(re.sub(r"^([!%]|\w+ = !).*$", "", cell.source, flags=re.MULTILINE))
        assert not any(isinstance(node, definitions) for node in ast.walk(tree)), cell.source


def test_its_stored_outputs_are_those_of_one_whole_run():
    """It can be read without running it: a curve, no error, no path of the machine on which it ran."""
    notebook = nbformat.read(STORED, 4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert STORED.stat().st_size < 300_000
    assert pictures(cell_with(notebook, '"--resume"'))
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/", "".join(map(output_text, cells)))


@pytest.fixture(scope="module")
def executed(module_workplace):
    """The notebook after one run by a kernel of this Python, its folder, and the processes that it left."""
    folder, mark, before = module_workplace, uuid.uuid4().hex, {path.name for path in ROOT.iterdir()}
    for path in ROOT.iterdir():
        if path.name not in ("data", "trainOutput") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    notebook = nbformat.read(STORED, 4)
    client = NotebookClient(notebook, timeout=900, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable
    try:
        client.execute(env=os.environ | {MARK: mark, "IPYTHONDIR": str(folder / ".ipython")})
        left = [process.cmdline() for process in marked(mark)]
    finally:
        nbformat.write(notebook, folder / "executed.ipynb")
        for process in marked(mark):
            process.terminate()
        for process in marked(mark):
            process.kill()
    made = {path.name for path in ROOT.iterdir()} - before
    return SimpleNamespace(notebook=notebook, folder=folder, left=left, made=made)


def test_the_curve_is_drawn(executed):
    """While the job runs and at its end, with more data at the end."""
    live, whole = (pictures(cell_with(executed.notebook, text))[-1] for text in ("< 6", '"--resume"'))
    dark = [(picture[..., :3].max(axis=-1) < 0.3).mean() for picture in (live, whole)]
    assert min(dark) > 0.005
    assert live.shape != whole.shape or (live != whole).any()


def test_the_job_was_stopped_and_resumed(executed):
    """Every step is logged once, and the job reached its end."""
    assert "exit status 130" in output_text(cell_with(executed.notebook, "SIGINT"))
    console = (executed.folder / "trainOutput/notebook.txt").read_text()
    assert re.search(r"Run: trainOutput/quickstart/1, from checkpoint-(4|8)", console)
    run = executed.folder / "trainOutput/quickstart/1"
    lines = [line for line in read_metrics(run) if "reward" in line]
    assert [line["step"] for line in lines] == [*range(1, 13)]
    rewards = [line["reward"] for line in lines]
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 35
    assert (run / "final-checkpoint/README.md").exists()


def test_base_and_final_were_compared_and_shown(executed):
    """By the two commands, on the run's own data."""
    table = output_text(cell_with(executed.notebook, "compare_checkpoints.py")).replace("\\", "")
    completions = output_text(cell_with(executed.notebook, "demo_in_chat.py"))
    assert "length_reward" in table and "final" in table
    assert completions.count(" characters, ") == 4 and "final" in completions and "\x1b" not in completions


def test_nothing_is_left_and_the_clone_is_as_it_was(executed):
    """No process, and no file outside the folder in which the notebook ran."""
    assert executed.left == []
    assert executed.made <= {".pytest_cache", ".ruff_cache", ".hypothesis"}
