"""Weights from trainer to vLLM server as one file in shared memory, where NCCL cannot connect the two."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient


class DiskSyncClient(VLLMClient):
    """TRL's client with the NCCL group replaced by a folder: one file written, one request to read it, a sync.

    The server must run on this machine with `--worker-extension-cls grpo_launcher.weight_sync_worker.DiskSyncWorker`. The largest sync
    takes the model's size in shared memory for a moment; nothing stays. GRPO_SHARED_MEMORY names another folder: the launcher's own,
    which it removes even where the trainer was killed in mid-sync.
    """

    def init_communicator(self, device: torch.device | str | int = 0):
        """Nothing to connect: every sync stands alone."""

    def update_named_params(self, metadata, named_params):
        """Write the (name, tensor) pairs to a file and have every worker of the server load it."""
        folder = Path(tempfile.mkdtemp(prefix="grpo-weights-", dir=os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")))
        try:
            weights = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named_params}
            save_file(weights, folder / "model.safetensors")
            request = {"method": "load_weights_from", "kwargs": {"path": str(folder)}}
            self._post(f"{self.base_url}/collective_rpc", json=request)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
