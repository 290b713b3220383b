"""Child processes that never outlive this one, whatever ends it."""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)
GRACE = 10.0  # seconds between TERM and KILL
_libc = ctypes.CDLL(None)


class Stopped(Exception):
    """A signal asked this process to stop; args[0] is its number."""


@contextmanager
def catching_signals() -> Iterator[None]:
    """Turn INT, TERM and HUP into Stopped, and leave no descendant when the block ends.

    A signal that was ignored when the process began (HUP under nohup) stays ignored, except INT, which a shell ignores
    for every background job. As a subreaper this process inherits orphans, so that a rank whose parent was killed is
    found too.
    """
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)

    def stop(number, frame):
        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(caught, signal.SIG_IGN)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        kill_descendants()


@contextmanager
def first_term(act: Callable[[], bool]) -> Iterator[None]:
    """Let the first TERM call `act`. The next one, or the first where `act` returns False, does what it did before.

    Another within a second is the same one: `timeout` and others send it to a process and to its group.
    """
    before, first = signal.getsignal(signal.SIGTERM), None

    def handle(number, frame):
        nonlocal first
        if first is None and act():
            first = time.monotonic()
        elif first is None or time.monotonic() - first > 1:
            signal.signal(signal.SIGTERM, before)
            before(number, frame)

    if callable(before):
        signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) == handle:
            signal.signal(signal.SIGTERM, before)


def exit_at_once(status: int) -> NoReturn:
    """End this process as sys.exit does, but without taking its modules apart, which can take 2 s."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(
    command: list[str],
    env: dict[str, str] | None = None,
    undertaker: subprocess.Popen | None = None,
    **streams,
) -> subprocess.Popen:
    """Start a command in a session of its own, so that Ctrl-C reaches it through `stop` alone.

    It gets TERM when this process dies, and the undertaker hears of it before it can do anything.
    """

    def die_with_parent():
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        let_stacks_be_read()
        if undertaker:
            os.write(undertaker.stdin.fileno(), f"{os.getpid()}\n".encode())

    streams = {"stdin": subprocess.DEVNULL} | streams
    env = os.environ | (env or {})
    return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=die_with_parent, **streams)


def let_stacks_be_read() -> None:
    """Let py-spy, a process of the same user, look into this one, which Ubuntu allows to parents alone."""
    _libc.prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)


def start_undertaker(folder: str) -> subprocess.Popen:
    """Start a process that does what `stop` would do, in case this process is killed.

    The children that it was told of get TERM as this process dies, and KILL from it after GRACE seconds: a vLLM server
    that is told to end in the middle of a weight sync waits for ever. Their temporary `folder` is removed. End it with
    `kill`.
    """
    # `read` fails when the pipe closes, which it does with this process.
    script = 'while read -r child; do set -- "$@" "-$child"; done; '
    script += f'sleep {GRACE:.0f}; kill -KILL -- "$@"; rm -rf -- "$0"'
    streams = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(["bash", "-c", script, folder], start_new_session=True, **streams)


def stop(child: subprocess.Popen) -> None:
    """End a child and its process group: TERM, GRACE seconds, KILL.

    The group gets its time even where the child is dead already: a vLLM server's other processes free shared memory.
    """
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    with suppress(ProcessLookupError, ChildProcessError):
        while time.monotonic() < deadline:
            os.killpg(child.pid, 0)
            os.waitpid(-child.pid, os.WNOHANG)  # orphans of the group are this subreaper's to bury
            time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def kill_descendants() -> None:
    """KILL every process that descends from this one, and wait until they are gone."""
    deadline = time.monotonic() + GRACE
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def descendants() -> list[int]:
    """Return the ids of all processes that descend from this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" (", 1)
        except (OSError, ValueError):
            continue
        parents[int(pid)] = int(rest.rpartition(") ")[2].split()[1])
    found = [os.getpid()]
    for ancestor in found:
        found += [pid for pid, parent in parents.items() if parent == ancestor]
    return found[1:]
