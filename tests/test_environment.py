"""launch_train.sh before there is an environment: help, mistakes and a missing tool are told without installing anything."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

TOOLS = [
    "mkdir",
    "cp",
    "sleep",
    "bash",
    "env",
    "dirname",
    "basename",
    "awk",
    "df",
    "cat",
    "grep",
    "wc",
    "sha256sum",
    "cut",
    "flock",
    "sed",
    "true",
    "false",
    "uname",
]


@pytest.fixture
def bare(tmp_path):
    """bare(python, gpu, free) → run launch_train.sh of a copy of the scripts with only the tools that a machine has."""

    def run(*arguments: str, python: str | None = "3.11", gpu: bool = False, free: int = 10**9):
        home, path = tmp_path / "clone", tmp_path / "bin"
        path.mkdir()
        shutil.copytree(ROOT / "launcher", home / "launcher")
        shutil.copytree(ROOT / "requirements", home / "requirements")
        shutil.copytree(ROOT / "configs", home / "configs")
        shutil.copy(ROOT / "launch_train.sh", home)
        for tool in TOOLS:
            (path / tool).symlink_to(shutil.which(tool))
        (path / "df").unlink()
        _script(path / "df", f"echo header; echo disk 0 0 {free} 0 /")
        if gpu:
            _script(path / "nvidia-smi", "echo GPU 0")
        if python == "3.11":
            (path / "python3").symlink_to(Path(sys.executable).resolve())
        elif python == "slow pip":
            _script(path / "slow-python", 'case "$1" in -c) exit 1 ;; esac; exec sleep 300')
            _script(path / "python3.11", f'[ "$1" = -m ] && mkdir -p "$4/bin" && cp {path}/slow-python "$4/bin/python"; exit 0')
        elif python:
            _script(path / "python3", f'[ "$1" = --version ] && echo Python {python}; case "$1" in */arguments.py) exit 0 ;; esac; exit 1')
        if python == "slow pip":
            return [shutil.which("bash"), str(home / "launch_train.sh"), *arguments], {"PATH": str(path), "HOME": str(tmp_path)}, home
        done = subprocess.run(
            [shutil.which("bash"), str(home / "launch_train.sh"), *arguments],
            env={"PATH": str(path), "HOME": str(tmp_path)}, cwd=home, capture_output=True, text=True,
        )  # fmt: skip
        return done, home

    return run


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_help_teaches_at_once(bare):
    """Without an environment."""
    done, home = bare("--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout
    assert not (home / ".venv").exists()


def test_an_installed_environment_is_used_at_once(bare, tmp_path):
    """The second start compares one hash, and installs nothing."""
    home = tmp_path / "clone"
    (home / ".venv/bin").mkdir(parents=True)
    _script(home / ".venv/bin/python", 'echo started "$@"')
    lock = (ROOT / "requirements/cpu.lock").read_bytes()
    (home / ".venv/installed").write_text(hashlib.sha256(lock).hexdigest() + "\n")
    done, _ = bare("configs/quickstart.yaml", "--beta", "0.1")
    assert done.stdout == "started -P -m grpo_launcher.launch configs/quickstart.yaml --beta 0.1\n", done.stderr


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"python": "3.12.1"}, "Python 3.11 is needed"),
        ({"python": None}, "Python 3.11 is needed"),
        ({"gpu": True}, "g++ is needed with a GPU"),
        ({"free": 2 * 2**20}, "has 2 GB free and the installation needs 6"),
    ],
    ids=["another Python", "no Python", "a GPU and no compiler", "a full disk"],
)
def test_a_machine_that_cannot_is_told_before_any_download(machine, said, bare):
    """And what to do."""
    done, home = bare(**machine)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (home / ".venv").exists()


def test_a_mistyped_recipe_is_told_before_any_download(bare):
    """With the nearest name."""
    done, home = bare("configs/quikstart.yaml")
    assert done.returncode == 2 and "did you mean configs/quickstart.yaml?" in done.stderr
    assert not (home / ".venv").exists()


def test_an_interrupted_installation_leaves_no_pip_behind(bare):
    """TERM ends pip too, and the lock with it; the next start goes on."""
    command, env, home = bare(python="slow pip")
    mark = {"GRPO_TEST_MARK": str(home)}
    run = subprocess.Popen(command, env=env | mark, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def marked() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("GRPO_TEST_MARK") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    deadline = time.monotonic() + 30
    while not any(process.name() == "sleep" for process in marked()) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=20)
    assert run.returncode == 143 and "a second start goes on" in said, said
    assert marked() == []
