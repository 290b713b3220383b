"""The worker's side of weight_sync.py, loaded by the vLLM server. Imports neither trl nor transformers."""

import torch


class DiskSyncWorker:
    """A vLLM worker extension (`--worker-extension-cls`) with two methods for `/collective_rpc`."""

    pushed = ""

    def last_push(self) -> str:
        """Return the folder that its weights came from; "" for those of the base model."""
        return self.pushed

    def load_weights_from(self, path: str) -> None:
        """Replace the model's weights by the safetensors files in the folder `path`.

        On a CPU vLLM packs each matrix when it loads it. A head that is tied to the embeddings keeps its old packing,
        and would go on generating with stale weights, so it is packed again here.
        """
        self.reload_weights(weights_path=path)
        model = self.model_runner.get_model()
        if self.device.type == "cpu" and getattr(model.config, "tie_word_embeddings", False):
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            with torch.inference_mode():
                dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
        self.pushed = path
