"""Supervise a run: server and trainer start together, are watched, and stop together."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from grpo_launcher.errors import EXIT_GUARD
from grpo_launcher.launch.hardware import GIB, cgroup
from grpo_launcher.launch.processes import descendants, start, start_undertaker, stop
from grpo_launcher.runs import PROGRESS, STOPPED, Run

UNHEALTHY_LIMIT = 180.0  # seconds without a healthy answer after which a server that was up counts as lost
EXIT_SERVER_LOST = 1
# In a traceback: Python and torch on a GPU (OutOfMemoryError), torch on a CPU, C++
OUT_OF_MEMORY = re.compile(r"MemoryError|(can't|[Uu]nable to|Cannot) allocate memory|bad_alloc")
SILENCE = 10.0  # seconds without a line until the console says what goes on; six times as long in a file


def supervise(run: Run, server_url: str | None, server_timeout: float) -> int:
    """Start the run's commands, watch them, and end both when one ends.

    The trainer's output goes to the console and train.log, its errors to train.log, the server's output to server.log.

    Args:
        run: with commands["trainer"] and, where the launcher starts a server, commands["server"].
        server_url: address of that server, or None.
        server_timeout: seconds that it may take to come up.

    Returns:
        The trainer's exit status; EXIT_GUARD where a guard stopped it; EXIT_SERVER_LOST.
    """
    (run.folder / STOPPED).unlink(missing_ok=True)  # of the run that is resumed
    memory = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
    shared = tempfile.TemporaryDirectory(prefix="grpo-weights-", dir=memory, ignore_cleanup_errors=True)
    children, undertaker, server = [], None, None
    witness, screen = Witness(run), Screen(run.folder, server_url)
    (run.folder / PROGRESS).unlink(missing_ok=True)
    with (
        shared,
        open(run.folder / "train.log", "ab") as train_log,
        open(run.folder / "server.log", "ab") as server_log,
    ):
        try:
            if "server" in run.commands:
                command = run.commands["server"]
                server = start(command["argv"], command["env"], stdout=server_log, stderr=subprocess.STDOUT)
                children.append(server)
            command = run.commands["trainer"]
            env = command["env"] | {"GRPO_SHARED_MEMORY": shared.name}
            trainer = start(command["argv"], env, stdout=subprocess.PIPE, stderr=train_log)
            children.insert(0, trainer)
            undertaker = start_undertaker(children, shared.name)
            echo = threading.Thread(target=_echo, args=(trainer.stdout, train_log, screen), daemon=True)
            echo.start()
            status = _watch(witness, screen, trainer, server, server_url, server_timeout)
            if status is None:
                return EXIT_SERVER_LOST
            echo.join(5)
            if (run.folder / STOPPED).exists():
                return EXIT_GUARD
            if status:
                screen.fail(witness.failed(status))
            return status
        finally:
            witness.is_over.set()
            screen.write("")
            for child in children:
                stop(child)
            if undertaker:
                undertaker.kill()
                undertaker.communicate()


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

    def log(self, name: str) -> str:
        """Return what this launch has added to a log."""
        with open(self.folder / name, "rb") as file:
            file.seek(self.starts[name])
            return file.read().decode(errors="replace")

    def failed(self, status: int) -> str:
        """Say why the trainer failed: the signal that ended a rank first, or else the first traceback."""
        # torchrun's report, whose own traceback says less
        log = self.log("train.log")
        report = re.search(r"failed \(exitcode: -(\d+)\) local_rank: (\d+) \(pid: (\d+)\)", log)
        if report:
            return self.killed(f"Rank {report[2]}", int(report[1]), int(report[3]), "train.log")
        memory = self.out_of_memory()
        if not memory and OUT_OF_MEMORY.search(first_traceback(log)):
            memory = f" The memory had run out.{self.remedy}"
        message = f"The trainer failed (exit status {status}).{memory}"
        self.is_over.set()
        self.watcher.join()
        self._read_logs()
        if self.first_anomaly == "server.log":
            before = self.with_traceback("The vLLM server had failed before it.", "server.log")
            message = f"{before}\n\n{message}"
        return self.with_traceback(message, "train.log")

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
        self.progress, self.server_url = folder / PROGRESS, server_url
        self.is_terminal = sys.stdout.isatty()
        self.lock = threading.Lock()
        self.last = time.monotonic()
        self.has_status = False

    def write(self, text: str, status: str = "") -> None:
        """Print lines in place of the status line, and a new status line. A console that is gone ends no run."""
        with self.lock, suppress(OSError, ValueError):
            clear = "\r\033[K" if self.has_status or status else ""
            self.has_status = bool(status)
            print(f"{clear}{text}{status}", end="", flush=True)

    def show(self, text: str) -> None:
        """Print lines of the run: the silence is over."""
        self.last = time.monotonic()
        self.write(text)

    def fail(self, message: str) -> None:
        """Print why a run ends."""
        self.write("")
        print(f"\n{message}", file=sys.stderr)

    def tell(self) -> None:
        """Say what the trainer is doing, where that is due."""
        silence = time.monotonic() - self.last
        if silence < (SILENCE if self.is_terminal else 6 * SILENCE) or not self.progress.exists():
            return
        seconds = time.time() - self.progress.stat().st_mtime
        work = self.progress.read_text(encoding="utf-8")
        if "generating" in work and self.server_url and (left := _completions_left(self.server_url)):
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


def _watch(
    witness: Witness,
    screen: Screen,
    trainer: subprocess.Popen,
    server: subprocess.Popen | None,
    url: str | None,
    timeout: float,
) -> int | None:
    """Wait for the trainer's end. Returns its exit status, or None where the server was lost first."""
    started = last_healthy = last_message = last_told = time.monotonic()
    last_check, is_up = 0.0, server is None
    while (status := trainer.poll()) is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now - last_told > 1:
            last_told = now
            screen.tell()
        if server is None:
            continue
        if server.poll() is not None:
            return _report_lost_server(witness, screen, f"ended with exit status {server.returncode}", server)
        if now - last_check > (10 if is_up else 1):
            last_check = now
            if _is_healthy(url):
                last_healthy = time.monotonic()
                if not is_up:
                    is_up = True
                    screen.show(f"The vLLM server is up after {last_healthy - started:.0f} s.\n")
        if not is_up and now - last_message > 15:
            last_message = now
            last_line = _last_line(witness.folder / "server.log")
            screen.show(f"Waiting for the vLLM server ({now - started:.0f} s): {last_line}\n")
        if now - last_healthy > (UNHEALTHY_LIMIT if is_up else timeout):
            return _report_lost_server(witness, screen, f"gave no healthy answer for {now - last_healthy:.0f} s")
    return status


