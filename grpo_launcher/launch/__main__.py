"""`python -m grpo_launcher.launch`, what launch_train.sh runs once the environment is there."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from grpo_launcher.launch import hardware
from grpo_launcher.launch.arguments import HOME, named, parse
from grpo_launcher.launch.plan import Plan, make_plan
from grpo_launcher.launch.processes import Stopped, catching_signals, start
from grpo_launcher.launch.supervise import supervise
from grpo_launcher import hub, runs as run_folder


class Refused(Exception):
    """A run that cannot start; the message says why and what to do."""


def main(argv: list[str]) -> int:
    """From the command line to the run's exit status: 2 where it was refused, 128 + the number of a signal that ended it."""
    options, flags = parse(argv)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        with catching_signals():
            return _launch(options, flags)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as signal:
        print("\nStopped; no process is left. To go on from the last checkpoint: the same command with --resume.", file=sys.stderr)
        return 128 + signal.args[0]


def _launch(options, flags: list[str]) -> int:
    hub.use_cache_if_unreachable()
    try:
        gpus = hardware.find_gpus()
    except ValueError as error:
        raise Refused(str(error)) from None
    if options.assume_gpus is not None:
        gpus = hardware.assumed_gpus(options.assume_gpus, options.assume_memory or 24)
    config = options.config
    if config is None:
        config = str(HOME / "configs" / ("tldr_length.yaml" if gpus else "quickstart.yaml"))
        print(f"No recipe given: {Path(config).name}, the default {'with' if gpus else 'without'} a GPU.")
    name = Path(config).stem
    inherited = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    folders = [os.getcwd(), str(Path(config).resolve().parent), *inherited]
    search_path = [folder for folder in dict.fromkeys(folders) if folder != str(HOME)]

    run, before, config = _find_resumed(options, flags, name, config)
    search_path = before.get("search_path", search_path)
    facts = _facts(config, flags, search_path)
    if before:  # the run's recipe.yaml names every field; what the machine decided then, it decides anew
        facts["given"] = [key for key in facts["given"] if key in {*named(flags), *before["given"]}]
        if (options.colocate, options.vllm_gpus, options.sync) == (False, 1, None):
            vars(options).update(before["options"])
    if facts["adapter"] and not options.dry_run:
        print(f"Merging the adapter {facts['adapter']} into its base, to start from the two as one model: python -m grpo_launcher.merge", flush=True)
        _run([sys.executable, "-P", "-m", "grpo_launcher.merge", facts["adapter"]], search_path, f"model_name_or_path: {facts['adapter']} could not be merged")
        facts = _facts(config, flags, search_path)
    prepare = facts["values"].get("prepare")
    own = [line for line in facts["missing"] if line.split(":")[0] in named(flags)]  # which nothing here can make
    if facts["missing"] and prepare and not own and not facts["problems"] and not options.dry_run:
        print(f"Preparing what {name} needs: python -m {prepare}", flush=True)
        _run([sys.executable, "-P", "-m", prepare], search_path, f"`python -m {prepare}` failed")
        facts = _facts(config, flags, search_path)
    plan = make_plan(facts, name, options, flags, gpus, search_path)
    if before and plan.ranks != before["ranks"]:
        plan.problems.append(
            f"--resume: {run} was trained by {before['ranks']} ranks, and this layout has {plan.ranks}; the optimizer's shards need the same number."
        )
    output = facts["values"].get("output_dir")
    if output and not options.resume and Path(output).is_dir() and any(Path(output).iterdir()):
        plan.problems.append(f"output_dir: {output} is not empty; name another folder, or add --resume to go on with the run in it.")

    _print_plan(plan, options)
    if plan.problems or (plan.missing and not options.dry_run):
        raise Refused("\n       ".join([f"{name} cannot run as asked:", *plan.problems, *([] if options.dry_run else plan.missing)]))
    if options.dry_run:
        return 0
    model = plan.values["model_name_or_path"]
    if not Path(model).exists():
        _download(model, plan.values["model_revision"])
    if not before:
        run = Path(output) if output else run_folder.new_run(name)
        run.mkdir(parents=True, exist_ok=True)
    checkpoint = run_folder.last_checkpoint(run, plan.ranks) if before else None
    run_folder.write_recipe(run, {**plan.values, "output_dir": str(run)}, [*plan.given, *plan.filled], (facts["data"] or {}).get("system_prompt"))
    (run / "accelerate.yaml").write_text(yaml.safe_dump(plan.accelerate), encoding="utf-8")
    (run / "plan.json").write_text(json.dumps(plan.as_dict() | {"search_path": search_path}, indent=1), encoding="utf-8")
    print(f"Run: {run}" + (f", from {checkpoint.name}" if checkpoint else ""), flush=True)
    return supervise(json.loads((run / "plan.json").read_text()), run, ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else [])


