"""Bytes of weights, gradients and optimizer on each rank, before anything is loaded."""

GIB = 2**30
ROOM = 0.2  # share of a GPU's memory left to activations, gathered layers and buffers


def states(parameters: int, ranks: int, *, lora: bool, reference: bool, offload: bool, on_cpu: bool) -> dict[str, float]:
    """GiB on each of `ranks` ZeRO-3 ranks, by what takes them.

    On a GPU bf16 weights and gradients (2 bytes a parameter each) and an fp32 master copy with Adam's two moments (12); on a
    CPU all in fp32. LoRA trains a per cent of the weights or two (left out), and gathers the whole model at every sync.
    Source: Rajbhandari et al. 2020, ZeRO, section 3.1; ZeRO-3 divides all of it by the ranks.
    """
    width = 4 if on_cpu else 2
    share = parameters / ranks / GIB
    parts = {"weights": width * share}
    if lora:
        parts["whole model at each sync"] = width * parameters / GIB
    else:
        parts["gradients"] = width * share
        if not offload:
            parts["optimizer"] = 12 * share
        if reference:
            parts["reference model"] = width * share
    return parts


def fits(needed: float, memory: float) -> bool:
    """Whether `needed` GiB leave ROOM of a device of `memory` GiB."""
    return needed <= memory * (1 - ROOM)
