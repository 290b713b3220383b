"""Server and ranks start together and end together, whatever ends them. Stubs stand for both."""

import contextlib
import functools
import http.server
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT, Launch, write_checkpoint

from grpo_launcher.errors import EXIT_LOST, EXIT_RESUME
from grpo_launcher.launch import commands, processes, stuck
from grpo_launcher.launch import supervise as supervise_module
from grpo_launcher.launch.supervise import _last_line, first_traceback, supervise
from grpo_launcher.runs import Run

HEALTHY = """
import http.server
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(PORT)), Health).serve_forever()
"""
COUNTS = """
import http.server, itertools, time
tokens = itertools.count(step=STEP)
class Counts(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        for name, count in {"num_requests_running": REQUESTS, "generation_tokens_total": next(tokens)}.items():
            self.wfile.write(f'vllm:{name}{{engine="0"}} {count}\\n'.encode())
http.server.HTTPServer(("127.0.0.1", int(PORT)), Counts).serve_forever()
"""
IGNORE_TERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
STAY = "import time; time.sleep(300)"
FAIL = """
import sys
print("Traceback is a word")
def reward():
    raise RuntimeError("the judge is asleep")
try:
    reward()
except RuntimeError as error:
    raise ValueError("a later error") from error
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """A function that supervises stubs and returns the exit status. It asserts that nothing of them is left.

    trainer, server: Python code. PORT in the server's is the port at which its health is asked for.
    """
    monkeypatch.setattr(processes, "GRACE", 0.5)
    monkeypatch.setenv("GRPO_SHARED_MEMORY", str(tmp_path / "shm"))
    (tmp_path / "shm").mkdir()
    started = []
    monkeypatch.setattr(
        supervise_module, "start", lambda *a, **k: started.append(processes.start(*a, **k)) or started[-1]
    )

    def command(code: str) -> dict:
        return {"argv": [sys.executable, "-I", "-S", "-u", "-c", code], "env": {}}

    def start(trainer: str, server: str | None = None, timeout: float = 30, restarts: int = 0, ddp: int = 900) -> int:
        port = free_port()
        commands = {"trainer": command(trainer)}
        if server:
            commands["server"] = command(server.replace("PORT", str(port)))
        plan = {"plan": ["memory: 0.1 GiB", "context: 2"], "lighter": "--per_device_train_batch_size 4"}
        values = {"output_dir": str(tmp_path), "max_server_restarts": restarts, "ddp_timeout": ddp}
        layout = {"ranks": 2, "server_url": None}
        stub = Run(tmp_path, "stub", values, [], commands=commands, layout=layout, **plan)
        status = supervise(stub, f"http://127.0.0.1:{port}" if server else None, timeout)
        assert started and all(child.poll() is not None for child in started)
        assert list((tmp_path / "shm").iterdir()) == []
        started.clear()
        return status

    return start


def test_output_goes_to_console_and_log(run, tmp_path, capfd):
    """The trainer's errors go to the log alone, and the server's output to its own. Weights get an empty folder."""
    wait_for_server = (
        f"import os, sys, time\nwhile not os.path.getsize({str(tmp_path / 'server.log')!r}): time.sleep(0.01)"
    )
    show = "print(os.listdir(os.environ['GRPO_SHARED_MEMORY'])); print('a warning', file=sys.stderr)"
    assert run(f"{wait_for_server}\n{show}", "print('listening')\n" + STAY) == 0
    assert capfd.readouterr().out.splitlines() == ["[]"]
    assert sorted((tmp_path / "train.log").read_text().splitlines()) == ["[]", "a warning"]
    assert "listening" in (tmp_path / "server.log").read_text()


def test_the_console_says_what_goes_on_in_a_long_step(run, tmp_path, capfd, monkeypatch):
    """In a file or a pipe that is a line now and then."""
    monkeypatch.setattr(supervise_module, "SILENCE", 0.1)
    code = f"import time; open({str(tmp_path / 'progress.txt')!r}, 'w').write('step 3: scoring'); time.sleep(5)"
    assert run(f"{code}; print('step 3/9')") == 0
    *told, last = capfd.readouterr().out.splitlines()
    assert told and all(re.fullmatch(r"  step 3: scoring \(\d s\)", line) for line in told) and last == "step 3/9"


def test_on_a_terminal_that_is_one_line(tmp_path, capfd, monkeypatch):
    """It is written anew, and goes where a line of the trainer comes."""
    monkeypatch.setattr(supervise_module, "SILENCE", 0)
    screen = supervise_module.Screen(tmp_path)
    screen.is_terminal = True
    screen.tell()
    (tmp_path / "progress.txt").write_text("step 1: scoring")
    screen.tell()
    screen.tell()
    screen.show("step 1/9\n")
    out = re.sub(r"\d+ s", "N s", capfd.readouterr().out)
    assert out == 2 * "\r\033[K  step 1: scoring (N s)" + "\r\033[Kstep 1/9\n"


def test_the_console_counts_the_completions_that_are_left(tmp_path, capfd, monkeypatch):
    """A vLLM server tells. One that does not is left out."""
    monkeypatch.setattr(supervise_module, "SILENCE", 0)
    (tmp_path / "progress.txt").write_text("step 2: generating 8 completions")
    (tmp_path / "metrics").write_text(
        '# HELP vllm:num_requests_running\nvllm:num_requests_running{engine="0"} 2.0\n'
        'vllm:num_requests_waiting{engine="0"} 1.0\nvllm:num_requests_waiting_by_reason{engine="0"} 1.0\n'
    )
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        supervise_module.Screen(tmp_path, f"http://127.0.0.1:{server.server_port}").tell()
        server.shutdown()
    supervise_module.Screen(tmp_path, f"http://127.0.0.1:{free_port()}").tell()
    told, untold = capfd.readouterr().out.splitlines()
    assert "generating 8 completions, 3 of them left (" in told and "left" not in untold


def test_a_console_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    """As where the terminal was closed."""
    with open("/dev/full", "w") as console:
        monkeypatch.setattr(sys, "stdout", console)
        screen = supervise_module.Screen(tmp_path)
        screen.show("step 1/9\n")
        screen.write("", status="step 2: scoring")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            console.close()


def test_a_trainer_that_fails_ends_the_server_with_the_first_traceback(run, tmp_path, capfd):
    """Even a server that does not hear TERM."""
    assert run(FAIL, IGNORE_TERM + HEALTHY) == 1
    errors = capfd.readouterr().err
    assert "RuntimeError: the judge is asleep" in errors and str(tmp_path / "train.log") in errors
    assert "exit status 1" in errors


@pytest.mark.parametrize("is_memory", [False, True], ids=["by itself", "by the kernel"])
def test_a_server_that_ends_ends_the_trainer(is_memory, run, tmp_path, capfd, monkeypatch):
    """The kernel may end the server's engine alone, a process of its own, after which the server ends by itself."""
    counts = iter([3, 4 if is_memory else 3])
    monkeypatch.setattr(supervise_module, "memory_kills", lambda: next(counts))
    assert run(STAY, FAIL) == 1
    errors = capfd.readouterr().err
    assert ("The memory had run out" in errors) == ("per_device_train_batch_size" in errors) == is_memory
    assert "server ended with exit status 1" in errors and str(tmp_path / "server.log") in errors
    assert "RuntimeError: the judge is asleep" in errors


