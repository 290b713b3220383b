"""Groups without spread are asked again, on two ZeRO-3 ranks."""

import json

import pandas
import pytest
from helpers import ROOT, read_metrics, run_python, write_accelerate_config

REWARD = '''
import zlib


def every_fifth(completions, number, **columns):
    """Of most prompts all completions get the same, of the others not."""
    texts = [completion[-1]["content"].encode() for completion in completions]
    return [float(n % 5 == 0) * (zlib.crc32(text) % 7) for text, n in zip(texts, number, strict=True)]
'''
SAME = ["reward", "grad_norm", "num_tokens", "resample/tokens", "resample/useful_groups", "resample/stock_tokens"]


def test_two_ranks_resample_alike_and_resume_where_they_were(workplace):
    """A run of six steps, and the same from the checkpoint of the third, which knows the prompts without spread.

    The ranks are started by accelerate's own command.
    """
    (workplace / "mine.py").write_text(REWARD)
    rows = [
        {"prompt": [{"role": "user", "content": f"My sister sold {number} lamps."}], "number": number}
        for number in range(20)
    ]
    (workplace / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_accelerate_config(workplace / "machine.yaml", "zero3", 2)
    command = ["-m", "accelerate.commands.launch", "--config_file", "machine.yaml", ROOT / "train.py"]
    command += ["--model_name_or_path", "data/quickstart-model", "--dataset_name", "rows.jsonl"]
    command += [
        "--reward_funcs",
        "mine.py:every_fifth",
        "--resample_groups",
        "2",
        "--max_steps",
        "6",
        "--save_steps",
        "3",
    ]
    command += ["--per_device_train_batch_size", "12", "--num_generations", "8", "--max_completion_length", "16"]
    command += ["--learning_rate", "1e-4", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
    threads = {"OMP_NUM_THREADS": 1}
    done = run_python(*command, "--output_dir", "whole", cwd=workplace, **threads)
    assert "deepspeed_shm_comm" not in done.stdout, "DeepSpeed compiles nothing, which needs a compiler and a minute"
    lines = read_metrics(workplace / "whole")
    for step in range(1, 7):
        kept = pandas.read_parquet(workplace / f"whole/completions/completions_{step:05d}.parquet")
        kept["number"] = [json.loads(row)["number"] for row in kept["dataset_row"]]
        groups = kept.groupby(kept.index // 8)
        assert len(kept) == 24 and (groups["number"].nunique() == 1).all(), "12 of each rank, in groups of 8"
        assert (groups["every_fifth"].std() > 0).sum() == lines[step - 1]["resample/useful_groups"]
    more = [line["resample/tokens"] > line["resample/stock_tokens"] for line in lines]
    assert sum(more) >= 3 and sum(line["resample/useful_groups"] for line in lines) > 6
    resumed = ["--output_dir", "again", "--resume_from_checkpoint", "whole/checkpoint-3"]
    run_python(*command, *resumed, cwd=workplace, **threads)
    again = read_metrics(workplace / "again")
    assert [line["step"] for line in again] == [4, 5, 6]
    for before, after in zip(lines[3:], again, strict=True):
        assert [after[name] for name in SAME] == pytest.approx([before[name] for name in SAME], rel=1e-4)
