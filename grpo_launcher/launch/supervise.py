"""Supervise a run: server and trainer start together, are watched, and stop together."""

import functools
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from grpo_launcher.console import coloured
from grpo_launcher.errors import EXIT_GUARD, EXIT_LOST, EXIT_RESUME
from grpo_launcher.launch.hardware import GIB, cgroup
from grpo_launcher.launch.processes import descendants, first_term, start, start_undertaker, stop
from grpo_launcher.launch.stuck import Deadline, read_progress, vllm_load, write_stacks
from grpo_launcher.runs import END_REQUEST, PROGRESS, STOPPED, Run

UNHEALTHY_LIMIT = 180.0  # seconds without a healthy answer after which a server that was up counts as lost
GENERATION_LIMIT = 600.0  # seconds without a token after which a server that has requests counts as stuck
LOOK = 10.0  # seconds between two looks at a server that is up
# In a traceback: Python and torch on a GPU (OutOfMemoryError), torch on a CPU, C++
OUT_OF_MEMORY = re.compile(r"MemoryError|(can't|[Uu]nable to|Cannot) allocate memory|bad_alloc")
NOISE = re.compile(r"destroy_process_group|torch/distributed/elastic/multiprocessing")  # behind any failure of a rank
# In an exception: another process, or the connection to it, has gone
LOST = re.compile(
    r"Dist(Backend|Network|Store)Error|AcceleratorError|NCCL|gloo|the vLLM server was lost|Max retries exceeded"
    r"|Request failed: 5\d\d"
)
FULL = 2**26  # bytes that are free on a disk where a write has just failed, or fewer
SILENCE = 10.0  # seconds without a line until the console says what goes on; six times as long in a file


def supervise(run: Run, server_url: str | None, server_timeout: float) -> int:
    """Start the run's commands, watch them, and end both when one ends.

    The trainer's output goes to the console and train.log, its errors to train.log, the server's output to server.log.

    Args:
        run: with commands["trainer"] and, where the launcher starts a server, commands["server"].
        server_url: address of that server, or None.
        server_timeout: seconds that it may take to come up.

    Returns:
        The trainer's exit status; EXIT_GUARD where a guard stopped it; EXIT_RESUME where TERM did, behind a
        checkpoint; EXIT_LOST where a process of the run was lost or nothing went on, so that another start may help.
    """
    folder = Path(run.values["output_dir"])  # of the main rank, which may be on another node
    memory = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
    shared = tempfile.TemporaryDirectory(prefix="grpo-weights-", dir=memory, ignore_cleanup_errors=True)
    witness, screen = Witness(run), Screen(folder, server_url)
    if run.folder == folder:
        for name in (STOPPED, PROGRESS):  # of the run that is resumed
            (folder / name).unlink(missing_ok=True)
    undertaker, children = start_undertaker(shared.name), {}

    def start_child(name: str, **streams) -> subprocess.Popen:
        command = run.commands[name]
        env = command["env"] | ({"GRPO_SHARED_MEMORY": shared.name} if name == "trainer" else {})
        children[name] = start(command["argv"], env, undertaker, **streams)
        return children[name]

    with (
        shared,
        open(run.folder / "train.log", "ab") as train_log,
        open(run.folder / "server.log", "ab") as server_log,
        first_term(lambda: not run.values.get("save_only_model") and screen.ask_to_end()),
    ):
        try:
            server = None
            if "server" in run.commands:
                begin = functools.partial(start_child, "server", stdout=server_log, stderr=subprocess.STDOUT)
                server = Server(begin, server_url, server_timeout, run.values["max_server_restarts"], witness, screen)
            trainer = start_child("trainer", stdout=subprocess.PIPE, stderr=train_log)
            echo = threading.Thread(target=_echo, args=(trainer.stdout, train_log, screen), daemon=True)
            echo.start()
            status = _watch(screen, trainer, server, Deadline(run))
            if status is None:
                return EXIT_LOST if server is None or server.was_up else 1  # one that never came up never will
            echo.join(5)
            if (folder / STOPPED).exists():
                return EXIT_GUARD
            if status:
                message, is_lost = witness.failed(status)
                screen.fail(message)
                return EXIT_LOST if is_lost else status
            elif screen.was_asked and not (folder / END_REQUEST).exists():
                screen.fail("Stopped by TERM, with a checkpoint of the last step. To go on from it: add --resume.")
                return EXIT_RESUME
            return status
        finally:
            witness.is_over.set()
            screen.write("")
            for name in ("trainer", "server"):
                if name in children:
                    stop(children[name])
            undertaker.kill()
            undertaker.communicate()