def test_a_server_that_never_is_healthy_ends_the_trainer(run, capfd):
    assert run(STAY, STAY, timeout=0.3) == 1
    assert "no healthy answer" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("healthy", "trainer_ends", "status", "end"),
    [
        (lambda now: False, 9999, None, 900),
        (lambda now: now > 800, 5000, 0, 5000),
        (lambda now: 30 < now < 100, 9999, None, 280),
        (lambda now: now > 30 and not 100 < now < 260, 5000, 0, 5000),
    ],
    ids=["never up", "up in time", "lost", "busy for a while"],
)
def test_how_long_a_server_may_be_silent(healthy, trainer_ends, status, end, monkeypatch, tmp_path):
    """900 s until it is up, as the recipe says here, and UNHEALTHY_LIMIT after that. By a clock of the test's own."""
    seconds = [0.0]
    clock = SimpleNamespace(monotonic=lambda: seconds[0], sleep=lambda time: seconds.append(seconds.pop() + time))
    monkeypatch.setattr(supervise_module, "time", clock)
    monkeypatch.setattr(supervise_module, "_is_healthy", lambda url: healthy(seconds[0]))
    monkeypatch.setattr(supervise_module, "vllm_load", lambda url: (0, None))
    (tmp_path / "server.log").touch()
    trainer = SimpleNamespace(poll=lambda: 0 if seconds[0] >= trainer_ends else None)
    texts = {"with_traceback": lambda message, log: message, "out_of_memory": lambda: "", "log": lambda name: ""}
    witness = SimpleNamespace(folder=tmp_path, **texts)
    screen = SimpleNamespace(tell=lambda: None, show=lambda text: None, fail=lambda text: None)
    process = SimpleNamespace(poll=lambda: None, pid=0)
    server = supervise_module.Server(lambda: process, "http://127.0.0.1:9", 900, 0, witness, screen)
    deadline = SimpleNamespace(trouble=lambda server: None)
    monkeypatch.setattr(supervise_module, "write_stacks", lambda folder, server: "")
    assert supervise_module._watch(screen, trainer, server, deadline) == status
    assert seconds[0] == pytest.approx(end, abs=11)


