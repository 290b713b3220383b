"""Bytes of weights, gradients and optimizer on each rank, before anything is loaded."""

import os
import shutil

GIB = 2**30
ROOM = 0.2  # share of a GPU's memory left to activations, gathered layers and buffers


def states(parameters: int, ranks: int, *, width: float, sharded: bool, lora: bool, reference: bool, offload: bool) -> dict[str, float]:
    """GiB on each of `ranks` ranks, by what takes them.

    width: bytes a weight. sharded: ZeRO-3, which divides all of it by the ranks and keeps an fp32 master copy with Adam's two moments
    (12 bytes a parameter); else DDP, which keeps all of it on every rank, and no master copy. LoRA trains a per cent of the weights or two
    (left out), and under ZeRO-3 gathers the whole model at every sync. Source: Rajbhandari et al. 2020, ZeRO, section 3.1.
    """
    share = parameters / (ranks if sharded else 1) / GIB
    parts = {"weights": width * share}
    if lora:
        if sharded:
            parts["whole model at each sync"] = width * parameters / GIB
    else:
        parts["gradients"] = width * share
        if not offload:
            parts["optimizer"] = (12 if sharded else 2 * width) * share
        if reference:
            parts["reference model"] = width * share
    return parts


def fits(needed: float, memory: float) -> bool:
    """Whether `needed` GiB leave ROOM of a device of `memory` GiB."""
    return needed <= memory * (1 - ROOM)


def check(plan, facts: dict, accelerate: dict, trainers: list[dict], servers: list[dict], ram: float) -> None:
    """Weights, gradients and optimizer on each rank, beside what a device has."""
    if not facts["model"]:
        return
    parameters, values = facts["model"]["parameters"], plan.values
    sharded = "deepspeed_config" in accelerate
    offload = sharded and accelerate["deepspeed_config"].get("offload_optimizer_device", "none") != "none"
    reference, width = values["beta"] != 0 and values["method"] == "grpo", _width(values, sharded, on_cpu=not trainers)
    kind = {"lora": values["use_peft"], "reference": reference, "sharded": sharded, "width": width}
    parts = states(parameters, plan.ranks, offload=offload, **kind)
    shared = values["vllm_gpu_memory_utilization"] if trainers and values["use_vllm"] and not servers else 0
    if trainers:
        size = min(gpu["memory"] for gpu in trainers)
        if shared:
            parts["vLLM"] = shared * size
    else:
        size = ram / plan.ranks
    needed = sum(parts.values())
    detail = " + ".join(f"{name} {gib:.2g}" for name, gib in parts.items())
    source = f"{parameters / 1e6:,.1f} million parameters (from {facts['model']['source']})"
    plan.lines.append(f"memory: {source}; a rank {detail} = {needed:.2g} of {size:.1f} GiB, activations beside it")
    heads = facts["model"].get("heads")
    if servers and heads and heads % len(servers):
        valid = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        plan.problems.append(f"--vllm_gpus {len(servers)}: the model's {heads} attention heads divide among {valid} GPUs only.")
    if values["weight_sync"] == "disk" and values["vllm_mode"] == "server":
        place = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
        size_on_disk, free = (2 if trainers else 4) * parameters / GIB, shutil.disk_usage(place).free / GIB
        if size_on_disk > free:
            plan.problems.append(
                f"weight_sync: {place} has {free:.1f} GiB free and a sync writes {size_on_disk:.1f}; give the container more (--shm-size), "
                "or set GRPO_SHARED_MEMORY to a folder on a disk."
            )
    weights = 2 * parameters / GIB
    if servers and weights / len(servers) > 0.8 * min(gpu["memory"] for gpu in servers):
        plan.problems.append(f"--vllm_gpus {len(servers)}: {weights:.0f} GiB of weights do not fit the server's GPUs; raise --vllm_gpus.")
    if fits(needed, size):
        return
    remedies = []
    if trainers:
        for ranks in range(plan.ranks + 1, 65):
            if fits(sum(states(parameters, ranks, offload=offload, **kind).values()), size):
                remedies.append(f"{ranks + max(1, len(servers))} such GPUs ({ranks} train)")
                break
    if not sharded and not (values["load_in_4bit"] or values["load_in_8bit"]):
        remedies.append("ZeRO-3, which shards all of it: --parallel zero3")
    if not values["use_peft"]:
        lora = sum(states(parameters, plan.ranks, offload=offload, **(kind | {"lora": True})).values()) + shared * size
        if fits(lora, size):
            remedies.append(f"LoRA ({lora:.1f} GiB): --use_peft true with a learning rate of about 1e-5, or configs/tldr_lora.yaml for TL;DR")
        less = sum(states(parameters, plan.ranks, offload=True, **kind).values()) + shared * size
        if sharded and not offload and trainers and fits(less, size):
            remedies.append(f"optimizer offload ({less:.1f} GiB): offload_optimizer_device: cpu in zero3.yaml")
    remedies.append("a smaller model")
    plan.problems.append(f"memory: a rank needs {needed:.1f} GiB and a fifth of {size:.1f} GiB must stay for activations. Remedies: {'; '.join(remedies)}.")


def _width(values: dict, sharded: bool, on_cpu: bool) -> float:
    """Bytes a weight. DDP keeps the type in which the model was loaded, float32 by default; DeepSpeed casts to the run's own."""
    if values["load_in_4bit"] or values["load_in_8bit"]:
        return 1 if values["load_in_4bit"] else 1.5  # half a byte or one, and embeddings in 16 bits: an upper bound
    return 2 if values["dtype"] in ("bfloat16", "float16") or (sharded and not on_cpu) else 4
