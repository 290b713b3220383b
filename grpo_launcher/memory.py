"""Estimate the memory of each rank and of the server before anything is loaded. Standard library only."""

import math
import os
import shutil
from dataclasses import dataclass, replace

from grpo_launcher.errors import UserError
from grpo_launcher.layout import Hardware, Layout, server_dtype
from grpo_launcher.preflight_runner import ModelInfo

GIB = 2**30
# Shares of a device's memory that are left to what no library counts, such as the context of CUDA
FREE_ON_GPU, FREE_ON_CPU = 0.08, 0.05
FREE_UNKNOWN = 0.2  # the same where the activations are not known
LIBRARIES = 1.0  # GiB of a rank on a CPU beside what its model takes
# Found by measuring runs on a CPU: gloo gathers into copies, which leave gaps in the heap
GATHERED_ON_CPU, HEAP_ON_CPU = 2.5, 1.05
SERVER_LIBRARIES = 1.4  # GiB of a vLLM server's two processes on a CPU
SERVER_COPIES = 2  # of the weights: as loaded, and as packed for the kernels
# DeepSpeed's own sizes, in parameters: reduce_bucket_size and stage3_max_live_parameters
BUCKET, LIVE = 5e8, 1e9
# TRL's tile of logits, in tokens and vocabulary (kernels/chunked_logprob.py), and how many of them a CPU holds at once
TILE, TILES_ON_CPU = (4096, 32768), 8


