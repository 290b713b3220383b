"""Check a recipe once, before anything expensive starts: fields, model, plugins, data, batch arithmetic, memory.

It runs in a child process, which preflight_runner.run_preflight() starts: main() answers one JSON request on standard
input with one JSON report on standard output.
"""

import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from trl import ModelConfig, get_peft_config

from grpo_launcher import hub, plugins, runs, seq2seq
from grpo_launcher.callbacks import guard_limits
from grpo_launcher.config import arguments_class, build, grpo_only_fields, load_config
from grpo_launcher.data import check_prompt, column_values, load_splits, load_tokenizer, longest_prompt
from grpo_launcher.errors import UserError, closest_match, first_line
from grpo_launcher.layout import Gpu, Hardware, Options, choose_layout
from grpo_launcher.memory import check_memory
from grpo_launcher.merge import needs_merge
from grpo_launcher.messages import is_null
from grpo_launcher.preflight_runner import PROJECT, DataInfo, ModelInfo, Report
from grpo_launcher.trl_version import check_trl_version


def preflight(argv: list[str], hardware: Hardware, options: Options, rehearsal: str | None = None) -> Report:
    """Check a recipe. Nothing is trained and no weight is read.

    Args:
        argv: the recipe, as for train.py: ["--config", PATH, "--key", "value", ...].
        hardware: what there is, or what is assumed.
        options: the launcher's command line.
        rehearsal: folder for the model of a rehearsal, whose report stands in this one; None for no rehearsal.
    """
    report = Report()
    check = _Check(report, hardware, options)
    try:
        config = load_config(argv)
    except UserError as error:
        report.problems.append(str(error))
        return report
    report.name, report.values, report.given = config.name, config.values, config.given
    check.folders()
    check.model()
    check.layout()
    check.combinations()
    check.plugins_and_data()
    check.batch()
    check.context()
    check.memory()
    if rehearsal and not report.problems:
        from grpo_launcher.rehearsal import prepare_rehearsal

        report.rehearsal = preflight(prepare_rehearsal(report, argv, Path(rehearsal)), hardware, options)
    return report