DIES = """
import http.server, pathlib, sys
starts = pathlib.Path("FOLDER/starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(PORT)), Health)
if len(starts.read_text()) <= DEATHS:
    server.handle_request()
    raise RuntimeError(f"death {starts.read_text()}")
server.serve_forever()
"""
WAITS = """
import os, time
while not os.path.exists("FOLDER/starts") or os.path.getsize("FOLDER/starts") <= DEATHS:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("deaths", "restarts", "starts"), [(1, 3, 2), (2, 2, 3), (9, 2, 3), (1, 0, 1)])
def test_a_server_that_was_up_is_started_again(deaths, restarts, starts, run, tmp_path, capfd):
    """As often as the recipe says, with the reason. After that the run ends."""
    codes = [code.replace("FOLDER", str(tmp_path)).replace("DEATHS", str(deaths)) for code in (WAITS, DIES)]
    is_enough = deaths <= restarts
    assert run(*codes, restarts=restarts) == (0 if is_enough else EXIT_LOST)
    assert (tmp_path / "starts").read_text() == "x" * starts
    out, errors = capfd.readouterr()
    assert out.count("The vLLM server is started again") == starts - 1
    assert all(f"RuntimeError: death {'x' * number}\n" in out for number in range(1, starts))
    assert (f"RuntimeError: death {'x' * starts}" in errors) != is_enough


def test_a_server_that_never_was_up_is_not_started_again(run, capfd):
    """It would fail again."""
    assert run(STAY, FAIL, restarts=3) == 1
    assert "started again" not in capfd.readouterr().out


OBEYS = """
import os, signal, time
open("FOLDER/progress.txt", "w").write("step 3: training")
os.kill(os.getppid(), signal.SIGTERM)
while not os.path.exists("FOLDER/save-and-end"):
    time.sleep(0.01)
if IS_OBEYED:
    os.unlink("FOLDER/save-and-end")
