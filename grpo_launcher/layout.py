"""Which devices train, which generate, and what a recipe needs for that. Standard library only."""

from dataclasses import dataclass, field

from grpo_launcher.errors import UserError

# Fields that become flags of the server that the launcher starts.
SERVER_FIELDS = ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_model_impl", "vllm_server_args")
SERVER_TIMEOUT = 900.0  # seconds to wait for the vLLM server, which loads and compiles; TRL's default is 240
CPU_RANKS = 2
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM serves
WHOLE_MODEL_SHARE = 0.25  # of a GPU: with LoRA a larger model is not gathered on every rank to send it to the server
BF16_CAPABILITY = 8.0  # GPUs from Ampere on


@dataclass
class Gpu:
    """A GPU: its id, as CUDA_VISIBLE_DEVICES takes it, its memory in GiB, and its compute capability."""

    id: str
    memory: float
    capability: float = 8.0


@dataclass
class Hardware:
    """What this process may use: GPUs, CPU cores, and main memory in GiB. is_real: found here, and not assumed."""

    gpus: list[Gpu]
    cpus: list[int]
    memory: float
    is_real: bool = False


@dataclass
class Options:
    """What the launcher's command line says about the layout.

    num_nodes: machines that train.
    serves: this one does not, and runs the server for them.
    ranks: number of ranks where something else has started them (accelerate launch); None for the launcher.
    deepspeed: whether these ranks use it.
    """

    colocate: bool = False
    vllm_gpus: int | None = None
    sync: str | None = None
    num_nodes: int = 1
    serves: bool = False
    ranks: int | None = None
    deepspeed: bool = True


