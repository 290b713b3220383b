"""Estimate the memory of each rank from the number of parameters, before anything is loaded. Standard library only."""

import os
import shutil

from grpo_launcher.errors import UserError
from grpo_launcher.layout import Hardware, Layout

GIB = 2**30
HEADROOM = 0.2  # share of a device's memory that is left to activations, gathered layers and buffers


def rank_memory(
    parameters: int,
    ranks: int,
    *,
    bytes_per_weight: float,
    zero3: bool,
    lora: bool,
    syncs: bool,
    reference: bool,
    offload: bool,
) -> dict[str, float]:
    """Return the GiB on each rank, by what takes them.

    ZeRO-3 divides all of it by the ranks and keeps an fp32 master copy with Adam's two moments: 12 bytes a parameter.
    DDP keeps all of it on every rank, without a master copy. LoRA trains one or two per cent of the weights, which are
    not counted; under ZeRO-3 it gathers the whole model at every weight sync.
    Source: Rajbhandari et al. 2020, ZeRO, section 3.1.
    """
    share = parameters / (ranks if zero3 else 1) / GIB
    parts = {"weights": bytes_per_weight * share}
    if lora:
        if zero3 and syncs:
            parts["whole model at each sync"] = bytes_per_weight * parameters / GIB
        return parts
    parts["gradients"] = bytes_per_weight * share
    if not offload:
        parts["optimizer"] = (12 if zero3 else 2 * bytes_per_weight) * share
    if reference:
        parts["reference model"] = bytes_per_weight * share
    return parts


def fits(needed: float, device: float) -> bool:
    """Whether `needed` GiB leave HEADROOM of a device of `device` GiB."""
    return needed <= device * (1 - HEADROOM)


def check_memory(
    values: dict, layout: Layout, hardware: Hardware, parameters: int, source: str, offload: bool
) -> tuple[str, list[UserError]]:
    """Hold the estimate against the devices.

    Returns:
        One line for the plan, and what does not fit, with remedies.
    """
    zero3 = layout.parallel == "zero3"
    arguments = {
        "bytes_per_weight": _bytes_per_weight(values, zero3, bool(layout.train_gpus)),
        "zero3": zero3,
        "lora": values["use_peft"],
        "syncs": layout.use_vllm,
        "reference": values["beta"] != 0 and layout.method == "grpo",
        "offload": offload and zero3,
    }
    parts = rank_memory(parameters, layout.ranks, **arguments)
    device = min((gpu.memory for gpu in layout.train_gpus), default=hardware.memory / layout.ranks)
    colocated = 0.0
    if layout.train_gpus and layout.use_vllm and layout.vllm_mode == "colocate":
        colocated = values["vllm_gpu_memory_utilization"] * device
        parts["vLLM"] = colocated
    needed = sum(parts.values())
    detail = " + ".join(f"{name} {gib:.2g}" for name, gib in parts.items())
    line = f"memory: {parameters / 1e6:,.1f} million parameters (from {source}); "
    line += f"a rank {detail} = {needed:.2g} of {device:.1f} GiB, and activations beside it"
    problems = _check_server(values, layout, parameters)
    if not fits(needed, device):
        remedies = _remedies(values, layout, parameters, device, colocated, arguments)
        problem = f"a rank needs {needed:.1f} GiB, and a fifth of {device:.1f} GiB must stay for activations"
        problems.append(UserError("memory", problem, "; or ".join(remedies)))
    return line, problems


def _check_server(values: dict, layout: Layout, parameters: int) -> list[UserError]:
    problems = []
    weights = 2 * parameters / GIB
    count = len(layout.server_gpus)
    if count and weights / count > 0.8 * min(gpu.memory for gpu in layout.server_gpus):
        problem = f"{count}: {weights:.0f} GiB of weights do not fit the server's GPUs"
        problems.append(UserError("--vllm_gpus", problem, "give a larger number"))
    if layout.use_vllm and layout.vllm_mode == "server" and values["weight_sync"] == "disk":
        folder = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
        if not os.path.isdir(folder):
            problems.append(UserError("GRPO_SHARED_MEMORY", f"there is no folder {folder}", "make it, or unset it"))
            return problems
        size = (2 if layout.train_gpus else 4) * parameters / GIB
        free = shutil.disk_usage(folder).free / GIB
        if size > free:
            problem = f"{folder} has {free:.1f} GiB free, and a weight sync writes {size:.1f} GiB"
            fix = "give the container more (--shm-size), or set GRPO_SHARED_MEMORY to a folder on a disk"
            problems.append(UserError("weight_sync", problem, fix))
    return problems


def _remedies(
    values: dict, layout: Layout, parameters: int, device: float, colocated: float, arguments: dict
) -> list[str]:
    def would_fit(ranks: int = layout.ranks, vllm: float = colocated, **changes) -> float:
        needed = sum(rank_memory(parameters, ranks, **arguments | changes).values()) + vllm
        return needed if fits(needed, device) else 0

    remedies = []
    if layout.train_gpus:
        has_server = layout.use_vllm and (layout.starts_server or layout.ranks == 1)  # from two GPUs on
        vllm = 0 if has_server else colocated
        enough = next((ranks for ranks in range(layout.ranks + 1, 65) if would_fit(ranks, vllm)), None)
        if enough and has_server:
            remedies.append(f"{enough + max(1, len(layout.server_gpus))} such GPUs ({enough} train)")
        elif enough:
            remedies.append(f"{enough} such GPUs")
    if not arguments["zero3"] and not (values["load_in_4bit"] or values["load_in_8bit"]):
        remedies.append("ZeRO-3, which shards all of it: --parallel zero3")
    if not values["use_peft"]:
        if needed := would_fit(lora=True):
            advice = "--use_peft true with a learning rate of about 1e-5, or configs/tldr_lora.yaml for TL;DR"
            remedies.append(f"LoRA ({needed:.1f} GiB): {advice}")
        needed = would_fit(offload=True)
        if needed and arguments["zero3"] and layout.train_gpus and not arguments["offload"]:
            remedies.append(f"optimizer offload ({needed:.1f} GiB): offload_optimizer_device: cpu in zero3.yaml")
    return [*remedies, "a smaller model"]


def _bytes_per_weight(values: dict, zero3: bool, has_gpu: bool) -> float:
    """DDP keeps the type in which the model was loaded, float32 by default. DeepSpeed casts to the run's own type."""
    if values["load_in_4bit"]:
        return 1  # half a byte, and embeddings in 16 bits: an upper bound
    if values["load_in_8bit"]:
        return 1.5
    return 2 if values["dtype"] in ("bfloat16", "float16") or (zero3 and has_gpu) else 4
