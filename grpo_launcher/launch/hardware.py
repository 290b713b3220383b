"""What this machine has to offer, without torch."""

import os
import shutil
import socket
import subprocess


def find_gpus() -> list[dict]:
    """The NVIDIA GPUs that this process may use, as {"id", "memory" in GiB}: all, or those of CUDA_VISIBLE_DEVICES, in its order.

    The id is what CUDA_VISIBLE_DEVICES takes. Raises ValueError where that variable names a GPU that is not there.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    rows = [line.split(", ") for line in answer.stdout.splitlines() if line.count(", ") == 2]
    present = [{"id": index, "uuid": uuid, "memory": float(mib) / 1024} for index, uuid, mib in rows]
    if visible is None:
        return present
    chosen = []
    names = [] if visible.strip() in ("-1", "NoDevFiles") else [part.strip() for part in visible.split(",") if part.strip()]
    for name in names:
        match = next((gpu for gpu in present if name == gpu["id"] or gpu["uuid"].startswith(name)), None)
        if match is None:
            raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: there is no GPU {name}; nvidia-smi lists {[g['id'] for g in present]}.")
        if any(gpu["uuid"] == match["uuid"] for gpu in chosen):
            raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: GPU {name} stands there twice; NCCL wants every rank on a GPU of its own.")
        chosen.append({**match, "id": name})
    return chosen


def assumed_gpus(count: int, memory: float) -> list[dict]:
    """`count` GPUs of `memory` GiB that need not be there."""
    return [{"id": str(index), "memory": memory} for index in range(count)]


def find_cpus() -> tuple[list[int], float]:
    """The cores that this process may run on, and the machine's memory in GiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return sorted(os.sched_getaffinity(0)), memory


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """`count` different ports of 127.0.0.1 that are free now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
