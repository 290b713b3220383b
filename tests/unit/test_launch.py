"""The launcher in this process, up to the point where it would start server and ranks."""

import itertools
import json
import shlex
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT, write_checkpoint
from tiny_models import make_model

from grpo_launcher.config import load_config
from grpo_launcher.errors import EXIT_REFUSED, UserError
from grpo_launcher.launch import __main__ as launcher
from grpo_launcher.launch import commands, hardware
from grpo_launcher.launch.arguments import parse
from grpo_launcher.layout import Gpu, Hardware, Options, choose_layout
from grpo_launcher.preflight import preflight
from grpo_launcher.runs import load_run
from grpo_launcher.standalone import check_recipe

QUICKSTART = str(ROOT / "configs/quickstart.yaml")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    make_model(folder / "model", seed=0)
    for name, count in {"rows": 64, "seven": 7}.items():
        rows = [{"prompt": f"post {number}"} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def launch(home, tmp_path, monkeypatch):
    """A function that runs the launcher in an empty folder with a small model and rows, and returns its exit status.

    launch.supervised: arguments of supervise(). launch.modules: what was run with python -m.
    """
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "catching_signals", nullcontext)

    def run_preflight(argv, hardware, options, start, rehearsal=None):
        return preflight(argv, hardware, options, rehearsal)

    monkeypatch.setattr(launcher, "run_preflight", run_preflight)

    def run(flags: str, recipe: str = QUICKSTART) -> int:
        return launcher.main([recipe, *shlex.split(flags)])

    run.supervised, run.modules = [], []
    monkeypatch.setattr(launcher, "supervise", lambda *arguments: run.supervised.append(arguments) or 0)
    monkeypatch.setattr(launcher, "_run_python", lambda *arguments: run.modules.append(arguments))
    return run


SMALL = "--model_name_or_path model --dataset_name rows.jsonl"
REFUSED = {
    "unknown flag": ("--learning_rat 1", "--learning_rat: ", "did you mean learning_rate?"),
    "missing dataset": (f"{SMALL} --dataset_name data/tldr", "dataset_name: ", "process_dataset.py tldr"),
    "missing model": (f"{SMALL} --model_name_or_path data/nothing", "model_name_or_path: ", "data/nothing"),
    "too few rows": (f"{SMALL} --dataset_name seven.jsonl", "dataset_name: ", "7 rows"),
    "folder in a file": (f"{SMALL} --output_dir rows.jsonl/run", "output_dir: ", "Not a directory"),
    "folder in use": (f"{SMALL} --output_dir model", "output_dir: ", "is not empty"),
    "checkpoint by hand": (f"{SMALL} --resume_from_checkpoint x", "resume_from_checkpoint: ", "--resume"),
    "resume without a run": ("--resume", "--resume: ", "no run of quickstart"),
    "resume of no run": ("--resume --output_dir model", "model: ", "no run"),
    "no such GPU": (f"{SMALL} --use_cpu false", "use_cpu: ", "False does not fit"),
    "colocate": (f"{SMALL} --colocate", "--colocate: ", "there is no GPU"),
}


@pytest.mark.parametrize(("flags", "field", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_starts(flags, field, message, launch, tmp_path, capsys):
    """Exit status 2, and no run folder."""
    assert launch(flags) == 2
    errors = capsys.readouterr().err
    assert f"error: {field}" in errors and message in errors
    assert launch.supervised == launch.modules == [] and not (tmp_path / "trainOutput").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["configs/tldr_lenght.yaml"], "did you mean configs/tldr_length.yaml?"),
        (["--assume-gpus", "4"], "needs --dry-run"),
        (["--dry-run", "--assume-memory", "80"], "needs --assume-gpus"),
        (["--dry-run", "--assume-gpus", "-1"], "at least 0"),
        (["--vllm_gpus", "0"], "at least 1"),
        (["--sync", "smoke"], "invalid choice"),
        (["--dry-run", "configs/quickstart.yaml"], "the recipe comes first"),
        (["--force"], "needs --resume"),
        (["--num_nodes", "2"], "belong together"),
        (["--num_nodes", "2", "--main_address", "10.0.0.1", "--node_rank", "2"], "0 to --num_nodes - 1"),
    ],
)
def test_a_mistyped_command_line_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(argv)
    assert message in capsys.readouterr().err


