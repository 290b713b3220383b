"""Who trains and who generates: what is given is obeyed or refused, never changed."""

import pytest

from grpo_launcher.config import load_config
from grpo_launcher.layout import SERVER_FIELDS, SERVER_TIMEOUT, Gpu, Hardware, Options, choose_layout

VALUES = load_config(["--model_name_or_path", "m", "--dataset_name", "d"]).values


def choose(gpus: int, *, options: Options | None = None, is_seq2seq: bool = False, **given):
    """Return the layout for so many GPUs, the fields as they end, and the fields that are refused."""
    hardware = Hardware([Gpu(str(index), 24) for index in range(gpus)], [0, 1], 32)
    values = VALUES | given
    layout, filled, problems = choose_layout(values, list(given), hardware, options or Options(), is_seq2seq)
    if not problems:
        changed = {name for name, value in given.items() if (values | filled)[name] != value}
        assert not changed, f"changed in silence: {changed}"
    return layout, values | filled, [problem.field for problem in problems]


def ids(gpus: list[Gpu]) -> list[str]:
    return [gpu.id for gpu in gpus]


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 2), (4, 8)])
def test_several_nodes_train_on_all_their_gpus(gpus, ranks):
    """The server has a machine of its own, or vLLM is in the ranks. Without a GPU each node has one rank."""
    nodes, url = Options(num_nodes=2), "http://10.0.0.3:8000"
    layout, values, refused = choose(gpus, options=nodes, vllm_server_base_url=url)
    assert refused == [] and layout.ranks == ranks and len(layout.train_gpus) == gpus and not layout.starts_server
    assert values["vllm_mode"] == "server" and "2 nodes" in layout.describe()
    assert choose(gpus, options=nodes)[2] == ([] if gpus == 1 else ["vllm_server_base_url"])
    if gpus:
        colocated, _, refused = choose(gpus, options=Options(colocate=True, num_nodes=2))
        assert refused == [] and colocated.ranks == ranks and colocated.vllm_mode == "colocate"
        options, unused = Options(colocate=True, num_nodes=2), ["--seed=1"]
        assert choose(gpus, options=options, vllm_server_args=unused)[2] == ["vllm_server_args"]
    for options in (nodes, Options(num_nodes=2, serves=True), Options(serves=True)):
        assert choose(gpus, options=options, vllm_server_base_url=url, vllm_server_args=["--seed=1"])[2] == []


@pytest.mark.parametrize(
    ("gpus", "ranks", "server_gpus", "mode"),
    [
        (0, 2, [], "server"),
        (1, 1, [], "colocate"),
        (2, 1, ["1"], "server"),
        (4, 3, ["3"], "server"),
        (8, 7, ["7"], "server"),
    ],
)
def test_the_hardware_decides(gpus, ranks, server_gpus, mode):
    """The last GPU generates and the others train. One GPU does both. The CPU has two ranks and a server."""
    layout, values, refused = choose(gpus)
    assert refused == [] and layout.ranks == ranks and layout.use_vllm and values["use_vllm"]
    assert ids(layout.server_gpus) == server_gpus
    assert ids(layout.train_gpus) == [str(index) for index in range(gpus - len(server_gpus))]
    assert layout.vllm_mode == values["vllm_mode"] == mode and layout.starts_server == (mode == "server")
    assert layout.parallel == values["parallel"] == "zero3"
    assert (values["bf16"], values["use_cpu"]) == (gpus > 0, gpus == 0)
    if mode == "server":
        assert values["weight_sync"] == ("nccl" if gpus else "disk")
        assert values["vllm_server_timeout"] == SERVER_TIMEOUT
    phrase = "colocate" if gpus == 1 else f"vLLM server on {'GPU ' + server_gpus[0] if gpus else 'the CPU'}"
    assert layout.describe().startswith(f"{ranks} ZeRO-3 rank") and phrase in layout.describe()


