"""Shared by the tests: where things are, and real runs whose processes carry a mark, by which any is found."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import yaml

from grpo_launcher import runs
from grpo_launcher.launch.supervise import supervise

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("TEST_DATA", ROOT / "../shared/data")).resolve()
MARK = "GRPO_TEST_MARK"
REACHES = """
import errno, socket
client = socket.socket()
client.settimeout(10)
raise SystemExit(client.connect_ex(("10.77.0.3", 9)) != errno.ECONNREFUSED)
"""


def test_data(relative: str) -> Path:
    """Return a file or folder of the outside data, or skip the test."""
    path = TEST_DATA / relative
    if not path.exists():
        pytest.skip(f"{path} is not there (TEST_DATA names the folder)")
    return path


test_data.__test__ = False


def environment_of(process: psutil.Process) -> list[str]:
    """Return a process's environment. psutil reads none of those that changed their title, as vLLM's do."""
    return Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace").split("\0")


def marked(mark: str) -> list[psutil.Process]:
    """Return the living processes that were started, by whomever, with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and f"{MARK}={mark}" in environment_of(process):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def read_metrics(folder: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_accelerate_config(path: Path, parallel: str, ranks: int) -> None:
    """Write accelerate's file for ranks on the CPU: zero3.yaml or ddp.yaml of this project, filled in."""
    config = yaml.safe_load((ROOT / f"{parallel}.yaml").read_text())
    config |= {"use_cpu": True, "mixed_precision": "no", "num_processes": ranks, "main_process_port": 0}
    path.write_text(yaml.safe_dump(config))


def write_checkpoint(folder: Path, *names: str) -> None:
    """Make a checkpoint of stub files, which are whole: an empty object of JSON, and an archive of nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        content = b"{}" if name.endswith(".json") else b"PK\5\6" + bytes(18)
        (folder / name).write_bytes(content)


def means(lines: list[dict], name: str, first: int = 3, last: int = 5) -> tuple[float, float]:
    """Return the mean of a metric over the first and over the last lines that have it."""
    values = [line[name] for line in lines if line.get(name) is not None]
    return sum(values[:first]) / first, sum(values[-last:]) / last


def is_in_sync(lines: list[dict]) -> bool:
    """Whether server and trainer held the same weights in every step."""
    return all(line["sampling/sampling_logp_difference/max"] < 1e-3 for line in lines if "reward" in line)


def run_python(*arguments, cwd: Path, timeout: float = 600, status: int = 0, **env) -> subprocess.CompletedProcess:
    """Run this Python with arguments, and assert its exit status."""
    command = [sys.executable, *map(str, arguments)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | {name: str(value) for name, value in env.items()}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_here(command: str, *arguments, cwd: Path) -> None:
    """Run a Python file, or a module by its name, in this process, which has imported the libraries already."""
    argv, sys.argv = sys.argv, [command, *map(str, arguments)]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()):
            run = runpy.run_path if command.endswith(".py") else runpy.run_module
            run(command, run_name="__main__")
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = argv


def run_code(code: str, cwd: Path) -> str:
    """Run Python code in this process, and return what it prints."""
    output = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(output):
        exec(code, {})  # noqa: S102 -- of a card that the test has just made
    return output.getvalue()


def memory_held_and_planned(console: str) -> tuple[float, float]:
    """Return the GiB that a rank of a run held at most, and the plan's estimate."""
    held = re.search(r"A rank held up to (\d+\.\d) GiB\. The plan said (\d+(?:\.\d+)?) of", console)
    return float(held[1]), float(held[2])


class Launch:
    """One `bash launch_train.sh` in a folder of its own, with its own folder for shared memory."""

    def __init__(self, folder: Path, *arguments: str, command: list[str] | None = None):
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.output = folder / f"console-{self.mark[:6]}.txt"
        self.shared_memory = folder / f"shm-{self.mark[:6]}"
        self.shared_memory.mkdir()
        self.command_lines = set()  # (RANK or None, command line) of every process that was seen
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, MARK: self.mark, "GRPO_SHARED_MEMORY": str(self.shared_memory)}
        environment.pop("VLLM_LOGGING_LEVEL", None)  # TRL's import sets it in this process; a user's server logs more
        command = command or ["bash", str(ROOT / "launch_train.sh"), *arguments, "--no-install"]
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def text(self) -> str:
        """Return what the console showed so far."""
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 600) -> None:
        """Wait until the console shows `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {text!r}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s:\n{self.tail()}"
            time.sleep(0.2)

    def finish(self, status: int = 0, timeout: float = 900) -> "Launch":
        """Wait for the end and assert the exit status. Every command line is kept on the way."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            for process in self.processes():
                try:
                    ranks = [line[5:] for line in environment_of(process) if line.startswith("RANK=")]
                    self.command_lines.add((ranks[0] if ranks else None, " ".join(process.cmdline())))
                except (psutil.Error, OSError):
                    continue
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.tail()}"
            time.sleep(0.5)
        assert self.process.returncode == status, self.tail()
        return self

    def tail(self) -> str:
        """Return the end of the console and of the logs."""
        logs = [log.read_text(errors="replace")[-2000:] for log in self.folder.glob("trainOutput/*/*/*.log")]
        return "\n".join([self.text()[-4000:], *logs])

    def processes(self) -> list[psutil.Process]:
        """Return the run's living processes."""
        return marked(self.mark)

    def servers(self) -> list[psutil.Process]:
        """Return the processes of its vLLM server."""
        return [process for process in self.processes() if "grpo_launcher.vllm_server" in process.cmdline()]

    def leftovers(self, patience: float = 0) -> list:
        """Return processes and shared-memory files that are still there after `patience` seconds."""
        deadline = time.monotonic() + patience
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return [*self.processes(), *self.shared_memory.iterdir()]

    def run_folder(self) -> Path:
        """Return the newest run's folder."""
        return max(self.folder.glob("trainOutput/*/latest"), key=lambda link: link.stat().st_mtime).resolve()

    def metrics(self) -> list[dict]:
        """Return the lines of its metrics.jsonl."""
        return read_metrics(self.run_folder())

    def end(self) -> None:
        """Kill whatever is left."""
        for process in self.processes():
            process.kill()