NODES = "--num_nodes 2 --main_address 127.0.0.1 --vllm_server_base_url http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (NODES, "output_dir"),
        (f"{NODES} --output_dir run --max_restarts 1", "max_restarts"),
        ("--num_nodes 2 --main_address 127.0.0.1 --output_dir run", "vllm_server_base_url"),
        ("--serve", "vllm_server_base_url"),
    ],
)
def test_what_several_nodes_cannot_do_is_refused(flags, field, launch, capsys):
    assert launch(f"{SMALL} {flags}") == EXIT_REFUSED
    assert f"error: {field}: " in capsys.readouterr().err and launch.supervised == []


def test_each_node_has_its_part_of_the_run(launch, tmp_path, capsys):
    """They share checkpoints and figures, and each has its own logs. The plan names the doors between them."""
    for rank in (1, 0):  # in any order
        assert launch(f"{SMALL} {NODES} --output_dir run --node_rank {rank}") == 0
        run = launch.supervised[-1][0]
        assert run.folder == Path("run/node-1" if rank else "run") and run.values["output_dir"] == "run"
        accelerate = yaml.safe_load((run.folder / "accelerate.yaml").read_text())
        assert (accelerate["num_machines"], accelerate["machine_rank"], accelerate["num_processes"]) == (2, rank, 2)
        assert (accelerate["main_process_ip"], accelerate["main_process_port"]) == ("127.0.0.1", 29500)
        assert run.commands["trainer"]["env"]["GLOO_SOCKET_IFNAME"] == "lo"
        out = capsys.readouterr().out
        assert "127.0.0.1:29500" in out and "http://127.0.0.1:8000" in out and "public" not in out
    assert launch(f"{SMALL} {NODES} --output_dir run") == EXIT_REFUSED, "node 0 would overwrite a run"


def test_a_public_address_is_warned_of(launch, monkeypatch, capsys):
    monkeypatch.setattr(commands, "way_to", lambda address: ("eth0", "8.8.8.8"))
    flags = NODES.replace("127.0.0.1 ", "8.8.8.8 ")
    assert launch(f"{SMALL} {flags} --output_dir run --dry-run") == 0
    assert "8.8.8.8 is a public address" in capsys.readouterr().out


def test_a_dry_run_shows_the_server_of_a_machine_that_only_serves(launch, capsys):
    assert launch(f"{SMALL} --serve --dry-run --vllm_server_base_url http://127.0.0.1:8123") == 0
    out = capsys.readouterr().out
    assert "--port 8123" in out and "train.py" not in out and launch.supervised == []


def test_what_prepare_would_make_is_not_asked_for_beside_another_error(launch, capsys):
    assert launch("--dataset_name seven.jsonl") == EXIT_REFUSED
    assert "dataset_name: " in (error := capsys.readouterr().err) and "model_name_or_path" not in error


def test_train_py_lists_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        check_recipe(["--help"])
    assert ended.value.code == 0 and "--reward_kwargs" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--help", "configs/quikstart.yaml"])
def test_help_and_a_mistyped_recipe_take_the_time_of_a_python_start(argument):
    """The standard library alone answers. The fastest of five, in multiples of `python3 -c pass`."""

    def fastest(*command: str) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, cwd=ROOT)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    assert fastest("bash", "launch_train.sh", argument) < 12 * fastest("python3", "-c", "pass")


@pytest.mark.parametrize(
    ("recipe", "gpus", "memory", "status", "message"),
    [
        ("quickstart", 0, 24, 0, "use_cpu: true"),
        ("tldr_length", 1, 24, 2, "3 such GPUs"),
        ("tldr_length", 1, 80, 0, "vLLM inside each rank"),
        ("tldr_length", 4, 24, 0, "CUDA_VISIBLE_DEVICES=3 "),
        ("tldr_length", 8, 80, 0, "num_processes: 7"),
    ],
)
def test_a_dry_run_plans_for_hardware_that_is_not_there(
    recipe, gpus, memory, status, message, launch, tmp_path, capsys
):
    """Neither model nor data need be there. What is missing is named, and nothing is made."""
    flags = f"--dry-run --assume-gpus {gpus} --assume-memory {memory}"
    assert launch(flags, str(ROOT / f"configs/{recipe}.yaml")) == status
    output = capsys.readouterr()
    assert message in output.out + output.err
    assert ("Before it can run: dataset_name: " in output.out) == (status == 0)
    assert launch.supervised == launch.modules == [] and not (tmp_path / "trainOutput").exists()