def _find_resumed(options, flags: list[str], name: str, config: str) -> tuple[Path | None, dict, str]:
    """The run to go on with, its plan.json, and its own recipe.yaml in place of the config; or (None, {}, config)."""
    if not options.resume:
        return None, {}, config
    try:
        folder = named(flags).get("output_dir") or yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("output_dir")
    except (yaml.YAMLError, AttributeError) as error:
        raise Refused(f"{config}: not a recipe: {error}") from None
    run = Path(folder) if folder else run_folder.newest_run(name)
    if run is None or not (run / "plan.json").is_file():
        raise Refused(f"--resume: there is no run of {name} in {run or run_folder.ROOT / name}; start one without --resume.")
    before = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    if run_folder.last_checkpoint(run, before["ranks"]) is None:
        raise Refused(f"--resume: {run} has no whole checkpoint yet (the recipe's save_steps); start anew without --resume.")
    return run, before, str(run / "recipe.yaml")


def _facts(config: str, flags: list[str], search_path: list[str]) -> dict:
    env = {"PYTHONPATH": os.pathsep.join([str(HOME), *search_path]), "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    command = [sys.executable, "-P", "-m", "grpo_launcher.preflight", "--config", config, *flags]
    child = start(command, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = child.communicate()
    if child.returncode:
        raise Refused(f"the recipe could not be read:\n{errors.decode(errors='replace')[-3000:]}")
    return json.loads(output.decode().strip().rpartition("\n")[2])


def _run(command: list[str], search_path: list[str], failure: str) -> None:
    child = start(command, {"PYTHONPATH": os.pathsep.join([str(HOME), *search_path]), "DS_ACCELERATOR": "cpu"})
    if child.wait():
        raise Refused(failure)


def _download(model: str, revision: str | None) -> None:
    """Fetch a model of the Hub before server and trainer start, so that neither waits or times out over it."""
    print(f"Fetching {model} unless it is in the cache (HF_ENDPOINT names a mirror)", flush=True)
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", model]
    for pattern in ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"):
        command += ["--exclude", pattern]
    if revision not in (None, "main"):
        command += ["--revision", revision]
    _run(command, [], f"model_name_or_path: {model} could not be fetched")


def _print_plan(plan: Plan, options) -> None:
    print(f"Plan for {plan.recipe}: {plan.layout or 'none'}")
    for line in plan.lines:
        print(f"  {line}")
    if not options.dry_run or plan.problems:
        return
    for title, part in (("vLLM server", plan.server), ("trainer", plan.trainer)):
        if part:
            print(f"{title}:")
            print("  " + " ".join(f"{key}={shlex.quote(value)}" for key, value in part["env"].items()))
            print("  " + shlex.join(part["command"]))
    print("accelerate.yaml:\n  " + yaml.safe_dump(plan.accelerate).strip().replace("\n", "\n  "))
    for note in plan.missing:
        print(f"Before it can run: {note}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # --dry-run | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
