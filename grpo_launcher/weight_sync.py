"""Weights from trainer to vLLM server as files in shared memory, for CPUs and where NCCL cannot connect the two."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient

BUCKET = 2**28  # bytes of weights that the trainer copies at a time


class DiskSyncClient(VLLMClient):
    """TRL's client with a folder in place of the NCCL group: a sync is a few files and one request to read them.

    The server runs on the same machine, with `--worker-extension-cls grpo_launcher.weight_sync_worker.DiskSyncWorker`.
    A sync takes the model's size in shared memory for a moment. GRPO_SHARED_MEMORY names another folder: the
    launcher's own, which it removes even where the trainer was killed during a sync.
    """

    def init_communicator(self, device: torch.device | str | int = 0):
        """Connect nothing. Overrides VLLMClient.init_communicator, which refuses every device but CUDA."""

    def update_named_params(self, metadata, named_params):
        """Write the (name, tensor) pairs to files of about BUCKET bytes and let every worker of the server load them.

        Overrides VLLMClient.update_named_params, which broadcasts over NCCL.
        """
        shared_memory = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="grpo-weights-", dir=shared_memory))
        try:
            for number, bucket in enumerate(_buckets(named_params)):
                save_file(bucket, folder / f"{number:05}.safetensors")
            request = {"method": "load_weights_from", "kwargs": {"path": str(folder)}}
            self._post(f"{self.base_url}/collective_rpc", json=request)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _buckets(named_params):
    """Yield the (name, tensor) pairs as dicts of copies."""
    bucket, size = {}, 0
    for name, tensor in named_params:
        bucket[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= BUCKET:
            yield bucket
            bucket, size = {}, 0
    yield bucket
