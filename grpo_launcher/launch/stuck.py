"""A run that does nothing any more: how that is found out, and what each of its processes was doing."""

import http.client
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from grpo_launcher.launch.processes import descendants
from grpo_launcher.runs import PROGRESS, Run

STACKS = "stacks.txt"
SHARE = 0.9  # of ddp_timeout, after which torch ends a rank that waits, and nothing can be asked any more
ALONE = 4  # times ddp_timeout, where no rank waits for another, or where vLLM in the ranks does not tell how far it is


def vllm_load(url: str) -> tuple[int, float | None]:
    """Return how many completions a vLLM server works on or will, and the tokens that it has made and read so far.

    (0, None) where it does not say.
    """
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=1) as answer:
            metrics = answer.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, None

    def total(*names: str) -> float:
        pattern = rf"^vllm:(?:{'|'.join(names)})\{{.*\}} (\S+)$"
        return sum(map(float, re.findall(pattern, metrics, re.MULTILINE)))

    requests = round(total("num_requests_running", "num_requests_waiting"))
    return requests, total("generation_tokens_total", "prompt_tokens_total")


def read_progress(folder: Path) -> tuple[str, float]:
    """Return what the trainer of a run is doing, and since when in seconds since the epoch; ("", 0) before it says so.

    The main rank writes it, which may be on another machine: a network's file system fails now and then.
    """
    try:
        return (folder / PROGRESS).read_text(encoding="utf-8"), (folder / PROGRESS).stat().st_mtime
    except OSError:
        return "", 0.0


class Deadline:
    """How long the trainer may show no sign of life.

    A sign of life is another line in progress.txt, or a token of the server.

    Args:
        run: nine tenths of its ddp_timeout are the limit where ranks wait for each other: what takes longer in one of
            them ends the others anyway. Where none waits it is ALONE times ddp_timeout.
    """

    def __init__(self, run: Run):
        has_server = "server" in run.commands or run.layout["server_url"]
        self.limit = run.values["ddp_timeout"] * (SHARE if has_server and run.layout["ranks"] > 1 else ALONE)
        if run.layout["server_url"]:  # which the ranks wait for themselves
            self.limit += run.values["vllm_server_timeout"]
        self.folder, self.signs, self.since = Path(run.values["output_dir"]), None, time.monotonic()

    def trouble(self, server) -> str | None:
        """Return what has taken too long, or None.

        Args:
            server: a supervise.Server, or None. While it starts its own deadline holds.
        """
        work, changed = read_progress(self.folder)
        signs, now = (changed, server and server.tokens), time.monotonic()
        has_own_deadline = (server and not server.is_up) or "pushing" in work  # a start, and the Hub's client
        if signs != self.signs or has_own_deadline:
            self.signs, self.since = signs, now
        if now - self.since < self.limit:
            return None
        fix = "If it only needs longer, raise ddp_timeout."
        return f"Nothing has happened for {now - self.since:.0f} s in: {work or 'start'}. {fix}"


def write_stacks(folder: Path, server: int | None) -> str:
    """Write what every process of the run is doing to stacks.txt.

    Args:
        folder: of the run.
        server: process id of the vLLM server, or None.

    Returns:
        A line for each: the rank or the server, whether it is stopped, and the innermost call of its main thread.
    """
    lines, dumps = [f"The stacks of all processes: {folder / STACKS}"], []
    for pid, who in _members(server):
        try:
            state = re.search(r"State:\s+\S+ \((.*)\)", Path(f"/proc/{pid}/status").read_text())[1]
        except OSError:  # it has just ended
            continue
        stack = _dump(pid)
        main = re.search(rf'^Thread (?:{pid} .*|.*"MainThread")\n +(.*)', stack, re.MULTILINE)
        doing = main[1] if main else (stack.splitlines() or ["no stack"])[-1]
        doing = "it is stopped (SIGSTOP, or a debugger)" if state in ("stopped", "tracing stop") else f"in {doing}"
        lines.append(f"  {who}, process {pid}: {doing}")
        dumps.append(f"{who}, process {pid}, {state}\n{stack}\n")
    with open(folder / STACKS, "a", encoding="utf-8") as file:
        file.write("\n".join([f"== {time.strftime('%Y-%m-%d %H:%M:%S')}", *dumps]))
    return "\n".join(lines)


def _members(server: int | None) -> list[tuple[int, str]]:
    """Return the ranks and the processes of the server as (process id, name)."""
    found = {}
    for pid in descendants():
        with suppress(OSError):  # it has just ended
            parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
            if pid == server or found.get(parent) == "the vLLM server":
                found[pid] = "the vLLM server"
                continue
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            is_of_rank = found.get(parent, "").startswith("rank")  # it has inherited the environment
            if rank and not is_of_rank:
                found[pid] = f"rank {rank[1].decode()}"
    return sorted(found.items(), key=lambda item: item[1])


def _dump(pid: int) -> str:
    """Return the stacks of a process as py-spy tells them, or why it does not."""
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    return done.stdout or done.stderr
