"""The preflight: what a recipe would do on some hardware, and everything that is wrong with it."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict
from helpers import ROOT
from tiny_models import TEMPLATE, make_encoder_model, make_model
from transformers import AutoConfig, BartConfig, Qwen2Config, T5Config

from grpo_launcher.config import load_config
from grpo_launcher.errors import UserError
from grpo_launcher.layout import Gpu, Hardware, Options, choose_layout
from grpo_launcher.memory import check_memory
from grpo_launcher.preflight import preflight
from grpo_launcher.preflight_runner import ModelInfo, Report, run_preflight

SYSTEM = "Answer in one sentence."
STREAM = "--dataset_streaming true --reward_funcs rewards.length.length_reward"
SFT = "--method sft"
LENGTH = "--reward_funcs rewards.length.length_reward"
ROUGE = "--reward_funcs rewards.rouge.rouge_reward"
BART = "--model_name_or_path bart --dataset_name plain --max_completion_length 40"
TOOL = '''
import atexit, functools, os, sys

print("noise of a module")
if sys.flags.safe_path:  # the child, not this process
    atexit.register(os.system, "echo noise of another process at the end")


def weather(city: str) -> str:
    """Say what the weather is.

    Args:
        city: A city.
    """
    return "rain"


class Game:
    def __init__(self, level):
        pass

    def reset(self, **row):
        pass

    look = staticmethod(weather)

    def get_reward(self):
        return 0.0


easy = functools.partial(Game, level=1)


def mine(completions, **columns):
    print("noise of a function")
    return [0.0] * len(completions)


def scored(completions, score, answers=None, **columns):
    return score


def asleep(completions, **columns):
    return [0.0] * len(completions)


def ask():
    raise ConnectionRefusedError("nobody is there")


asleep.ready = ask
'''


def chat(number: int) -> list[dict]:
    content = f"The cat number {number} sat on the mat."
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with small models and datasets."""
    folder = tmp_path_factory.mktemp("preflight")
    make_model(folder / "model", seed=0)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    make_model(folder / "no-system", seed=0, template=refusal + TEMPLATE)
    shutil.copytree(folder / "model", folder / "tied")
    AutoConfig.from_pretrained(folder / "model", tie_word_embeddings=True).save_pretrained(folder / "tied")
    make_encoder_model(folder / "bart", "bart", positions=64)
    for name, config in {
        "small-t5": T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, decoder_start_token_id=0),
        "small-bart": BartConfig(d_model=16, encoder_layers=1, decoder_layers=1),
        "wide": Qwen2Config(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
        ),
        "no-targets": Qwen2Config(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
    }.items():
        shutil.copytree(folder / "bart", folder / name, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        config.save_pretrained(folder / name)
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").touch()
    splits = {"train": 64, "test": 20, "validation": 20}
    for name, make in {
        "chat": lambda i: {"prompt": chat(i), "reference": "It sat."},
        "plain": lambda i: {"prompt": f"summarize: The cat {i} sat.", "reference": "It sat."},
        "bare": lambda i: {"prompt": chat(i)},
        "seven": lambda i: {"prompt": chat(i)},
        "long": lambda i: {"prompt": f"The cat {i} sat on the mat. " * 20, "reference": "It sat."},
        "texts": lambda i: {"text": "a"},
    }.items():
        (folder / name).mkdir()
        for split, count in splits.items():
            rows = [make(number) for number in range(7 if name == "seven" else count)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "empty.csv").write_text("prompt\n")
    (folder / "wrapped.json").write_text('{"version": 1, "data": [{"prompt": "a"}, {"prompt": "b"}]}')
    (folder / "semicolons.csv").write_text("prompt;reference\na;b\n" * 64)
    (folder / "comma.jsonl").write_text('{"prompt": "a"},\n' * 64)
    chats = [{"prompt": chat(number), "reference": "It sat."} for number in range(64)]
    for name, rows in {
        "sharegpt": [{"prompt": [{"from": "human", "value": "a"}]}] * 64,
        "image": [row | {"image": "a.png"} for row in chats],
        "counted": [row | {"prompt_tokens": 3} for row in chats],
        "null": [*chats, {"prompt": None}],
        "mixed": [*chats, {"prompt": "The cat."}],
        "keyword": [row | {"completions": "a", "trainer_state": "b"} for row in chats],
        "no-gold": [*chats, {"prompt": chat(64), "reference": None}],
        "no-number": [
            *({"prompt": chat(i), "answer": str(i + 1)} for i in range(64)),
            {"prompt": chat(64), "answer": "some"},
        ],
        "parts": [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "The cat."}]}]}] * 64,
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_dict({"prompt": ["The cat."] * 64, "score": [*[1.0] * 63, math.nan]}).save_to_disk(folder / "saved")
    rows = Dataset.from_list(chats)
    DatasetDict(train=rows, test=rows.select([])).save_to_disk(folder / "no-test")
    (folder / "late").mkdir()
    for split, rows in {"train": chats, "test": [*chats[:2], {"prompt": [], "reference": "a"}]}.items():
        (folder / f"late/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tools.py").write_text(TOOL)
    return folder


