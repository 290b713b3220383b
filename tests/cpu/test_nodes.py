"""Two machines train and a third one generates. Network namespaces stand for them, and share the disk."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, is_in_sync, read_metrics

STEPS = 5
REACHES = "import errno, socket; s = socket.socket(); s.settimeout(10)\n"
REACHES += "raise SystemExit(s.connect_ex(('10.77.0.3', 9)) != errno.ECONNREFUSED)"


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def open_doors(machine: str) -> set[int]:
    """Return the ports of a machine that others can reach."""
    command = ["ip", "netns", "exec", machine, "ss", "--listening", "--tcp", "--numeric", "--no-header"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    doors = [line.split()[3] for line in lines]
    return {int(door.rpartition(":")[2]) for door in doors if not door.startswith(("127.0.0.1:", "[::1]:"))}


@pytest.fixture
def machines():
    """The names of three network namespaces with the addresses 10.77.0.1 to 3. Skips where none can be made."""
    if not (shutil.which("ip") and shutil.which("ss")):
        pytest.skip("there is no ip or no ss (Debian's iproute2)")
    mark, names = os.getpid() % 10_000, []
    bridge = f"gb{mark}"
    try:
        ip(f"link add name {bridge} type bridge")
        ip(f"link set {bridge} up")
        for number in (1, 2, 3):
            name, cable = f"grpo-{mark}-{number}", f"gv{mark}-{number}"
            ip(f"netns add {name}")
            names.append(name)
            ip(f"link add {cable} type veth peer name eth0 netns {name}")
            ip(f"link set {cable} master {bridge} up")
            ip(f"-n {name} addr add 10.77.0.{number}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        if subprocess.run(["ip", "netns", "exec", names[0], sys.executable, "-c", REACHES]).returncode:
            pytest.skip("a firewall is between the namespaces")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            ip(f"netns del {name}")
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def test_two_nodes_train_beside_a_third(machines, workplace, launch):
    """By the commands of a cluster. What listens on their addresses is what the plan says must be open."""
    flags = [str(ROOT / "configs/quickstart.yaml"), "--no-install", "--max_completion_length", "64"]
    flags += ["--per_device_train_batch_size", "8", "--sample_every", "0", "--max_steps", str(STEPS)]
    flags += ["--num_nodes", "2", "--main_address", "10.77.0.1", "--vllm_server_base_url", "http://10.77.0.3:8000"]
    flags += ["--output_dir", "several"]

    def begin(machine: str, *more: str):
        command = ["ip", "netns", "exec", machine, "bash", str(ROOT / "launch_train.sh"), *flags, *more]
        return launch(workplace, command=command)

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
