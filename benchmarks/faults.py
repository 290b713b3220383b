"""What happens when something fails: real runs on the CPU, and one fault after the other.

python benchmarks/faults.py [NAME ...] [--output FILE]

A row says how many seconds it took until the run had ended or went on, its exit status, the sentence that the console
shows, the processes and files in shared memory that were left, and whether all steps came once in the end. The exit
status is 1 where a row is not as it should be. Limits that are minutes are set to seconds. Half an hour on two cores.
Full and read-only folders, limited memory and several nodes need root. the_clock needs pip's libfaketime.
"""

import contextlib
import http.server
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas
from common import parser, show
from helpers import ROOT, Launch, environment_of, ip, on_machine, run_python, three_machines

from grpo_launcher.errors import EXIT_LOST, EXIT_REFUSED, EXIT_RESUME
from grpo_launcher.launch.hardware import free_ports
from grpo_launcher.runs import last_checkpoint

STEPS = 6
FLAGS = [str(ROOT / "configs/quickstart.yaml"), "--max_completion_length", "64", "--per_device_train_batch_size", "8"]
FLAGS += ["--sample_every", "0", "--max_steps", str(STEPS), "--save_steps", "2", "--ddp_timeout", "90"]
LAUNCHER = """
import sys
from grpo_launcher.launch import supervise
supervise.UNHEALTHY_LIMIT = 20
from grpo_launcher.launch.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
COMMAND = [sys.executable, "-P", "-c", LAUNCHER, *FLAGS]
REWARD = "def reward(completions, **kwargs):\n    DO\n    return [0.0] * len(completions)\n"


def launch(folder: Path, *flags: str) -> Launch:
    """Start the launcher with low limits."""
    return Launch(folder, command=[*COMMAND, *flags])


def until(run: Launch, text: str) -> None:
    """Wait until progress.txt of a run holds `text`."""
    deadline = time.monotonic() + 300
    while not any(text in path.read_text() for path in run.folder.glob("trainOutput/*/*/progress.txt")):
        if run.process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"no {text!r}:\n{run.tail()}")
        time.sleep(0.002)


def rank_of(run: Launch, rank: int):
    """Return the process of a rank."""
    for process in run.processes():
        if f"RANK={rank}" in environment_of(process) and any("train.py" in word for word in process.cmdline()):
            return process
    sys.exit(f"there is no rank {rank}:\n{run.tail()}")


def row(fault: str, run: Launch, seconds: float, status: int | None, sentence: str, steps: bool = False) -> dict:
    """Return a row of the table.

    Args:
        fault: what was done.
        run: after it ended, or goes on.
        seconds: since the fault.
        status: the exit status that is right; None where the run goes on.
        sentence: regular expression of what the console must show.
        steps: whether all steps must be there.
    """
    found = re.search(sentence, run.text())
    is_over = run.process.poll() is not None
    left = len(run.leftovers(patience=30)) if is_over else 0
    trained = [line["step"] for line in run.metrics()] if steps else []
    is_clean = bool(found) and left == 0 and run.process.poll() == status
    is_clean &= not steps or trained == list(range(1, STEPS + 1))
    if not is_clean:
        print(run.tail(), file=sys.stderr)
    return {
        "fault": fault,
        "s": round(seconds),
        "exit status": "goes on" if not is_over else run.process.returncode,
        "left": left,
        "all steps": "yes" if steps and is_clean else "" if not steps else "NO",
        "as it should be": "yes" if is_clean else "NO",
        "the console says": found[0][:110] if found else "NOTHING OF IT",
    }


def ended(fault: str, run: Launch, status: int, sentence: str, steps: bool = False) -> dict:
    """Wait for the end of a run and return its row. The seconds are those from now."""
    start = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(400)
    return row(fault, run, time.monotonic() - start, status, sentence, steps)


@contextlib.contextmanager
def small_folder(path: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory on a folder."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def a_server(folder: Path) -> Iterator[dict]:
    """One run, whose server is lost four times."""
    run = launch(folder, "--max_server_restarts", "4")
    again = "The vLLM server is started again"
    faults = {
        "server killed while it generates": ("step 2: generating", "kill", "ended by signal 9"),
        "server killed while the ranks train": ("step 3: training", "kill", "ended by signal 9"),
        "server killed while weights are sent": ("step 4: sending", "kill", "ended by signal 9"),
        "server stopped (SIGSTOP)": ("step 5: generating", "suspend", "gave no healthy answer"),
    }
    for number, (fault, (when, act, sentence)) in enumerate(faults.items(), 1):
        until(run, when)
        getattr(run.servers()[0], act)()
        start = time.monotonic()
        run.wait_for(f"step {number + 1}/{STEPS}")
        assert run.text().count(again) == number, run.tail()
        yield row(fault, run, time.monotonic() - start, None, f"The vLLM server (was )?{sentence}[^.]*")
    assert "the vLLM server, process" in (run.run_folder() / "stacks.txt").read_text()
    yield ended("  … and that run's end", run, 0, again, steps=True)


def a_server_that_never_comes(folder: Path) -> Iterator[dict]:
    run = launch(folder)
    run.wait_for("Waiting for the vLLM server")
    run.servers()[0].kill()
    yield ended("server killed before it is up", run, 1, r"The vLLM server was ended by signal 9[^.]*")
    run = launch(folder, "--vllm_server_timeout", "3")
    yield ended("server never healthy (from the start)", run, 1, r"gave no healthy answer for \d+ s")
    (port,) = free_ports(1)
    run = launch(folder, "--vllm_server_port", str(port))
    run.wait_for("Run: ")
    with socket.create_server(("127.0.0.1", port)):
        yield ended("port taken between plan and start", run, 1, "[Aa]ddress already in use")


def a_rank(folder: Path) -> Iterator[dict]:
    for fault, act, sentence in [
        ("rank killed, max_restarts: 1", "kill", r"Rank 1 was ended by signal 9 \(SIGKILL\)"),
        ("rank stopped (SIGSTOP), max_restarts: 1", "suspend", r"rank 1, process \d+: it is stopped"),
    ]:
        run = launch(folder, "--max_restarts", "1")
        until(run, "step 4: training")
        getattr(rank_of(run, 1), act)()
        start = time.monotonic()
        run.wait_for("The run is started again")
        yield row(fault, run, time.monotonic() - start, None, sentence)
        yield ended("  … and that run's end", run, 0, "from checkpoint-2", steps=True)


def memory(folder: Path) -> Iterator[dict]:
    run = launch(folder)
    until(run, "step 2: generating")
    group = Path("/sys/fs/cgroup/memory") / f"grpo-faults-{os.getpid()}"
    group.mkdir()
    rank = rank_of(run, 1)
    (group / "memory.limit_in_bytes").write_text(str(4 * 2**20))
    (group / "cgroup.procs").write_text(str(rank.pid))  # what it takes from now on counts
    sentence = r"Rank 1 was ended by signal 9[^\n]*The memory had run out"
    yield ended("a rank takes too much memory", run, EXIT_LOST, sentence)
    group.rmdir()


def the_launcher(folder: Path) -> Iterator[dict]:
    run = launch(folder)
    until(run, "step 5: training")
    run.process.kill()
    yield ended("launcher killed (KILL)", run, -signal.SIGKILL, "step 4/6")
    weights = run.run_folder() / "checkpoint-4/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    run = launch(folder, "--resume")
    yield ended("  … its newest checkpoint cut off, resumed", run, 0, r"checkpoint-4 is not whole[^\n]*", steps=True)
    run = launch(folder)
    until(run, "step 3: training")
    run.process.send_signal(signal.SIGHUP)
    yield ended("terminal closed (HUP)", run, 128 + signal.SIGHUP, "Stopped. No process is left")
    run = launch(folder, "--resume")
    yield ended("  … resumed", run, 0, "from checkpoint-2", steps=True)
    run = launch(folder)
    until(run, "step 3: training")
    run.process.send_signal(signal.SIGTERM)
    yield ended("TERM of a scheduler", run, EXIT_RESUME, "Stopped by TERM, with a checkpoint")
    run = launch(folder, "--resume")
    yield ended("  … resumed", run, 0, "from checkpoint-3", steps=True)
    run = launch(folder)
    until(run, "step 3: training")
    run.process.send_signal(signal.SIGINT)
    yield ended("Ctrl-C", run, 128 + signal.SIGINT, "Stopped. No process is left")


def disks(folder: Path) -> Iterator[dict]:
    output = folder / "small"
    with small_folder(output, "size=30m"):
        run = launch(folder, "--output_dir", "small/run", "--save_steps", "1")
        yield ended("disk full in a save", run, 1, r"The disk of \S+ is full[^\n]*")
        whole = last_checkpoint(output / "run", ranks=2)
        assert whole, list((output / "run").iterdir())
    with small_folder(output, "ro"):
        run = launch(folder, "--output_dir", "small/run")
        yield ended("output folder read-only", run, EXIT_REFUSED, r"error: output_dir: [^\n]*")
    run = launch(folder)
    with small_folder(run.shared_memory, "size=1m"):
        yield ended("/dev/shm full from the start", run, EXIT_REFUSED, r"error: weight_sync: [^\n]*")
    run = launch(folder)
    with small_folder(run.shared_memory, "size=1g"):
        until(run, "step 2: training")
        with tempfile.TemporaryFile(dir=run.shared_memory, buffering=0) as filler:
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(2**20))
            yield ended("/dev/shm full in the middle", run, 1, "No space left on device")


def rewards(folder: Path) -> Iterator[dict]:
    for fault, do, flags, status, sentence in [
        ("reward that fails", "raise KeyError('price')", [], 1, "KeyError: 'price'"),
        (
            "reward that hangs",
            "__import__('time').sleep(9999)",
            ["--reward_timeout", "2"],
            0,
            "reward took over 2 s and rates none",
        ),
    ]:
        (folder / "mine.py").write_text(REWARD.replace("DO", do))
        run = launch(folder, "--reward_funcs", "mine.py:reward", "--reward_kwargs", "{}", *flags)
        yield ended(fault, run, status, sentence)


class Judge(http.server.BaseHTTPRequestHandler):
    """A judge that rates everything 5, after `wait` seconds."""

    wait = 0.0

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.wait)
        answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "5"}, "finish_reason": "stop"}]}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "judge"} | answer).encode()
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args):
        """Print nothing."""


def a_judge(folder: Path) -> Iterator[dict]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    options = {"model": "judge", "base_url": f"http://127.0.0.1:{server.server_port}/v1", "timeout": 2, "retries": 0}
    flags = ["--reward_funcs", "rewards.judge.judge_reward", "rewards.length.length_reward"]
    flags += ["--reward_kwargs", json.dumps({"judge_reward": options, "length_reward": {"target": 200}})]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = launch(folder, *flags)
    run.wait_for(f"step 2/{STEPS}")
    Judge.wait = 5.0
    run.wait_for(f"step 4/{STEPS}")
    server.shutdown()
    server.server_close()
    yield ended("judge slow, then down", run, 0, r"judge_reward[^\n]*", steps=True)
    failed = [line["rewards/judge_reward/failed"] for line in run.metrics()]
    assert failed[0] == 0 and failed[-1] == 1, failed
    run = launch(folder, *flags)
    yield ended("judge down from the start", run, EXIT_REFUSED, r"judge_reward: [^\n]*")


def a_cable(folder: Path) -> Iterator[dict]:
    """Two nodes and a server: one of the three is cut off."""
    limits = ["--max_steps", str(STEPS), "--save_steps", "2", "--ddp_timeout", "90", "--vllm_server_timeout", "60"]
    sentence = "Nothing has happened for [^.]*"
    for fault, lost in (("network cut between the nodes", 1), ("network cut to the server", 2)):
        with three_machines() as machines:
            server = Launch(folder, command=on_machine(machines[2], *limits, "--serve"))
            output = ["--output_dir", f"cut-{lost}"]
            other, main = (
                Launch(folder, command=on_machine(machines[rank], *limits, *output, "--node_rank", str(rank)))
                for rank in (1, 0)
            )
            main.wait_for(f"step 3/{STEPS}")
            ip(f"-n {machines[lost]} link set eth0 down")
            yield ended(fault, main, EXIT_LOST, sentence)
            yield ended("  … the other node after that", other, EXIT_LOST, sentence)
            server.process.terminate()
            yield ended("  … the server, after TERM", server, 143, "Stopped")


def the_clock(folder: Path) -> Iterator[dict]:
    """The wall clock of all processes goes forward by two hours, and back again (pip's libfaketime)."""
    (library,) = Path(importlib.util.find_spec("libfaketime").origin).parent.rglob("libfaketime.so.1")
    clock = folder / "clock"
    clock.write_text("+0")
    fake = [f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={clock}", "FAKETIME_NO_CACHE=1"]
    run = Launch(folder, command=["env", *fake, "FAKETIME_DONT_FAKE_MONOTONIC=1", *COMMAND])
    until(run, "step 3: training")
    clock.write_text("+2h")
    until(run, "step 5: training")
    clock.write_text("-2h")
    yield ended("clock set forward and back by hours", run, 0, r"Saved trainOutput/\S*", steps=True)
    times = [line["time"] for line in run.metrics()]
    assert max(times) - min(times) > 2 * 3600, times


def prompts(run: Launch) -> list[list]:
    """Return the prompts of each step of a run."""
    files = sorted((run.run_folder() / "completions").glob("*.parquet"))
    return [pandas.read_parquet(file)["prompt"].map(str).tolist() for file in files]


def two_runs(folder: Path) -> Iterator[dict]:
    """Two at once, and one that is killed and resumed: each step must have the prompts of the others."""
    first = launch(folder)
    first.wait_for("Run: ")
    second = launch(folder)
    yield ended("two runs at once: the first", first, 0, r"Saved trainOutput/\S*")
    yield ended("  … the second", second, 0, r"Saved trainOutput/\S*")
    assert re.search("Run: (.*)", first.text())[1] != re.search("Run: (.*)", second.text())[1]
    whole = prompts(second)
    run = launch(folder)
    until(run, "step 4: training")
    run.process.kill()
    run.process.wait()
    run = launch(folder, "--resume")
    yield ended("launcher killed, resumed: the same prompts", run, 0, "from checkpoint-2", steps=True)
    assert len(whole) == STEPS and prompts(run) == whole, "the prompts differ"


PARTS: list[Callable[[Path], Iterator[dict]]] = [a_server, a_server_that_never_comes, a_rank, memory, the_launcher]
PARTS += [disks, rewards, a_judge, two_runs, a_cable, the_clock]
PARTS = {part.__name__: part for part in PARTS}


def main() -> None:
    """Print the table."""
    command = parser(__doc__)
    command.add_argument("parts", nargs="*", metavar="NAME", help=f"some of {', '.join(PARTS)} (default: all)")
    args = command.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        run_python("-m", "grpo_launcher.quickstart", "--output", home / "data", cwd=home)
        for part in args.parts or PARTS:
            folder = home / part
            folder.mkdir()
            (folder / "data").symlink_to(home / "data")
            for made in PARTS[part](folder):
                rows.append(made)
                print(made, flush=True)
    show(rows, args.output)
    sys.exit(any(made["as it should be"] != "yes" for made in rows))


if __name__ == "__main__":
    main()