def _report_lost_server(witness: Witness, screen: Screen, what: str, ended: subprocess.Popen | None = None) -> None:
    if ended and ended.returncode < 0:
        message = witness.killed("The vLLM server", -ended.returncode, ended.pid, "server.log")
    else:
        message = witness.with_traceback(f"The vLLM server {what}.{witness.out_of_memory()}", "server.log")
    screen.fail(message)


def _completions_left(url: str) -> int:
    """Return how many completions a vLLM server works on or will; 0 where it does not say."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=1) as answer:
            metrics = answer.read().decode()
    except OSError:
        return 0
    counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.MULTILINE)
    return round(sum(map(float, counts)))


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _last_line(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").strip().rpartition("\n")[2].split())[:120] or "no output yet"


def first_traceback(log: str) -> str:
    """Return the first Python traceback near a log's end, or its last lines where there is none."""
    lines = log.splitlines()[-400:]
    starts = ("Traceback (most recent call last)", "Fatal Python error")
    first = next((i for i, line in enumerate(lines) if any(start in line for start in starts)), None)
    if first is None:
        return "\n".join(lines[-25:])
    rest = (i for i in range(first + 1, len(lines)) if not re.match(r"\s|$", re.sub(r"^\[rank\d+\]: ", "", lines[i])))
    end = next(rest, len(lines))  # the line of the exception itself, which must not be cut off
    return "\n".join(lines[max(first, end - 40) : end + 5])