@pytest.mark.parametrize(("options", "given"), [(Options(colocate=True), {}), (None, {"vllm_mode": "colocate"})])
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_colocate_uses_every_gpu(gpus, options, given):
    layout, values, refused = choose(gpus, options=options, **given)
    if gpus == 0:
        assert refused == ["--colocate" if options else "vllm_mode"], "there is nothing to share"
        return
    assert refused == [] and layout.ranks == gpus and not layout.starts_server and layout.server_gpus == []
    assert layout.vllm_mode == values["vllm_mode"] == "colocate"


@pytest.mark.parametrize(
    ("options", "given"), [(Options(vllm_gpus=2), {}), (None, {"vllm_tensor_parallel_size": 2})], ids=["flag", "field"]
)
@pytest.mark.parametrize("gpus", [0, 2, 4])
def test_a_server_on_two_gpus(gpus, options, given):
    """The last two. At least one must train."""
    layout, _, refused = choose(gpus, options=options, **given)
    assert refused == ([] if gpus == 4 else ["--vllm_gpus"])
    if gpus == 4:
        assert layout.ranks == 2 and ids(layout.server_gpus) == ["2", "3"] and ids(layout.train_gpus) == ["0", "1"]


@pytest.mark.parametrize(
    ("vllm_gpus", "size", "server_gpus", "replicas"),
    [
        (None, None, "0123", 1),
        (2, None, "01", 1),
        (None, 2, "01", 1),
        (4, 2, "0123", 2),
        (3, 2, None, 0),
        (5, 1, None, 0),
    ],
)
def test_a_machine_that_only_serves(vllm_gpus, size, server_gpus, replicas):
    """With all of its GPUs, or with as many as it is told."""
    given = {"vllm_tensor_parallel_size": size} if size else {}
    options = Options(serves=True, vllm_gpus=vllm_gpus)
    layout, _, refused = choose(4, options=options, vllm_server_base_url="http://10.0.0.3:8000", **given)
    assert refused == ([] if server_gpus else ["--vllm_gpus"])
    if server_gpus:
        assert (ids(layout.server_gpus), layout.replicas) == (list(server_gpus), replicas)