raise SystemExit(STATUS)
"""


@pytest.mark.parametrize(
    ("is_obeyed", "trainer", "status"),
    [(True, 0, EXIT_RESUME), (True, 1, 1), (False, 0, 0)],
    ids=["obeyed", "failed", "ended"],
)
def test_term_ends_a_run_with_a_checkpoint(is_obeyed, trainer, status, run, tmp_path, capfd):
    """Exit status 75 says that it can be resumed: not where the checkpoint failed, or the run had come to its end."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("the first TERM is not the launcher's"))
    code = OBEYS.replace("FOLDER", str(tmp_path)).replace("IS_OBEYED", str(is_obeyed)).replace("STATUS", str(trainer))
    try:
        assert run(code, HEALTHY) == status
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ("--resume" in capfd.readouterr().err) == (status == EXIT_RESUME)


KILLED = """
import os, signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "x = bytearray(2**28); import time; time.sleep(300)"])
time.sleep(3)
rank.kill()
status = rank.wait()
print(f"E0101 failed (exitcode: {status}) local_rank: 1 (pid: {rank.pid}) of binary: env", file=sys.stderr)
print("Traceback (most recent call last):\\n  torchrun's own\\nFailures:", file=sys.stderr)
sys.exit(1)
"""


@pytest.mark.parametrize("is_memory", [False, True], ids=["by somebody", "by the kernel"])
def test_a_rank_that_is_killed_is_named_with_the_reason(is_memory, run, tmp_path, capfd, monkeypatch):
    """In place of torchrun's own traceback, with what the rank held. An earlier start's report is not read again."""
    (tmp_path / "train.log").write_text("failed (exitcode: -9) local_rank: 7 (pid: 1) of binary: env\n")
    counts = iter([3, 4 if is_memory else 3])
    monkeypatch.setattr(supervise_module, "memory_kills", lambda: next(counts))
    assert run(KILLED) == EXIT_LOST
    errors = capfd.readouterr().err
    assert "Rank 1 was ended by signal 9 (SIGKILL). It held up to 0.3 GiB." in errors and "Traceback" not in errors
    assert ("The memory had run out" in errors) == ("per_device_train_batch_size" in errors) == is_memory
    assert ("The plan said memory: 0.1 GiB." in errors) == is_memory


RANK = """
import os, time
if os.environ.get("LOCAL_RANK", "0") == "LAST":
    os.kill(os.getpid(), 9)
time.sleep(300)
"""


@pytest.mark.parametrize(("parallel", "ranks", "who"), [("zero3", 2, "Rank 1"), ("ddp", 1, "Rank 0")])
def test_accelerate_tells_which_rank_was_killed(parallel, ranks, who, run, tmp_path, capfd):
    """The report is torchrun's own here, which accelerate starts for one rank too."""
    layout = SimpleNamespace(parallel=parallel, ranks=ranks, num_nodes=1, train_gpus=[])
    config = commands.accelerate_config({"bf16": False, "fp16": False}, layout, commands.Node())
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "grpo_launcher.ranks", "--config_file", f"{tmp_path}/accelerate.yaml"]
    words += ["--no_python", sys.executable, "-c", RANK.replace("LAST", str(ranks - 1))]
    assert run(f"import os; os.execv({sys.executable!r}, {words!r})") == EXIT_LOST
    assert f"{who} was ended by signal 9 (SIGKILL)." in capfd.readouterr().err


@pytest.fixture
def memory_group():
    """A control group of 300 MB, as a file that a process writes its id to. Skips where none can be made."""
    folder = Path("/sys/fs/cgroup/memory") / f"grpo-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(300 * 10**6))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield folder / "cgroup.procs"
    folder.rmdir()


GREEDY = """
import os, time
if os.environ["LOCAL_RANK"] == "1":
    open("GROUP", "w").write(str(os.getpid()))
    held = [b"x" * 10**7 for _ in range(100)]
time.sleep(300)
"""


