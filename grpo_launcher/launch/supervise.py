"""Run a plan: server and trainer start together, are watched, and stop together."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from grpo_launcher.launch.processes import start, start_executioner, stop
from grpo_launcher import runs as run_folder

WEDGED = 180.0  # seconds without a healthy answer, once the server was up, after which it counts as lost
GUARDED = 3  # the exit status of a run that a guard stopped


def supervise(plan: dict, run: Path, trainer_flags: list[str]) -> int:
    """Start what `plan` (plan.json) says, from the run's folder, and return the trainer's exit status, or GUARDED.

    The trainer's output goes to the console and train.log, its errors and the server's output to train.log and server.log.
    """

    def command_of(part: dict) -> list[str]:
        return [f"{run}/{word.removeprefix('RUN/')}" if word.startswith("RUN/") else word for word in part["command"]]

    children, executioner = [], None
    memory = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
    shared = tempfile.TemporaryDirectory(prefix="grpo-weights-", dir=memory, ignore_cleanup_errors=True)
    with shared, open(run / "train.log", "ab") as train_log, open(run / "server.log", "ab") as server_log:
        try:
            server = None
            if plan["server"]:
                server = start(command_of(plan["server"]), plan["server"]["env"], stdout=server_log, stderr=subprocess.STDOUT)
                children.append(server)
            env = plan["trainer"]["env"] | {"GRPO_SHARED_MEMORY": shared.name}
            trainer = start(command_of(plan["trainer"]) + trainer_flags, env, stdout=subprocess.PIPE, stderr=train_log)
            children.insert(0, trainer)
            executioner = start_executioner(children, shared.name)
            echo = threading.Thread(target=_echo, args=(trainer.stdout, train_log), daemon=True)
            echo.start()
            status = _watch(plan, run, trainer, server)
            if status is None:
                return 1
            echo.join(5)
            if status:
                print(f"\nThe trainer failed (exit status {status}); {run}/train.log holds all of it:\n{_traceback(run / 'train.log')}", file=sys.stderr)
            return GUARDED if status == 0 and (run / run_folder.STOPPED).exists() else status
        finally:
            for child in children:
                stop(child)
            if executioner:
                executioner.kill()
                executioner.communicate()


def _echo(pipe, log) -> None:
    for line in pipe:  # to its end, whatever becomes of log and console: a full pipe would stop the trainer
        with suppress(OSError, ValueError):
            log.write(line)
            log.flush()
        with suppress(OSError, ValueError):
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def _watch(plan: dict, run: Path, trainer: subprocess.Popen, server: subprocess.Popen | None) -> int | None:
    """Wait for the trainer's end: its exit status, or None where the server was lost first (then told on stderr)."""
    began = last_good = told = time.monotonic()
    up, asked = server is None, 0.0
    while (status := trainer.poll()) is None:
        time.sleep(0.2)
        if server is None:
            continue
        now = time.monotonic()
        if server.poll() is not None:
            return _server_lost(run, f"ended with exit status {server.returncode}")
        if now - asked > (10 if up else 1):
            asked = now
            if _healthy(plan["server"]["url"]):
                last_good = time.monotonic()
                if not up:
                    up = True
                    print(f"The vLLM server is up after {last_good - began:.0f} s.", flush=True)
        if not up and now - told > 15:
            told = now
            print(f"Waiting for the vLLM server ({now - began:.0f} s): {_last_line(run / 'server.log')}", flush=True)
        if now - last_good > (WEDGED if up else plan["server"]["timeout"]):
            return _server_lost(run, f"gave no healthy answer for {now - last_good:.0f} s")
    return status


def _server_lost(run: Path, what: str) -> None:
    tail = "\n".join((run / "server.log").read_text(errors="replace").splitlines()[-25:])
    print(f"\nThe vLLM server {what}; the last lines of {run}/server.log:\n{tail}", file=sys.stderr)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _last_line(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").strip().rpartition("\n")[2].split())[:120] or "no output yet"


def _traceback(log: Path) -> str:
    """The first Python traceback of the log's end, or its last lines where there is none."""
    lines = log.read_text(errors="replace").splitlines()[-400:]
    signs = ("Traceback (most recent call last)", "Fatal Python error")
    first = next((i for i, line in enumerate(lines) if any(sign in line for sign in signs)), None)
    if first is None:
        return "\n".join(lines[-25:])
    said = (i for i in range(first + 1, len(lines)) if not re.match(r"\s|$", re.sub(r"^\[rank\d+\]: ", "", lines[i])))
    end = next(said, len(lines))  # the line of the exception itself, which must not be cut off
    return "\n".join(lines[max(first, end - 40) : end + 5])