@pytest.mark.parametrize(
    ("gpus", "options", "given", "field"),
    {
        "no whole replicas": (4, Options(vllm_gpus=3), {"vllm_tensor_parallel_size": 2}, "--vllm_gpus"),
        "server GPUs and colocate": (4, Options(colocate=True, vllm_gpus=2), {}, "--vllm_gpus"),
        "ranks that do not share evenly": (
            4,
            Options(colocate=True),
            {"vllm_tensor_parallel_size": 3},
            "vllm_tensor_parallel_size",
        ),
        "server and --colocate": (4, Options(colocate=True), {"vllm_mode": "server"}, "--colocate"),
        "server on one GPU": (1, None, {"vllm_mode": "server"}, "vllm_mode"),
        "colocate at a URL": (4, None, {"vllm_mode": "colocate", "vllm_server_base_url": "http://a:1"}, "vllm_mode"),
        "NCCL without a GPU": (0, None, {"weight_sync": "nccl"}, "weight_sync"),
        "--sync nccl without a GPU": (0, Options(sync="nccl"), {}, "--sync"),
        "an adapter without LoRA": (0, None, {"weight_sync": "adapter"}, "weight_sync"),
        "an adapter with DoRA": (
            0,
            Options(sync="adapter"),
            {"use_peft": True, "use_dora": True},
            "--sync",
        ),
        "overlap on one GPU": (1, None, {"overlap": True}, "overlap"),
        "overlap without vLLM": (0, None, {"overlap": True, "use_vllm": False}, "overlap"),
        "overlap with tools": (0, None, {"overlap": True, "tools": ["t"]}, "overlap"),
        "overlap without correction": (
            0,
            None,
            {"overlap": True, "vllm_importance_sampling_correction": False},
            "vllm_importance_sampling_correction",
        ),
        "two ways to sync": (4, Options(sync="disk"), {"weight_sync": "nccl"}, "--sync"),
        "the CPU beside GPUs": (2, None, {"use_cpu": True}, "use_cpu"),
        "a GPU that is not there": (0, None, {"use_cpu": False}, "use_cpu"),
        "fp16 on the CPU": (0, None, {"fp16": True}, "fp16"),
        "sleep of a server": (2, None, {"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode"),
        "vLLM with 4 bits": (1, None, {"load_in_4bit": True, "use_vllm": True}, "use_vllm"),
        "vLLM in SFT": (1, None, {"method": "sft", "use_vllm": True}, "use_vllm"),
        "server GPUs in SFT": (4, Options(vllm_gpus=2), {"method": "sft"}, "--vllm_gpus"),
        "server GPUs without vLLM": (4, Options(vllm_gpus=2), {"use_vllm": False}, "--vllm_gpus"),
        "server arguments without vLLM": (
            4,
            None,
            {"use_vllm": False, "vllm_server_args": ["--x"]},
            "vllm_server_args",
        ),
        "--colocate without vLLM": (4, Options(colocate=True), {"use_vllm": False}, "--colocate"),
        "--sync and colocate": (1, Options(sync="disk"), {}, "--sync"),
        "server GPUs at a URL": (4, Options(vllm_gpus=2), {"vllm_server_base_url": "http://a:1"}, "--vllm_gpus"),
        "colocate in SFT": (4, Options(colocate=True), {"method": "sft"}, "--colocate"),
    }.values(),
)
def test_what_cannot_be_obeyed_is_refused(gpus, options, given, field):
    assert choose(gpus, options=options, **given)[2] == [field]


@pytest.mark.parametrize(
    ("gpus", "options", "given"),
    {
        "no bf16 on a GPU": (2, None, {"bf16": False}),
        "bf16 on the CPU": (0, None, {"bf16": True}),
        "fp16": (2, None, {"fp16": True, "bf16": False}),
        "server": (4, None, {"vllm_mode": "server"}),
        "server on the CPU": (0, None, {"vllm_mode": "server", "use_cpu": True}),
        "no vLLM": (4, None, {"use_vllm": False}),
        "DDP": (4, None, {"parallel": "ddp"}),
        "sync over a disk": (4, None, {"weight_sync": "disk"}),
        "the adapter alone": (0, None, {"weight_sync": "adapter", "use_peft": True}),
        "overlap": (4, None, {"overlap": True, "vllm_importance_sampling_mode": "token_mask"}),
        "time limit": (4, None, {"vllm_server_timeout": 30.0}),
        "sleep of colocate": (1, None, {"vllm_enable_sleep_mode": True}),
        "memory of colocate": (1, None, {"vllm_gpu_memory_utilization": 0.5, "vllm_model_impl": "transformers"}),
        "memory of a server": (2, None, {"vllm_gpu_memory_utilization": 0.5, "vllm_server_args": ["--x"]}),
    }.values(),
)
def test_what_is_given_is_obeyed(gpus, options, given):
    """choose() compares every given field with its value in the end."""
    assert choose(gpus, options=options, **given)[2] == []


def test_overlap_weighs_tokens():
    """TRL's default throws most longer completions of older weights away (trl#4772)."""
    assert choose(2, overlap=True)[1]["vllm_importance_sampling_mode"] == "token_truncate"
    assert choose(2)[1]["vllm_importance_sampling_mode"] == VALUES["vllm_importance_sampling_mode"]


@pytest.mark.parametrize(
    ("billions", "given", "sync"), [(1.5, {}, "nccl"), (7, {}, "adapter"), (7, {"parallel": "ddp"}, "nccl")]
)
def test_a_large_model_with_lora_is_not_gathered(billions, given, sync):
    """On GPUs of 24 GiB: under ZeRO-3 the adapter travels alone where the model would take a quarter of one."""
    hardware = Hardware([Gpu(str(index), 24) for index in range(4)], [0, 1], 32)
    values = VALUES | given | {"use_peft": True}
    parameters = int(billions * 1e9)
    for use_peft in (True, False):
        values["use_peft"] = use_peft
        _, filled, problems = choose_layout(values, list(given), hardware, Options(), False, parameters)
        assert not problems and filled["weight_sync"] == (sync if use_peft else "nccl")


def test_fp16_takes_the_place_of_bf16():
    assert not choose(1, fp16=True)[1]["bf16"]
    assert choose(4, options=Options(sync="disk"))[1]["weight_sync"] == "disk"


def test_a_server_of_the_users_own():
    """None is started, every GPU trains, and its fields are refused, as they would go nowhere."""
    url = {"vllm_server_base_url": "http://10.0.0.1:8000"}
    for gpus in (0, 1, 4):
        layout, values, refused = choose(gpus, **url)
        assert refused == [] and not layout.starts_server and layout.ranks == (gpus or 2)
        assert values["vllm_mode"] == "server" and "http://10.0.0.1:8000" in layout.describe()
    assert choose(0, options=Options(sync="disk"), **url)[2] == []
    for field in (*SERVER_FIELDS, "max_server_restarts"):
        value = ["--x"] if field == "vllm_server_args" else 2
        assert choose(4, **url, **{field: value})[2] == [field]
    assert choose(1, vllm_server_args=["--x"])[2] == ["vllm_server_args"], "colocate starts none either"
    assert choose(1, weight_sync="disk")[2] == ["weight_sync"] and choose(4, weight_sync="disk", **url)[2] == []


def test_a_lost_server_is_started_again_where_it_can_be_used():
    """Ranks that are connected by NCCL cannot connect to a new one."""
    assert choose(4)[1]["max_server_restarts"] == 0 and choose(4, max_server_restarts=0)[2] == []
    assert choose(4, max_server_restarts=2)[2] == ["max_server_restarts"]
    for gpus in (0, 4):
        _, values, refused = choose(gpus, weight_sync="disk", max_server_restarts=2)
        assert values["max_server_restarts"] == 2 and refused == []
    assert choose(0)[1]["max_server_restarts"] == 3


@pytest.mark.parametrize(
    ("given", "is_seq2seq", "parallel", "phrase"),
    [
        ({"method": "sft"}, False, "zero3", "no generation (SFT)"),
        ({}, True, "zero3", "transformers on every device"),
        ({"load_in_4bit": True}, False, "ddp", "generation by transformers"),
        ({"load_in_8bit": True}, False, "ddp", "generation by transformers"),
    ],
)
@pytest.mark.parametrize("gpus", [0, 4])
def test_every_device_trains_where_vllm_cannot_generate(gpus, given, is_seq2seq, parallel, phrase):
    layout, values, refused = choose(gpus, is_seq2seq=is_seq2seq, **given)
    assert refused == [] and layout.ranks == (gpus or 2) and len(layout.train_gpus) == gpus
    assert not layout.use_vllm and not values["use_vllm"] and not layout.starts_server
    assert layout.parallel == values["parallel"] == parallel and phrase in layout.describe()


def test_ranks_that_somebody_else_started_keep_trls_meaning():
    """Under `accelerate launch` vLLM is used where the recipe says so, in the mode that it says."""
    layout, values, refused = choose(4, options=Options(ranks=2))
    assert refused == [] and layout.ranks == 2 and not layout.use_vllm and not values["use_vllm"]
    layout, values, refused = choose(4, options=Options(ranks=2), use_vllm=True)
    assert refused == [] and layout.vllm_mode == values["vllm_mode"] == VALUES["vllm_mode"]
    assert not layout.starts_server


def test_gpus_before_ampere_get_fp16():
    """A bf16 that is given is refused at once, as vLLM would refuse it later."""
    hardware = Hardware([Gpu("0", 24), Gpu("1", 24, 7.5)], [0, 1], 32)
    for given, expected in {None: (False, True), "fp16": (False, True), "bf16": (True, False)}.items():
        values = VALUES | ({given: True} if given else {})
        _, filled, problems = choose_layout(values, [given] if given else [], hardware, Options(), False)
        assert ((values | filled)["bf16"], (values | filled)["fp16"]) == expected or problems
        assert [problem.field for problem in problems] == (["bf16"] if given == "bf16" else [])