def test_a_rank_that_takes_too_much_memory_is_named(memory_group, run, tmp_path, capfd):
    """The kernel really ends it, and torchrun really reports it."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    words += ["--no_python", sys.executable, "-c", GREEDY.replace("GROUP", str(memory_group))]
    assert run(f"import os; os.execv({sys.executable!r}, {words!r})") == EXIT_LOST
    errors = capfd.readouterr().err
    assert "Rank 1 was ended by signal 9 (SIGKILL)." in errors
    assert "The memory had run out" in errors and "The plan said memory: 0.1 GiB." in errors


def test_memory_that_is_refused_is_told_with_the_traceback(run, capfd):
    """Here by a limit of the shell, to torch."""
    code = f"ulimit -v 8000000; exec {sys.executable} -c 'import torch; torch.ones(4 * 10**9)'"
    assert run(f"import os; os.execv('/bin/bash', ['bash', '-c', {code!r}])") == 1
    errors = capfd.readouterr().err
    assert "The memory had run out. The plan said memory: 0.1 GiB." in errors and "you tried to allocate" in errors


STUCK = """
import os, signal, subprocess, sys, time
waits = "import time\\ndef wait_for_the_other(): print(flush=True); time.sleep(300)\\nwait_for_the_other()"
stops = "import os; print(flush=True); os.kill(os.getpid(), 19)"
for rank, code in enumerate([waits, stops]):
    environment = os.environ | {"RANK": str(rank)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    child.stdout.readline()
open("FOLDER/progress.txt", "w").write("step 3: training")
time.sleep(300)
"""


def test_a_rank_that_hangs_is_named(run, tmp_path, capfd):
    """Within nine tenths of ddp_timeout. py-spy reads the stacks, of a process that is stopped too."""
    assert run(STUCK.replace("FOLDER", str(tmp_path)), HEALTHY, ddp=8) == EXIT_LOST
    errors = capfd.readouterr().err
    assert "step 3: training" in errors and "ddp_timeout" in errors
    rank_0, rank_1 = re.findall("^  rank (.*)", errors, re.MULTILINE)
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "the vLLM server, process" in errors and "stopped (SIGSTOP" in rank_1
    if "ermission" in stacks:
        pytest.skip("py-spy may not look into other processes here")
    assert "wait_for_the_other" in rank_0 and "wait_for_the_other" in stacks


def test_signs_of_life_put_the_deadline_off(tmp_path, monkeypatch):
    """Another line in progress.txt, or a token. A server's start and a push to the Hub have deadlines of their own.

    By a clock of the test's own: 90 s are the limit.
    """
    seconds = [0.0]
    monkeypatch.setattr(stuck, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    server = SimpleNamespace(is_up=True, tokens=1.0)
    values = {"output_dir": str(tmp_path), "ddp_timeout": 100, "vllm_server_timeout": 50}
    layout, beside = {"ranks": 2, "server_url": None}, {"commands": {"server": None}}
    deadline = stuck.Deadline(Run(tmp_path, "", values, [], layout=layout, **beside))
    progress = tmp_path / "progress.txt"

    def trouble_after(wait: float) -> bool:
        seconds[0] += wait
        return deadline.trouble(server) is not None

    assert not trouble_after(50)
    progress.write_text("step 1: training")
    os.utime(progress, ns=(1, 1))
    assert not trouble_after(89)
    server.tokens += 1
    assert not trouble_after(89)
    os.utime(progress, ns=(2, 2))
    assert not trouble_after(89) and not trouble_after(89) and trouble_after(2)
    server.is_up = False
    assert not trouble_after(500)
    server.is_up = True
    assert not trouble_after(89) and trouble_after(2)
    progress.write_text("saving and pushing the final checkpoint")
    assert not trouble_after(500) and not trouble_after(500)
    alone = stuck.Deadline(Run(tmp_path, "", values, [], layout=layout | {"ranks": 1}, **beside))
    another = stuck.Deadline(Run(tmp_path, "", values, [], layout=layout | {"server_url": "http://there"}))
    colocated = stuck.Deadline(Run(tmp_path, "", values, [], layout=layout))
    assert (alone.limit, another.limit, colocated.limit) == (400, 140, 400)


def test_a_server_that_is_stopped_is_lost(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(supervise_module, "UNHEALTHY_LIMIT", 1)
    monkeypatch.setattr(supervise_module, "LOOK", 0.1)
    answers = "        self.end_headers()\n"
    stops = "import os\n" + HEALTHY.replace(answers, f"{answers}        os.kill(os.getpid(), 19)\n")
    assert run(STAY, stops) == EXIT_LOST
    errors = capfd.readouterr().err
    assert "gave no healthy answer" in errors and re.search("the vLLM server, process .*stopped", errors)
    assert "the vLLM server" in (tmp_path / "stacks.txt").read_text()


@pytest.mark.parametrize(("step", "requests"), [(0, 2), (1, 2), (0, 0)], ids=["hangs", "generates", "idles"])
def test_a_server_is_judged_by_its_tokens(step, requests, run, capfd, monkeypatch):
    """One that answers and makes none is lost, unless nothing is asked of it."""
    monkeypatch.setattr(supervise_module, "GENERATION_LIMIT", 3)
    monkeypatch.setattr(supervise_module, "LOOK", 0.1)
    server = COUNTS.replace("STEP", str(step)).replace("REQUESTS", str(requests))
    is_stuck = (step, requests) == (0, 2)
    assert run(STAY if is_stuck else "import time; time.sleep(6)", server) == (EXIT_LOST if is_stuck else 0)
    assert ("has made no token" in capfd.readouterr().err) == is_stuck


@pytest.mark.parametrize("free", [2**20, 2**40])
def test_a_full_disk_is_named(free, run, tmp_path, capfd, monkeypatch):
    """Then torch may say `iostream error` alone."""
    monkeypatch.setattr(supervise_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert run("raise RuntimeError('iostream error')") == 1
    errors = capfd.readouterr().err
    assert (f"The disk of {tmp_path} is full." in errors) == (free == 2**20) and "iostream error" in errors


SERVER_FAILS = """
import sys, threading, time
time.sleep(WAIT)
print("(Worker) Traceback (most recent call last)\\n  File 1\\nValueError: no such adapter", file=sys.stderr)
time.sleep(300)
"""


@pytest.mark.parametrize("is_first", [True, False])
def test_what_failed_first_is_told_first(is_first, run, capfd):
    """A server that answers with an error and goes on is the cause, where its traceback came before the trainer's."""
    waits = (0, 2.5) if is_first else (300, 0)
    trainer = f"import time; time.sleep({waits[1]}); raise OSError('500 Server Error')"
    assert run(trainer, SERVER_FAILS.replace("WAIT", str(waits[0]))) == 1
    errors = capfd.readouterr().err
    assert ("The vLLM server had failed before it." in errors) == is_first and "500 Server Error" in errors
    assert not is_first or errors.index("no such adapter") < errors.index("500 Server Error")


def test_a_server_that_is_killed_is_named(run, capfd):
    """A signal that Python reports itself comes with its traceback."""
    assert run(STAY, "import os; os.kill(os.getpid(), 9)") == 1
    assert "The vLLM server was ended by signal 9 (SIGKILL)." in capfd.readouterr().err
    abort = "import os, faulthandler; faulthandler.enable(); os.abort()"
    assert run(STAY, abort) == 1
    errors = capfd.readouterr().err
    assert "signal 6 (SIGABRT)" in errors and "Fatal Python error: Aborted" in errors


def test_memory_kills_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(supervise_module, "cgroup", lambda *names: ["oom 9\noom_kill 2\noom_group_kill 5"])
    assert supervise_module.memory_kills() >= 2


def test_the_stop_of_a_guard_has_its_own_status(run, tmp_path, capfd):
    """Also under accelerate, whose exit status is 1 for any failure of a rank. A resumed run begins anew."""
    for status in (0, 1):
        code = f"open({str(tmp_path / 'stopped.json')!r}, 'w'); raise SystemExit({status})"
        assert run(code) == supervise_module.EXIT_GUARD
    assert "failed" not in capfd.readouterr().err
    assert run("raise SystemExit(1)") == 1


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (["noise"] * 50 + ["the end"], "noise", "the end"),
        (["[rank0]: Traceback (most recent call last):", "[rank0]:   a", "[rank0]: E: x", "y"], "[rank0]: Tr", "y"),
        (["Traceback (most recent call last):"] + ["  a"] * 100 + ["E: x"] + ["y"] * 99, "  a", "y"),
        (["x", "Fatal Python error: Aborted", "", "  a"], "Fatal", "  a"),
    ],
)
def test_the_first_traceback_of_a_log_keeps_its_last_line(text, first, last):
    lines = first_traceback("\n".join(text)).splitlines()
    assert lines[0].startswith(first) and lines[-1] == last and len(lines) <= 50
    assert any("E: x" in line for line in lines) == any("E: x" in line for line in text)


