"""train.py without the launcher: one process, and several ranks under accelerate launch."""

import json

from helpers import ROOT, means, read_metrics, run_python, test_data, write_accelerate_config

TRAIN, QUICKSTART = ROOT / "train.py", ROOT / "configs/quickstart.yaml"
ONE_THREAD = {"OMP_NUM_THREADS": 1}


def test_a_real_pretrained_model_learns(tmp_path):
    """Plain story openings and a model of TEST_DATA: the reward rises, and the entropy does not collapse."""
    model = test_data("models/stories260K_hf")
    names = ["Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Tim", "Anna", "Sam", "Lucy"]
    animals = ["dog", "cat", "bird", "frog", "fish", "bear", "duck", "rabbit"]
    rows = [{"prompt": f"One day, {name} saw a {animal}"} for name in names for animal in animals]
    (tmp_path / "openings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [TRAIN, "--model_name_or_path", model, "--dataset_name", "openings.jsonl", "--output_dir", "run"]
    command += [
        "--reward_funcs",
        "rewards.length.length_reward",
        "--reward_kwargs",
        '{"length_reward": {"target": 300}}',
    ]
    command += ["--beta", "0.1", "--learning_rate", "7e-4", "--lr_scheduler_type", "constant", "--max_steps", "10"]
    command += ["--per_device_train_batch_size", "64", "--max_completion_length", "200"]
    run_python(*command, "--gradient_checkpointing", "false", cwd=tmp_path, **ONE_THREAD)
    lines = read_metrics(tmp_path / "run")
    first, last = means(lines, "reward")
    assert last > first + 25, (first, last)
    first, last = means(lines, "entropy")
    assert last > 0.5 * first and means(lines, "kl")[1] > 0
    assert (tmp_path / "run/final-checkpoint/model.safetensors").exists()


def test_a_guard_stops_ranks_under_accelerate_launch(workplace):
    """Two DDP ranks without the launcher. A learning rate far too high ends the run with another status than 0."""
    write_accelerate_config(workplace / "machine.yaml", "ddp", 2)
    command = ["-m", "accelerate.commands.launch", "--config_file", "machine.yaml", TRAIN, "--config", QUICKSTART]
    command += ["--learning_rate", "5e-2", "--max_steps", "40", "--save_steps", "1", "--sample_every", "0"]
    command += ["--per_device_train_batch_size", "8", "--max_completion_length", "32"]
    done = run_python(*command, cwd=workplace, status=1, **ONE_THREAD)
    folder = workplace / "trainOutput/quickstart/1"
    stopped = json.loads((folder / "stopped.json").read_text())
    assert "Stopped by a guard" in done.stdout and stopped["step"] < 40
    assert not (folder / "final-checkpoint").exists() and (folder / "curves.png").exists()
    lines = read_metrics(folder)
    if stopped["checkpoint"]:
        step = int(stopped["checkpoint"].split("-")[1])
        assert lines[step]["kl"] <= 1, "the KL of checkpoint-N is measured in step N + 1"
    run_json = json.loads((folder / "run.json").read_text())
    assert run_json["layout"]["ranks"] == 2 and run_json["values"]["learning_rate"] == 5e-2
