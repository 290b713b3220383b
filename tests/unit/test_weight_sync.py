"""After every push server and trainer score the same tokens: a fault in the sync ends a run in its own step."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_models import make_model
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from grpo_launcher import trainer as trainer_module
from grpo_launcher.callbacks import SYNC_DIFFERENCE, Guards, RunLog, guard_limits
from grpo_launcher.config import build_dataclasses, load_config
from grpo_launcher.runs import read_metrics
from grpo_launcher.trainer import build_trainer

ROWS = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"What of number {n}?"}] for n in range(8)]})


def rate(completion_ids, **columns):
    """Return a reward that differs within a group."""
    return [float(sum(ids)) for ids in completion_ids]


FLAGS = ["--dataset_name", "rows", "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "3"]
FLAGS += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--max_completion_length", "8"]
FLAGS += [
    "--learning_rate",
    "1e-2",
    "--use_vllm",
    "true",
    "--vllm_mode",
    "server",
    "--vllm_importance_sampling_correction",
    "false",
]
FLAGS += ["--lora_target_modules", "all-linear", "--sample_every", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, seed=0)
    return folder


class Server:
    """Stands for client and server: a model of its own, which generates with the weights that it was sent.

    Args:
        fault: what goes wrong with the second push and those after it.
    """

    fault, folder = "", ""

    def __init__(self, **_):
        self.model, self.pushes = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32), 0

    def init_communicator(self, device):
        pass

    def reset_prefix_cache(self):
        pass

    def update_named_params(self, metadata, named_params):
        own, self.pushes = dict(self.model.named_parameters()), self.pushes + 1
        fault = self.fault if self.pushes == 2 else ""
        for name, weight in named_params:
            if fault == "a push is skipped":
                continue
            is_corrupt = fault == "a tensor is corrupted" and name.endswith("layers.1.mlp.down_proj.weight")
            own[name].data.copy_(weight.flip(0) if is_corrupt else weight)

    def load_adapter(self, config, weights):
        self.pushes += 1
        if self.pushes == 1:
            self.model = get_peft_model(
                self.model, LoraConfig(**{k: getattr(config, k) for k in ("r", "lora_alpha", "target_modules")})
            )
        if self.pushes != 2 or self.fault != "the adapter is not loaded":
            set_peft_model_state_dict(self.model, weights)

    def generate(self, prompts, features=None, n=1, temperature=1.0, max_tokens=16, **_):
        ids, logprobs = [], []
        for prompt in prompts:
            options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_tokens, "min_new_tokens": max_tokens}
            tokens = torch.tensor([prompt] * n)
            with torch.no_grad():
                done = self.model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
                scores = self.model(done).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
            new = done[:, len(prompt) :]
            ids += new.tolist()
            logprobs += scores.gather(2, new.unsqueeze(2)).tolist()
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": logprobs}


@pytest.fixture
def train(model, tmp_path, monkeypatch):
    """Return a function (fault, flags) -> the message of the guard, and the differences of each step."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", VLLMClient)

    def run(fault: str, *flags: str) -> tuple[str | None, list[float]]:
        kind = type("FaultyServer", (Server,), {"fault": fault, "folder": str(model)})
        monkeypatch.setattr(trainer_module, "DiskSyncClient", kind)
        argv = ["--model_name_or_path", str(model), *FLAGS, *flags]
        recipe, args, model_args = build_dataclasses(load_config(argv).values)
        guards = Guards(tmp_path, guard_limits(None, beta=0.0))
        options = {"reward_funcs": [rate], "callbacks": [RunLog(tmp_path), guards]}
        rows = {"train_dataset": ROWS, "eval_dataset": None}
        trainer = build_trainer(recipe, args, model_args, run=tmp_path, **options, **rows)
        trainer.train()
        return guards.stopped, [line[SYNC_DIFFERENCE] for line in read_metrics(tmp_path) if "reward" in line]

    return run


@pytest.mark.parametrize(
    ("fault", "flags"),
    [
        ("", ["--weight_sync", "disk"]),
        ("", ["--weight_sync", "disk", "--use_peft", "true"]),
        ("", ["--weight_sync", "adapter", "--use_peft", "true"]),
        ("a push is skipped", ["--weight_sync", "disk"]),
        ("a tensor is corrupted", ["--weight_sync", "disk"]),
        ("the adapter is not loaded", ["--weight_sync", "adapter", "--use_peft", "true"]),
    ],
)
def test_a_fault_in_the_sync_ends_the_run_in_its_step(train, fault, flags):
    stopped, differences = train(fault, *flags)
    if fault:
        assert stopped and "step 2" in stopped and SYNC_DIFFERENCE in stopped
        assert differences[0] < 1e-4 and differences[1] > 1e-3
    else:
        assert not stopped and len(differences) == 3 and max(differences) < 1e-4
