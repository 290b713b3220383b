"""Two machines train and a third one generates. Network namespaces stand for them, and share the disk."""

import contextlib
import shutil
import subprocess

import pytest
from helpers import is_in_sync, on_machine, read_metrics, three_machines

STEPS = 5


def open_doors(machine: str) -> set[int]:
    """Return the ports of a machine that others can reach."""
    command = ["ip", "netns", "exec", machine, "ss", "--listening", "--tcp", "--numeric", "--no-header"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    doors = [line.split()[3] for line in lines]
    return {int(door.rpartition(":")[2]) for door in doors if not door.startswith(("127.0.0.1:", "[::1]:"))}


@pytest.fixture
def machines():
    """The names of three network namespaces. Skips where none can be made, or a firewall is between them."""
    if not (shutil.which("ip") and shutil.which("ss")):
        pytest.skip("there is no ip or no ss (Debian's iproute2)")
    with contextlib.ExitStack() as stack:
        try:
            names = stack.enter_context(three_machines())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces that reach each other: {error.stderr.decode().strip()}")
        yield names


def test_two_nodes_train_beside_a_third(machines, workplace, launch):
    """By the commands of a cluster. What listens on their addresses is what the plan says must be open."""

    def begin(machine: str, *flags: str):
        always = ["--max_steps", str(STEPS), "--output_dir", "several"]
        return launch(workplace, command=on_machine(machine, *always, *flags))

    server = begin(machines[2], "--serve")
    other, main = (begin(machines[rank], "--node_rank", str(rank)) for rank in (1, 0))
    main.wait_for(f"step 2/{STEPS}")
    doors = [open_doors(name) for name in machines]
    plan = main.text()
    assert "10.77.0.1:29500" in plan and "http://10.77.0.3:8000" in plan and "eth0 from 1024 on" in plan
    assert 29500 in doors[0] and doors[2] == {8000} and min(doors[0] | doors[1]) >= 1024
    main.finish()
    other.finish()
    server.process.terminate()
    server.finish(143)
    assert main.leftovers() == other.leftovers() == server.leftovers() == []
    lines = read_metrics(workplace / "several")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and is_in_sync(lines)
    assert (workplace / "several/final-checkpoint/model.safetensors").exists()
