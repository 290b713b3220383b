"""merge.py: an adapter to start from becomes part of its base, once."""

import os

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_models import make_adapter, make_encoder_model, make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from grpo_launcher import merge
from grpo_launcher.chat.backends import line_up
from grpo_launcher.config import build_dataclasses, load_config
from grpo_launcher.errors import UserError
from grpo_launcher.trainer import build_trainer


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_the_merged_model_computes_what_base_and_adapter_do(kind, tmp_path, capsys):
    """A newer adapter has to be merged anew."""
    base, name = tmp_path / "base", str(tmp_path / "adapter")
    if kind == "t5":
        make_encoder_model(base, "t5")
    else:
        make_model(base, seed=0)
    make_adapter(tmp_path / "adapter", base, seed=1)
    assert merge.needs_merge(name) == name == merge.merged_path(name)
    merge.main([name])
    assert capsys.readouterr().out.endswith(f"Wrote {name}/merged\n")
    assert merge.needs_merge(name) is None and merge.merged_path(name) == f"{name}/merged"
    assert {path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()} == {"merged"}
    flags = ["--model_name_or_path", name, "--dataset_name", "rows"]
    assert load_config(flags).values["model_name_or_path"] == f"{name}/merged"

    auto_class = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    inputs = dict(AutoTokenizer.from_pretrained(f"{name}/merged")("The cat sat", return_tensors="pt"))
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        plain, merged = (auto_class.from_pretrained(folder)(**inputs).logits for folder in (base, f"{name}/merged"))
        adapted = PeftModel.from_pretrained(auto_class.from_pretrained(base), name)(**inputs).logits
    assert torch.allclose(merged, adapted, atol=1e-4) and (adapted - plain).abs().max() > 1e-2
    os.utime(tmp_path / "adapter/adapter_model.safetensors", (2e9, 2e9))
    assert merge.needs_merge(name) == name


def test_the_revision_that_was_trained_on_is_loaded(tmp_path, monkeypatch):
    """By merge, chat and comparison: the adapter names it."""
    make_model(tmp_path / "base", seed=0)
    flags = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", "rows", "--use_peft", "true"]
    flags += ["--model_revision", "v1.0", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    recipe, args, model_args = build_dataclasses(load_config(flags).values)
    rows = Dataset.from_dict({"prompt": ["The cat"] * 8})
    options = {"train_dataset": rows, "eval_dataset": None, "reward_funcs": [len], "callbacks": []}
    trainer = build_trainer(recipe, args, model_args, run=tmp_path / "run", **options)
    trainer.save_model(str(tmp_path / "run/final-checkpoint"))
    loaded = []

    def record(kind):
        load = kind.from_pretrained

        def from_pretrained(name, *args, **kwargs):
            if str(name) == str(tmp_path / "base"):
                loaded.append((kind, kwargs.get("revision")))
            return load(name, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (AutoConfig, AutoModelForCausalLM, GenerationConfig):
        record(kind)
    merge.merge(tmp_path / "run/final-checkpoint")
    assert {(AutoConfig, "v1.0"), (AutoModelForCausalLM, "v1.0")} <= {*loaded}
    loaded.clear()
    (model,) = line_up([str(tmp_path / "run/final-checkpoint")], None, []).models
    with model.pool.active(model.checkpoint, model.config):
        pass
    kinds = {kind for kind, revision in loaded if revision == "v1.0"}
    assert kinds >= {AutoConfig, GenerationConfig} and model.checkpoint.model_key.endswith("base@v1.0")


def test_what_is_no_adapter_is_left_as_it_is(tmp_path):
    assert merge.merged_path(str(tmp_path)) == str(tmp_path) and merge.needs_merge("Qwen/Qwen3-0.6B") is None
    with pytest.raises(UserError, match=merge.ADAPTER_CONFIG):
        merge.main([str(tmp_path)])


def test_a_base_that_is_not_there_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "./nowhere"}')
    with pytest.raises(UserError, match="cannot be read") as refused:
        merge.main([str(tmp_path)])
    assert refused.value.field == str(tmp_path) and not (tmp_path / "merged").exists()
