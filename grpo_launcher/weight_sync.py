"""Weights from trainer to vLLM: as files in shared memory, of a LoRA adapter alone, and merged without a trace.

Files are for CPUs, where NCCL cannot connect the two, and the adapter for ranks without memory for the whole model.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import requests
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from requests.adapters import HTTPAdapter
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient

BUCKET = 2**28  # bytes of weights that the trainer copies at a time


class DiskSyncClient(VLLMClient):
    """TRL's client with a folder in place of the NCCL group: a sync is a few files and one request to read them.

    The server runs on the same machine, with `--worker-extension-cls grpo_launcher.weight_sync_worker.DiskSyncWorker`.
    A sync takes the model's size in shared memory for a moment. GRPO_SHARED_MEMORY names another folder: the
    launcher's own, which it removes even where the trainer was killed during a sync.
    """

    adapter: tempfile.TemporaryDirectory | None = None  # of the adapter that the server generates with

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # VLLMClient asks up to five times: a server that is slow would generate the same completions again.
        self.session.mount("http://", HTTPAdapter())
        self.pushed = ""  # folder of the last push

    def reconnect(self, timeout: float) -> None:
        """Wait for a server, which may be a new one.

        Args:
            timeout: seconds.

        Raises:
            requests.RequestException: none came.
        """
        self.check_server(timeout)
        if self.adapter and self.model not in self._models():
            self.adapter = None
        if self.adapter is None:
            self.model = self._models()[0]

    def has_weights(self) -> bool:
        """Whether the server has what was pushed last. A new one has not, and answers as if nothing were wrong."""
        if self.adapter:
            return self.model in self._models()
        if not self.pushed:
            return True
        workers = self._post(f"{self.base_url}/collective_rpc", json={"method": "last_push"})["results"]
        return all(pushed == self.pushed for pushed in workers)

    def _models(self) -> list[str]:
        response = self.session.get(f"{self.base_url}/v1/models")
        response.raise_for_status()
        return [model["id"] for model in response.json()["data"]]

    def _post(self, url: str, **kwargs) -> dict:
        """Ask the server. One that fails by itself counts as lost, which VLLMClient._post does not tell apart."""
        return _checked(self.session.post(url, **kwargs)).json()

    def init_communicator(self, device: torch.device | str | int = 0):
        """Connect nothing. Overrides VLLMClient.init_communicator, which refuses every device but CUDA."""

    def update_named_params(self, metadata, named_params):
        """Write the (name, tensor) pairs to files of about BUCKET bytes and let every worker of the server load them.

        Overrides VLLMClient.update_named_params, which broadcasts over NCCL.
        """
        with _new_folder() as folder:
            for number, bucket in enumerate(_buckets(named_params)):
                save_file(bucket, f"{folder}/{number:05}.safetensors")
            request = {"method": "load_weights_from", "kwargs": {"path": folder}}
            self._post(f"{self.base_url}/collective_rpc", json=request)
            self.pushed = folder

    def load_adapter(self, config, weights: dict[str, torch.Tensor]) -> None:
        """Let the server generate with this adapter from now on.

        Each version has a name of its own: vLLM keeps prefixes of prompts by the adapter's name (vllm#42125).

        Args:
            config: peft's.
            weights: as peft saves them.
        """
        folder = _new_folder()
        config.save_pretrained(folder.name)
        save_file(weights, f"{folder.name}/adapter_model.safetensors")
        name = Path(folder.name).name
        self._adapter_request("load", lora_name=name, lora_path=folder.name)
        before, self.adapter, self.model = self.adapter, folder, name
        if before:
            self._adapter_request("unload", lora_name=Path(before.name).name)
            before.cleanup()

    def reset_prefix_cache(self) -> None:
        """Let the server forget prefixes. VLLMClient.reset_prefix_cache does not tell one that failed by itself."""
        _checked(self.session.post(f"{self.base_url}/reset_prefix_cache"))

    def _adapter_request(self, verb: str, **body: str) -> None:
        _checked(self.session.post(f"{self.base_url}/v1/{verb}_lora_adapter", json=body))


def _checked(response: requests.Response) -> requests.Response:
    """Return a response of status 200.

    Raises:
        requests.ConnectionError: the server failed by itself.
        RuntimeError: it refused the request.
    """
    if response.status_code >= 500:
        raise requests.ConnectionError(f"it answered {response.status_code}: {response.text}")
    if response.status_code != 200:
        raise RuntimeError(f"the vLLM server refused {response.url}: {response.status_code}, {response.text}")
    return response


def send_adapter(model: PeftModel, dist, client: DiskSyncClient | None) -> None:
    """Give the server a model's adapter. All ranks call it together, and gather nothing but the adapter.

    VLLMGeneration.sync_weights gathers the whole model on every rank under ZeRO-3 (trl#5975).

    Args:
        model: it is not wrapped.
        dist: TRL's DistributedBackend.
        client: the main rank's, None on the others.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with dist.gather_params(list(parameters.values())):
        if client:
            weights = get_peft_model_state_dict(model, parameters, save_embedding_layers=False)
            weights = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
            client.load_adapter(model.peft_config["default"], weights)


def merged_parameters(model: PeftModel, walk: Callable[[], Iterator]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and weights that vLLM gets of a model with LoRA. The model's own weights are not touched.

    TRL adds the adapter to the weights in place and takes it away again. In 16 bits that does not give the weights
    back, so each push would change the frozen base. And vLLM's NCCL engine packs its last tensors after the end of
    the walk, where TRL has taken the adapter away already.

    Args:
        model: it is not wrapped.
        walk: VLLMGeneration._iter_named_params, which gathers the weights.
    """
    layers = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[name.removeprefix("base_model.model.").replace(".base_layer", "")].append(module)
    model.merge_adapter = model.unmerge_adapter = lambda: None  # hides the methods that TRL calls
    try:
        for name, weight in walk():
            owner, _, attribute = name.rpartition(".")
            yield name, _merged(layers[owner], attribute) if owner in layers else weight
    finally:
        del model.merge_adapter, model.unmerge_adapter


@torch.no_grad()
def _merged(layers: list[BaseTunerLayer], attribute: str) -> torch.Tensor:
    """Return a weight of the layer below `layers` with their adapter, as a copy."""
    base = layers[0].get_base_layer()
    before = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
    for layer in layers:
        layer.merge(safe_merge=True)  # into a new tensor
        layer.merged_adapters.clear()
    merged = getattr(base, attribute).data
    for name, weight in before.items():
        getattr(base, name).data = weight
    return merged


def _new_folder() -> tempfile.TemporaryDirectory:
    shared_memory = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
    return tempfile.TemporaryDirectory(prefix="grpo-weights-", dir=shared_memory, ignore_cleanup_errors=True)


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
