"""Train a recipe: python train.py --config configs/NAME.yaml [--key value ...]

Alone it is one process without a server. Under `accelerate launch train.py ...` it is one of several ranks.
launch_train.sh starts it with --run FOLDER: there everything is checked and resolved already.
"""

import os
import resource
import sys
import traceback
import warnings
from pathlib import Path

from grpo_launcher import hub
from grpo_launcher.console import exit_status
from grpo_launcher.errors import EXIT_GUARD
from grpo_launcher.launch.processes import exit_at_once, let_stacks_be_read
from grpo_launcher.runs import FINAL, Run, load_run, report_progress

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def main(argv: list[str]) -> int:
    """Train and save. Returns EXIT_GUARD where a guard stopped the run, else 0."""
    from grpo_launcher.slow_imports import quick_imports, skip_deepspeed_ops, skip_vllm

    skip_deepspeed_ops()
    if argv[:1] == ["--run"]:
        run = load_run(Path(argv[1]))
    else:
        from grpo_launcher.standalone import check_recipe

        run = check_recipe(argv)
    run.folder = Path(run.values["output_dir"])  # of all nodes; each has its own part of it for logs
    with quick_imports(run.values):
        from grpo_launcher import plugins
        from grpo_launcher.callbacks import EndOnRequest, Guards, RunLog, guard_limits, sync_limit
        from grpo_launcher.config import build_dataclasses, sends_files
        from grpo_launcher.data import load_for_training, load_tokenizer
        from grpo_launcher.layout import server_dtype

        recipe, args, model_args = build_dataclasses(run.values)
        if not run.values["use_vllm"] or sends_files(recipe, args):
            skip_vllm()
        from grpo_launcher.trainer import build_trainer

    is_sft = recipe.method == "sft"
    if args.process_index == 0:
        report_progress(run.folder, "loading model and data")

    # Rewards and tools
    tokenizer = load_tokenizer(run.values)
    tools = plugins.load_tools(recipe.tools, recipe.tool_kwargs, tokenizer)
    environment, all_tools = plugins.load_environment(recipe.environment_factory, tools)
    template_options = (run.values["chat_template_kwargs"] or {}) | plugins.chat_template_options(all_tools, tokenizer)

    # Dataset
    train_dataset, eval_dataset = load_for_training(run.values, tokenizer, run.max_prompt, **template_options)

    # Trainer
    rewards = []
    if not is_sft:
        rewards = plugins.load_rewards(recipe.reward_funcs, recipe.reward_kwargs, timeout=recipe.reward_timeout)
    max_sync = sync_limit(server_dtype(run.values), args.device.type)
    limits = guard_limits(recipe.guards, run.values["beta"], max_sync, recipe.refuse_hopeless)
    guards = Guards(run.folder, limits, metric="loss" if is_sft else "reward")
    end_on_request = EndOnRequest(run.folder)
    trainer = build_trainer(
        recipe,
        args,
        model_args,
        run=run.folder,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        reward_funcs=rewards,
        tools=tools,
        environment_factory=environment,
        callbacks=[end_on_request, RunLog(run.folder, is_sft=is_sft), guards],
        longest_prompt=run.longest_prompt or run.max_prompt,
    )
    with plugins.no_exit("a reward, a tool or an environment"):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    save(trainer, run, is_whole=not guards.stopped and not end_on_request.has_ended)
    return EXIT_GUARD if guards.stopped else 0


def save(trainer, run: Run, is_whole: bool) -> None:
    """Draw the curves, and save the final checkpoint of a run that came to its end.

    Args:
        trainer: after the training.
        run: the run.
        is_whole: whether it came to its end, the same on all ranks.
    """
    from grpo_launcher.callbacks import print_summary
    from grpo_launcher.report import plot_run

    if trainer.is_world_process_zero():
        plot_run(run.folder)
    if is_whole:
        if trainer.is_world_process_zero():
            push = " and pushing" if trainer.args.push_to_hub else ""
            report_progress(run.folder, f"saving{push} the final checkpoint")
        trainer.args.output_dir = str(run.folder / FINAL)  # TRL pushes this folder, and not the run's logs and paths
        trainer.save_model()
        trainer.create_model_card()
    peak = memory_peak(trainer.accelerator)
    if trainer.is_world_process_zero():
        print_summary(run.folder)
        print(f"A rank held up to {peak:.1f} GiB.{run.planned_memory}")
        if is_whole:
            print(f"Saved {run.folder / FINAL}", flush=True)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        _examine(run.folder)


def _examine(folder: Path) -> None:
    """Say what the reward has paid for. Nothing that happens here makes a trained run a failed one."""
    from grpo_launcher import autopsy, rollouts

    if not rollouts.files(folder):
        return
    report_progress(folder, "looking at what the reward has paid for")
    try:
        autopsy.examine(folder)
    except Exception as error:
        traceback.print_exc()
        print(f"Warning: no autopsy: {error!r}. Fix: see train.log, and report it.", flush=True)


def memory_peak(accelerator) -> float:
    """Return the most GiB that any rank has held: of its GPU, or of the machine's memory. All ranks call it."""
    import torch

    device = accelerator.device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return accelerator.gather(torch.tensor([peak], device=device)).max().item()


def run(argv: list[str]) -> None:
    """Run main() as a program: messages of a refusal, and the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    let_stacks_be_read()
    hub.use_cache_if_unreachable()
    status = exit_status(main, argv)
    if "LOCAL_RANK" not in os.environ:
        sys.exit(status)
    exit_at_once(status)  # in the C++ destructors gloo's threads may abort (pytorch#179291)


if __name__ == "__main__":
    run(sys.argv[1:])