def test_the_wait_for_the_server_shows_what_it_tells():
    """Not its warnings, nor the source line under one."""
    told = "(APIServer pid=7) INFO 11-27 02:49:37 [core.py:1] Loading weights"
    assert _last_line(f"{told}\nwarnings.warn(\nTriton is not there") == ": Loading weights"
    assert _last_line("Triton is not there") == ""


STUB = f'''#!{sys.executable} -IS
"""Stands for every Python that the launcher starts. It stays at the stage that STUB_STAGE names."""
import os, pathlib, signal, subprocess, sys, time

module = "preflight" if "-c" in sys.argv else sys.argv[sys.argv.index("-m") + 1].rpartition(".")[2]
stage = os.environ["STUB_STAGE"]
LAYOUT = {{"method": "grpo", "is_seq2seq": False, "parallel": "zero3", "ranks": 2}}
LAYOUT |= {{"use_vllm": True, "starts_server": True}}
VALUES = dict.fromkeys(["output_dir", "model_revision", "trust_remote_code", "vllm_max_model_length", "bf16", "fp16"])
VALUES |= dict.fromkeys(["dtype", "vllm_server_args", "resume_from_checkpoint"])
VALUES |= {{"model_name_or_path": ".", "weight_sync": "disk", "vllm_server_timeout": 60}}
VALUES |= {{"max_server_restarts": 0, "max_restarts": 1, "ddp_timeout": 900}}
REPORT = {{"name": "stub", "values": VALUES, "given": [], "layout": LAYOUT, "model": None, "data": {{"columns": []}}}}


def stay():
    if stage != "preflight":
        subprocess.Popen(["sleep", "300"])  # a grandchild, as a rank or vLLM's engine is
    pathlib.Path(f"at-{{stage}}").touch()
    time.sleep(300)


if module == "preflight":
    if stage == "preflight":
        stay()
    if stage == "prepare":
        REPORT |= {{"missing": ["dataset_name: nothing"], "values": VALUES | {{"prepare": "prepare"}}}}
    import json
    print(json.dumps(REPORT))
elif stage in ("lost", "lost again", "failed") and not module.startswith("vllm"):
    starts = pathlib.Path("starts")
    starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
    pathlib.Path(f"at-{{stage}}").touch()
    if stage == "failed":
        raise ValueError("the reward has an error")
    if stage == "lost again" or starts.read_text() == "x":
        sys.exit("DistNetworkError: a rank has gone")
elif stage == "loading" and not module.startswith("vllm"):
    time.sleep(300)
elif module.startswith("vllm") and stage == "training":
    {IGNORE_TERM}
    exec({HEALTHY!r}.replace("PORT", sys.argv[sys.argv.index("--port") + 1]))
else:
    if stage == "training":
        pathlib.Path(sys.argv[-1], "progress.txt").write_text("step 2: training")
    print("step 1", flush=True)
    stay()
'''
LAUNCHER = """
import sys
sys.executable = sys.argv.pop(1)
from grpo_launcher.launch import processes
processes.GRACE = 1
from grpo_launcher.launch.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts the launcher on stubs and waits for a stage. What is left of it is killed in the end."""
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    launches = []

    def begin(stage: str, *prefix: str) -> Launch:
        monkeypatch.setenv("STUB_STAGE", stage)
        recipe = str(ROOT / "configs/quickstart.yaml")
        command = [*prefix, sys.executable, "-c", LAUNCHER, str(tmp_path / "stub"), recipe]
        launches.append(Launch(tmp_path, command=command))
        while not (tmp_path / f"at-{stage}").exists():
            assert launches[-1].process.poll() is None, launches[-1].tail()
            time.sleep(0.02)
        if stage == "training":
            launches[-1].wait_for("server is up", timeout=60)
        return launches[-1]

    yield begin
    for launched in launches:
        launched.end()