def ip(command: str) -> None:
    """Run a command of iproute2."""
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@contextlib.contextmanager
def three_machines():
    """Make three network namespaces with the addresses 10.77.0.1 to 3, and yield their names.

    Raises:
        subprocess.CalledProcessError: none can be made here, or they do not reach each other.
    """
    mark, names = uuid.uuid4().hex[:6], []  # a namespace goes some time after it was deleted
    bridge = f"gb{mark}"
    try:
        ip(f"link add name {bridge} type bridge")
        ip(f"link set {bridge} up")
        for number in (1, 2, 3):
            name, cable = f"grpo-{mark}-{number}", f"gv{mark}-{number}"
            ip(f"netns add {name}")
            names.append(name)
            ip(f"link add {cable} type veth peer name eth0 netns {name}")
            ip(f"link set {cable} master {bridge} up")
            ip(f"-n {name} addr add 10.77.0.{number}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        reach = ["ip", "netns", "exec", names[0], sys.executable, "-c", REACHES]
        subprocess.run(reach, check=True, capture_output=True)
        yield names
    finally:
        for name in names:
            ip(f"netns del {name}")
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def on_machine(name: str, *flags: str) -> list[str]:
    """Return the command by which a machine takes part in a quickstart on two nodes with a server beside."""
    command = ["ip", "netns", "exec", name, "bash", f"{ROOT}/launch_train.sh", f"{ROOT}/configs/quickstart.yaml"]
    command += ["--no-install", "--max_completion_length", "64", "--per_device_train_batch_size", "8"]
    command += ["--sample_every", "0", "--num_nodes", "2", "--main_address", "10.77.0.1"]
    return [*command, "--vllm_server_base_url", "http://10.77.0.3:8000", *flags]


def run_again(run: Launch, script: str, limit_s: int, **changes) -> tuple[int, Path]:
    """Run a finished run's trainer again, with a script of tests/cpu in place of train.py.

    Args:
        run: it used a server that goes on, or a new one is started as it was.
        script: name of the script.
        limit_s: the exit status is 124 where the trainer takes longer.
        changes: values of the recipe that differ.

    Returns:
        The exit status and the new run's folder.
    """
    again = runs.load_run(run.run_folder())
    folder = again.folder.parent / Path(script).stem
    again.folder, again.values = folder, again.values | {"output_dir": str(folder)} | changes
    again.write()
    (folder / runs.ACCELERATE_FILE).write_text((run.run_folder() / runs.ACCELERATE_FILE).read_text())
    argv = again.commands["trainer"]["argv"]
    argv = [str(ROOT / "tests/cpu" / script) if part.endswith("train.py") else part for part in argv]
    again.commands["trainer"]["argv"] = ["timeout", str(limit_s), *argv[:-1], str(folder)]
    url = f"http://127.0.0.1:{again.values['vllm_server_port']}" if "server" in again.commands else None
    with contextlib.chdir(run.folder):
        return supervise(again, url, 300), folder