class Server:
    """The vLLM server of a run. Where it is lost it is started again: ranks that send weights as files wait for it.

    Args:
        begin: starts its process.
        url: its address.
        timeout: seconds that it may take to come up.
        restarts: how many times it may be started again.
        witness: of the run.
        screen: the console.
    """

    def __init__(self, begin: Callable, url: str, timeout: float, restarts: int, witness: "Witness", screen: "Screen"):
        self.begin, self.url, self.timeout, self.restarts = begin, url, timeout, restarts
        self.witness, self.screen = witness, screen
        self.was_up = False  # ever: one that never came up would not the next time
        self._start()

    def _start(self) -> None:
        self.process, self.is_up, self.last_check = self.begin(), False, 0.0
        self.requests, self.tokens = 0, None  # as vllm_load() tells them
        self.started = self.last_healthy = self.last_token = self.last_message = time.monotonic()

    def is_lost(self) -> bool:
        """Look after it. Returns whether the run must end because it is lost."""
        message = self._trouble()
        if message is None:
            return False
        if self.process.poll() is None:
            message += f"\n{write_stacks(self.witness.folder, self.process.pid)}"
        if not self.restarts or not self.was_up:
            self.screen.fail(message)
            return True
        self.restarts -= 1
        stop(self.process)
        left = f"{self.restarts} times more if need be" if self.restarts else "for the last time"
        self.screen.show(f"{message}\nThe vLLM server is started again, and the ranks wait for it ({left}).\n")
        self.witness.forget_server()
        self._start()
        return False

    def _trouble(self) -> str | None:
        """Return what is wrong with it, or None. Says when it is up, and what it does until then."""
        now = time.monotonic()
        if (status := self.process.poll()) is not None:
            if status < 0:
                return self.witness.killed("The vLLM server", -status, self.process.pid, "server.log")
            return self._describe(f"ended with exit status {status}")
        if now - self.last_check > (LOOK if self.is_up else 1):
            self.last_check = now
            if _is_healthy(self.url):
                self.last_healthy = time.monotonic()
                if not self.is_up:
                    self.is_up = self.was_up = True
                    self.screen.show(f"The vLLM server is up after {self.last_healthy - self.started:.0f} s.\n")
            if self.is_up:
                before = self.tokens
                self.requests, self.tokens = vllm_load(self.url)
                if self.tokens != before or not self.requests:
                    self.last_token = time.monotonic()
        if not self.is_up and now - self.last_message > 15:
            self.last_message = now
            last_line = _last_line(self.witness.log("server.log"))
            self.screen.show(f"Waiting for the vLLM server ({now - self.started:.0f} s){last_line}\n")
        if now - self.last_healthy > (UNHEALTHY_LIMIT if self.is_up else self.timeout):
            return self._describe(f"gave no healthy answer for {now - self.last_healthy:.0f} s")
        wait = now - self.last_token
        if self.is_up and wait >= GENERATION_LIMIT:
            return self._describe(f"has made no token for {wait:.0f} s, and {self.requests} completions wait for it")
        return None

    def _describe(self, what: str) -> str:
        return self.witness.with_traceback(f"The vLLM server {what}.{self.witness.out_of_memory()}", "server.log")


