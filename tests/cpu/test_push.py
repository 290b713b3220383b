"""A LoRA run with a reward model that is pushed to the Hub: a small server here stands for it."""

import re

import pytest
import torch
from helpers import ROOT, read_metrics, run_code, run_python
from hub_server import Hub
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification


@pytest.fixture(scope="module")
def pushed(module_workplace):
    """The folder of a short run, and what the Hub was sent. A folder with a sequence classifier is a reward."""
    tokenizer = AutoTokenizer.from_pretrained(module_workplace / "data/quickstart-model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    config = Qwen2Config(vocab_size=len(tokenizer), num_labels=1, num_key_value_heads=2, **tokens, **sizes)
    Qwen2ForSequenceClassification(config).save_pretrained(module_workplace / "judge/model")
    tokenizer.save_pretrained(module_workplace / "judge/model")
    hub = Hub()
    command = [ROOT / "train.py", "--config", ROOT / "configs/quickstart.yaml", "--output_dir", "pushed"]
    command += ["--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "8"]
    command += ["--reward_funcs", "rewards.length.length_reward", "judge/model", "--reward_weights", "1", "0.5"]
    command += ["--learning_rate", "1e-2"]
    command += ["--max_completion_length", "32", "--use_peft", "true", "--lora_target_modules", "all-linear"]
    command += ["--push_to_hub", "true", "--hub_model_id", "somebody/short"]
    try:
        run_python(*command, cwd=module_workplace, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, HF_TOKEN="hf_none")
    finally:
        hub.close()
    again = run_python(*command, cwd=module_workplace, status=2)
    assert "output_dir: pushed holds another run" in again.stderr
    return module_workplace, hub.commits


def test_only_the_final_checkpoint_is_pushed(pushed):
    """Once, with its card, and nothing else of the run: its logs tell of this machine."""
    folder, commits = pushed
    assert len(commits) == 1
    assert all(
        {"rewards/length_reward/mean", "rewards/model/mean"} <= set(line) for line in read_metrics(folder / "pushed")
    )
    files = {path.name: path.read_bytes() for path in (folder / "pushed/final-checkpoint").iterdir()}
    assert commits[0] == files
    assert {"README.md", "curves.png", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(
        files
    )
    card = files["README.md"].decode()
    assert "# somebody/short" in card and str(folder) not in card
    assert ModelCard(card).data.library_name == "peft" and "lora" in ModelCard(card).data.tags


def test_the_commands_of_the_card_work(pushed):
    """They load and merge the adapter as they stand. The merged model computes what base and adapter do."""
    folder, _ = pushed
    card = (folder / "pushed/final-checkpoint/README.md").read_text()
    load, merge = re.findall("```python\n(.*?)```", card.replace("somebody/short", "pushed/final-checkpoint"), re.S)
    assert len(run_code(load, folder).split()) > 3
    run_code(merge, folder)
    ids = AutoTokenizer.from_pretrained(folder / "merged")("My brother sold my bike.", return_tensors="pt")[
        "input_ids"
    ]
    base, merged = (
        AutoModelForCausalLM.from_pretrained(folder / name) for name in ("data/quickstart-model", "merged")
    )
    with torch.inference_mode():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "pushed/final-checkpoint")(ids).logits
        assert (adapted - plain).abs().max() > 1e-2
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=1e-4)