@pytest.fixture
def check(home, monkeypatch):
    """A function that checks a recipe of configs/ for so many GPUs, in the folder of small models and datasets.

    recipe: its name, or None for flags alone. small: with the small model and chat prompts.
    """
    monkeypatch.chdir(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))

    def run(recipe: str | None, gpus: int, *flags: str, memory=24, small=True, **options) -> Report:
        hardware = Hardware([Gpu(str(index), memory) for index in range(gpus)], [0, 1], 64)
        config = ["--config", str(ROOT / f"configs/{recipe}.yaml")] if recipe else []
        model_and_data = ["--model_name_or_path", "model", "--dataset_name", "chat"] if small else []
        return preflight([*config, *model_and_data, *flags], hardware, Options(**options))

    return run


@pytest.mark.parametrize(
    ("gpus", "memory", "ranks", "remedies"),
    [
        (1, 24, 1, ["3 such GPUs (2 train)", "LoRA", "optimizer offload"]),
        (2, 24, 1, ["3 such GPUs (2 train)", "LoRA", "configs/tldr_lora.yaml", "optimizer offload"]),
        (3, 24, 2, None),
        (4, 24, 3, None),
        (8, 24, 7, None),
        (1, 80, 1, None),
        (2, 80, 1, None),
        (3, 80, 2, None),
        (4, 80, 3, None),
        (8, 80, 7, None),
    ],
)
def test_full_fine_tuning_of_1_5_billion_weights(gpus, memory, ranks, remedies, check):
    """A right plan, or a right refusal. The model's size comes from its name."""
    report = check("tldr_length", gpus, memory=memory, small=False)
    assert report.layout.ranks == ranks and report.model.source == "its name"
    assert any(f"= {32 * ranks} completions a step" in line for line in report.lines)
    assert [line.split(":")[0] for line in report.missing] == ["model_name_or_path", "dataset_name"]
    if remedies is None:
        assert report.problems == []
        return
    (problem,) = report.problems
    assert problem.startswith("memory:") and all(remedy in problem for remedy in remedies)