@dataclass(frozen=True)
class Load:
    """What decides the memory of a rank."""

    model: ModelInfo
    ranks: int
    rows: int  # of a micro-batch
    bytes_per_weight: float
    has_gpu: bool
    zero3: bool
    lora: bool
    syncs: bool
    reference: bool
    offload: bool
    checkpointing: bool

    def parts(self) -> dict[str, float]:
        """Return the GiB on each rank, by what takes them.

        ZeRO-3 divides weights, gradients and optimizer by the ranks and keeps an fp32 master copy with Adam's two
        moments: 12 bytes a parameter. DDP keeps all of it on every rank, without a master copy. Of a model with fewer
        than LIVE parameters ZeRO-3 keeps all weights gathered during a step.
        Source: Rajbhandari et al. 2020, ZeRO, section 3.1.
        """
        model, size = self.model, self.bytes_per_weight
        trained = model.trainable if self.lora else model.parameters
        trained_size = 4 if self.lora and not self.zero3 else size  # peft and trainer.py keep an adapter in 32 bits
        share = 1 / (self.ranks if self.zero3 else 1) / GIB
        parts = {} if self.has_gpu else {"libraries": LIBRARIES}
        parts["weights"] = size * model.parameters * share
        parts["gradients"] = trained_size * trained * share
        if not self.offload:
            parts["optimizer"] = (12 if self.zero3 else 2 * trained_size) * trained * share
        if self.reference and not self.lora:
            parts["reference model"] = size * model.parameters * share
        if model.reward_parameters:
            parts["reward models"] = (2 if self.has_gpu else 4) * model.reward_parameters / GIB
        if self.ranks > 1 or self.zero3:
            # Allocated whole; a CPU gives only the part that is written.
            bucket = BUCKET if self.zero3 and self.has_gpu else min(trained, BUCKET) if self.zero3 else trained
            parts["gradient bucket"] = trained_size * bucket / GIB
        copies = 1 if self.has_gpu else GATHERED_ON_CPU
        gathered = copies * size * min(model.parameters, LIVE) / GIB if self.zero3 else 0
        step = {"gathered weights": gathered, "activations": self._activations(), "head": self._head()}
        merges = self.lora and self.zero3 and self.syncs
        sync = {"whole model at each sync": merges * copies * size * model.parameters / GIB}
        parts |= {name: gib for name, gib in max(step, sync, key=lambda part: sum(part.values())).items() if gib}
        return parts

    def total(self) -> float:
        """Return the GiB of a rank."""
        return sum(self.parts().values()) * (1 if self.has_gpu else HEAP_ON_CPU)

    def _activations(self) -> float:
        """Return what the backward pass of a micro-batch needs: all layers, or their inputs and one layer."""
        model, size = self.model, 2 if self.bytes_per_weight < 4 else 4
        whole = self.rows * model.row_activations / GIB
        if not self.checkpointing or not whole:
            return whole
        return self.rows * model.row_tokens * model.hidden * model.layers * size / GIB + whole / model.layers

    def _head(self) -> float:
        """Return the logits that are held at once, and the head's gradient in 32 bits."""
        model = self.model
        if not model.row_activations:
            return 0
        rows = self.rows if self.has_gpu or self.checkpointing else -(-self.rows // 2)  # as trainer.py scores them
        tile = min(rows * model.row_tokens, TILE[0]) * min(model.vocabulary, TILE[1]) * 4
        gradient = 0 if self.lora else model.vocabulary * model.hidden * 4
        return (tile * (1 if self.has_gpu else TILES_ON_CPU) + gradient) / GIB


def server_memory(parameters: int, size: float) -> float:
    """Return the GiB of a vLLM server on a CPU. It takes more at a weight sync, and the ranks take less then."""
    cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
    return SERVER_LIBRARIES + cache + SERVER_COPIES * size * parameters / GIB


def check_memory(
    values: dict, layout: Layout, hardware: Hardware, model: ModelInfo, offload: bool
) -> tuple[str, str, list[UserError]]:
    """Hold the estimate against the devices.

    Returns:
        One line for the plan; settings that take a fifth less, for a run whose memory runs out all the same; and what
        does not fit, with remedies.
    """
    zero3, has_gpu = layout.parallel == "zero3", bool(layout.train_gpus)
    load = Load(
        model=model,
        ranks=layout.ranks,
        rows=values["per_device_train_batch_size"],
        bytes_per_weight=_bytes_per_weight(values, zero3, has_gpu),
        has_gpu=has_gpu,
        zero3=zero3,
        lora=values["use_peft"],
        syncs=layout.use_vllm and values["weight_sync"] != "adapter",
        reference=values["beta"] != 0 and layout.method == "grpo",
        offload=offload and zero3,
        checkpointing=values["gradient_checkpointing"],
    )
    device, others = _device(values, layout, hardware, load)
    parts, needed = load.parts(), load.total()
    detail = " + ".join(f"{name} {gib:.2g}" for name, gib in parts.items())
    line = f"memory: {model.parameters / 1e6:,.1f} million parameters (from {model.source}); each rank: {detail}"
    line += "" if has_gpu else ", and 5 % for gaps"
    line += f" = {needed:.3g} of {device:.1f} GiB" + ("" if model.row_activations else ", and activations beside it")
    line += f"; {others}" if others else ""
    problems = _check_server(values, layout, model.parameters)
    free = (FREE_ON_GPU if has_gpu else FREE_ON_CPU) if model.row_activations else FREE_UNKNOWN
    if needed > device * (1 - free):
        remedies = _remedies(values, layout, load, device, free)
        problem = f"a rank needs {needed:.1f} GiB, and of {device:.1f} GiB {free:.0%} must stay free"
        problems.append(UserError("memory", problem + (f"; {others}" if others else ""), "; or ".join(remedies)))
    return line, "; or ".join(_remedies(values, layout, load, 0.8 * needed, 0)), problems


def _device(values: dict, layout: Layout, hardware: Hardware, load: Load) -> tuple[float, str]:
    """Return the GiB that a rank can have, and in words what else takes memory there."""
    if not layout.train_gpus:
        server = server_memory(load.model.parameters, load.bytes_per_weight) if layout.starts_server else 0
        others = f"the server {server:.1f} of the machine's {hardware.memory:.1f} GiB" if server else ""
        return (hardware.memory - server) / (layout.ranks // layout.num_nodes), others
    device = min(gpu.memory for gpu in layout.train_gpus)
    if not (layout.use_vllm and layout.vllm_mode == "colocate"):
        return device, ""
    share = values["vllm_gpu_memory_utilization"] * device
    return device - share, f"vLLM {share:.1f} of the GPU's {device:.1f} GiB"


def _check_server(values: dict, layout: Layout, parameters: int) -> list[UserError]:
    problems = []
    weights = (4 if server_dtype(values) == "float32" else 2) * parameters / GIB
    if layout.use_vllm and layout.vllm_mode == "colocate" and layout.train_gpus:
        device, part = min(gpu.memory for gpu in layout.train_gpus), weights / values["vllm_tensor_parallel_size"]
        share = values["vllm_gpu_memory_utilization"]
        if part > 0.8 * share * device:
            problem = f"{share}: vLLM gets {share * device:.1f} GiB of a GPU, for {part:.1f} GiB of weights"
            fix = f"give at least {math.ceil(part / 0.8 / device * 20) / 20:g}, or a larger vllm_tensor_parallel_size"
            problems.append(UserError("vllm_gpu_memory_utilization", problem, fix))
    count = layout.tensor_parallel
    if layout.server_gpus and weights / count > 0.8 * min(gpu.memory for gpu in layout.server_gpus):
        problem = f"{count}: {weights:.0f} GiB of weights do not fit the server's GPUs"
        problems.append(UserError(layout.size_field, problem, "give a larger number"))
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


def _remedies(values: dict, layout: Layout, load: Load, device: float, free: float) -> list[str]:
    """Return the settings nearest to the recipe's that leave the share `free` of `device` GiB."""

    def would_fit(limit: float = device * (1 - free), **changes) -> float:
        needed = replace(load, **changes).total()
        return needed if needed <= limit else 0

    remedies = []
    for factor in [factor for factor in range(2, load.rows + 1) if load.rows % factor == 0]:
        if needed := would_fit(rows=load.rows // factor):
            steps = values["gradient_accumulation_steps"] * factor
            advice = f"--per_device_train_batch_size {load.rows // factor} --gradient_accumulation_steps {steps}"
            remedies.append(f"smaller micro-batches ({needed:.1f} GiB): {advice}")
            break
    if not load.checkpointing and (needed := would_fit(checkpointing=True)):
        remedies.append(f"--gradient_checkpointing true ({needed:.1f} GiB)")
    if load.has_gpu:
        has_server = layout.use_vllm and (layout.starts_server or layout.ranks == 1)  # from two GPUs on
        limit = (1 - free) * min(gpu.memory for gpu in layout.train_gpus) if has_server else device * (1 - free)
        enough = next((ranks for ranks in range(layout.ranks + 1, 65) if would_fit(limit, ranks=ranks)), None)
        if enough and has_server:
            remedies.append(f"{enough + max(1, len(layout.server_gpus))} such GPUs ({enough} train)")
        elif enough:
            remedies.append(f"{enough} such GPUs")
    if not load.zero3 and not (values["load_in_4bit"] or values["load_in_8bit"]):
        remedies.append("ZeRO-3, which shards all of it: --parallel zero3")
    if not load.lora:
        if needed := would_fit(lora=True):
            advice = "--use_peft true with a learning rate of about 1e-5, or configs/tldr_lora.yaml for TL;DR"
            remedies.append(f"LoRA ({needed:.1f} GiB): {advice}")
        needed = would_fit(offload=True)
        if needed and load.zero3 and load.has_gpu and not load.offload:
            remedies.append(f"optimizer offload ({needed:.1f} GiB): offload_optimizer_device: cpu in zero3.yaml")
    return [*remedies, "a smaller model"]


def _bytes_per_weight(values: dict, zero3: bool, has_gpu: bool) -> float:
    """DDP keeps the type in which the model was loaded, float32 by default. DeepSpeed casts to the run's own type."""
    if values["load_in_4bit"]:
        return 1  # half a byte, and embeddings in 16 bits: an upper bound
    if values["load_in_8bit"]:
        return 1.5
    return 2 if values["dtype"] in ("bfloat16", "float16") or (zero3 and has_gpu) else 4
