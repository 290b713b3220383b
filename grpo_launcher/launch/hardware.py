"""What this machine has to offer, without torch."""

import itertools
import os
import shutil
import socket
import subprocess

from grpo_launcher.errors import UserError
from grpo_launcher.layout import Gpu, Hardware

GIB = 2**30


def find_hardware(assumed_gpus: int | None = None, assumed_memory: float = 24) -> Hardware:
    """Return the GPUs, cores and memory of this machine, or assumed GPUs of `assumed_memory` GiB each."""
    if assumed_gpus is None:
        gpus = find_gpus()
    else:
        gpus = [Gpu(str(index), assumed_memory) for index in range(assumed_gpus)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Hardware(gpus, sorted(os.sched_getaffinity(0)), memory)


def find_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that this process may use: all, or those of CUDA_VISIBLE_DEVICES, in its order.

    Raises:
        UserError: that variable names a GPU that is not there, or one twice.
    """
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    output = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    rows = [line.split(", ") for line in output.splitlines() if line.count(", ") == 2]
    present = [(index, uuid, float(mib) / 1024) for index, uuid, mib in rows]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [Gpu(index, memory) for index, _, memory in present]
    if visible.strip() in ("-1", "NoDevFiles"):
        return []
    chosen, uuids = [], []
    for name in [part.strip() for part in visible.split(",") if part.strip()]:
        match = next((gpu for gpu in present if name == gpu[0] or gpu[1].startswith(name)), None)
        if match is None:
            indices = ", ".join(gpu[0] for gpu in present)
            raise UserError("CUDA_VISIBLE_DEVICES", f"there is no GPU {name}", f"use some of {indices}")
        if match[1] in uuids:
            raise UserError("CUDA_VISIBLE_DEVICES", f"GPU {name} is named twice", "NCCL needs a GPU for each rank")
        chosen.append(Gpu(name, match[2]))
        uuids.append(match[1])
    return chosen


def is_port_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of 127.0.0.1 that are free now.

    They are outside the range from which Linux takes the ports of outgoing connections, so that none of these occupies
    one before the server listens. The search starts at a number of this process, so that two launchers do not meet.
    """
    start = os.getpid() * 8 % 10_000
    candidates = (20_000 + (start + offset) % 10_000 for offset in range(10_000))
    return list(itertools.islice((port for port in candidates if is_port_free(port)), count))