class Witness:
    """What is known of a run's processes when one of them ends: their logs, their memory, and the kernel's kills."""

    def __init__(self, run: Run):
        self.folder, self.remedy = run.folder, f"{run.memory_plan} Fix: {run.lighter}."
        logs = (run.folder / name for name in ("train.log", "server.log"))
        self.starts = {log.name: log.stat().st_size if log.exists() else 0 for log in logs}  # of a run that is resumed
        self.kills = memory_kills()
        self.peaks = {}  # process id -> GiB, while it lives
        self.read, self.first_anomaly = dict(self.starts), None  # name of the log that has shown the first traceback
        self.is_over = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def _watch(self) -> None:
        while not self.is_over.wait(1):
            self._read_logs()
            for pid in descendants():
                with suppress(OSError):
                    if match := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
                        self.peaks[pid] = int(match[1]) * 1024 / GIB

    def _read_logs(self) -> None:
        """Look for a traceback in what was written since the last look. The server's may cause the trainer's."""
        for name in ("server.log", "train.log"):
            with open(self.folder / name, "rb") as file:
                file.seek(self.read[name])
                lines = file.read().rpartition(b"\n")[0]
            self.read[name] += len(lines)
            if b"Traceback (most recent call last)" in lines:
                self.first_anomaly = self.first_anomaly or name

    def forget_server(self) -> None:
        """Read the server's log from here on, as it is started again."""
        self.starts["server.log"] = self.read["server.log"] = (self.folder / "server.log").stat().st_size
        self.first_anomaly, self.kills = None, memory_kills()

    def log(self, name: str) -> str:
        """Return what this launch has added to a log."""
        with open(self.folder / name, "rb") as file:
            file.seek(self.starts[name])
            return file.read().decode(errors="replace")

    def failed(self, status: int) -> tuple[str, bool]:
        """Say why the trainer failed: the signal that ended a rank first, or else the first traceback.

        Returns:
            The message, and whether the cause lies outside the recipe and the user's code.
        """
        # torchrun's report, whose own traceback says less
        log = self.log("train.log")
        report = re.search(r"failed \(exitcode: -(\d+)\) local_rank: (\d+) \(pid: (\d+)\)", log)
        if report:
            return self.killed(f"Rank {report[2]}", int(report[1]), int(report[3]), "train.log"), True
        memory, traceback = self.out_of_memory(), first_traceback(log)
        if not memory and OUT_OF_MEMORY.search(traceback):
            memory = f" The memory had run out.{self.remedy}"
        disk = ""
        if shutil.disk_usage(self.folder).free < FULL:
            disk = f" The disk of {self.folder} is full. Fix: free some of it, or save_total_limit: 2."
        message = f"The trainer failed (exit status {status}).{memory}{disk}"
        self.is_over.set()
        self.watcher.join()
        self._read_logs()
        if self.first_anomaly == "server.log":
            before = self.with_traceback("The vLLM server had failed before it.", "server.log")
            message = f"{before}\n\n{message}"
        exception = re.sub(r"(?m)^(\[rank\d+\]: )?\s.*", "", traceback)
        return self.with_traceback(message, "train.log"), bool(LOST.search(exception))

    def killed(self, who: str, number: int, pid: int, log: str) -> str:
        """Say which signal ended a process, and for KILL whether the memory had run out."""
        held = f" It held up to {self.peaks[pid]:.1f} GiB." if pid in self.peaks else ""
        message = f"{who} was ended by signal {number} ({signal.Signals(number).name}).{held}"
        if number != signal.SIGKILL:
            return self.with_traceback(message, log)
        message += self.out_of_memory() or " The memory had not run out: another program, or a person, sent it."
        return f"{message} All of it: {self.folder / log}"

    def out_of_memory(self) -> str:
        """Return what to say where the kernel has ended a process: a rank, the server, or one that these started."""
        if memory_kills() == self.kills:
            return ""
        return f" The memory had run out, and the kernel ended a process.{self.remedy}"

    def with_traceback(self, message: str, log: str) -> str:
        """Return a message with a log's name and first traceback."""
        return f"{message} All of it: {self.folder / log}\n{first_traceback(self.log(log))}"


def memory_kills() -> int:
    """Return how many processes the kernel has ended because memory ran out, in this control group or this machine."""
    texts = [*cgroup("memory", "memory.events", "memory.oom_control"), Path("/proc/vmstat").read_text()]
    return sum(int(count) for text in texts for count in re.findall(r"^oom_kill (\d+)", text, re.MULTILINE))


