"""Check a recipe where no launcher has done it: train.py alone, or under accelerate launch."""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from grpo_launcher import runs
from grpo_launcher.errors import UserError
from grpo_launcher.launch.hardware import find_hardware
from grpo_launcher.layout import Options
from grpo_launcher.preflight_runner import run_preflight
from grpo_launcher.runs import Run


def check_recipe(argv: list[str]) -> Run:
    """Check the recipe on the main rank and write the run folder. All ranks return the same run.

    Raises:
        UserError: on all ranks, with everything that is wrong.
    """
    if {"--help", "-h"} & set(argv):
        from grpo_launcher.config import load_config

        load_config(argv)  # which ends with the list of all fields
    state = PartialState(cpu=not torch.cuda.is_available())  # joins the ranks: DeepSpeed, DDP or one process
    result: list[Run | UserError | None] = [None]
    if state.is_main_process:
        try:
            result = [_write_run(argv, state.num_processes)]
        except UserError as error:
            result = [error]
    if state.num_processes > 1:
        broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def _write_run(argv: list[str], ranks: int) -> Run:
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    report = run_preflight(argv, find_hardware(), Options(ranks=ranks, deepspeed=deepspeed))
    problems = [*report.problems, *report.missing]
    if problems:
        raise UserError("recipe", "\n  ".join(["it cannot run as it is", *problems]))
    values = report.values
    folder = Path(values["output_dir"]) if values["output_dir"] else runs.new_run(report.name)
    if (folder / runs.METRICS).exists() and not values["resume_from_checkpoint"]:
        fix = f"name another folder, or give --resume_from_checkpoint {folder}/checkpoint-STEP"
        raise UserError("output_dir", f"{folder} holds another run", fix)
    values["output_dir"] = str(folder)
    data, layout = report.data, asdict(report.layout)
    run = Run(folder, report.name, values, report.given, data.system_prompt, data.max_prompt, layout)
    run.longest_prompt = data.longest_prompt
    run.write()
    return run