def test_a_run_is_written_before_it_starts(launch, tmp_path, capsys):
    """The default layout of the CPU. The ranks read the values that the server was started with."""
    assert launch(f"{SMALL} --max_steps 7 --vllm_server_host 0.0.0.0") == 0
    ((run, url, timeout),) = launch.supervised
    written = load_run(run.folder)
    assert written == run and run.folder.resolve() == tmp_path / "trainOutput/quickstart/1"
    assert written.values["max_steps"] == 7 and "max_steps" in written.given
    port = written.values["vllm_server_port"]
    assert url == f"http://127.0.0.1:{port}" and timeout == written.values["vllm_server_timeout"] == 900
    assert written.values["output_dir"] == str(run.folder) and written.layout["ranks"] == 2
    server, trainer = written.commands["server"]["argv"], written.commands["trainer"]["argv"]
    assert server[server.index("--port") + 1] == str(port) and trainer[-2:] == ["--run", str(run.folder)]
    accelerate = yaml.safe_load((run.folder / "accelerate.yaml").read_text())
    assert accelerate["num_processes"] == 2 and accelerate["use_cpu"] and accelerate["mixed_precision"] == "no"
    assert port != written.values["vllm_group_port"] and "Run: trainOutput/quickstart/1" in capsys.readouterr().out