class Screen:
    """The console: the trainer's lines, and what it is doing where none has come for a while.

    On a terminal that is one line, which is written anew each second.
    """

    def __init__(self, folder: Path, server_url: str | None = None):
        self.folder, self.server_url = folder, server_url
        self.was_asked = self.has_told = False  # to end, and the user that it was
        self.is_terminal = sys.stdout.isatty()
        self.lock = threading.Lock()
        self.last = self.since = time.monotonic()
        self.progress = ("", 0.0)
        self.has_status = False

    def write(self, text: str, status: str = "") -> None:
        """Print lines in place of the status line, and a new status line. A console that is gone ends no run."""
        with self.lock, suppress(OSError, ValueError):
            clear = "\r\033[K" if self.has_status or status else ""
            self.has_status = bool(status)
            print(f"{clear}{coloured(text, sys.stdout)}{status}", end="", flush=True)

    def show(self, text: str) -> None:
        """Print lines of the run: the silence is over."""
        self.last = time.monotonic()
        self.write(text)

    def fail(self, message: str) -> None:
        """Print why a run ends."""
        self.write("")
        print(f"\n{message}", file=sys.stderr)

    def ask_to_end(self) -> bool:
        """Ask the trainer for a checkpoint and its end. Returns whether it trains: else there is nothing to save.

        A signal calls it, at any moment: it must not wait for the lock.
        """
        is_training = read_progress(self.folder)[0].startswith("step ")
        if is_training:
            self.was_asked = True
            (self.folder / END_REQUEST).touch()
        return is_training

    def tell(self) -> None:
        """Say what the trainer is doing, where that is due."""
        if self.was_asked and not self.has_told:
            self.has_told = True
            self.show("TERM: this step ends with a checkpoint, and the run with it. A second TERM ends it at once.\n")
        silence = time.monotonic() - self.last
        progress = read_progress(self.folder)
        if progress != self.progress:
            self.progress, self.since = progress, time.monotonic()
        work = progress[0]
        if silence < (SILENCE if self.is_terminal else 6 * SILENCE) or not work:
            return
        seconds = time.monotonic() - self.since
        if "generating" in work and self.server_url and (left := vllm_load(self.server_url)[0]):
            work += f", {left} of them left"
        text = f"  {work} ({seconds:.0f} s)"
        if self.is_terminal:
            self.write("", status=text)
        else:
            self.show(f"{text}\n")


def _echo(pipe, log, screen: Screen) -> None:
    for line in pipe:  # to its end, whatever becomes of log and console: a full pipe would stop the trainer
        with suppress(OSError, ValueError):
            log.write(line)
            log.flush()
        screen.show(line.decode(errors="replace"))


def _watch(screen: Screen, trainer: subprocess.Popen, server: Server | None, deadline: Deadline) -> int | None:
    """Wait for the trainer's end. Returns its exit status, or None where the server was lost or nothing went on."""
    last_told = time.monotonic()
    while (status := trainer.poll()) is None:
        time.sleep(0.2)
        if time.monotonic() - last_told > 1:
            last_told = time.monotonic()
            screen.tell()
            if trouble := deadline.trouble(server):
                screen.fail(f"{trouble}\n{write_stacks(screen.folder, server and server.process.pid)}")
                return None
        if server and server.is_lost():
            return None
    return status


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, http.client.HTTPException):
        return False


def _last_line(log: str) -> str:
    """Return ": " and the last thing that a server tells in its log; empty where it has told nothing."""
    told = re.findall(r"(?m) INFO [\d: -]+\[\S+\] (.*)", log)
    return f": {told[-1][:120]}" if told else ""


def first_traceback(log: str) -> str:
    """Return the first Python traceback near a log's end, or its last lines where there is none."""
    lines = log.splitlines()[-1000:]
    starts = ("Traceback (most recent call last)", "Fatal Python error")
    first = next((i for i, line in enumerate(lines) if any(start in line for start in starts)), None)
    if first is None:
        return "\n".join(lines[-25:])
    rest = (i for i in range(first + 1, len(lines)) if not re.match(r"\s|$", re.sub(r"^\[rank\d+\]: ", "", lines[i])))
    end = next(rest, len(lines))  # the line of the exception itself, which must not be cut off
    noise = (i for i in range(end, min(end + 5, len(lines))) if NOISE.search(lines[i]))
    return "\n".join(lines[max(first, end - 40) : next(noise, end + 5)])
