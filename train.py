"""Train a recipe: python train.py --config configs/NAME.yaml [--key value …]

One process without a server when called alone; under `accelerate launch` or `bash launch_train.sh` one of its ranks.
"""

import atexit
import os
import sys
import warnings
from pathlib import Path

from grpo_launcher.hub import use_cache_if_unreachable

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def main(argv: list[str]) -> int:
    """Recipe → rows and rewards → trainer → checkpoints, curves and table in the run's folder. 3 where a guard stopped it, else 0."""
    from grpo_launcher.preflight import gather
    from grpo_launcher.config import RecipeError, RecipeParser

    alone = "LOCAL_RANK" not in os.environ  # else a launcher has checked all this
    if alone:
        told = gather(argv)
        if told["problems"] or told["missing"]:
            raise RecipeError("\n       ".join(["the recipe cannot run as asked:", *told["problems"], *told["missing"]]))

    from grpo_launcher.trainer import compile_nothing, trainer_class

    compile_nothing()
    recipe, args, model = RecipeParser().parse(argv)

    from accelerate.utils import broadcast_object_list
    from transformers import AutoConfig, AutoTokenizer, PrinterCallback, ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from grpo_launcher import seq2seq as encoder_decoder, runs as run_folder, supervised
    from grpo_launcher.plugins import load_rewards
    from grpo_launcher.bind_tools import load_environment, load_tools, template_options
    from grpo_launcher.callbacks import RunLog, print_summary
    from grpo_launcher.guards import Guards, limits
    from grpo_launcher.report import plot_run
    from grpo_launcher.data import column_names, load_rows, short_prompts

    state = args.distributed_state
    options = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(model.model_name_or_path, **options)
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, **options) if recipe.tools or recipe.environment_factory else None
    tools = load_tools(recipe, tokenizer)
    environment, offered = load_environment(recipe, tools)
    reads = encoder_decoder.is_encoder_decoder(config)
    model.lora_task_type = encoder_decoder.TASK[reads]
    rows = load_rows(recipe.dataset_name, recipe.dataset_config, recipe.dataset_streaming)
    teaches = recipe.method == "sft"
    context = recipe.dataset_streaming and (encoder_decoder.places(config) if reads else args.vllm_max_model_length)
    if context:
        template = (args.chat_template_kwargs or {}) | template_options(offered, tokenizer)
        room = context if reads else context - args.max_completion_length * (2 if offered else 1)
        rows = {split: short_prompts(one, model.model_name_or_path, room, **template) for split, one in rows.items()}
    train_rows = rows[recipe.dataset_train_split]
    held_out = rows.get(recipe.dataset_test_split)
    if held_out is not None and recipe.eval_rows:
        held_out = held_out.take(recipe.eval_rows)
    prompts = 1 if teaches else args.generation_batch_size // args.num_generations
    if not recipe.dataset_streaming and len(train_rows) < prompts:
        raise RecipeError(f"dataset_name: {len(train_rows)} prompts, and one generation takes {prompts}: TRL would end after 0 steps.")
    rewards = [] if teaches else load_rewards(recipe, column_names(train_rows), args.reward_weights)

    name = Path(argv[argv.index("--config") + 1]).stem if "--config" in argv else "flags"
    folder = [args.output_dir or (str(run_folder.new_run(name)) if state.is_main_process else None)]
    if state.num_processes > 1:
        broadcast_object_list(folder)
    args.output_dir = folder[0]
    run = Path(args.output_dir)
    if (run / run_folder.METRICS).exists() and not args.resume_from_checkpoint:
        raise RecipeError(f"output_dir: {run} holds another run; name another folder, or give --resume_from_checkpoint {run}/checkpoint-STEP.")

    if alone:
        run.mkdir(parents=True, exist_ok=True)
        run_folder.write_recipe(run, told["values"] | {"output_dir": str(run)}, told["given"], (told["data"] or {}).get("system_prompt"))
    args.model_init_kwargs = {"dtype": model.dtype, "revision": model.model_revision, **(args.model_init_kwargs or {})}
    if model.attn_implementation:
        args.model_init_kwargs.setdefault("attn_implementation", model.attn_implementation)
    guards = Guards(run, limits(recipe.guards, 0 if teaches else args.beta), judged="loss" if teaches else "reward")
    rows = {"train_dataset": train_rows, "eval_dataset": held_out if args.eval_strategy != "no" else None}
    callbacks = [RunLog(run, taught=teaches), guards]
    if teaches:
        trainer = supervised.make_trainer(args, model, config, rows, callbacks)
    else:
        trainer = trainer_class(args, recipe, config)(
            model=model.model_name_or_path,
            reward_funcs=rewards,
            args=args,
            **rows,
            tools=tools or None,
            environment_factory=environment,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            callbacks=callbacks,
        )
    for printed_twice in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printed_twice)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if not guards.stopped:
        args.output_dir = str(run / run_folder.FINAL)  # TRL pushes this folder: not the run's, with its logs and paths
        trainer.save_model()  # pushes it too, where the recipe says so
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if state.is_main_process:
        if guards.stopped:  # else the card of the final checkpoint has drawn them
            plot_run(run)
        print_summary(run)
        print(guards.stopped or f"Saved {run / run_folder.FINAL}", flush=True)
    return 3 if guards.stopped and alone else 0  # a launcher would take any other status of a rank for a crash; it reads STOPPED


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    use_cache_if_unreachable()
    from grpo_launcher.config import RecipeError

    try:
        status = main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
    if "LOCAL_RANK" not in os.environ:
        sys.exit(status)
    atexit._run_exitfuncs()  # all that sys.exit would do for a rank, but for the C++ destructors, in which gloo's threads now and then abort it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # pytorch#179291
