"""Real runs, made once a session and asserted on from many sides; every process they start is found and ended."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from grpo_launcher.launch import hardware, plan

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, at the first import; where the Hub cannot be reached its client asks again for minutes
ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("TEST_DATA", ROOT / "../shared/data")).resolve()


def test_data(relative: str) -> Path:
    """A file or folder of the outside data, or a skip that names it."""
    path = TEST_DATA / relative
    if not path.exists():
        pytest.skip(f"{path} is not there (TEST_DATA names the folder)")
    return path


test_data.__test__ = False


def pytest_collection_modifyitems(items):
    """Where a GPU is visible the launcher would lay out another topology than the slow tests assert."""
    if hardware.find_gpus():
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a test of the layout without a GPU: hide it with CUDA_VISIBLE_DEVICES="))


def _rank_and_command(process: psutil.Process) -> tuple[str | None, str] | None:
    try:
        return process.environ().get("RANK"), " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return None


def marked(mark: str) -> list[psutil.Process]:
    """The processes that are there now and were started with GRPO_TEST_MARK=mark, by whomever."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("GRPO_TEST_MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


class Launch:
    """One `bash launch_train.sh` in a folder of its own; its processes carry a mark, so that any that stays is found."""

    def __init__(self, folder: Path, *arguments: str, env: dict | None = None):
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.shared_memory = set(Path("/dev/shm").iterdir())
        self.output, self.seen = folder / f"console-{self.mark[:6]}.txt", set()  # (RANK, command line)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "GRPO_TEST_MARK": self.mark, "PYTHONPATH": ""} | (env or {})
        with open(self.output, "wb") as file:
            command = ["bash", str(ROOT / "launch_train.sh"), *arguments, "--no-install"]
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def text(self) -> str:
        """What the console showed so far."""
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 300) -> None:
        """Wait until the console shows `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {text!r}:\n{self.text()[-4000:]}"
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s:\n{self.text()[-4000:]}"
            time.sleep(0.2)

    def finish(self, timeout: float = 600) -> int:
        """The exit status, once it ended; every command line of the run is kept in `seen` on the way."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            self.seen |= {told for process in self.processes() if (told := _rank_and_command(process))}
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.text()[-4000:]}"
            time.sleep(0.5)
        return self.process.returncode

    def leftovers(self, patience: float = 0) -> list[str]:
        """The run's processes that are still there after `patience` seconds."""
        deadline = time.monotonic() + patience
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [told[1] for process in left if (told := _rank_and_command(process))]

    def shared_memory_left(self) -> set[Path]:
        """What the run left in shared memory."""
        return set(Path("/dev/shm").iterdir()) - self.shared_memory

    def run_folder(self) -> Path:
        """The newest run's folder."""
        return max(self.folder.glob("trainOutput/*/latest"), key=lambda link: link.stat().st_mtime).resolve()

    def metrics(self) -> list[dict]:
        """Its metrics.jsonl."""
        return [json.loads(line) for line in (self.run_folder() / "metrics.jsonl").read_text().splitlines()]

    def end(self) -> None:
        """Kill whatever is left."""
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """The run's processes that are there now."""
        return marked(self.mark)


@pytest.fixture(scope="session")
def launch():
    """Start runs: launch(folder, *arguments) → Launch."""
    started = []

    def begin(*args, **kwargs) -> Launch:
        started.append(Launch(*args, **kwargs))
        return started[-1]

    yield begin
    for run in started:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
        run.end()


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """taught(seed) → a folder with the quickstart's model and posts of that seed under data/, made once."""
    made = {}

    def teach(seed: int) -> Path:
        if seed not in made:
            made[seed] = tmp_path_factory.mktemp(f"seed{seed}")
            command = [sys.executable, "-m", "grpo_launcher.quickstart", "--output", str(made[seed] / "data"), "--seed", str(seed)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return made[seed]

    return teach


@pytest.fixture(scope="session")
def workplace(taught, tmp_path_factory):
    """workplace() → a new folder in which the quickstart's data is at hand, so that runs do not mix."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("work")
        (folder / "data").symlink_to(taught(0) / "data")
        return folder

    return make


@pytest.fixture(scope="session")
def quickstart_run(taught, launch):
    """quickstart_run(seed) → the finished `bash launch_train.sh` of that seed, made once; of seed 0 without any argument."""
    finished = {}

    def run(seed: int) -> Launch:
        if seed not in finished:
            finished[seed] = launch(taught(seed), *(["--seed", str(seed)] if seed else []))
            assert finished[seed].finish() == 0, finished[seed].text()[-4000:]
            finished[seed].left_in_shared_memory = finished[seed].shared_memory_left()
        return finished[seed]

    return run


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    """A folder of random models, an adapter, a run and rows."""
    from compared import make

    return make(tmp_path_factory.mktemp("small"))


@pytest.fixture
def compare(compared, tmp_path, monkeypatch, capfd):
    """compare(*arguments) → exit status and output of compare_checkpoints.py where the small models are at hand."""
    from compared import Compare

    for path in compared.iterdir():
        (shutil.copytree if path.name == "trainOutput" else os.symlink)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Compare(tmp_path, capfd)


@pytest.fixture(scope="session")
def resolved():
    """resolved(recipe) → what grpo_launcher.preflight says of it; the model is not at hand, so its size comes from its name."""
    made = {}

    def resolve(recipe: str) -> dict:
        if recipe not in made:
            from grpo_launcher.preflight import gather

            made[recipe] = json.loads(json.dumps(gather(["--config", str(ROOT / f"configs/{recipe}.yaml")])))
            made[recipe]["data"] = {"rows": 100_000, "test_rows": 128, "longest_prompt": 768, "system_prompt": None}
        return copy.deepcopy(made[recipe])

    return resolve


@pytest.fixture(scope="session")
def make_plan():
    """make_plan(facts, gpus, GiB of each) → the plan for that hardware, which need not be there; `given` stands for values of YAML."""

    def make(facts: dict, gpus: int, memory: float = 24, given: dict | None = None, **options):
        facts["values"] |= given or {}
        facts["given"] += list(given or {})
        defaults = {"colocate": False, "vllm_gpus": 1, "sync": None, "dry_run": True}
        return plan.make_plan(facts, "recipe", SimpleNamespace(**(defaults | options)), [], hardware.assumed_gpus(gpus, memory), [])

    return make