class _Check:
    """The steps of the preflight. Each adds to the report; none of them stops the others."""

    def __init__(self, report: Report, hardware: Hardware, options: Options):
        self.report, self.hardware, self.options = report, hardware, options
        self.tokenizer = self.model_config = self.meta_model = None
        self.splits = {}  # those that the run uses

    def refuse(self, field_name: str, problem: str, fix: str = "") -> None:
        self.report.problems.append(str(UserError(field_name, problem, fix)))

    def folders(self) -> None:
        """Try to write where a run will."""
        output = self.report.values["output_dir"] or runs.ROOT / self.report.name
        for name, folder in {"output_dir": output, "HF_HOME": datasets.config.HF_DATASETS_CACHE}.items():
            try:
                runs.check_writable(name, Path(folder))
            except UserError as error:
                self.report.problems.append(str(error))

    def model(self) -> None:
        """Read config and tokenizer of the model, and count its parameters without loading them."""
        values, report = self.report.values, self.report
        name = values["model_name_or_path"]
        report.adapter = needs_merge(name)
        if report.adapter:
            problem = f"{name} is an adapter and must be merged into its base"
            fix = f"the launcher does it; by hand: python -m grpo_launcher.merge {name}"
            report.missing.append(str(UserError("model_name_or_path", problem, fix)))
            return
        trust = {"trust_remote_code": values["trust_remote_code"]}
        try:
            config = AutoConfig.from_pretrained(name, revision=values["model_revision"], **trust)
            self.tokenizer = load_tokenizer(values)
        except (OSError, ValueError) as error:
            problem = f"{name} cannot be read: {first_line(error)}"
            report.missing.append(str(UserError("model_name_or_path", problem, hub.hint())))
            if size := re.search(r"(\d+(?:\.\d+)?)B\b", name):
                report.model = ModelInfo(int(float(size[1]) * 1e9), "its name")
            return
        self.model_config = config
        is_16_bit = values["bf16"] or values["fp16"] or bool(self.hardware.gpus)
        config.dtype = torch.bfloat16 if is_16_bit else torch.float32
        with torch.device("meta"):
            self.meta_model = seq2seq.model_class(config).from_config(config, **trust)
        text_config = config.get_text_config()
        report.model = ModelInfo(
            parameters=self.meta_model.num_parameters(),
            source="its config.json",
            context=seq2seq.max_positions(text_config),
            heads=getattr(text_config, "num_attention_heads", None),
            is_seq2seq=config.is_encoder_decoder,
            layers=text_config.num_hidden_layers,
            hidden=text_config.hidden_size,
            vocabulary=text_config.vocab_size,
        )
        if self.tokenizer.pad_token is None and self.tokenizer.eos_token is None:
            self.refuse("model_name_or_path", f"the tokenizer of {name} has neither a pad nor an end-of-text token")

    def layout(self) -> None:
        """Choose who trains and who generates."""
        report = self.report
        is_seq2seq = bool(report.model and report.model.is_seq2seq)
        report.layout, filled, problems = choose_layout(
            report.values,
            report.given,
            self.hardware,
            self.options,
            is_seq2seq,
            report.model.parameters if report.model else 0,
        )
        report.problems += map(str, problems)
        if is_seq2seq:
            report.problems += map(str, seq2seq.check_seq2seq(report.values, self.model_config, self.tokenizer))
        report.values |= filled
        self._gpus()
        count, heads = report.layout.tensor_parallel, report.model and report.model.heads
        if report.layout.server_gpus and heads and heads % count:
            valid = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            problem = f"{count}: the model has {heads} attention heads"
            self.refuse(report.layout.size_field, problem, f"use one of {valid}")

    def _gpus(self) -> None:
        """Ask torch for the GPUs that nvidia-smi lists."""
        listed, seen = len(self.hardware.gpus), torch.cuda.device_count()
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs alone"
        self.report.torch = f"torch {torch.__version__}, built {built}, sees {seen} GPUs"
        if self.hardware.is_real and seen < listed:
            problem = f"nvidia-smi lists {listed}, and {self.report.torch}"
            fix = "update the driver, or remove the folder .venv so that it is installed for GPUs, or run "
            self.refuse("GPU", problem, fix + "without them: CUDA_VISIBLE_DEVICES= in the environment")

    def combinations(self) -> None:
        """Refuse what TRL cannot do together."""
        values = self.report.values
        try:
            guard_limits(values["guards"], values["beta"], refuse_hopeless=values["refuse_hopeless"])
        except UserError as error:
            self.report.problems.append(str(error))
        self._full_sampling()
        self._lora()
        self._packages()
        self._lost_updates()
        generation, layout = values["generation_kwargs"] or {}, self.report.layout
        if "temperature" in generation:
            problem = "temperature: the trainer scores at that of the field temperature"
            self.refuse("generation_kwargs", problem, "set that one")
        if "seed" in generation and layout.use_vllm and layout.vllm_mode == "colocate":
            problem = "seed: vLLM inside the trainer would give all completions of a prompt the same text"
            self.refuse("generation_kwargs", problem, "leave it out")
        if values["remove_unused_columns"] and values["method"] != "sft":
            self.refuse("remove_unused_columns", "true would keep the columns from the rewards", "leave it out")
        if values["sync_ref_model"] and values["beta"] == 0:
            self.refuse("sync_ref_model", "with beta 0 there is no reference model", "set beta, for example 0.04")
        if values["sync_ref_model"] and values["use_peft"]:
            self.refuse("sync_ref_model", "with LoRA the reference is the base model, which stays", "leave it out")
        if values["method"] == "sft":
            for name in grpo_only_fields(values):
                self.refuse(name, "a supervised run (method: sft) generates and rewards nothing", "leave it out")
        if values["dataset_streaming"] and values["method"] == "sft":
            self.refuse("dataset_streaming", "a supervised run tokenizes all rows first", "dataset_streaming: false")
        if values["dataset_streaming"] and values["max_steps"] <= 0:
            self.refuse("max_steps", "a stream has no length", "give the number of steps, for example max_steps: 200")
        if values["resample_groups"]:
            self._resampling()

    def _lost_updates(self) -> None:
        """Refuse weights of 16 bits that nothing keeps in 32 bits: most updates are smaller than they can show."""
        values = self.report.values
        whole = not (values["use_peft"] or values["load_in_4bit"] or values["load_in_8bit"])
        if values["parallel"] == "ddp" and whole and values["dtype"] in ("bfloat16", "float16"):
            problem = f"{values['dtype']}: DDP keeps no weights in 32 bits beside these, and small updates are lost"
            self.refuse("dtype", problem, "dtype: float32 (with bf16: true it computes in 16 bits), or LoRA, or zero3")
        if values["use_transformers_continuous_batching"] and (values["bf16"] or values["fp16"]):
            problem = "in 16 bits TRL writes the weights themselves in 16 bits, and small updates are lost"
            self.refuse("use_transformers_continuous_batching", problem, "leave it out")

    def _lora(self) -> None:
        values, given = self.report.values, self.report.given
        is_quantized = values["load_in_4bit"] or values["load_in_8bit"]
        if is_quantized and values["parallel"] == "zero3":
            self.refuse("parallel", "ZeRO-3 cannot shard quantised weights", "leave it out, or ddp")
        if is_quantized and not values["use_peft"]:
            self.refuse("use_peft", "quantised weights cannot be trained themselves", "use_peft: true")
        if not values["use_peft"] and "use_peft" not in given:
            for name in [name for name in given if name.startswith("lora_") or name == "use_dora"]:
                self.refuse(name, "it has no effect: nothing asks for LoRA", "use_peft: true, or leave it out")
        if values["use_peft"] and self.meta_model is not None:
            self._tied_weights()
            self._check_lora_targets()

    def _tied_weights(self) -> None:
        """Refuse what would train the embeddings or the head alone where vLLM has one matrix for both."""
        if not self.report.layout.use_vllm or not self.meta_model.config.get_text_config().tie_word_embeddings:
            return
        both = (self.meta_model.get_input_embeddings(), self.meta_model.get_output_embeddings())
        names = {name.split(".")[-1] for name, module in self.meta_model.named_modules() if module in both}
        for field_name in ("lora_modules_to_save", "lora_target_modules"):
            for name in names & {*(self.report.values[field_name] or [])}:
                problem = f"{name}: this model has one matrix for embeddings and head, and vLLM would keep it so"
                self.refuse(field_name, problem, "leave it out, or use_vllm: false")

    def _packages(self) -> None:
        """Refuse what needs a package that is looked for only when the model is loaded."""
        values = self.report.values
        wants_flash = values["attn_implementation"] == "flash_attention_2" and self.hardware.is_real
        if wants_flash and not is_flash_attn_2_available():
            self.refuse("attn_implementation", "the package flash-attn is not installed", "leave it out")
        if values["use_liger_kernel"] and not is_liger_kernel_available():
            self.refuse("use_liger_kernel", "the package liger-kernel is not installed", "leave it out")

    def _resampling(self) -> None:
        """Refuse what would mix the rows of two generations wrongly."""
        values, fix = self.report.values, "resample_groups: 0"
        for name in ("overlap", "dataset_streaming", "tools", "environment_factory", "refuse_hopeless"):
            if values[name]:
                self.refuse("resample_groups", f"it does not work together with {name}", f"leave {name} out, or {fix}")
        for name, value, other in (
            ("scale_rewards", "batch", "group"),
            ("multi_objective_aggregation", "normalize_then_sum", "sum_then_normalize"),
        ):
            if values[name] == value:
                problem = f"with {name}: {value} the advantages of two generations would have two scales"
                self.refuse("resample_groups", problem, f"{name}: {other}, or {fix}")

    def _full_sampling(self) -> None:
        """Refuse sampling from a part of the vocabulary, whose log-probabilities the correction would misread."""
        values = self.report.values
        if not self.report.layout.use_vllm or not values["vllm_importance_sampling_correction"]:
            return
        whole = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "vllm_structured_outputs_regex": None}
        whole |= dict.fromkeys(("structured_outputs", "allowed_token_ids", "bad_words", "logit_bias"))
        given = {name: values.get(name) for name in whole} | (values["generation_kwargs"] or {})
        for name, value in whole.items():
            if given[name] not in (value, None, -1):
                problem = f"{given[name]}: vLLM reports the log-probabilities among the tokens that this leaves, and "
                problem += "the importance sampling correction takes them for those among all (trl#6789)"
                self.refuse(name, problem, "leave it out, or vllm_importance_sampling_correction: false")

    def _check_lora_targets(self) -> None:
        """Let peft look for the target modules in a model without weights, before the run loads the real one."""
        modules = self.meta_model.named_modules()
        linear = {name.split(".")[-1] for name, module in modules if isinstance(module, torch.nn.Linear)}
        fix = f"use some of {', '.join(sorted(linear))}, or all-linear"
        wanted = self.report.values["lora_target_modules"] or []
        unknown = [name for name in wanted if name != "all-linear" and len(wanted) > 1 and name not in linear]
        try:
            get_peft_model(self.meta_model, get_peft_config(build(ModelConfig, self.report.values)))
        except ValueError as error:
            self.refuse("lora_target_modules", first_line(error), fix)
        else:
            for name in unknown:  # peft refuses only where none is there
                self.refuse("lora_target_modules", f"the model has no linear layer {name}", fix)

    def plugins_and_data(self) -> None:
        """Load rewards, tools and environment, and look at the dataset."""
        values = self.report.values
        template_options = values["chat_template_kwargs"] or {}
        has_rewards, environment_rewards = bool(values["reward_funcs"]), []
        if self.tokenizer is not None:
            try:
                tools = plugins.load_tools(values["tools"], values["tool_kwargs"], self.tokenizer)
                environment, tools = plugins.load_environment(values["environment_factory"], tools, has_rewards)
                template_options = template_options | plugins.chat_template_options(tools, self.tokenizer)
                environment_rewards = [type(environment()).__name__] if environment else []
            except UserError as error:
                self.report.problems.append(str(error))
        self._data(template_options)
        columns = self.report.data.columns if self.report.data else None
        if values["method"] == "sft":
            self._golds("a supervised run", ["reference"])
            self._best_metric(["loss"])
            return
        if not has_rewards and not values["environment_factory"]:
            self.refuse("reward_funcs", "empty", "give at least one, for example rewards.length.length_reward")
        try:
            rewards = plugins.load_rewards(
                values["reward_funcs"], values["reward_kwargs"], columns=columns, weights=values["reward_weights"]
            )
        except UserError as error:
            self.report.problems.append(str(error))
            return
        for reward in filter(callable, rewards):
            self._golds(reward.__name__, plugins.required_columns(reward), getattr(reward, "check_gold", None))
        self._rewards_ready(rewards)
        names = [*map(plugins.metric_name, rewards), *environment_rewards]
        self._best_metric(["reward", "loss", *(f"rewards/{name}/mean" for name in names)])

    def _rewards_ready(self, rewards: list) -> None:
        """Ask the rewards that can be asked, and count the weights that each rank will keep for them."""
        parameters = 0
        for reward in rewards:
            try:
                if isinstance(reward, str):
                    config = AutoConfig.from_pretrained(reward, num_labels=1)
                    with torch.device("meta"):
                        model = AutoModelForSequenceClassification.from_config(config)
                    parameters += model.num_parameters()
                elif hasattr(reward, "ready"):
                    parameters += reward.ready() or 0
            except OSError:
                self.refuse("reward_funcs", f"{reward} is no reward model that can be read", hub.hint())
            except ValueError as error:
                self.report.missing.append(f"reward_kwargs: {error}")
        if self.report.model:
            self.report.model.reward_parameters = parameters

    def _best_metric(self, known: list[str]) -> None:
        """Check metric_for_best_model, which transformers reads at the first evaluation only."""
        values = self.report.values
        wanted = values["metric_for_best_model"]
        if not wanted:
            return
        if wanted.removeprefix("eval_") not in known:
            names = [f"eval_{name}" for name in known]
            fix = f"use {closest_match(wanted, names) or ' or '.join(names)}"
            self.refuse("metric_for_best_model", f"{wanted} is not logged", fix)
        elif values["eval_strategy"] == "no":
            self.refuse("metric_for_best_model", "nothing is evaluated", "eval_strategy: steps, with eval_steps")
        elif values["eval_strategy"] == values["save_strategy"] == "steps":
            interval = values["eval_steps"] or values["logging_steps"]
            if interval % values["save_steps"]:
                problem = f"{values['save_steps']:g}: what is evaluated must be saved"
                self.refuse("save_steps", problem, f"save_steps: {interval:g}, as eval_steps")

    def _data(self, template_options: dict) -> None:
        values, report = self.report.values, self.report
        name, split = values["dataset_name"], values["dataset_train_split"]
        try:
            splits = load_splits(name, values["dataset_config"], values["dataset_streaming"])
        except UserError as error:
            fix = error.fix if Path(name).exists() else self._how_to_make(name)
            problem = f"{error.field} cannot be read: {error.problem}"
            report.missing.append(str(UserError("dataset_name", problem, fix)))
            return
        eval_split = values["dataset_test_split"] if values["eval_strategy"] != "no" else None
        for field_name, wanted in {"dataset_train_split": split, "dataset_test_split": eval_split}.items():
            if wanted and wanted not in splits:
                self.refuse(field_name, f"{name} has no split {wanted}", f"use one of {', '.join(splits)}")
                return
        rows = list(splits[split].take(100))
        data = DataInfo(splits[split].column_names or (list(rows[0]) if rows else []), list(splits))
        report.data = data
        if not rows or (eval_split and not list(splits[eval_split].take(1))):
            self.refuse("dataset_name", f"{name} has no rows in a split that the run uses")
            return
        if "prompt" not in data.columns:
            fix = f"rename one of {', '.join(data.columns)} to prompt"
            if ";" in data.columns[0]:
                fix = "separate the cells of the file by commas"
            for column in [key for key, value in rows[0].items() if len(rows) == 1 and isinstance(value, list)]:
                fix = f"its rows stand under {column}: write that list alone into a file"
            self.refuse("dataset_name", f"{name} has no column prompt", fix)
            return
        self.splits = {key: splits[key] for key in (split, eval_split) if key}
        self._rows(name, rows, template_options)
        if values["dataset_streaming"]:
            return
        data.rows = len(splits[split])
        if eval_split:
            data.eval_rows = min(len(splits[eval_split]), values["eval_rows"] or len(splits[eval_split]))

    def _rows(self, name: str, rows: list[dict], template_options: dict) -> None:
        """Look at the prompt of every row, and count its tokens. `rows` are the first ones of the training split."""
        values, data, is_chat = self.report.values, self.report.data, isinstance(rows[0]["prompt"], list)
        taken = dict.fromkeys(plugins.TRL_KEYWORDS, "TRL gives rewards its own")
        taken |= dict.fromkeys(["image", "images"], "TRL takes it for a picture")
        for column in sorted(set(taken) & set(data.columns)) if values["method"] != "sft" else []:
            self.refuse("dataset_name", f"{name} has a column {column}, and {taken[column]}", "rename it")
        try:
            mark = 0
            for split, part in self.splits.items():
                for number, prompt in enumerate(column_values(part, "prompt"), 1):
                    check_prompt(prompt, is_chat, f"{name}, split {split}, row {number}")
                    if split == values["dataset_train_split"]:
                        mark = zlib.crc32(repr(prompt).encode(), mark)
            data.prompts_mark = None if values["dataset_streaming"] else mark
            self._prompts(name, rows[0], [row["prompt"] for row in rows])
            if self.tokenizer is not None and (not is_chat or self.tokenizer.chat_template):
                lengths = [longest_prompt(part, self.tokenizer, **template_options) for part in self.splits.values()]
                data.longest_prompt = None if values["dataset_streaming"] else max(lengths)
        except UserError as error:
            self.report.problems.append(str(error))

    def _golds(self, reader: str, columns: list[str], check_gold: Callable | None = None) -> None:
        """Look at what `reader` needs in every row. Without `check_gold` a null is refused, with it only told."""
        name, nulls = self.report.values["dataset_name"], 0
        for split, column in itertools.product(self.splits, columns):
            if column not in self.report.data.columns:
                continue  # load_rewards, or _prompts, has told it
            for number, value in enumerate(column_values(self.splits[split], column), 1):
                is_missing = is_null(value)
                nulls += is_missing
                try:
                    if check_gold:
                        check_gold(value)
                    elif is_missing:
                        raise ValueError(f"no {column}, which {reader} needs")
                except ValueError as error:
                    fix = "mend the row, drop it, or give the reward's parameter a default"
                    self.refuse("dataset_name", f"{name}, split {split}, row {number}: {error}", fix)
                    return
        if nulls:
            self.report.lines.append(f"data: {nulls} rows have no {column}: {reader} does not rate them")

    def _how_to_make(self, name: str) -> str:
        """Return the command that makes a prepared folder, or the hint about the Hub."""
        if not name.startswith("data/"):
            return hub.hint()
        python, dataset = os.path.relpath(sys.executable), Path(name).name
        if (PROJECT / "grpo_launcher/datasets" / f"{dataset}.py").exists() or not self.report.values["prepare"]:
            return f"{python} {os.path.relpath(PROJECT)}/process_dataset.py {dataset}"
        return f"{python} -m {self.report.values['prepare']}"

    def _prompts(self, name: str, first: dict, prompts: list) -> None:
        values, data = self.report.values, self.report.data
        is_chat = isinstance(first["prompt"], list)
        is_seq2seq = bool(self.report.model and self.report.model.is_seq2seq)
        if values["method"] == "sft" and not isinstance(first.get("reference"), str):
            problem = f"{name} has no column reference of texts, which a supervised run trains on"
            self.refuse("dataset_name", problem, f"it has {', '.join(data.columns)}: rename one to reference")
        if is_chat and is_seq2seq:
            self.refuse("dataset_name", f"{name} holds chat messages, and {seq2seq.PLAIN_TEXT}")
        elif is_chat and self.tokenizer is not None and self.tokenizer.chat_template is None:
            problem = f"{name} holds chat messages, and {values['model_name_or_path']} has no chat template"
            self.refuse("dataset_name", problem, "use an instruct model, or plain-text prompts")
        for field_name in ("tools", "environment_factory"):
            if values[field_name] and not is_chat:
                fix = "write a prompt as [{role: user, content: ...}]"
                self.refuse(field_name, f"{name} holds plain-text prompts, and tools need chat messages", fix)
        if is_chat and first["prompt"][0]["role"] == "system":
            data.system_prompt = first["prompt"][0]["content"]
        elif not is_chat and is_seq2seq:
            data.system_prompt = seq2seq.common_prefix(prompts)

    def batch(self) -> None:
        """Let TRL and transformers check the arguments for the planned number of ranks, and say what a step is."""
        values, ranks = self.report.values, self.report.layout.ranks
        # TRL reads the number of ranks from this property. In this process there is one.
        kind = type(
            "PlannedArguments", (arguments_class(values["method"]),), {"world_size": property(lambda _: ranks)}
        )
        here = {"use_cpu": True, "bf16": False, "fp16": False, "output_dir": values["output_dir"] or "unused"}
        try:
            build(ModelConfig, values)
            args = build(kind, values, **here)
            for reporter in get_reporting_integration_callbacks(values["report_to"]):
                reporter()
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            self._refuse_arguments(str(error))
            return
        self._optimizer(args)
        step = args.per_device_train_batch_size * ranks * args.gradient_accumulation_steps
        plural = "" if ranks == 1 else "s"
        rows = self.report.data.rows if self.report.data else None
        unit = "rows" if values["method"] == "sft" else "completions"
        line = f"batch: {args.per_device_train_batch_size} {unit} × {ranks} rank{plural} × "
        line += f"{args.gradient_accumulation_steps} accumulated = {step} {unit} a step"
        if values["method"] == "sft":
            self.report.lines.append(
                line if rows is None else f"{line}; {rows} rows = {-(-rows // step)} steps an epoch"
            )
            return
        prompts = args.generation_batch_size // args.num_generations
        line += f"; {prompts} prompts × {args.num_generations} completions generated at once"
        if rows is not None:
            updates = max(1, args.generation_batch_size // step) * args.num_iterations
            line += f"; {rows} prompts = {rows // prompts * updates} steps an epoch"
            if rows < prompts:
                problem = f"{rows} rows, and one generation takes {prompts} prompts: TRL would end after 0 steps"
                fix = f"give at least {prompts} rows, or lower per_device_train_batch_size"
                self.refuse("dataset_name", problem, fix)
        self.report.lines.append(line)
        self._evaluation(args, ranks)

    def _evaluation(self, args, ranks: int) -> None:
        rows = self.report.data.eval_rows if self.report.data else None
        if args.eval_strategy == "no" or rows is None:
            return
        completions = args.num_generations_eval or args.num_generations
        prompts = args.per_device_eval_batch_size * ranks // completions
        line = f"evaluation: {rows} prompts × {completions} completions, {prompts} prompts at once"
        self.report.lines.append(f"{line} = {-(-rows // prompts)} rounds")

    def _optimizer(self, args) -> None:
        """Let transformers make optimizer and schedule for one weight: a run does so when all else is loaded."""
        weights, schedule = [torch.nn.Parameter(torch.zeros(1))], args.lr_scheduler_type
        faults = (ImportError, ValueError, TypeError, RuntimeError)
        try:
            optimizer = torch.optim.SGD(weights, args.learning_rate)
            get_scheduler(schedule, optimizer, args.get_warmup_steps(10), 10, args.lr_scheduler_kwargs)
        except faults as error:
            fix = "give what it takes, or another lr_scheduler_type"
            self.refuse("lr_scheduler_kwargs", f"{schedule.value}: {first_line(error)}", fix)
        if not {"optim", "optim_args"} & {*self.report.given}:
            return
        from transformers.trainer import Trainer  # half a second

        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args, self.meta_model)
            kind(weights, **options)
        except faults as error:
            fix = "install what it names, or leave it and optim_args out"
            self.refuse("optim", f"{args.optim.value}: {first_line(error)}", fix)

    def _refuse_arguments(self, message: str) -> None:
        """Add the nearest valid values to what TRL says about the batch."""
        values, ranks = self.report.values, self.report.layout.ranks
        if "generation_batch_size" in message and "steps_per_generation" not in message:
            size, group = values["per_device_train_batch_size"], values["num_generations"]
            rounds = values["steps_per_generation"] or values["gradient_accumulation_steps"]
            if values["generation_batch_size"]:
                self.refuse(
                    "generation_batch_size", message, f"use a multiple of {size} × {ranks} ranks and of {group}"
                )
                return
            fix = f"per_device_train_batch_size: {_nearest_sizes(size, ranks * rounds, group)}"
            self.refuse("per_device_train_batch_size", message, f"{fix}, or another num_generations")
        elif "eval batch size" in message:
            size = values["per_device_eval_batch_size"]
            group = values["num_generations_eval"] or values["num_generations"]
            fix = f"per_device_eval_batch_size: {_nearest_sizes(size, ranks, group)}"
            self.refuse("per_device_eval_batch_size", message, f"{fix}, or another num_generations_eval")
        else:
            self.refuse("recipe", message)

    def context(self) -> None:
        """Check that prompt and completion fit. One longer prompt would be an HTTP error that ends the run."""
        values, report = self.report.values, self.report
        longest = report.data.longest_prompt if report.data else None
        limit = report.model.context if report.model else None
        completion = values["max_completion_length"]
        if report.layout.is_seq2seq:
            self._seq2seq_context(longest, limit, completion if values["method"] == "grpo" else 0)
            return
        has_tools = values["tools"] or values["environment_factory"]
        needed, text = completion, f"completion {completion}"
        if values["method"] == "sft":
            needed, text = 0, "reference"
        elif has_tools and report.layout.use_vllm:  # a later turn asks for a whole completion on top of the history
            needed, text = 2 * completion, f"2 × completion {completion} (turns with tools)"
        context = values["vllm_max_model_length"] if report.layout.use_vllm else None
        if values["dataset_streaming"] and report.layout.use_vllm:
            if context is None:
                fix = f"give the tokens of prompt and completion, for example {needed + 768}"
                self.refuse("vllm_max_model_length", "the longest prompt of a stream is not known", fix)
                return
            line = (
                f"context: prompts up to {context - needed} + {text} = {context} tokens; longer prompts are left out"
            )
            report.lines.append(line)
            if report.data:
                report.data.max_prompt = context - needed
        elif longest is not None:
            if context is None:
                context = longest + needed
                report.values["vllm_max_model_length"] = context if report.layout.use_vllm else None
            report.lines.append(f"context: longest prompt {longest} + {text} = {longest + needed} of {context} tokens")
            if longest + needed > context:
                problem = f"{context}, and the longest prompt of {longest} tokens + {text} needs {longest + needed}"
                fix = f"raise it, or prepare the data with --max_prompt_length {max(1, context - needed)}"
                self.refuse("vllm_max_model_length", problem, fix)
        if limit and context and context > limit:
            problem = f"{context} tokens of prompt and completion, and the model's context is {limit}"
            fix = f"lower it, or prepare the data with --max_prompt_length {max(1, limit - needed)}"
            self.refuse("max_completion_length", problem, fix)

    def _seq2seq_context(self, longest: int | None, limit: int | None, completion: int) -> None:
        positions = f"{limit} positions each" if limit else "relative positions, no limit"
        if self.report.data and self.report.values["dataset_streaming"]:
            self.report.data.max_prompt = limit
        if longest is not None:
            decoder = f", completion {completion} in the decoder" if completion else ""
            self.report.lines.append(f"context: longest prompt {longest} in the encoder{decoder}; {positions}")
        if limit and longest and longest > limit:
            fix = f"prepare the data with --max_prompt_length {limit} --too_long cut"
            self.refuse("dataset_name", f"the longest prompt has {longest} tokens, and the encoder takes {limit}", fix)
        if limit and completion > limit:
            self.refuse("max_completion_length", f"{completion} tokens, and the decoder takes {limit}", "lower it")

    def memory(self) -> None:
        """Hold weights, gradients, optimizer and activations against the devices."""
        report = self.report
        if report.model is None:
            return
        if self.meta_model is not None:
            report.model.trainable = self.meta_model.num_parameters(only_trainable=True)
            self._activations()
        zero3 = yaml.safe_load((PROJECT / "zero3.yaml").read_text(encoding="utf-8"))["deepspeed_config"]
        offload = zero3.get("offload_optimizer_device", "none") != "none"
        line, report.lighter, problems = check_memory(
            report.values, report.layout, self.hardware, report.model, offload
        )
        report.lines.append(line)
        report.problems += map(str, problems)

    def _activations(self) -> None:
        """Let a longest row pass through the model without values, and count what autograd keeps."""
        values, model, data = self.report.values, self.report.model, self.report.data
        prompt = data and (data.longest_prompt or data.max_prompt)
        if values["method"] == "sft" or not prompt:
            return
        completion, kept = values["max_completion_length"], {}
        network = self.meta_model if model.is_seq2seq else self.meta_model.base_model

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        def forward(**inputs):
            return torch.func.functional_call(network, weights, (), inputs)

        with FakeTensorMode():  # unlike meta it takes the kernels of a real device
            named = [*network.named_parameters(), *network.named_buffers()]
            weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
            for name, _ in network.named_parameters():
                weights[name].requires_grad_()  # ZeRO-3 keeps the inputs of frozen layers too
            ids = torch.zeros(2, prompt + completion, dtype=torch.long)
            mask = torch.ones_like(ids)
            try:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    if model.is_seq2seq:
                        seq2seq.decoder_log_probs(forward, ids, mask, completion, 0, 1.0)
                    else:
                        forward(input_ids=ids, attention_mask=mask, use_cache=False)
            except RuntimeError as error:  # what it computes depends on values, as with experts
                self.report.lines.append(
                    f"activations: not counted, as a trial without values fails: {first_line(error)}"
                )
                return
            for weight in weights.values():
                kept.pop(weight.untyped_storage()._cdata, None)
        model.row_tokens = prompt + completion
        model.row_activations = sum(storage.nbytes() for storage in kept.values()) / 2


def _nearest_sizes(size: int, factor: int, group: int) -> str:
    """Return the two batch sizes nearest to `size` that, times `factor`, are a multiple of `group`."""
    valid = [number for number in range(1, size + group + 1) if number * factor % group == 0]
    nearest = sorted(valid, key=lambda number: abs(number - size))[:2]
    return " or ".join(str(number) for number in sorted(nearest))


def main() -> None:
    """Answer one request. What libraries and plugins print goes to standard error."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    request = json.load(sys.stdin)
    hardware = request["hardware"]
    hardware["gpus"] = [Gpu(**gpu) for gpu in hardware["gpus"]]
    try:
        check_trl_version()
        options = Options(**request["options"])
        report = preflight(request["argv"], Hardware(**hardware), options, request["rehearsal"])
    except UserError as error:
        report = Report(problems=[str(error)])
    with answer:
        json.dump(asdict(report), answer)