MADE_FOR = {  # GPUs and GiB of each for which a recipe is made -> ranks that train, and who generates
    "calculator": {(2, 24): (1, "server")},
    "gsm8k": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "kuakua": {(1, 24): (1, "colocate"), (4, 24): (3, "server")},
    "mcq_refusal": {(2, 24): (1, "server")},
    "search_qa": {(2, 24): (1, "server")},
    "summarize_bart": {(1, 24): (1, None), (4, 24): (4, None)},
    "summarize_t5": {(1, 24): (1, None), (2, 24): (2, None)},
    "summarize_t5_lora": {(1, 16): (1, None), (4, 16): (4, None)},
    "summarize_t5_sft": {(1, 16): (1, None), (2, 16): (2, None)},
    "tldr_ddp": {(3, 24): (2, "server"), (4, 24): (3, "server")},
    "tldr_dr_grpo": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_length": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_lora": {(1, 24): (1, "colocate"), (2, 24): (1, "server")},
    "tldr_qlora": {(1, 24): (1, None), (4, 24): (4, None)},
    "tldr_ref_sync": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_rouge": {(2, 48): (1, "server"), (4, 24): (3, "server")},
    "tldr_stream": {(2, 48): (1, "server"), (4, 24): (3, "server")},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_a_recipe_has_no_problem_on_the_hardware_that_it_is_made_for(name, check):
    """Nor anywhere else for want of anything but memory. Without a GPU two ranks train."""
    flags, parallel = [], "ddp" if name in ("tldr_ddp", "tldr_qlora") else "zero3"
    if "summar" in name:  # the name of the model does not say that it has an encoder
        flags = ["--model_name_or_path", "small-bart" if name.endswith("bart") else "small-t5"]
    made_for = MADE_FOR.get(name, {(0, 24): (2, None if flags else "server")})
    for gpus, memory in {*made_for, (0, 24), (1, 24), (4, 24)}:
        report = check(name, gpus, *flags, memory=memory, small=False)
        assert report.missing and report.layout.parallel == parallel
        assert all(problem.startswith("memory:") for problem in report.problems), report.problems
        if (gpus, memory) in made_for:
            mode = report.values["vllm_mode"] if report.values["use_vllm"] else None
            assert report.problems == [] and (report.layout.ranks, mode) == made_for[gpus, memory]


def test_lora_and_ddp_count_the_memory_that_they_take(check):
    """DDP keeps weights, gradients, Adam and the reference in 32 bits on each GPU. ZeRO-3 is the remedy."""
    assert check("tldr_lora", 2, small=False).problems == []
    (problem,) = check("tldr_length", 4, "--parallel", "ddp", small=False).problems
    assert problem.startswith("memory: a rank needs 33.5 GiB") and "--parallel zero3" in problem


WIDE = ["--model_name_or_path", "wide", "--dataset_name", "plain", "--max_completion_length", "400"]


def estimate(report: Report) -> float:
    return float(re.search(r"= (\d+(\.\d+)?) of", report.lines[-1])[1])


def test_the_estimate_follows_the_settings(check):
    """More rows, longer ones, a reference model and a reward model take more; checkpointing and LoRA take less."""
    sizes = [
        estimate(check("quickstart", 0, *WIDE, *flags.split()))
        for flags in (
            "",
            "--per_device_train_batch_size 16",
            "--max_completion_length 200",
            "--beta 0",
            "--gradient_checkpointing true",
            "--use_peft true",
            "--reward_funcs rewards.perplexity.perplexity_reward "
            + json.dumps({"perplexity_reward": {"model": "wide"}}).replace(" ", "").join(["--reward_kwargs ", ""]),
        )
    ]
    plain, fewer, shorter, no_reference, checkpointing, lora, reward = sizes
    assert max(fewer, shorter, no_reference, checkpointing, lora) < plain < reward


def test_what_does_not_fit_comes_with_settings_that_do(check):
    """Each of them is tried. On a CPU server and ranks share the memory."""
    report = check("quickstart", 0, *WIDE, "--per_device_train_batch_size", "128", "--num_generations", "4")
    (problem,) = report.problems
    assert problem.startswith("memory: a rank needs") and "the server" in problem
    for advice in (
        r"--per_device_train_batch_size \d+ --gradient_accumulation_steps \d+",
        "--gradient_checkpointing true",
    ):
        flags = re.search(advice, problem)[0].split()
        better = check(
            "quickstart", 0, *WIDE, "--per_device_train_batch_size", "128", "--num_generations", "4", *flags
        )
        assert better.problems == [] and estimate(better) < estimate(report)


def test_a_rank_of_a_server_has_less_where_vllm_shares_the_gpu(check):
    colocated, alone = (check("tldr_length", gpus, *WIDE, small=False) for gpus in (1, 2))
    assert "vLLM 7.2 of the GPU's 24.0 GiB" in colocated.lines[-1] and "of 24.0 GiB" in alone.lines[-1]


@pytest.mark.parametrize(("billions", "gpu", "gpus"), [(7.6, 40, 4), (14.8, 80, 4), (3.1, 16, 4)])
def test_vllm_inside_gets_room_for_its_weights(billions, gpu, gpus):
    """The share that the message names is enough."""
    model = ModelInfo(int(billions * 1e9), "its config.json", layers=28, hidden=3584, vocabulary=152_064)
    model.trainable, model.row_tokens, model.row_activations = 40_000_000, 1024, 2e9
    machine = Hardware([Gpu(str(index), gpu) for index in range(gpus)], [0], 256)

    def problems(*flags: str) -> list[UserError]:
        config = load_config(["--model_name_or_path", "m", "--dataset_name", "d", "--use_peft", "true", *flags])
        options = Options(colocate=True)
        layout, filled, _ = choose_layout(config.values, config.given, machine, options, False, model.parameters)
        return check_memory(config.values | filled, layout, machine, model, False)[2]

    (problem,) = problems()
    assert problem.field == "vllm_gpu_memory_utilization"
    share = re.search(r"at least ([\d.]+)", problem.fix)[1]
    assert "vllm_gpu_memory_utilization" not in [each.field for each in problems(f"--{problem.field}", share)]


def test_what_the_report_holds(check):
    """Sizes of model, data and batch, the longest prompt, the system prompt. JSON keeps it all."""
    report = check("tldr_length", 4)
    assert report.problems == report.missing == []
    assert report.name == "tldr_length" and "beta" in report.given
    assert (report.model.context, report.model.heads, report.model.is_seq2seq) == (2048, 2, False)
    data = report.data
    assert (data.rows, data.eval_rows, data.system_prompt) == (64, 20, SYSTEM) and data.longest_prompt > 20
    text = "\n".join(report.lines)
    assert "8 completions × 3 ranks × 4 accumulated = 96 completions a step; 12 prompts × 8 completions" in text
    assert "evaluation: 20 prompts × 2 completions, 12 prompts at once = 2 rounds" in text
    assert f"longest prompt {data.longest_prompt} + completion 256" in text
    assert Report.from_dict(json.loads(json.dumps(asdict(report)))) == report


def test_a_generation_block_may_hold_many_updates(check):
    """32 prompts of 12 completions at once, trained on 16 at a time: 24 updates, and 64 prompts are two blocks."""
    flags = ["--num_generations", "12", "--generation_batch_size", "384"]
    flags += ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"]
    report = check("tldr_lora", 1, *flags)
    assert report.problems == []
    assert "32 prompts × 12 completions generated at once; 64 prompts = 48 steps an epoch" in "\n".join(report.lines)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "1"], "per_device_train_batch_size"),
        (["--per_device_train_batch_size", "12", "--gradient_accumulation_steps", "1"], "per_device_train_batch_size"),
        (["--num_generations_eval", "16"], "per_device_eval_batch_size"),
        (["--per_device_eval_batch_size", "3", "--num_generations_eval", "4"], "per_device_eval_batch_size"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_valid_sizes(flags, field, check):
    """Three ranks are the usual trap. Each size that the message names is valid, and the values stay as given."""
    report = check("tldr_length", 4, *flags)
    (problem,) = report.problems
    assert problem.startswith(f"{field}:") and report.values[flags[0][2:]] == int(flags[1])
    sizes = re.search(rf"{field}: (\d+)(?: or (\d+))?", problem)
    for size in filter(None, sizes.groups()):
        assert check("tldr_length", 4, *flags, f"--{field}", size).problems == [], size


PROBLEMS = {  # recipe (None: flags alone), GPUs, flags, field, part of the message
    "block size": ("tldr_length", 4, "--generation_batch_size 100", "generation_batch_size", "a multiple of 8 × 3"),
    "too few prompts": ("quickstart", 0, "--dataset_name seven", "dataset_name", "7 rows"),
    "context of the server": ("tldr_length", 4, "--vllm_max_model_length 260", "vllm_max_model_length", "length 4"),
    "context of the model": ("quickstart", 0, "--max_completion_length 2040", "max_completion_length", "is 2048"),
    "token": (None, 0, f"{LENGTH} --hub_token hf_secret", "hub_token", "HF_TOKEN in the environment"),
    "no reward": (None, 0, "", "reward_funcs", "give at least one"),
    "LoRA that nobody asked for": (None, 0, f"{LENGTH} --lora_r 8", "lora_r", "use_peft: true"),
    "columns kept from the rewards": (
        None,
        0,
        f"{ROUGE} --remove_unused_columns true",
        "remove_unused_columns",
        "leave it out",
    ),
    "a package that is not there": (None, 0, f"{LENGTH} --use_liger_kernel true", "use_liger_kernel", "liger-kernel"),
    "weights of 16 bits in DDP": (None, 4, f"{LENGTH} --parallel ddp --dtype bfloat16", "dtype", "updates are lost"),
    "weights in 16 bits, written by TRL": (
        None,
        4,
        f"{LENGTH} --use_transformers_continuous_batching true",
        "use_transformers_continuous_batching",
        "updates are lost",
    ),
    "a head that vLLM ties": (
        None,
        4,
        f"{LENGTH} --model_name_or_path tied --use_peft true --lora_modules_to_save lm_head",
        "lora_modules_to_save",
        "one matrix",
    ),
    "a second temperature": (
        None,
        4,
        f"{LENGTH} --generation_kwargs '{{\"temperature\": 0.5}}'",
        "generation_kwargs",
        "temperature",
    ),
    "a pattern with the correction": (
        None,
        4,
        f"{LENGTH} --vllm_structured_outputs_regex [0-9]+",
        "vllm_structured_outputs_regex",
        "importance sampling",
    ),
    "an optimizer's package": (None, 0, f"{LENGTH} --optim galore_adamw", "optim", "galore_torch"),
    "a schedule's option": (
        None,
        0,
        f"{LENGTH} --lr_scheduler_type cosine_with_min_lr",
        "lr_scheduler_kwargs",
        "min_lr_rate",
    ),
    "a column of pictures": (None, 0, f"{LENGTH} --dataset_name image.jsonl", "dataset_name", "a picture"),
    "missing column": ("tldr_rouge", 4, "--dataset_name bare", "reward_funcs", "needs the column reference"),
    "reward model": (None, 0, "--reward_funcs owner/nothing", "reward_funcs", "owner/nothing is no reward model"),
    "reporter": ("tldr_rouge", 4, "--report_to wandb", "recipe", "wandb"),
    "guard": ("tldr_rouge", 4, "--guards '{\"kll\": null}'", "guards", "did you mean kl?"),
    "no prompts": ("tldr_lora", 2, "--dataset_name texts", "dataset_name", "rename one of text"),
    "rows inside an object": (None, 0, f"{LENGTH} --dataset_name wrapped.json", "dataset_name", "stand under data"),
    "semicolons": (None, 0, f"{LENGTH} --dataset_name semicolons.csv", "dataset_name", "by commas"),
    "ShareGPT": (None, 0, f"{LENGTH} --dataset_name sharegpt.jsonl", "dataset_name", "row 1: prompt is [{'from'"),
    "a prompt of null": (None, 0, f"{LENGTH} --dataset_name null.jsonl", "dataset_name", "split train, row 65"),
    "texts and chats": (None, 0, f"{LENGTH} --dataset_name mixed.jsonl", "dataset_name", "row 65: prompt is 'The"),
    "a row of the test split": ("tldr_rouge", 4, "--dataset_name late", "dataset_name", "late, split test, row 3"),
    "ShareGPT in a stream": (
        None,
        4,
        f"{STREAM} --max_steps 2 --vllm_max_model_length 600 --dataset_name sharegpt.jsonl",
        "dataset_name",
        "row 1: prompt is",
    ),
    "a gold answer that is no number": (
        None,
        0,
        "--reward_funcs rewards.calculation.calculation_accuracy --dataset_name no-number.jsonl",
        "dataset_name",
        "no-number.jsonl, split train, row 65: calculation: answer is 'some'",
    ),
    "a gold answer that is no letter": (
        None,
        0,
        "--reward_funcs rewards.choice.choice_reward --dataset_name no-number.jsonl",
        "dataset_name",
        "row 1: choice: answer is '1'",
    ),
    "a null": (None, 0, "--reward_funcs tools.py:scored --dataset_name saved", "dataset_name", "row 64: no score, w"),
    "a null in SFT": (None, 1, f"{SFT} --dataset_name no-gold.jsonl", "dataset_name", "row 65: no reference, which"),
    "a template without system": (None, 0, f"{LENGTH} --model_name_or_path no-system", "no-system", "System role not"),
    "such a template and a stream": (
        "tldr_stream",
        4,
        "--model_name_or_path no-system",
        "no-system",
        "process_dataset.py --system_in_user",
    ),
    "no split": (
        "tldr_rouge",
        4,
        "--dataset_test_split valid",
        "dataset_test_split",
        "use one of train, validation, test",
    ),
    "tools on text": ("tldr_rouge", 4, "--dataset_name plain --tools tools.py:weather", "tools", "chat messages"),
    "no template": ("tldr_rouge", 4, "--model_name_or_path no-targets", "dataset_name", "no chat template"),
    "chat and encoder": ("summarize_bart", 1, f"{BART} --dataset_name chat", "dataset_name", "plain-text"),
    "decoder": ("summarize_bart", 1, f"{BART} --max_completion_length 65", "max_completion_length", "takes 64"),
    "encoder": ("summarize_bart", 1, f"{BART} --dataset_name long", "dataset_name", "--max_prompt_length 64"),
    "vLLM and encoder": ("summarize_bart", 1, f"{BART} --use_vllm true", "use_vllm", "leave use_vllm out"),
    "stream without context": (None, 4, f"{STREAM} --max_steps 2", "vllm_max_model_length", "of a stream"),
    "LoRA targets": ("tldr_lora", 2, "--lora_target_modules q v_proj", "lora_target_modules", "linear layer q"),
    "one LoRA target": ("tldr_lora", 2, "--lora_target_modules q_proj", "lora_target_modules", "use some of"),
    "stream without end": (None, 4, f"{STREAM} --vllm_max_model_length 600", "max_steps", "no length"),
    "vLLM with 4 bits": ("tldr_qlora", 1, "--use_vllm true", "use_vllm", "configs/tldr_qlora.yaml works"),
    "ZeRO-3 with 4 bits": ("tldr_qlora", 1, "--parallel zero3", "parallel", "ddp"),
    "4 bits without LoRA": ("tldr_qlora", 1, "--use_peft false", "use_peft", "use_peft: true"),
    "half of the vocabulary": ("quickstart", 0, "--top_p 0.9", "top_p", "correction: false"),
    "a part by another way": (None, 0, f"{LENGTH} --generation_kwargs '{{\"top_k\": 5}}'", "top_k", "trl#6789"),
    "one seed inside": (None, 1, f"{LENGTH} --generation_kwargs '{{\"seed\": 1}}'", "generation_kwargs", "same text"),
    "reference without KL": ("tldr_ref_sync", 4, "--beta 0", "sync_ref_model", "set beta"),
    "reference with LoRA": ("tldr_ref_sync", 4, "--use_peft true", "sync_ref_model", "leave it out"),
    "resampling with overlap": ("quickstart", 4, "--resample_groups 2 --overlap true", "resample_groups", "overlap"),
    "resampling of a stream": (
        None,
        4,
        f"{STREAM} --resample_groups 1 --max_steps 2 --vllm_max_model_length 600",
        "resample_groups",
        "streaming",
    ),
    "resampling and the batch's scale": (
        "quickstart",
        0,
        "--resample_groups 2 --scale_rewards batch",
        "resample_groups",
        "group",
    ),
    "resampling and two ends": (
        "quickstart",
        0,
        "--resample_groups 2 --refuse_hopeless true",
        "resample_groups",
        "out",
    ),
    "resampling in SFT": (None, 0, f"{SFT} --resample_groups 2", "resample_groups", "supervised"),
    "two limits": (
        "quickstart",
        0,
        '--refuse_hopeless true --guards \'{"frac_reward_zero_std": {"max": 0.5}}\'',
        "guards",
        "refuse_hopeless",
    ),
    "metric": ("tldr_rouge", 4, "--metric_for_best_model rouge", "metric_for_best_model", "eval_rewards/rouge_reward"),
    "metric without evaluation": ("tldr_lora", 2, "--metric_for_best_model reward", "metric_for_best_model", "steps"),
    "best step not saved": (
        "tldr_rouge",
        4,
        "--metric_for_best_model eval_reward --eval_steps 20",
        "save_steps",
        "save_steps: 20",
    ),
    "rewards in SFT": (None, 1, f"{SFT} --num_generations 4", "num_generations", "method: sft"),
    "tools in SFT": (None, 1, f"{SFT} --tools tools.py:weather", "tools", "method: sft"),
    "stream in SFT": (
        None,
        1,
        f"{SFT} --dataset_streaming true --max_steps 2",
        "dataset_streaming",
        "tokenizes all rows",
    ),
    "SFT without references": (None, 1, f"{SFT} --dataset_name bare", "dataset_name", "rename one to reference"),
    "metric in SFT": (None, 1, f"{SFT} --metric_for_best_model reward", "metric_for_best_model", "use eval_loss"),
}


@pytest.mark.parametrize(("recipe", "gpus", "flags", "field", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_recipe_that_cannot_run_is_refused(recipe, gpus, flags, field, message, check):
    """Before a model loads, with one problem, its field and its remedy."""
    report = check(recipe, gpus, *shlex.split(flags))
    (problem,) = report.problems
    assert problem.startswith(f"{field}: ") and message in problem and report.missing == []


def test_columns_of_the_names_that_trl_passes_are_refused(check):
    """All of them. SFT has no rewards, and goes on."""
    problems = check(None, 0, *f"{LENGTH} --dataset_name keyword.jsonl".split()).problems
    assert all(problem.startswith("dataset_name: keyword.jsonl has a column ") for problem in problems)
    assert sorted(problem.split()[5] for problem in problems) == ["completions,", "trainer_state,"]
    assert check(None, 1, *f"{SFT} --dataset_name keyword.jsonl".split()).problems == []


@pytest.mark.parametrize("name", ["parts.jsonl", "no-gold.jsonl", "saved", "counted.jsonl"])
def test_what_no_reward_of_the_run_reads_may_be_null(name, check):
    """Text parts are fine too."""
    report = check(None, 0, *f"{LENGTH} --dataset_name {name}".split())
    assert report.problems == report.missing == [] and report.data.rows >= 64 and report.data.longest_prompt > 2


def test_the_rewards_of_this_project_leave_rows_without_gold_out(check):
    """As in data of several tasks. The plan says how many."""
    report = check(None, 0, *f"{ROUGE} --dataset_name no-gold.jsonl".split())
    assert report.problems == report.missing == []
    assert "data: 1 rows have no reference: rouge_reward does not rate them" in report.lines


def test_a_service_that_a_reward_does_not_reach_is_told_by_its_name(check):
    report = check(None, 0, "--reward_funcs", "tools.py:asleep")
    assert report.problems == [] and report.missing == ["reward_kwargs: asleep: nobody is there"]


def test_gpus_that_torch_does_not_see_are_told(check):
    """As with torch for CPUs, or with a driver that is too old. Nothing is known of GPUs that are assumed."""
    argv = f"--model_name_or_path model --dataset_name chat {LENGTH}".split()
    (problem,) = preflight(argv, Hardware([Gpu("0", 80)], [0, 1], 64, is_real=True), Options()).problems
    assert problem.startswith("GPU: nvidia-smi lists 1, and torch ") and "sees 0" in problem


def test_a_folder_for_weights_that_is_not_there_is_refused(check, monkeypatch):
    monkeypatch.setenv("GRPO_SHARED_MEMORY", "nowhere")
    (problem,) = check(None, 0, *LENGTH.split()).problems
    assert problem.startswith("GRPO_SHARED_MEMORY: there is no folder nowhere")


def test_a_server_on_several_gpus_must_divide_the_heads(check):
    (problem,) = check("tldr_length", 8, vllm_gpus=3).problems
    assert problem.startswith("--vllm_gpus:") and "use one of 1, 2" in problem


@pytest.mark.parametrize(
    ("flags", "field", "message"),
    {
        "dataset": ("--dataset_name data/tldr", "dataset_name", "process_dataset.py tldr"),
        "prepared data": ("--dataset_name data/quickstart", "dataset_name", "-m grpo_launcher.quickstart"),
        "empty file": ("--dataset_name empty.csv", "dataset_name", "empty.csv cannot be read"),
        "empty split": ("--dataset_name no-test", "dataset_name", "no-test cannot be read: a split has no rows"),
        "broken file": (
            "--dataset_name comma.jsonl",
            "dataset_name",
            "comma.jsonl cannot be read: line 1: Extra data",
        ),
        "model": ("--model_name_or_path data/nothing", "model_name_or_path", "data/nothing cannot be read"),
        "adapter": ("--model_name_or_path adapter", "model_name_or_path", "-m grpo_launcher.merge adapter"),
    }.values(),
)
def test_what_is_missing_comes_with_the_command_that_makes_it(flags, field, message, check):
    """It refuses a run, but not a dry run."""
    report = check("quickstart", 0, *shlex.split(flags))
    (line,) = report.missing
    assert line.startswith(f"{field}: ") and message in line and report.problems == []
    assert report.adapter == ("adapter" if "adapter" in flags else None)


def test_turns_with_tools_need_room_for_two_completions(check):
    """A later turn asks the server for a whole completion on top of the history."""
    flags = ["--reward_funcs", "rewards.rouge.rouge_reward", "--max_completion_length", "100"]
    plain, tools = check(None, 4, *flags), check(None, 4, *flags, "--tools", "tools.py:weather")
    assert plain.problems == tools.problems == []
    assert plain.values["vllm_max_model_length"] == plain.data.longest_prompt + 100
    assert tools.data.longest_prompt > plain.data.longest_prompt, "the tool's schema stands in the prompt"
    assert tools.values["vllm_max_model_length"] == tools.data.longest_prompt + 200


def test_a_stream_leaves_long_prompts_out(check):
    report = check("tldr_stream", 4)
    assert report.problems == [] and report.data.rows is None
    assert "prompts up to 768 + completion 256 = 1024 tokens; longer prompts are left out" in "\n".join(report.lines)
    assert report.data.max_prompt == 768


def test_every_device_trains_an_encoder_decoder(check):
    """By SFT too. The text that every prompt begins with is kept for the chat."""
    report = check("summarize_t5_sft", 4, "--model_name_or_path", "small-t5", "--dataset_name", "plain")
    assert report.problems == [] and report.layout.ranks == 4 and report.layout.is_seq2seq
    assert report.data.system_prompt == "summarize: "
    assert "8 rows × 4 ranks × 4 accumulated = 128 rows a step" in "\n".join(report.lines)


def test_shared_memory_must_hold_the_weights(check, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    problems = check("tldr_length", 0, small=False).problems
    assert any(problem.startswith("weight_sync:") and "--shm-size" in problem for problem in problems)


def test_a_bad_recipe_is_a_problem_too(check):
    assert check("quickstart", 0, "--bet", "1").problems[0].startswith("--bet:")


def test_the_child_reports_in_spite_of_noise(home, check, monkeypatch, capfd):
    """What a user's module prints, and the variables of a rank, do not disturb it."""
    flags = ["--reward_kwargs", "{}", "--reward_funcs", "tools.py:mine"]
    expected = check("quickstart", 0, *flags)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--config", str(ROOT / "configs/quickstart.yaml"), "--model_name_or_path", "model"]
    argv += ["--dataset_name", "chat", *flags]
    capfd.readouterr()  # what the check above printed
    report = run_preflight(argv, Hardware([], [0, 1], 64), Options())
    assert report == expected and report.problems == []
    output = capfd.readouterr()
    assert "noise" not in output.out and "noise of a module" in output.err and "at the end" in output.err


def run_child(code: str) -> Report:
    """Return the report of a child that runs this code."""

    def start(command, **streams):
        return subprocess.Popen([sys.executable, "-S", "-c", code], **streams)

    return run_preflight([], Hardware([], [0], 1), Options(), start)


@pytest.mark.parametrize(("code", "message"), [("1 / 0", "status 1"), ("raise SystemExit(0)", "status 0")])
def test_a_child_that_does_not_answer_is_refused(code, message, capfd):
    """A fault in a user's module ends it with a traceback, which stays visible."""
    with pytest.raises(UserError, match=message) as error:
        run_child(code)
    assert error.value.field == "preflight" and ("ZeroDivisionError" in capfd.readouterr().err) == (code == "1 / 0")


def test_what_a_child_does_after_its_answer_does_not_count():
    """Libraries may abort when Python takes them apart."""
    report = Report(problems=["half a surrogate pair: \ud83d"])
    assert run_child(f"import os; print({json.dumps(asdict(report))!r}, flush=True); os.abort()") == report


@pytest.mark.parametrize("folder", ["tools.py", "tools.py/run", "/proc/run", "nowhere"])
def test_a_folder_that_cannot_be_made_is_refused(folder, check, home, monkeypatch):
    """The run's, and the cache of the datasets. Nothing is made in the search."""
    (home / "nowhere").unlink(missing_ok=True)
    (home / "nowhere").symlink_to("not/there")
    before = sorted(home.iterdir())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
    flags = ["--reward_funcs", "rewards.length.length_reward", "--dataset_name", "missing"]
    problems = check(None, 0, *flags, "--output_dir", folder).problems
    assert [problem.split(":")[0] for problem in problems] == ["output_dir", "HF_HOME"]
    assert all(f"{folder} cannot be made or written" in problem for problem in problems)
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert check(None, 0, *flags, "--output_dir", "a/new [run]/1").problems == [] and sorted(home.iterdir()) == before


def test_an_environment_may_be_a_partial(check):
    """Its reward has the name of the class."""
    flags = ["--environment_factory", "tools.py:easy", "--eval_strategy", "steps"]
    flags += ["--save_steps", "1", "--metric_for_best_model"]
    assert check(None, 4, *flags, "rewards/Game/mean").problems == []
    (problem,) = check(None, 4, *flags, "rewards/easy/mean").problems
    assert "use eval_rewards/Game/mean" in problem