def again_and_again(launched: Launch, number: int) -> int:
    """Send a signal until the launcher ends, and return its exit status."""
    deadline = time.monotonic() + 30
    while launched.process.poll() is None:
        assert time.monotonic() < deadline, launched.tail()
        with contextlib.suppress(ProcessLookupError):
            os.kill(launched.process.pid, number)
        time.sleep(0.1)
    return launched.process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", ["preflight", "prepare", "loading", "training"])
def test_a_signal_leaves_nothing(stage, number, start):
    """At any stage, even where the server does not hear TERM. A second signal changes nothing."""
    launched = start(stage)
    if stage == "training":
        names = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"]
        write_checkpoint(launched.run_folder() / "checkpoint-1", *names)
    os.kill(launched.process.pid, number)
    if stage == "training" and number == signal.SIGTERM:
        launched.wait_for("TERM: this step ends", timeout=30)
    assert again_and_again(launched, number) == 128 + number, launched.tail()
    assert launched.leftovers() == [] and "Stopped. No process is left." in launched.text()
    assert ("--resume" in launched.text()) == (stage == "training"), "where there is a checkpoint"
    assert "step 1" in launched.text() or stage != "training"


@pytest.mark.parametrize("stage", ["preflight", "loading", "training"])
def test_a_killed_launcher_takes_all_with_it(stage, start):
    """Children get TERM from the kernel. What does not hear it gets KILL from the undertaker."""
    launched = start(stage)
    launched.process.kill()
    assert launched.leftovers(patience=30) == []


