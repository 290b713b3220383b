"""The plan: layout, arithmetic, memory and context, for hardware that need not be there."""

import socket

import pytest

from grpo_launcher.launch import hardware
from grpo_launcher.launch.arguments import parse

FULL = {  # (GPUs, GiB of each): (ranks, completions a step) or the refusal's remedies
    (1, 24): ["3 such GPUs (2 train)", "LoRA", "optimizer offload"],
    (2, 24): ["3 such GPUs (2 train)", "LoRA", "configs/tldr_lora.yaml", "optimizer offload"],
    (3, 24): (2, 64),
    (4, 24): (3, 96),
    (8, 24): (7, 224),
    (1, 80): (1, 32),
    (2, 80): (1, 32),
    (3, 80): (2, 64),
    (4, 80): (3, 96),
    (8, 80): (7, 224),
}


@pytest.mark.parametrize("hardware_", FULL, ids=lambda pair: f"{pair[0]} of {pair[1]} GiB")
def test_full_fine_tuning_of_1_5b(hardware_, resolved, make_plan):
    """configs/tldr_length.yaml for 1, 2, 3, 4 and 8 GPUs: a right plan or a right refusal."""
    made, expected = make_plan(resolved("tldr_length"), *hardware_), FULL[hardware_]
    if isinstance(expected, list):
        assert len(made.problems) == 1 and made.problems[0].startswith("memory:")
        assert all(remedy in made.problems[0] for remedy in expected), made.problems
        return
    assert made.problems == []
    ranks, completions = expected
    assert made.ranks == ranks and made.accelerate["num_processes"] == ranks
    assert any(f"= {completions} completions a step" in line for line in made.lines), made.lines
    if hardware_[0] == 1:
        assert made.server is None and made.values["vllm_mode"] == "colocate"
        return
    trainers = made.trainer["env"]["CUDA_VISIBLE_DEVICES"].split(",")
    assert made.server["env"]["CUDA_VISIBLE_DEVICES"] == str(hardware_[0] - 1), "the last GPU generates"
    assert trainers == [str(index) for index in range(hardware_[0] - 1)], "the device lists are disjoint"
    assert made.values["vllm_mode"] == "server" and made.values["weight_sync"] == "nccl" and made.values["bf16"]
    assert made.accelerate["mixed_precision"] == "bf16" and made.accelerate["use_cpu"] is False
    assert "--host 127.0.0.1" in " ".join(made.server["command"])


def test_lora_on_two_cards_of_24(resolved, make_plan):
    """configs/tldr_lora.yaml does what its first line says."""
    made = make_plan(resolved("tldr_lora"), 2, 24)
    assert made.problems == [] and made.ranks == 1


def test_tensor_parallel_server(resolved, make_plan):
    """--vllm_gpus takes the last GPUs, and at least one must train."""
    made = make_plan(resolved("tldr_length"), 8, 80, vllm_gpus=2)
    assert made.server["env"]["CUDA_VISIBLE_DEVICES"] == "6,7" and made.ranks == 6
    assert made.server["command"][made.server["command"].index("--tensor-parallel-size") + 1] == "2"
    assert "at least one must train" in make_plan(resolved("tldr_length"), 2, 80, vllm_gpus=2).problems[0]


def test_colocate_uses_every_gpu(resolved, make_plan):
    """--colocate: all train, all generate; without a GPU there is nothing to share."""
    made = make_plan(resolved("tldr_length"), 4, 80, colocate=True)
    assert made.ranks == 4 and made.server is None and made.problems == []
    assert any("--colocate" in problem for problem in make_plan(resolved("tldr_length"), 0, colocate=True).problems)


def test_without_a_gpu_two_ranks_and_a_server(resolved, make_plan):
    """The same topology on the CPU, weights over shared memory."""
    made = make_plan(resolved("tldr_length"), 0)
    assert made.ranks == 2 and made.server and made.values["weight_sync"] == "disk" and made.values["use_cpu"]
    assert made.accelerate["use_cpu"] is True and made.accelerate["mixed_precision"] == "no"
    assert "NCCL connects GPUs only" in make_plan(resolved("tldr_length"), 0, sync="nccl").problems[0]


def test_what_the_machine_changes_is_said(resolved, make_plan):
    """A value of the YAML that the machine overrules is printed with the reason."""
    made = make_plan(resolved("tldr_length"), 0, given={"bf16": True})
    assert "bf16: True → False (0 GPUs)" in made.lines


@pytest.mark.parametrize("given", [{"tools": ["grpo_launcher.tools.calculator.calculator"]}, {"environment_factory": "game.Game"}], ids=lambda given: next(iter(given)))
def test_a_later_turn_needs_room_for_a_whole_reply_more(given, resolved, make_plan):
    """With tools or an environment the server's context is the prompt and twice the reply."""
    facts = resolved("tldr_length")
    facts["given"].remove("vllm_max_model_length")
    assert make_plan(facts, 4, 80, given=given).values["vllm_max_model_length"] == 768 + 2 * 256


def test_the_server_must_divide_the_heads(resolved, make_plan):
    """Tensor parallelism splits attention heads."""
    facts = resolved("tldr_length")
    facts["model"]["heads"] = 12
    assert "12 attention heads divide among 1, 2, 3, 4, 6, 12 GPUs" in make_plan(facts, 8, 80, vllm_gpus=5).problems[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}, "per_device_train_batch_size 8"),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}, "or num_generations"),
        ({"generation_batch_size": 100}, "generation_batch_size: 100 is no multiple of 8 completions × 3 ranks = 24"),
        ({"vllm_max_model_length": 800}, "--max_prompt_length 544"),
    ],
)
def test_what_does_not_divide_or_fit_is_refused_with_valid_values(given, said, resolved, make_plan):
    """Nearest valid values stand in the message; nothing is changed in silence."""
    made = make_plan(resolved("tldr_length"), 4, given=given)
    assert said in made.problems[0], made.problems
    assert all(made.values[name] == value for name, value in given.items())


