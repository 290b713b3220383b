"""After every push server and trainer score the same tokens: a fault in the sync ends a run in its own step."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from table_server import TableServer, train_beside
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from grpo_launcher import trainer as trainer_module
from grpo_launcher.callbacks import SYNC_DIFFERENCE, Guards, guard_limits
from grpo_launcher.runs import read_metrics
from grpo_launcher.weight_sync import merged_parameters

FLAGS = ["--max_steps", "3", "--learning_rate", "1e-2", "--lora_target_modules", "all-linear"]
FLAGS += ["--vllm_importance_sampling_correction", "false", "--max_completion_length", "8"]


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

    def has_weights(self):
        return True

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
            kept = {name: getattr(config, name) for name in ("r", "lora_alpha", "target_modules")}
            self.model = get_peft_model(self.model, LoraConfig(**kept))
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

    def run(fault: str, *flags: str) -> tuple[str | None, list[float]]:
        kind = type("FaultyServer", (Server,), {"fault": fault, "folder": str(model)})
        monkeypatch.setattr(trainer_module, "DiskSyncClient", kind)
        guards = Guards(tmp_path, guard_limits(None, beta=0.0))
        unused = TableServer.at("http://unused")
        train_beside(unused, model, tmp_path, *FLAGS, *flags, callbacks=[guards])
        return guards.stopped, [line[SYNC_DIFFERENCE] for line in read_metrics(tmp_path) if "reward" in line]

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
    ids=["LoRA", "DoRA", "biases", "embeddings", "a whole layer"],
)
def test_a_push_sends_merged_weights_and_changes_none(model, options):
    """In 16 bits, and for a reader that looks at the tensors after the walk, as vLLM's NCCL engine does."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(r=4, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    generation = object.__new__(VLLMGeneration)
    generation.model = adapted
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext())
    for _ in range(3):
        sent = dict(list(merged_parameters(adapted, generation._iter_named_params)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapted.named_parameters())
    whole = dict(copy.deepcopy(adapted).merge_and_unload(safe_merge=True).named_parameters())
    assert sent.keys() == whole.keys() and all(torch.equal(sent[name], whole[name]) for name in whole)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    assert sum(not torch.equal(sent[name], original[name]) for name in sent) >= 3


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