@dataclass
class Layout:
    """Who trains and who generates. The GPUs are those of this machine, and the ranks those of all nodes."""

    method: str
    is_seq2seq: bool
    parallel: str
    ranks: int
    num_nodes: int = 1
    train_gpus: list[Gpu] = field(default_factory=list)
    server_gpus: list[Gpu] = field(default_factory=list)
    tensor_parallel: int = 1  # GPUs of each replica of the server
    use_vllm: bool = False
    vllm_mode: str = "server"
    starts_server: bool = False
    server_url: str | None = None  # of a server that somebody else runs

    def describe(self) -> str:
        """Return the layout in one line."""
        kind = {"zero3": "ZeRO-3 rank", "ddp": "DDP rank"}[self.parallel]
        plural = "" if self.ranks == 1 else "s"
        nodes = f" of {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        return f"{self.ranks} {kind}{plural} on {_names(self.train_gpus)}{nodes}; {self._generation()}"

    @property
    def replicas(self) -> int:
        """How many copies of the model the server has."""
        return max(1, len(self.server_gpus) // self.tensor_parallel)

    @property
    def size_field(self) -> str:
        """What sets the number of GPUs of each copy."""
        return "--vllm_gpus" if self.replicas == 1 else "vllm_tensor_parallel_size"

    def describe_server(self) -> str:
        """Return where the server runs."""
        return _names(self.server_gpus) + (f" ({self.replicas} replicas)" if self.replicas > 1 else "")

    def _generation(self) -> str:
        if self.method == "sft":
            return "no generation (SFT)"
        if self.is_seq2seq:
            return "generation by transformers on every device (vLLM has no seq2seq models)"
        if not self.use_vllm:
            return "generation by transformers"
        if self.vllm_mode == "colocate":
            return "vLLM inside each rank (colocate)"
        if self.starts_server:
            return f"vLLM server on {self.describe_server()}"
        return f"vLLM server at {self.server_url or 'the recipe’s host and port'}, which must be running"


def _names(gpus: list[Gpu]) -> str:
    return ", ".join(f"GPU {gpu.id}" for gpu in gpus) or "the CPU"


def server_dtype(values: dict) -> str:
    """Return the type in which the vLLM server computes: the trainer's, or that of its frozen weights."""
    if values["bf16"]:
        return "bfloat16"
    if values["fp16"]:
        return "float16"
    return values["dtype"] if values["dtype"] in ("bfloat16", "float16") else "float32"


class _Choice:
    """Fields that the hardware decides. A given value that cannot be obeyed is a problem."""

    def __init__(self, values: dict, given: list[str]):
        self.values, self.given = values, given
        self.filled: dict = {}
        self.problems: list[UserError] = []

    def refuse(self, field_name: str, problem: str, fix: str) -> None:
        self.problems.append(UserError(field_name, problem, fix))

    def need(self, name: str, value, reason: str) -> None:
        """Set a field to the one value that works. Another given value is refused."""
        if name in self.given and self.values[name] != value:
            self.refuse(name, f"{self.values[name]} does not fit: {reason} needs {value}", "leave it out")
        self.filled[name] = value

    def default(self, name: str, value) -> None:
        """Set a field where it was not given."""
        if name not in self.given:
            self.filled[name] = value


def choose_layout(
    values: dict, given: list[str], hardware: Hardware, options: Options, is_seq2seq: bool, parameters: int = 0
) -> tuple[Layout, dict, list[UserError]]:
    """Choose who trains and who generates.

    Args:
        values: the recipe's fields.
        given: names of those that YAML or flags gave. They are obeyed or refused.
        hardware: what there is.
        options: the launcher's command line.
        is_seq2seq: whether the model has an encoder.
        parameters: of the model, where they are known.

    Returns:
        The layout, the fields that it fills, and everything that is wrong.
    """
    choice = _Choice(values, given)
    is_quantized = values["load_in_4bit"] or values["load_in_8bit"]
    layout = Layout(
        method=values["method"],
        is_seq2seq=is_seq2seq,
        parallel=values["parallel"] or ("ddp" if is_quantized or not options.deepspeed else "zero3"),
        ranks=options.ranks or len(hardware.gpus) or CPU_RANKS,
        num_nodes=options.num_nodes,
        train_gpus=hardware.gpus,
        server_url=values["vllm_server_base_url"],
    )
    choice.default("parallel", layout.parallel)
    _choose_devices(choice, layout, hardware)
    no_vllm = _why_no_vllm(values, is_seq2seq, is_quantized)
    if no_vllm:
        if values["use_vllm"] and not is_seq2seq:  # seq2seq.check_seq2seq says it beside the model's other limits
            choice.refuse("use_vllm", f"true does not fit: {no_vllm}", "leave it out")
    else:
        layout.use_vllm = values["use_vllm"] if "use_vllm" in given or options.ranks else True
    choice.filled["use_vllm"] = layout.use_vllm
    if layout.use_vllm:
        _choose_vllm(choice, layout, hardware, options)
    else:
        _refuse_unused(choice, layout, options, no_vllm or "use_vllm is false")
    if layout.use_vllm and layout.vllm_mode == "server":
        _choose_weight_sync(choice, layout, options, parameters)
        choice.default("vllm_server_timeout", SERVER_TIMEOUT)
    if values["overlap"]:
        _check_overlap(choice, layout)
    if not options.ranks:
        layout.ranks = options.num_nodes * (len(layout.train_gpus) or (CPU_RANKS if options.num_nodes == 1 else 1))
    return layout, choice.filled, choice.problems


def _choose_devices(choice: _Choice, layout: Layout, hardware: Hardware) -> None:
    has_gpu = bool(hardware.gpus)
    if has_gpu and choice.values["use_cpu"] and "use_cpu" in choice.given:
        choice.refuse("use_cpu", "true, and there are GPUs", "hide them: CUDA_VISIBLE_DEVICES= in the environment")
    elif not has_gpu:
        choice.need("use_cpu", True, "a machine without a GPU")
    old = next((gpu for gpu in hardware.gpus if gpu.capability < BF16_CAPABILITY), None)
    if old and choice.values["bf16"] and "bf16" in choice.given:
        problem = f"true, and GPU {old.id} has compute capability {old.capability}; vLLM needs {BF16_CAPABILITY}"
        choice.refuse("bf16", problem, "fp16: true")
    choice.default("fp16", old is not None)
    choice.default("bf16", has_gpu and not old and not choice.values["fp16"])
    if choice.values["fp16"] and not has_gpu:
        choice.refuse("fp16", "true, and the CPU has no such mode", "leave it out, or use bf16")


def _why_no_vllm(values: dict, is_seq2seq: bool, is_quantized: bool) -> str:
    if values["method"] == "sft":
        return "a supervised run (method: sft) generates nothing"
    if is_seq2seq:
        return "vLLM has no seq2seq models"
    if is_quantized:
        return "TRL cannot hand quantised weights to vLLM (trl#4973, trl#3466); configs/tldr_qlora.yaml works without"
    return ""


def _choose_vllm(choice: _Choice, layout: Layout, hardware: Hardware, options: Options) -> None:
    values, given, count = choice.values, choice.given, len(hardware.gpus)
    given_mode = values["vllm_mode"] if "vllm_mode" in given else None
    wants_colocate = options.colocate or given_mode == "colocate"
    if options.colocate and given_mode == "server":
        choice.refuse("--colocate", "the recipe says vllm_mode: server", "leave one of them out")
    if options.ranks:  # TRL connects to whatever server the recipe names
        layout.vllm_mode = values["vllm_mode"]
    elif layout.server_url:
        choice.need("vllm_mode", "server", "vllm_server_base_url")
        if options.serves:
            _choose_server_gpus(choice, layout, hardware, options)
    elif wants_colocate and not count:
        choice.refuse(
            "--colocate" if options.colocate else "vllm_mode",
            "colocate shares a GPU, and there is no GPU",
            "leave it out: the server runs beside the trainer on the CPU",
        )
    elif wants_colocate or (count == 1 and given_mode != "server"):
        layout.vllm_mode = "colocate"
        size = values["vllm_tensor_parallel_size"]
        if count % size:
            problem = f"{size}: with vLLM inside, that many ranks share one, and there are {count} ranks"
            choice.refuse("vllm_tensor_parallel_size", problem, f"give a number that divides {count}")
    elif options.num_nodes > 1:
        problem = "missing, and with several nodes the server has a machine of its own"
        choice.refuse("vllm_server_base_url", problem, "start one (docs/launcher.md, Several nodes), or --colocate")
    elif count == 1:
        choice.refuse("vllm_mode", "server needs a GPU of its own, and there is one GPU", "leave it out: colocate")
    else:
        layout.starts_server = True
        _choose_server_gpus(choice, layout, hardware, options)
    choice.default("vllm_mode", layout.vllm_mode)
    if not layout.starts_server:
        _refuse_unused(choice, layout, options, "the launcher starts no server in this layout")
    elif values["vllm_enable_sleep_mode"]:
        choice.refuse("vllm_enable_sleep_mode", "a server of its own never sleeps", "leave it out, or --colocate")


def _refuse_unused(choice: _Choice, layout: Layout, options: Options, reason: str) -> None:
    """Refuse what would have no effect where the launcher starts no server."""
    is_colocate = layout.use_vllm and layout.vllm_mode == "colocate"
    names = ["vllm_server_args"] if is_colocate else SERVER_FIELDS  # the others are settings of vLLM in the ranks too
    # All machines have one command, that of the server too.
    is_for_server = layout.use_vllm and layout.server_url and (options.serves or options.num_nodes > 1)
    names = [] if is_for_server else names
    names = [*names, "max_server_restarts"]
    if is_colocate or not layout.use_vllm:
        names.append("weight_sync")
    names = [name for name in names if name in choice.given]
    if options.colocate and not layout.use_vllm:
        names.append("--colocate")
    if (options.vllm_gpus or 1) > 1 and not is_for_server:
        names.append("--vllm_gpus")
    if options.sync and (is_colocate or not layout.use_vllm):
        names.append("--sync")
    for name in names:
        choice.refuse(name, f"it has no effect: {reason}", "leave it out")


def _choose_server_gpus(choice: _Choice, layout: Layout, hardware: Hardware, options: Options) -> None:
    wanted = choice.values["vllm_tensor_parallel_size"] if "vllm_tensor_parallel_size" in choice.given else None
    size = options.vllm_gpus or wanted or (len(hardware.gpus) if options.serves else 0) or 1
    layout.tensor_parallel = wanted or size
    if size % layout.tensor_parallel:
        problem = f"{size}, and vllm_tensor_parallel_size is {wanted}"
        choice.refuse("--vllm_gpus", problem, f"give a multiple of {wanted}: each replica has so many")
    if not hardware.gpus:
        if size > 1:
            choice.refuse("--vllm_gpus", f"{size}, and there is no GPU", "leave it out")
        return
    if size > len(hardware.gpus) - (not options.serves):
        problem = f"{size} of {len(hardware.gpus)} GPUs" + ("" if options.serves else ": at least one must train")
        choice.refuse("--vllm_gpus", problem, "give a smaller number")
        return
    if options.serves:
        layout.server_gpus = hardware.gpus[:size]
        return
    layout.train_gpus, layout.server_gpus = hardware.gpus[:-size], hardware.gpus[-size:]


def _choose_weight_sync(choice: _Choice, layout: Layout, options: Options, parameters: int) -> None:
    values, gpus = choice.values, layout.train_gpus
    given = values["weight_sync"] if "weight_sync" in choice.given else None
    field_name = "--sync" if options.sync else "weight_sync"
    if options.sync and given and options.sync != given:
        choice.refuse("--sync", f"{options.sync}, and the recipe says weight_sync: {given}", "give one of them")
    sync = options.sync or given or ("nccl" if gpus else "disk")
    no_adapter = _why_no_adapter(values)
    if sync == "nccl" and not gpus:
        choice.refuse(field_name, "NCCL connects GPUs, and there is no GPU", "use disk")
    if sync == "adapter" and no_adapter:
        choice.refuse(field_name, f"adapter does not fit: {no_adapter}", "leave it out")
    is_free = layout.starts_server and not options.sync and not given and not no_adapter
    if is_free and gpus and layout.parallel == "zero3":
        share = 2 * parameters / 2**30 / min(gpu.memory for gpu in gpus)
        sync = "adapter" if share > WHOLE_MODEL_SHARE else sync
    choice.filled["weight_sync"] = sync
    if sync == "nccl" and layout.starts_server:
        if values["max_server_restarts"] and "max_server_restarts" in choice.given:
            problem = "it has no effect: with NCCL the ranks cannot connect to a new server"
            choice.refuse("max_server_restarts", problem, "leave it out, or --sync disk")
        choice.filled["max_server_restarts"] = 0


def _why_no_adapter(values: dict) -> str:
    """Return why the vLLM server cannot generate with the adapter."""
    if not values["use_peft"]:
        return "without use_peft there is no adapter"
    for name in ("use_dora", "lora_modules_to_save", "lora_target_parameters"):
        if values[name]:
            return f"vLLM serves no adapter with {name}"
    if values["lora_r"] > ADAPTER_RANKS[-1]:
        return f"vLLM serves adapters up to rank {ADAPTER_RANKS[-1]}"
    return ""


def _check_overlap(choice: _Choice, layout: Layout) -> None:
    """Refuse overlap where nothing can overlap, or where its completions could not be corrected."""
    off = "overlap: false"
    if layout.is_seq2seq:
        choice.refuse("overlap", "vLLM has no seq2seq models, so no server generates", off)
    elif not layout.use_vllm or layout.vllm_mode != "server":
        problem = "it needs a vLLM server: nothing generates beside the ranks in this layout"
        choice.refuse("overlap", problem, f"{off}, or a GPU more")
    for name in ("tools", "environment_factory"):
        if choice.values[name]:
            choice.refuse("overlap", f"with {name} the later turns of a completion would have newer weights", off)
    if not choice.values["vllm_importance_sampling_correction"]:
        problem = "false, and with overlap older weights generate: the loss must be corrected for it"
        choice.refuse("vllm_importance_sampling_correction", problem, f"leave it out, or {off}")
    # A whole completion of older weights would soon weigh nothing (trl#4772).
    choice.default("vllm_importance_sampling_mode", "token_truncate")