@pytest.mark.parametrize("size", [8, 16])
def test_the_valid_values_named_are_valid(size, resolved, make_plan):
    """Both sides of 12 on three trainers."""
    refused = make_plan(resolved("tldr_length"), 4, given={"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1})
    assert "per_device_train_batch_size 8 or 16" in refused.problems[0]
    given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1}
    assert make_plan(resolved("tldr_length"), 4, given=given).problems == []


def test_too_few_prompts_are_refused(resolved, make_plan):
    """TRL would end with exit status 0 after 0 steps."""
    facts = resolved("tldr_length")
    facts["data"]["rows"] = 7
    assert "7 prompts, and one generation takes 12" in make_plan(facts, 4).problems[0]


def test_a_context_beyond_the_model_is_refused(resolved, make_plan):
    """The model's own limit counts too."""
    facts = resolved("tldr_length")
    facts["model"]["context"] = 1000
    assert "the model's context is 1000" in make_plan(facts, 4).problems[0]


def test_a_named_port_that_is_taken_is_refused(resolved, make_plan):
    """And a free one is found where none is named."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = make_plan(resolved("tldr_length"), 4, given={"vllm_server_port": port}, dry_run=False)
    assert made.problems == [f"vllm_server_port: port {port} is taken; leave the field out and a free one is found."]


def test_visible_devices_are_respected(monkeypatch, tmp_path):
    """CUDA_VISIBLE_DEVICES chooses and orders; a GPU that is not there is named."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nprintf '0, GPU-aa, 24576\\n1, GPU-bb, 24576\\n2, GPU-cc, 24576\\n'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu["id"] for gpu in hardware.find_gpus()] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-aa")
    assert [(gpu["id"], gpu["memory"]) for gpu in hardware.find_gpus()] == [("2", 24.0), ("GPU-aa", 24.0)]
    for none in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert hardware.find_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-aa")
    with pytest.raises(ValueError, match="GPU GPU-aa stands there twice"):
        hardware.find_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(ValueError, match="there is no GPU 5"):
        hardware.find_gpus()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["configs/tldr_lenght.yaml"], "did you mean configs/tldr_length.yaml?"),
        (["--assume-gpus", "4"], "needs --dry-run"),
        (["--dry-run", "--assume-memory", "80"], "needs --assume-gpus"),
        (["--sync", "smoke"], "invalid choice"),
        (["--dry-run", "configs/quickstart.yaml"], "the recipe comes first"),
    ],
)
def test_a_mistyped_command_line_is_refused_at_once(argv, said, capsys):
    """By the standard library alone."""
    with pytest.raises(SystemExit, match="2"):
        parse(argv)
    assert said in capsys.readouterr().err


def test_held_out_batches_are_told_and_must_divide(resolved, make_plan):
    """On three trainers 8 completions each are 24: no multiple of 16, and 12 prompts at once of two replies each."""
    made = make_plan(resolved("tldr_length"), 4)
    assert "evaluation: 128 prompts × 2 replies, 12 prompts at once = 11 rounds; the last is filled up with 4 of the first prompts again" in made.lines
    made = make_plan(resolved("tldr_length"), 4, given={"num_generations_eval": 16})
    assert "per_device_eval_batch_size: 8 completions × 3 ranks = 24, no multiple of num_generations_eval 16. Nearest valid: 16" in made.problems[0]


def test_ddp_keeps_all_of_it_on_every_rank(resolved, make_plan):
    """1.5 billion float32 weights with gradients, Adam and a reference are 30 GB on each card, however many there are: ZeRO-3 is the remedy."""
    made = make_plan(resolved("tldr_length"), 4, given={"parallel": "ddp"})
    assert "DDP ranks" in made.layout and made.problems[0].startswith("memory: a rank needs 27.9 GiB")
    assert "ZeRO-3, which shards all of it: --parallel zero3" in made.problems[0]


def test_a_stream_needs_a_context(resolved, make_plan):
    """Its longest prompt is not known."""
    facts = resolved("tldr_stream")
    facts["data"] |= {"rows": None, "longest_prompt": None}
    made = make_plan(facts, 4)
    assert made.problems == [] and "context: prompts up to 768 + reply 256 = 1024 tokens; longer prompts are left out as they come" in made.lines
    facts = resolved("tldr_stream")
    facts["values"]["vllm_max_model_length"] = None
    assert "vllm_max_model_length: the longest prompt of a stream is not known" in make_plan(facts, 4).problems[0]


def test_the_values_of_tiny_grpo_mean_what_the_readme_says(resolved, make_plan):
    """32 prompts of 12 replies at once, trained on 16 at a time: 24 updates."""
    facts = resolved("tldr_lora")
    facts["data"]["rows"] = 3200
    given = {"num_generations": 12, "generation_batch_size": 384, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    made = make_plan(facts, 1, 80, given=given)
    assert made.problems == []
    line = next(line for line in made.lines if line.startswith("batch:"))
    assert "= 16 completions a step; 32 prompts × 12 replies generated at once; 3200 prompts = 2400 steps an epoch" in line
