"""launch_train.sh where nothing is installed yet: it says at once what is missing, and installs nothing by halves."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import MARK, ROOT, marked

TOOLS = "mkdir cp rm sleep bash env dirname basename awk df cat grep wc sha256sum cut flock sed true false uname"
COPIED = ["grpo_launcher/launch", "requirements", "configs", "launch_train.sh", "pyproject.toml"]


@pytest.fixture
def machine(tmp_path):
    """A copy of the scripts on a machine with few tools and no Python."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder: Path):
        self.home, self.path = folder / "clone", folder / "bin"
        self.path.mkdir()
        for name in COPIED:
            source, target = ROOT / name, self.home / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        for tool in TOOLS.split():
            (self.path / tool).symlink_to(shutil.which(tool))
        self.set_free_space(gib=1000)

    def write(self, path: Path, script: str) -> None:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def set_free_space(self, gib: int) -> None:
        self.write(self.path / "df", f"echo header; echo disk 0 0 {gib * 2**20} 0 /")

    def set_python(self, version: str | None) -> None:
        """This Python, one of another version, or none."""
        if version == "3.11":
            (self.path / "python3").symlink_to(Path(sys.executable).resolve())
        elif version:
            answer = (
                f'[ "$1" = --version ] && echo Python {version}; case "$1" in */arguments.py) exit 0; esac; exit 1'
            )
            self.write(self.path / "python3", answer)

    def set_environment(self, has_project: bool = True) -> None:
        """A .venv that is installed for this lock, whose Python says how it was started."""
        files = [self.home / "requirements/cpu.lock", self.home / "pyproject.toml"]
        stamp = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        status = 0 if has_project else 1
        self.write(self.home / ".venv/bin/python", f'[ "$2" = -c ] && exit {status}; echo started "$@"')
        (self.home / ".venv/installed").write_text(f"{stamp}\n")

    def command(self, *arguments: str) -> dict:
        command = [shutil.which("bash"), str(self.home / "launch_train.sh"), *arguments]
        env = {"PATH": str(self.path), "HOME": str(self.home), MARK: str(self.home)}
        return {"args": command, "env": env, "cwd": self.home, "text": True, "stdout": subprocess.PIPE}

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(*arguments), stderr=subprocess.PIPE)


def test_help_needs_no_environment(machine):
    machine.set_python("3.11")
    done = machine.run("--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout and not (machine.home / ".venv").exists()


def test_a_mistyped_recipe_is_refused_before_any_download(machine):
    machine.set_python("3.11")
    done = machine.run("configs/quikstart.yaml")
    assert done.returncode == 2 and "did you mean configs/quickstart.yaml?" in done.stderr
    assert not (machine.home / ".venv").exists()


@pytest.mark.parametrize(
    ("python", "gpu", "gib", "message"),
    [
        ("3.12.1", False, 1000, "Python 3.11 is needed"),
        (None, False, 1000, "Python 3.11 is needed"),
        ("3.11", True, 1000, "g++ is needed with a GPU"),
        ("3.11", False, 2, "has 2 GB free and the installation needs 6"),
    ],
    ids=["another Python", "no Python", "a GPU and no compiler", "a full disk"],
)
def test_a_machine_that_cannot_is_refused_before_any_download(python, gpu, gib, message, machine):
    machine.set_python(python)
    machine.set_free_space(gib)
    if gpu:
        machine.write(machine.path / "nvidia-smi", "echo GPU 0")
    done = machine.run()
    assert done.returncode == 2 and message in done.stderr and not (machine.home / ".venv").exists()


@pytest.mark.parametrize("is_read_only", [False, True])
def test_an_installed_environment_is_used_at_once(is_read_only, machine):
    """One hash is compared and nothing is written, so that a read-only checkout works too."""
    machine.set_python("3.11")
    machine.set_environment()
    if is_read_only:
        (machine.home / ".venv.lock").mkdir()  # nobody can open it, root included
    done = machine.run("configs/quickstart.yaml", "--beta", "0.1")
    assert done.stdout == "started -P -m grpo_launcher.launch configs/quickstart.yaml --beta 0.1\n", done.stderr


def test_a_changed_lock_is_installed_anew_or_refused(machine):
    """In a read-only checkout it cannot be installed."""
    machine.set_python("3.11")
    machine.set_environment()
    machine.set_free_space(gib=1)
    with open(machine.home / "pyproject.toml", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert "the installation needs 6" in machine.run().stderr
    (machine.home / ".venv.lock").unlink()
    (machine.home / ".venv.lock").mkdir()
    done = machine.run()
    assert done.returncode == 2 and "cannot be written" in done.stderr and "--no-install" in done.stderr


def test_packages_for_the_other_kind_of_machine_are_replaced(machine):
    """Pip would keep torch 2.13.0+cpu, which sees no GPU, for torch 2.13.0."""
    machine.set_python("3.11")
    machine.set_environment()
    other = machine.home / ".venv/lib/python3.11/site-packages/vllm-0.31.0.dist-info"
    other.mkdir(parents=True)
    assert machine.run().stdout.startswith("started"), "as long as the lock is the same"
    (machine.home / ".venv/installed").write_text("of gpu.lock")
    machine.write(machine.path / "python3.11", '[ "$1" = -m ] && exit 1; exit 0')  # it has no venv
    done = machine.run()
    assert "are for a machine with a GPU" in done.stdout and not other.exists(), done.stderr


def test_an_environment_with_another_checkout_is_refused(machine):
    """Else the code of the other would run."""
    machine.set_python("3.11")
    machine.set_environment(has_project=False)
    done = machine.run()
    assert done.returncode == 2 and f"--no-deps --editable {machine.home}" in done.stderr
    machine.write(machine.path / "python", '[ "$2" = -c ] && exit 0; echo started "$@"')
    assert machine.run("--no-install").stdout == "started -P -m grpo_launcher.launch --no-install\n"


def test_an_interrupted_installation_leaves_no_pip_behind(machine):
    """TERM ends pip too, and the lock with it. The next start goes on."""
    slow = machine.path / "slow-python"
    machine.write(slow, 'case "$1" in -c) exit 1 ;; esac; exec sleep 300')
    machine.write(
        machine.path / "python3.11", f'[ "$1" = -m ] && mkdir -p "$4/bin" && cp {slow} "$4/bin/python"; exit 0'
    )

    def is_installing() -> bool:
        try:
            return any(process.name() == "sleep" for process in marked(str(machine.home)))
        except psutil.NoSuchProcess:  # another one has just ended
            return False

    run = subprocess.Popen(**machine.command(), stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not is_installing():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 143 and "a second start goes on" in output
    assert marked(str(machine.home)) == []
