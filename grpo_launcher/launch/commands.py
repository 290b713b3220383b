"""The commands of a run: the vLLM server, the training ranks, and accelerate's file."""

import ipaddress
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from grpo_launcher.errors import UserError
from grpo_launcher.launch.hardware import free_ports, is_port_free, way_to
from grpo_launcher.layout import ADAPTER_RANKS, Hardware, Layout, server_dtype
from grpo_launcher.preflight_runner import PROJECT, Report
from grpo_launcher.runs import ACCELERATE_FILE

HOST = "127.0.0.1"


@dataclass
class Command:
    """A process to start: its arguments, and its environment beside the inherited one."""

    argv: list[str]
    env: dict[str, str]


@dataclass
class Node:
    """This machine among those that train: its number, where node 0 is, and the interface that leads there."""

    rank: int = 0
    address: str = HOST
    port: int = 0
    interface: str = "lo"


def find_node(options) -> Node:
    """Return this machine's part, from the launcher's options."""
    if options.num_nodes == 1:
        return Node()
    return Node(options.node_rank, options.main_address, options.main_port, way_to(options.main_address)[0])


def describe_ports(values: dict, layout: Layout, node: Node) -> list[str]:
    """Return lines of the plan: which ports must be open between the nodes."""
    if layout.num_nodes == 1:
        return []
    lines = [f"nodes: this is node {node.rank} of {layout.num_nodes}; open between the nodes must be"]
    lines.append(f"  {node.address}:{node.port}, for all nodes (the meeting point, on node 0)")
    lines.append(f"  every port of {node.interface} from 1024 on, for all nodes (the ranks among each other)")
    if layout.use_vllm and layout.vllm_mode == "server":
        lines.append(f"  {layout.server_url}, for node 0 (the vLLM server)")
        if values["weight_sync"] == "nccl":
            lines.append(f"  {node.address}:{values['vllm_group_port']}, for the vLLM server (its weights, on node 0)")
    if ipaddress.ip_address(socket.gethostbyname(node.address)).is_global:
        lines.append(f"  warning: {node.address} is a public address, and these doors ask nobody who comes in")
    return lines


def choose_ports(report: Report, check: bool = True) -> None:
    """Fill the server's address and ports into the report's values.

    Raises:
        UserError: a given port is taken (not looked at with check=False, for a plan).
    """
    ports = free_ports(2)
    if report.layout.starts_server:
        if "vllm_server_host" not in report.given:
            report.values["vllm_server_host"] = HOST
        for name, port in {"vllm_server_port": ports[0], "vllm_group_port": ports[1]}.items():
            if name not in report.given:
                report.values[name] = port
            elif check and not is_port_free(report.values[name]):
                raise UserError(name, f"port {report.values[name]} is taken", "leave it out: a free port is found")


def accelerate_config(values: dict, layout: Layout, node: Node) -> dict:
    """Return zero3.yaml or ddp.yaml with ranks, nodes and precision filled in. One node chooses its port itself."""
    config = yaml.safe_load((PROJECT / f"{layout.parallel}.yaml").read_text(encoding="utf-8"))
    precision = next((name for name in ("bf16", "fp16") if values[name]), "no")
    config |= {"num_processes": layout.ranks, "main_process_port": node.port, "mixed_precision": precision}
    if layout.num_nodes > 1:
        config |= {"num_machines": layout.num_nodes, "machine_rank": node.rank, "main_process_ip": node.address}
    return config | {"use_cpu": not layout.train_gpus}


def trainer_command(layout: Layout, hardware: Hardware, folder: Path, node: Node) -> Command:
    """Return the command of the training ranks. They read everything from run.json in the run folder."""
    if layout.train_gpus:
        host = urlsplit(layout.server_url).hostname if layout.server_url else HOST
        devices = _gpu_env(layout.train_gpus) | {"VLLM_HOST_IP": way_to(host)[1]}  # the server connects to it
        threads = max(1, len(hardware.cpus) // len(layout.train_gpus))  # accelerate's 1 is slow for offload_optimizer
        devices["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    else:
        threads = max(1, len(hardware.cpus) // 2)
        devices = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    if layout.num_nodes == 1:
        argv = [sys.executable, "-P", "-m", "grpo_launcher.ranks"]
    else:
        argv = [sys.executable, "-P", "-m", "accelerate.commands.launch"]
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        devices |= {name: os.environ.get(name, node.interface) for name in names}
    argv += ["--config_file", str(folder / ACCELERATE_FILE)]
    # accelerate puts the working directory on PYTHONPATH: a user's queue.py would replace Python's. env undoes it.
    argv += ["--no_python", "env", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}", sys.executable, "-u"]
    return Command([*argv, str(PROJECT / "train.py"), "--run", str(folder)], _common_env() | devices)


def server_command(values: dict, given: list[str], layout: Layout, hardware: Hardware) -> Command:
    """Return the command of the vLLM server.

    It always loads the base model: the trainer pushes its weights before the first generation. A given vllm_* field of
    TRL becomes the server's flag, and vllm_server_args is passed through.
    """
    argv = [sys.executable, "-P", "-m", "grpo_launcher.vllm_server"]
    argv += ["--model", values["model_name_or_path"], "--dtype", server_dtype(values)]
    argv += ["--host", values["vllm_server_host"], "--port", str(values["vllm_server_port"])]
    argv += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    if values["vllm_max_model_length"]:
        argv += ["--max-model-len", str(values["vllm_max_model_length"])]
    for name, flag in {
        "vllm_gpu_memory_utilization": "--gpu-memory-utilization",
        "vllm_model_impl": "--model-impl",
    }.items():
        if name in given:
            argv += [flag, str(values[name])]
    if values["model_revision"] not in (None, "main"):
        argv += ["--revision", values["model_revision"]]
    if values["trust_remote_code"]:
        argv += ["--trust-remote-code"]
    env = _common_env() | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": HOST}
    if layout.server_gpus:
        argv += ["--tensor-parallel-size", str(layout.tensor_parallel)]
        if layout.replicas > 1:
            argv += ["--data-parallel-size", str(layout.replicas)]
        env |= _gpu_env(layout.server_gpus)
    else:
        argv += ["--enforce-eager"]
        cores = hardware.cpus[: max(1, len(hardware.cpus) // 2)]
        env |= {
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine works itself: one process less to start and to hold
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores))),
        }
    if values["weight_sync"] == "disk":
        argv += ["--worker-extension-cls", "grpo_launcher.weight_sync_worker.DiskSyncWorker"]
    elif values["weight_sync"] == "adapter":
        rank = next(rank for rank in ADAPTER_RANKS if rank >= values["lora_r"])
        argv += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]  # this version and the next
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    else:
        argv += ["--weight-transfer-config", '{"backend": "nccl"}']
    return Command([*argv, *(values["vllm_server_args"] or [])], env)


def server_url(values: dict) -> str:
    """Return the address at which the launcher's own server is asked for its health."""
    host = values["vllm_server_host"]
    if host == "0.0.0.0":  # noqa: S104  # the user's choice: it listens on all addresses, this one too
        host = HOST
    return f"http://{host}:{values['vllm_server_port']}"


def _gpu_env(gpus: list) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.id for gpu in gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _common_env() -> dict[str, str]:
    return {
        "COLUMNS": str(shutil.get_terminal_size((120, 24)).columns),  # the trainer writes to a pipe and cannot ask
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # else at the address of the host's name
        "PYTHONSAFEPATH": "1",  # files of the working directory are not modules of the server or the ranks
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
