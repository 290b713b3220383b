"""What this machine has to offer, without torch."""

import itertools
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import psutil

from grpo_launcher.errors import UserError
from grpo_launcher.layout import Gpu, Hardware

GIB = 2**30
CGROUP, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def find_hardware(assumed_gpus: int | None = None, assumed_memory: float = 24) -> Hardware:
    """Return the GPUs, cores and memory that this process may use, or assumed GPUs of `assumed_memory` GiB each."""
    if assumed_gpus is None:
        gpus = find_gpus()
    else:
        gpus = [Gpu(str(index), assumed_memory) for index in range(assumed_gpus)]
    cpus = sorted(os.sched_getaffinity(0))[: _core_limit()]
    return Hardware(gpus, cpus, _machine_memory(), is_real=assumed_gpus is None)


def _machine_memory() -> float:
    """Return the GiB of this machine, or those that its container or control group allows."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [int(text) for text in cgroup("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()]
    return min(limits) / GIB


def _core_limit() -> int | None:
    """Return how many cores the control group's quota amounts to, at least 1; None where it has none."""
    quotas = [text.split() for text in cgroup("cpu", "cpu.max", None)]
    cores = [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]
    return max(1, round(min(cores))) if cores else None


def cgroup(controller: str, name: str, old_name: str | None) -> list[str]:
    """Return what a file says in this process's control group and in those around it.

    Args:
        controller: of version 1, as cpu or memory.
        name: the file in version 2.
        old_name: the file in version 1, or None where it is not asked for.
    """
    found = []
    for line in CGROUP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = CGROUP_ROOT if not controllers else CGROUP_ROOT / controller
        file = name if not controllers else old_name
        if file and (not controllers or controller in controllers.split(",")):
            folder = root / path.lstrip("/")
            folders = [above for above in (folder, *folder.parents) if above.is_relative_to(root)]
            found += [(above / file).read_text().strip() for above in folders if (above / file).is_file()]
    return found


def find_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that this process may use: all, or those of CUDA_VISIBLE_DEVICES, in its order.

    Raises:
        UserError: that variable names a GPU that is not there, or one twice.
    """
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    output = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    rows = [line.split(", ") for line in output.splitlines() if line.count(", ") == 3]
    # A GPU that shares the machine's memory has none of its own: [N/A].
    present = [
        (index, uuid, float(mib) / 1024 if mib[:1].isdigit() else _machine_memory(), float(capability))
        for index, uuid, mib, capability in rows
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [Gpu(index, memory, capability) for index, _, memory, capability in present]
    if visible.strip() in ("-1", "NoDevFiles"):
        return []
    if "MIG-" in visible:
        present += _slices({gpu[0]: gpu[3] for gpu in present})
    chosen, uuids = [], []
    for name in [part.strip() for part in visible.split(",") if part.strip()]:
        match = next((gpu for gpu in present if name == gpu[0] or gpu[1].startswith(name)), None)
        if match is None:
            indices = ", ".join(gpu[0] for gpu in present)
            raise UserError("CUDA_VISIBLE_DEVICES", f"there is no GPU {name}", f"use some of {indices}")
        if match[1] in uuids:
            raise UserError("CUDA_VISIBLE_DEVICES", f"GPU {name} is named twice", "NCCL needs a GPU for each rank")
        chosen.append(Gpu(match[0] if name == match[0] else match[1], *match[2:]))  # vLLM wants the whole id
        uuids.append(match[1])
    return chosen


def _slices(capabilities: dict[str, float]) -> list[tuple[str, str, float, float]]:
    """Return the slices of GPUs (MIG) as (id, id, GiB, compute capability). Their names tell the memory: 1g.10gb."""
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    found, gpu = [], ""
    for line in listing.splitlines():
        gpu = match[1] if (match := re.match(r"GPU (\d+):", line)) else gpu
        if match := re.search(r"MIG \S*?(\d+)gb\S* .*UUID: (MIG-[^)]+)", line):
            found.append((match[2], match[2], float(match[1]), capabilities.get(gpu, 8.0)))
    return found


def is_port_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def way_to(address: str) -> tuple[str, str]:
    """Return the network interface from which this machine reaches an address, and its own address there.

    Raises:
        UserError: there is no way to it, or it is this machine's name for itself.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # of a datagram: nothing is sent
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError("address", f"{address} cannot be reached: {error}", "write it as a number") from error
    if own.startswith("127.") and not address.startswith(("127.", "localhost")):
        raise UserError("address", f"{address} is {own} here, which other machines do not reach", "write a number")
    interfaces = psutil.net_if_addrs().items()
    names = [name for name, addresses in interfaces if any(found.address == own for found in addresses)]
    return (names or ["lo"])[0], own


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of 127.0.0.1 that are free now.

    They are outside the range from which Linux takes the ports of outgoing connections, so that none of these occupies
    one before the server listens. The search starts at a number of this process, so that two launchers do not meet.
    """
    start = os.getpid() * 8 % 10_000
    candidates = (20_000 + (start + offset) % 10_000 for offset in range(10_000))
    return list(itertools.islice((port for port in candidates if is_port_free(port)), count))