KILLED_AT_ONCE = """
import os, pathlib, signal, sys
from grpo_launcher.launch import processes
processes.GRACE = 1
undertaker = processes.start_undertaker("weights")
processes.start(["bash", "-c", "sleep 300 & touch started; wait"], undertaker=undertaker)
while not os.path.exists("started"):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_launcher_that_is_killed_right_behind_a_start_leaves_nothing(tmp_path):
    """The undertaker knows of a child before the child runs, and so of what the child starts."""
    launched = Launch(tmp_path, command=[sys.executable, "-c", KILLED_AT_ONCE])
    assert launched.process.wait(60) == -signal.SIGKILL
    assert launched.leftovers(patience=30) == []


def test_a_run_under_nohup_goes_on_without_its_terminal(start):
    launched = start("training", "nohup")
    os.kill(launched.process.pid, signal.SIGHUP)
    assert again_and_again(launched, signal.SIGTERM) == 128 + signal.SIGTERM and launched.leftovers() == []


STARTS = [("lost", 0, 2), ("lost again", EXIT_LOST, 2), ("failed", 1, 1)]


@pytest.mark.parametrize(("stage", "status", "starts"), STARTS)
def test_a_run_that_was_lost_is_started_again(stage, status, starts, start, tmp_path):
    """As often as `max_restarts` says, which is 1 here. An error in a reward would only come again."""
    launched = start(stage).finish(status, timeout=60)
    assert (tmp_path / "starts").read_text() == "x" * starts and launched.leftovers() == []
    assert launched.text().count("The run is started again") == starts - 1
    assert len(list((tmp_path / "trainOutput/stub").glob("[0-9]*"))) == 1