def test_resume_goes_on_with_the_run(launch, tmp_path, monkeypatch, capsys):
    """With its recipe, its flags and its options, from its last whole checkpoint; not with another number of ranks."""
    assert launch(f"{SMALL} --max_steps 7 --sync disk") == 0
    folder = tmp_path / "trainOutput/quickstart/1"
    assert launch("--resume") == 2 and "no whole checkpoint" in capsys.readouterr().err
    write_checkpoint(folder / "checkpoint-4", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth")
    write_checkpoint(folder / "checkpoint-5", "rng_state_0.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch("--resume --max_steps 9") == launch("--resume --output_dir=~/trainOutput/quickstart/1") == 0
    assert "checkpoint-5 is not whole (trainer_state.json is not there)" in capsys.readouterr().out
    assert not (folder / "checkpoint-5").exists() and (folder / "broken-checkpoint-5").exists()
    _, first, second = [run for run, *_ in launch.supervised]
    assert first.folder.resolve() == second.folder.resolve() == folder and first.recipe == "quickstart"
    assert first.values["resume_from_checkpoint"].endswith("quickstart/1/checkpoint-4")
    assert (first.values["max_steps"], second.values["max_steps"]) == (9, 9), "the flags of a resumed run stay"
    assert first.values["model_name_or_path"] == "model" and second.options["sync"] == "disk"
    content = json.loads((folder / "run.json").read_text())
    content["layout"]["ranks"] = 1
    (folder / "run.json").write_text(json.dumps(content))
    write_checkpoint(folder / "checkpoint-4", "rng_state.pth")
    assert launch("--resume") == 2 and "trained by 1 ranks" in capsys.readouterr().err


@pytest.fixture
def begun(launch, tmp_path):
    """A run of a recipe of the user's own, which has a checkpoint. The recipe's path."""
    recipe = tmp_path / "mine.yaml"
    (tmp_path / "posts.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    values = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    values |= {"model_name_or_path": "model", "dataset_name": "posts.jsonl", "beta": 0.1}
    recipe.write_text(yaml.safe_dump(values))
    assert launch("", str(recipe)) == 0
    names = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"]
    write_checkpoint(tmp_path / "trainOutput/mine/1/checkpoint-4", *names)
    launch.supervised.clear()
    return recipe


def test_what_a_resumed_run_may_change(begun, launch):
    """How long it goes on, and what it shows and keeps. A comment in the recipe is no change."""
    begun.write_text("# mine\n" + begun.read_text())
    flags = "--max_steps 99 --save_steps 5 --eval_strategy no --sample_every 7 --report_to tensorboard"
    assert launch(f"--resume {flags} --guards '{{\"kl\": null}}'", str(begun)) == 0


def change_recipe(recipe):
    recipe.write_text(recipe.read_text().replace("beta: 0.1", "beta: 0.3"))


def change_rows(recipe):
    rows = recipe.with_name("posts.jsonl")
    rows.write_text(rows.read_text().replace("post 7", "post seven"))


@pytest.mark.parametrize(
    ("change", "flags", "field", "message", "beta"),
    [
        (None, "--beta 0.2", "beta: ", "0.1 when trainOutput/mine/1 began, and 0.2 now", 0.2),
        (None, "--dataset_name rows.jsonl", "dataset_name: ", "and rows.jsonl now", 0.1),
        (change_recipe, "", "mine.yaml: ", "beta was 0.1", 0.1),
        (change_rows, "", "dataset_name: ", "other prompts", 0.1),
    ],
    ids=["flag", "another dataset", "recipe", "rows"],
)
def test_a_changed_run_goes_on_with_force_alone(change, flags, field, message, beta, begun, launch, capsys):
    """The difference is shown. With --force the run goes on with its own recipe and the flags."""
    if change:
        change(begun)
    assert launch(f"--resume {flags}", str(begun)) == 2 and launch.supervised == []
    errors = capsys.readouterr().err
    assert f"error: {field}" in errors and message in errors and "--force" in errors
    assert launch(f"--resume {flags} --force", str(begun)) == 0
    ((run, *_),) = launch.supervised
    assert run.values["beta"] == beta
    assert launch("--resume", str(begun)) == 0, "what was forced stays"


def test_what_is_missing_is_made_once(launch, tmp_path, capsys):
    """An adapter is merged, and the recipe's `prepare` is run; not for what a flag named, and not twice."""
    assert launch("") == 2 and launch.modules == [("grpo_launcher.quickstart",)]
    assert "model_name_or_path: data/quickstart-model" in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").touch()
    assert launch("--model_name_or_path adapter --dataset_name rows.jsonl") == 2
    assert launch.modules[1:] == [("grpo_launcher.merge", "adapter")]


def test_a_given_port_that_is_taken_is_refused(launch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not hardware.is_port_free(port) and port not in hardware.free_ports(50)
        assert launch(f"{SMALL} --vllm_server_port {port}") == 2
    assert f"error: vllm_server_port: port {port} is taken" in capsys.readouterr().err
    assert hardware.is_port_free(port) and len(set(hardware.free_ports(50))) == 50


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A function that returns the server's command and the layout, for so many GPUs and these flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()

    def make(gpus: int, flags: str = "", vllm_gpus: int | None = None):
        argv = f"--model_name_or_path m --dataset_name d --reward_funcs mine.py:f --vllm_server_port 8001 {flags}"
        config = load_config(["--vllm_server_host", "127.0.0.1", *shlex.split(argv)])
        machine = Hardware([Gpu(str(index), 24) for index in range(gpus)], [0, 1, 2, 3], 32)
        options = Options(vllm_gpus=vllm_gpus)
        layout, filled, problems = choose_layout(config.values, config.given, machine, options, is_seq2seq=False)
        assert problems == []
        command = commands.server_command(config.values | filled, config.given, layout, machine)
        return command, layout, machine

    return make


def test_settings_of_trl_become_flags_of_the_server(server):
    """What is not given stays the server's own default. vllm_server_args come last, so that they win."""
    flags = "--vllm_gpu_memory_utilization 0.5 --vllm_model_impl transformers --vllm_max_model_length 512 --fp16 true"
    flags += " --vllm_tensor_parallel_size 2 --model_revision abc --trust_remote_code true --vllm_server_args=--seed=3"
    argv = server(4, flags)[0].argv
    wanted = (
        "--model m --dtype float16 --host 127.0.0.1 --port 8001 --gpu-memory-utilization 0.5 --model-impl transformers"
    )
    wanted += " --max-model-len 512 --tensor-parallel-size 2 --revision abc --logprobs-mode processed_logprobs"
    words = wanted.split()
    assert set(zip(words[::2], words[1::2], strict=True)) <= set(itertools.pairwise(argv))
    assert "--trust-remote-code" in argv and argv[-1] == "--seed=3"
    argv = server(4)[0].argv
    assert argv[argv.index("--tensor-parallel-size") + 1] == "1" and "--data-parallel-size" not in argv
    assert not {"--gpu-memory-utilization", "--model-impl", "--max-model-len", "--revision"} & set(argv)


def test_more_gpus_than_one_copy_needs_hold_replicas(server):
    command, layout, _ = server(6, "--vllm_tensor_parallel_size 2", vllm_gpus=4)
    assert {("--tensor-parallel-size", "2"), ("--data-parallel-size", "2")} <= set(itertools.pairwise(command.argv))
    assert layout.ranks == 2 and command.env["CUDA_VISIBLE_DEVICES"] == "2,3,4,5" and "2 replicas" in layout.describe()
    argv = server(6, vllm_gpus=4)[0].argv
    assert argv[argv.index("--tensor-parallel-size") + 1] == "4" and "--data-parallel-size" not in argv


@pytest.mark.parametrize(
    ("gpus", "flags", "dtype"),
    [
        (0, "", "float32"),
        (2, "", "bfloat16"),
        (2, "--bf16 false", "float32"),
        (2, "--bf16 false --dtype float16", "float16"),
        (0, "--bf16 true", "bfloat16"),
    ],
)
def test_the_server_computes_in_the_type_of_the_trainer(gpus, flags, dtype, server):
    argv = server(gpus, flags)[0].argv
    assert argv[argv.index("--dtype") + 1] == dtype


def test_a_server_that_gets_adapters_has_room_for_two(server):
    """Of the next rank that vLLM has."""
    command = server(0, "--use_peft true --lora_r 12 --weight_sync adapter")[0]
    words = " ".join(command.argv)
    assert "--enable-lora --max-lora-rank 16 --max-loras 2" in words and "--worker-extension-cls" not in words
    assert command.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_server_and_ranks_share_no_device_and_see_no_folder_of_the_user(server, tmp_path):
    for gpus in (0, 4):
        command, layout, machine = server(gpus)
        trainer = commands.trainer_command(layout, machine, tmp_path / "run", commands.Node())
        for env in (command.env, trainer.env):
            assert env["PYTHONSAFEPATH"] == "1" and "PYTHONPATH" not in env
        assert not any(str(tmp_path) in word for word in [*command.argv, *command.env.values()])
        assert command.argv[:2] == trainer.argv[:2] == [sys.executable, "-P"]
        devices = [part.env["CUDA_VISIBLE_DEVICES"] for part in (command, trainer)]
        if gpus:
            assert devices == ["3", "0,1,2"] and trainer.env["VLLM_HOST_IP"] == "127.0.0.1"
            assert trainer.env["OMP_NUM_THREADS"] == str(max(1, len(machine.cpus) // 3))
            assert "--weight-transfer-config" in command.argv and "--worker-extension-cls" not in command.argv
        else:
            assert devices == ["", ""] and trainer.env["DS_ACCELERATOR"] == "cpu"
            assert command.env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1" and trainer.env["OMP_NUM_THREADS"] == "2"
            assert "grpo_launcher.weight_sync_worker.DiskSyncWorker" in command.argv


@pytest.mark.parametrize(
    ("gpus", "flags", "kind", "precision"),
    [
        (0, "", "DEEPSPEED", "no"),
        (0, "--parallel ddp", "MULTI_GPU", "no"),
        (4, "", "DEEPSPEED", "bf16"),
        (4, "--fp16 true --parallel ddp", "MULTI_GPU", "fp16"),
        (4, "--bf16 false", "DEEPSPEED", "no"),
    ],
)
def test_accelerate_gets_ranks_and_precision(gpus, flags, kind, precision, server):
    _, layout, _ = server(gpus, flags)
    values = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    config = commands.accelerate_config(values, layout, commands.Node())
    assert (config["distributed_type"], config["mixed_precision"]) == (kind, precision)
    assert config["num_processes"] == (3 if gpus else 2) and config["use_cpu"] == (gpus == 0)


def test_visible_devices_are_respected(monkeypatch, tmp_path):
    """CUDA_VISIBLE_DEVICES chooses and orders. A GPU that is not there, or is named twice, is refused."""
    fake = tmp_path / "nvidia-smi"
    rows = [f"{index}, GPU-{letter * 2}, 24576, 9.0" for index, letter in enumerate("abc")]
    fake.write_text("#!/bin/sh\necho '" + "\n".join(rows) + "'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.find_gpus() == [Gpu(index, 24.0, 9.0) for index in "012"]
    for visible, found in {
        "2,GPU-aa": ["2", "GPU-aa"],
        "GPU-b": ["GPU-bb"],
        "": [],
        "-1": [],
        "NoDevFiles": [],
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.id for gpu in hardware.find_gpus()] == found
    for visible, message in {"0,GPU-aa": "GPU-aa is named twice", "5": "no GPU 5"}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(UserError, match=message):
            hardware.find_gpus()


SLICES = """GPU 0: NVIDIA A100 (UUID: GPU-aa)
  MIG 3g.20gb     Device  0: (UUID: MIG-11)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-22)
GPU 1: NVIDIA H100 (UUID: GPU-bb)
  MIG 1g.10gb     Device  0: (UUID: MIG-33)"""


def test_gpus_without_memory_of_their_own_and_slices_of_gpus(monkeypatch, tmp_path):
    """nvidia-smi has no memory for a GPU that shares the machine's, and lists slices (MIG) elsewhere."""
    fake = tmp_path / "nvidia-smi"
    rows = "0, GPU-aa, [N/A], 8.0\n1, GPU-bb, 81559, 9.0"
    fake.write_text(f"#!/bin/sh\n[ $1 = -L ] && echo '{SLICES}' || echo '{rows}'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shared, own = hardware.find_gpus()
    assert shared.memory == hardware.find_hardware(0).memory and round(own.memory) == 80
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-33,MIG-22")
    assert hardware.find_gpus() == [Gpu("MIG-33", 10.0, 9.0), Gpu("MIG-22", 5.0, 8.0)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-44")
    with pytest.raises(UserError, match="no GPU MIG-44"):
        hardware.find_gpus()


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_a_container_hold(version, monkeypatch, tmp_path):
    """Its own and those of the groups around it, in both versions of control groups."""
    group = tmp_path / "cgroup"
    group.write_text("0::/outer/inner\n" if version == 2 else "4:cpu,memory:/outer/inner\n1:pids:/\n0::/\n")
    root = tmp_path if version == 2 else tmp_path / "memory"
    (root / "outer/inner").mkdir(parents=True)
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    (root / "outer" / name).write_text(f"{2**30}\n")
    (root / "outer/inner" / name).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (root / "outer/inner/cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(hardware, "CGROUP", group)
    monkeypatch.setattr(hardware, "CGROUP_ROOT", tmp_path)
    found = hardware.find_hardware(0)
    assert found.memory == 1.0 and (len(found.cpus) == 1 or version == 1)


def test_the_doctor_rehearses_in_a_run_of_its_own(launch, tmp_path, monkeypatch, capsys):
    def supervise(run, url, timeout) -> int:
        assert (run.folder.parent.name, run.values["max_steps"]) == ("doctor", 2) and url
        (run.folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n')
        return 0

    monkeypatch.setattr(launcher, "supervise", supervise)
    assert launch(f"--doctor {SMALL}") == 0
    output = capsys.readouterr().out
    assert "processor:" in output and "torch" in output and "memory: " in output and "with 1 steps" in output
    assert launch("--doctor --beta -1") == 2
    assert "beta: " in capsys.readouterr().out and launch.modules == []


@pytest.mark.parametrize(
    ("gpus", "memory", "recipe"),
    [
        (4, 24, "tldr_length"),
        (1, 80, "tldr_length"),
        (2, 24, "tldr_lora"),
        (1, 8, "tldr_qlora"),
        (0, 24, "quickstart"),
    ],
)
def test_the_memory_decides_the_default_recipe(gpus, memory, recipe, launch, capsys):
    launcher.main(["--dry-run", "--assume-gpus", str(gpus), "--assume-memory", str(memory)])
    assert f"No recipe given: {recipe}.yaml" in capsys.readouterr().out


def test_a_recipe_prepares_its_data_by_a_script_of_the_project(launch, monkeypatch):
    recipe = str(ROOT / "configs/tldr_length.yaml")
    assert launch("--model_name_or_path model", recipe) == 2 and launch.modules == [("process_dataset.py", "tldr")]
    started = []
    monkeypatch.undo()
    monkeypatch.setattr(launcher, "start", lambda command, env: started.append(command) or SimpleNamespace(wait=int))
    launcher._run_python("process_dataset.py", "tldr")
    assert started == [[sys.executable, "-P", str(ROOT / "process_dataset.py"), "tldr"]]
