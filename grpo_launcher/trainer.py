"""The trainer of a run: TRL's GRPOTrainer with every override that this project needs, or a trainer for SFT.

Written for one version of TRL (trl_version.py). An override that mends a fault names it, and has a test in
tests/unit/test_trainer.py that fails when upstream has mended it, and then the override can go.
"""

import contextlib
import copy
import functools
import itertools
import json
from collections import defaultdict, deque
from pathlib import Path

import pandas
import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
)
from trl import GRPOTrainer, ModelConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl.generation import vllm_generation
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler, create_model_from_path

from grpo_launcher import resample, rollouts, seq2seq
from grpo_launcher.callbacks import SYNC_DIFFERENCE, print_sample
from grpo_launcher.config import sends_files
from grpo_launcher.layout import server_dtype
from grpo_launcher.overlap import LAG, NextBlock
from grpo_launcher.plugins import DROPPED_COLUMNS, TRL_KEYWORDS, AsyncReward
from grpo_launcher.recovery import Recovery
from grpo_launcher.runs import FINAL, report_progress
from grpo_launcher.trl_version import check_trl_version
from grpo_launcher.verdict import verdict
from grpo_launcher.weight_sync import DiskSyncClient, merged_parameters, send_adapter

REFERENCE = "reference.pth"  # in a checkpoint, where the reference follows the policy
COMPARED_TOKENS = 32  # at most, of a prompt and of its completion


class Trainer(GRPOTrainer):
    """TRL's GRPOTrainer, with the figures, tools and models that it lacks.

    Args:
        recipe: our fields (config.Recipe).
        longest_row: tokens of the longest prompt and completion. The first micro-batch is padded to it, so that a run
            whose memory does not suffice ends in its first step. 0: not known.
    """

    def __init__(self, *args, recipe, longest_row: int = 0, **kwargs):
        self.recipe, self.longest_row = recipe, longest_row
        self._flat_prompts = set()
        self._verdict = set()  # the kinds of problems that were told
        self._measure_values = defaultdict(list)  # (mode, reward name) -> values of all ranks, one tensor a batch
        self._in_tool_loop, self._generating = False, "generating"
        self._compared_prompt = None
        super().__init__(*args, **kwargs)
        self.is_seq2seq = self.model.config.is_encoder_decoder
        # Others, such as GPT-2, count positions from the left end: there a row's figures depend on its padding.
        self._has_relative_positions = bool(getattr(self.model.config.get_text_config(), "rope_parameters", None))
        self._upcoming = deque()  # batches that were read and not yet trained
        self._next_block = None
        self._recovery = None
        if self.use_vllm:
            generation, model = self.vllm_generation, self.vllm_generation.model
            client = getattr(generation, "vllm_client", None)  # of the main rank alone
            by_files = sends_files(recipe, self.args)  # a new server can take the place of one that was lost
            self._next_block = NextBlock(client, by_files) if recipe.overlap else None
            if by_files:
                self._recovery = Recovery(client, self.args.vllm_server_timeout, self._report)
            send_weights = generation.sync_weights
            if by_files and recipe.weight_sync == "adapter":
                send_weights = functools.partial(send_adapter, model, self._dist, client)
            elif isinstance(model, PeftModel):
                walk = generation._iter_named_params
                generation._iter_named_params = functools.partial(merged_parameters, model, walk)
            generation.sync_weights = functools.partial(self._sync, send_weights)

    def _sync(self, send_weights) -> None:
        """Give vLLM the weights, and say so: TRL does it within the generation."""
        self._report("sending weights to vLLM")
        send_weights()
        if self.vllm_mode == "server":
            self._compare_with_server()
        self._report(self._generating)

    def _compare_with_server(self) -> None:
        """Let server and trainer score the same few tokens, which proves that the weights arrived.

        `weight_sync/server_logp` and `weight_sync/trainer_logp` are the mean log-probabilities of these tokens, and
        `weight_sync/logp_difference` is the mean of the absolute differences, in nats.
        """
        answer = [None]
        is_lost = self._recovery and self._recovery.lost
        if self.is_world_process_zero() and not is_lost:
            client, prompt = self.vllm_generation.vllm_client, self._compared_prompt
            length = min(COMPARED_TOKENS, self.max_completion_length)
            options = {"temperature": self.temperature, "max_tokens": length, "logprobs": 0}
            with self._recovery.noting() if self._recovery else contextlib.nullcontext():
                # The class's method: an instance that overlaps would take this for a block.
                answer = [type(client).generate(client, [prompt], generation_kwargs={"seed": 0}, **options)]
        broadcast_object_list(answer)
        if answer[0] is None:
            return
        prompt, ids = answer[0]["prompt_ids"][0], answer[0]["completion_ids"][0]
        tokens = torch.tensor([prompt + ids], device=self.accelerator.device)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            score = self._get_per_token_logps_and_entropies
            trainer = score(self.model, tokens, torch.ones_like(tokens), len(ids))[0][0].float().cpu()
        server = torch.tensor([logprob for (logprob,) in answer[0]["logprobs"][0]])
        metrics = self._metrics["train"]  # also before an evaluation, so that the guard sees every push
        metrics["weight_sync/server_logp"].append(server.mean().item())
        metrics["weight_sync/trainer_logp"].append(trainer.mean().item())
        metrics[SYNC_DIFFERENCE].append((server - trainer).abs().mean().item())

    @property
    def mode(self) -> str:
        """Which of TRL's two sets of metrics is being filled."""
        return "train" if self.model.training else "eval"

    def _report(self, work: str) -> None:
        """Let the launcher's console say what goes on within a step."""
        if self.is_world_process_zero():
            step = self.state.global_step + (self.mode == "train")
            report_progress(self.args.output_dir, f"step {step}: {work}")

    # Rewards and figures

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Return the rewards of all ranks, (B, number of rewards), with failed ratings mended.

        GRPOTrainer._calculate_rewards gives NaN for None, and the weighted sum takes NaN for 0: a failed rating would
        shift the advantages of its whole group. Here it takes its group's mean, which moves none. It stays NaN where
        the reward failed for the whole group, where nothing else has rated the completion (TRL leaves that one out of
        mean and standard deviation), and where each reward is normalised by itself.
        `rewards/NAME/failed` is the share of failed ratings.

        A reward of weight 0 is a measure. Its None means that it does not apply, and stays.
        """
        self._report("scoring")
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._keep_columns(inputs, completion_ids_list)
        self._report("training" if self.mode == "train" else "evaluating")
        group_size = self.num_generations if self.mode == "train" else self.num_generations_eval
        is_measure = (self.reward_weights == 0).to(rewards.device)
        failed = rewards.isnan() & ~is_measure
        for index, name in enumerate(self.reward_func_names):
            if is_measure[index]:
                self._measure_values[self.mode, name].append(rewards[:, index])
            else:
                self._metrics[self.mode][f"rewards/{name}/failed"].append(failed[:, index].float().mean().item())
        if self.multi_objective_aggregation == "normalize_then_sum":
            return rewards
        failed &= ~rewards.isnan().all(dim=1, keepdim=True)
        group_means = rewards.view(-1, group_size, rewards.shape[1]).nanmean(dim=1)
        return torch.where(failed, group_means.repeat_interleave(group_size, dim=0), rewards)

    def _keep_columns(self, inputs: list[dict], completion_ids: list[list[int]]) -> None:
        """Let the file of a step have what rollouts.py shows, and the dataset's row, which rewards need."""
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self._log_completion_extra(rollouts.IDS, completion_ids)
        self._log_completion_extra(rollouts.CUT_OFF, [bool(ids) and ids[-1] not in ends for ids in completion_ids])
        if self.log_completions and self.mode == "train":
            taken = {*DROPPED_COLUMNS, *TRL_KEYWORDS, "image", "images"}
            kept = [{name: value for name, value in row.items() if name not in taken} for row in inputs]
            # As text: a column of mixed types, or of empty dicts, does not go into a parquet file.
            texts = [json.dumps(row, default=str, ensure_ascii=False) for row in kept]
            self._log_completion_extra(rollouts.ROW, texts)

    def _keep_difference(self, output: dict) -> None:
        """The same for what is known in the end: which weights made the block, and how server and trainer differ."""
        count = len(output["advantages"])
        lag = [(self._metrics["train"].get(LAG) or [0])[-1]]  # the main rank knows it
        broadcast_object_list(lag)
        made_by = self.state.global_step - lag[0]
        columns = {rollouts.WEIGHTS_STEP: [made_by] * count}
        trainer, server = output.get("old_per_token_logps"), output.get("sampling_per_token_logps")
        if trainer is not None and server is not None:
            mask = output["completion_mask"] * output.get("tool_mask", 1)
            sums = ((trainer - server).abs().nan_to_num() * mask).sum(dim=1)
            columns[rollouts.LOGP_DIFFERENCE] = (sums / mask.sum(dim=1).clamp(min=1)).tolist()
        for name, values in columns.items():
            self._logs["extra"][name].extend(gather_object(values))

    def _judge_step(self) -> None:
        """Print what keeps this step's groups from teaching, where that is not known yet."""
        logs = self._logs
        if len(logs["extra"][rollouts.IDS]) != len(logs["prompt"]):
            return  # resumed within a step, from a checkpoint of an older version
        rewards = torch.tensor([logs["rewards"][name] for name in self.reward_func_names]).T  # (B, number of rewards)
        weights = self.reward_weights.cpu()
        frame = pandas.DataFrame({"reward": (rewards * weights).nansum(dim=1)})
        frame["reward"] = frame["reward"].mask(rewards.isnan().all(dim=1).numpy())
        frame["group"] = frame.index // self.num_generations
        frame["cut_off"] = list(logs["extra"][rollouts.CUT_OFF])
        frame["tokens"] = [len(ids) for ids in logs["extra"][rollouts.IDS]]
        problems = verdict(frame, self.max_completion_length, weights.sum().item(), told=self._verdict)
        for text in filter(None, problems.values()):
            print(f"Verdict on step {self.state.global_step}: {text}", flush=True)
        if self._verdict and not problems:
            print(f"Verdict on step {self.state.global_step}: its groups can teach something again.", flush=True)
        self._verdict = set(problems)

    def log(self, logs, start_time=None):
        """Log a measure's mean over completions, and print a sample.

        GRPOTrainer.log averages each batch's mean, so a batch with one completion to which a measure applies would
        weigh as much as a batch with thirty.
        """
        mode, step = self.mode, self.state.global_step
        for name in self.reward_func_names:
            if batches := self._measure_values.pop((mode, name), None):
                self._metrics[mode][f"rewards/{name}/mean"] = [torch.cat(batches).nanmean().item()]
        is_judged = self.is_world_process_zero() and mode == "train" and "train_runtime" not in logs
        super().log(logs, start_time)
        if is_judged and self._logs["prompt"]:
            self._judge_step()
        if is_judged and self.log_completions:
            rollouts.prune(Path(self.args.output_dir), self.recipe.keep_rollouts)
        sample_every = self.recipe.sample_every
        if is_judged and sample_every and (step == 1 or step % sample_every == 0):
            kept = self._logs
            print_sample(kept["prompt"], kept["completion"], kept["rewards"], kept["advantages"], step)

    def evaluate(self, *args, **kwargs):
        """Evaluate without touching the kept completions.

        GRPOTrainer.log would write the completions of the evaluation over those of the training step.
        """
        log_completions, logs = self.log_completions, copy.deepcopy(self._logs)
        self.log_completions = False
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.log_completions, self._logs = log_completions, logs

    def _determine_best_metric(self, metrics, trial):
        """Take a measure that applied to no completion for no best one.

        Trainer._determine_best_metric would compare the None that GRPOTrainer logs for it with a number.
        """
        name = f"eval_{self.args.metric_for_best_model}".replace("eval_eval_", "eval_")
        if name in metrics and metrics[name] is None:
            return False
        return super()._determine_best_metric(metrics, trial)

    # Generation

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Return one completion for each prompt of this rank, as token ids, and their log-probabilities or None.

        GRPOTrainer._generate_single_turn knows no encoder-decoder models, and needs as many prompts on every rank,
        which is not so once tools were called.
        """
        if self._in_tool_loop and self._needs_lockstep:
            return self._generate_together(prompt_ids)
        self._compared_prompt = self._compared_prompt or prompt_ids[0][-COMPARED_TOKENS:]
        self._generating = f"generating {len(prompt_ids) * self.accelerator.num_processes} completions"
        self._report(self._generating)
        if not self.is_seq2seq:
            generate = functools.partial(
                super()._generate_single_turn, prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
            generate = functools.partial(self._until_answered, generate)
            return self._generate_ahead(generate) if self._next_block else generate()
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            ids = seq2seq.sample_completions(model, prompt_ids, self.generation_config, self.eos_token_ids)
        return ids, None

    def _until_answered(self, generate):
        """Generate by `generate`, the stock path; again, with the weights pushed anew, where the server was lost."""

        def push_again():
            self._last_loaded_step = -1  # which GRPOTrainer._generate_single_turn compares

        return self._recovery.until_answered(generate, push_again) if self._recovery else generate()

    def _generate(self, prompts):
        """Generate, and start the async rewards.

        GRPOTrainer._calculate_rewards starts them only when the completions are scored, and waits.
        """
        generated = super()._generate(prompts)
        rewards = [reward for reward in self.reward_funcs if isinstance(reward, AsyncReward)]
        if not rewards:
            return generated
        names = [name for name in self._inputs[0] if name not in DROPPED_COLUMNS]
        columns = {name: [row[name] for row in self._inputs] for name in names}
        columns |= {
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
        }
        if self.environments is not None:
            columns["environments"] = self.environments
        columns |= {"prompts": prompts, "completion_ids": generated[1], "completions": generated[3]}
        for reward in rewards:
            reward.start(self.async_loop, **columns)
        return generated

    # Order of the data

    def _get_train_sampler(self, dataset=None):
        """Give each epoch the order that it has in an uninterrupted run.

        The RepeatSampler of GRPOTrainer draws one order after the other, so a run that is resumed in its second epoch
        would see the first one's again: some prompts twice, and others never.
        """
        stock = super()._get_train_sampler(dataset)
        options = {name: getattr(stock, name) for name in ("batch_size", "repeat_count", "shuffle", "seed")}
        return EpochSampler(self, stock.data_source, stock.mini_repeat_count, **options)

    # Resume

    def _save_rng_state(self, output_dir):
        """Save beside the random state what else a resumed run needs, to go on as if it had never been interrupted.

        The stock classes keep in memory alone: the block of completions that is being trained, the figures since the
        last logged line, and a reference model that follows the policy.
        """
        is_between_blocks = self._step % self._block_batches == 0
        figures = {
            "batches": self._batches,
            "step": self._step,
            "logged": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "compared_prompt": self._compared_prompt,
            "next_block": self._next_block and self._next_block.state(),
            "flat_prompts": sorted(self._flat_prompts),
        }
        if self.is_world_process_zero() and not is_between_blocks:
            figures["logs"] = {name: values for name, values in self._logs.items() if name != "images"}
        tensors = {
            "block": None if is_between_blocks else self._buffered_inputs,
            "loss": self._tr_loss,
            "measures": {name: values for (mode, name), values in self._measure_values.items() if mode == "train"},
            "figures": json.dumps(figures, default=_as_json),
        }
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(tensors, self._state_file(output_dir))
        if self.args.sync_ref_model:
            parameters = dict(self.ref_model.named_parameters())
            with self._dist.gather_params(list(parameters.values())):
                if self.is_world_process_zero():
                    weights = {name: weight.detach().to("cpu", copy=True) for name, weight in parameters.items()}
                    torch.save(weights, f"{output_dir}/{REFERENCE}")
        super()._save_rng_state(output_dir)  # whose file is the last of a rank

    def _load_rng_state(self, checkpoint):
        """Load what _save_rng_state has saved. Checkpoints of older versions have none of it."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not all(gather_object([self._state_file(checkpoint).exists()])):
            return
        tensors = torch.load(self._state_file(checkpoint), map_location="cpu", weights_only=True)
        tensors = send_to_device(tensors, self.accelerator.device)
        figures = json.loads(tensors["figures"])
        self._globalstep_last_logged, self._tr_loss = figures["logged"], tensors["loss"]
        self._compared_prompt = figures["compared_prompt"]
        self._flat_prompts = set(figures.get("flat_prompts", []))
        self._metrics["train"].update(figures["metrics"])
        self._measure_values.update({("train", name): values for name, values in tensors["measures"].items()})
        if figures["batches"] == self._batches:  # --force goes on with another size
            self._step, self._buffered_inputs = figures["step"], tensors["block"]
            if self._next_block and figures["next_block"]:
                self._next_block.restore(figures["next_block"])
            if self._dist.is_zero3 and self._buffered_inputs:
                self._begin_without_gradients(self._buffered_inputs[0])
        for (name, column), entries in resample.log_columns(figures.get("logs", {})).items():
            kept = self._logs[name] if column is None else self._logs[name][column]
            kept.extend(entries)
        reference = Path(checkpoint) / REFERENCE
        if self.args.sync_ref_model and reference.exists():
            self._load_reference(torch.load(reference, map_location="cpu", weights_only=True))

    def _begin_without_gradients(self, inputs: dict) -> None:
        """Score one row: ZeRO-3 learns the order of modules in its first pass, and fails where that has gradients."""
        row = {name: inputs[name][:1] for name in inputs if name.endswith(("_ids", "_mask"))}
        ids, mask = (torch.cat([row[f"prompt_{part}"], row[f"completion_{part}"]], dim=1) for part in ("ids", "mask"))
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(self.model, ids, mask, inputs["completion_ids"].shape[1])

    def _load_reference(self, weights: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.ref_model.named_parameters())
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._dist.is_zero3:
                import deepspeed

                stack.enter_context(deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0))
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    @property
    def _batches(self) -> list[int]:
        """The numbers that say which completions are trained in which step."""
        args = self.args
        return [args.per_device_train_batch_size, args.gradient_accumulation_steps, self._block_batches]

    def _state_file(self, checkpoint) -> Path:
        return Path(checkpoint) / f"grpo_state_{self.args.process_index}.pth"

    # Overlap

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Read one block further than is trained, so that its prompts are known. The order stays the stock one."""
        if self._next_block is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        missing = num_batches + self._block_batches - len(self._upcoming)
        self._upcoming.extend(itertools.islice(epoch_iterator, missing))
        batches = iter(list(itertools.islice(self._upcoming, num_batches)))
        return super().get_batch_samples(batches, num_batches, device)

    def _prepare_inputs(self, generation_batch):
        """Count a batch as trained."""
        if self._upcoming and self.mode == "train":
            self._upcoming.popleft()
        return super()._prepare_inputs(generation_batch)

    @property
    def _block_batches(self) -> int:
        """How many batches are trained on one generation."""
        return self.args.steps_per_generation * self.num_iterations

    def _generate_ahead(self, generate) -> tuple:
        """Generate by `generate`, the stock path, which takes what is ahead; then ask for the next block."""
        is_training, ahead = self.mode == "train", self._next_block
        ahead.step = self.state.global_step if is_training else None
        if errors := [error for error in gather_object([ahead.wait()]) if error]:
            raise RuntimeError(errors[0])
        result = generate()
        if is_training:
            prompts = self._next_prompts()
            if self.is_world_process_zero():
                if prompts:
                    ahead.request(prompts)
                for name, value in ahead.figures().items():
                    self._metrics["train"][name].append(value)
        return result

    def _next_prompts(self) -> list[list[int]] | None:
        """Return the token ids of the next block's prompts, each once; None where no block follows in this epoch."""
        micro_batches = self.args.gradient_accumulation_steps
        left = (self.state.max_steps - self.state.global_step) * micro_batches - self._step % micro_batches
        if min(left - 1, len(self._upcoming)) < self._block_batches:
            return None
        prompt_ids, _, _ = self._tokenize_prompts([row["prompt"] for row in self._upcoming[self._block_batches - 1]])
        return gather_object(prompt_ids)[:: self.num_generations]

    def _score(self, inputs: list[dict]) -> dict:
        """Generate and score by the stock way."""
        self._inputs = inputs
        output = super()._generate_and_score_completions(inputs)
        if self.mode == "train":
            self._keep_difference(output)
        return output

    def _with_spread(self, inputs: list[dict]) -> dict:
        """Generate and score, and again with other prompts in place of those whose groups have no spread.

        The figures of the step are those of the first generation, so that curves compare with a run that asks once.
        """
        size = self.num_generations
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        groups = self._groups(self._score(inputs))
        metrics, measures = copy.deepcopy((self._metrics["train"], self._measure_values))
        figures = {resample.STOCK_TOKENS: sum(group.tokens for group in groups)}
        figures[resample.STOCK_GROUPS] = sum(group.has_spread for group in groups)
        tokens, asked = figures[resample.STOCK_TOKENS], {group.prompt for group in groups}
        for attempt in range(self.recipe.resample_groups):
            flat = [place for place, group in enumerate(groups) if not group.has_spread]
            if not flat:
                break
            wanted = len(flat)
            while wanted * size % ranks:  # every rank needs as many completions
                wanted += 1
            seed = [self.args.seed, self.state.global_step, self._step, attempt]
            rows = resample.other_rows(self.train_dataset, wanted, seed, asked, self._flat_prompts)
            rows = [row for row in rows for _ in range(size)]
            share = len(rows) // ranks
            others = self._groups(self._score(rows[rank * share : (rank + 1) * share]))
            tokens += sum(group.tokens for group in others)
            asked |= {group.prompt for group in others}
            for place, group in zip(flat, [group for group in others if group.has_spread], strict=False):
                groups[place] = group
        metrics["num_tokens"] = self._metrics["train"]["num_tokens"]  # of all generations
        self._metrics["train"], self._measure_values = metrics, measures
        figures |= {resample.TOKENS: tokens, resample.GROUPS: sum(group.has_spread for group in groups)}
        for name, value in figures.items():
            metrics[name].append(float(value))
        resample.write_logs(self._logs, groups)
        rows = [row for group in groups for row in group.rows]
        local = rows[rank * len(inputs) : (rank + 1) * len(inputs)]
        output = resample.joined(local, self._tokenizer.pad_token_id, self.accelerator.device)
        masks = [row["completion_mask"] * row.get("tool_mask", 1) for row in rows]
        output["num_items_in_batch"] = torch.stack([mask.sum() for mask in masks]).sum().to(self.accelerator.device)
        return output

    def _groups(self, output: dict) -> list:
        """Return the groups of all ranks that were just scored, and remember which prompts have no spread."""
        groups = resample.groups_of(output, self._logs, self.num_generations, self.reward_weights)
        for group in groups:
            (self._flat_prompts.discard if group.has_spread else self._flat_prompts.add)(group.prompt)
        return groups

    def _generate_and_score_completions(self, inputs):
        """Ask flat groups again where the recipe says so, and log what the importance weights leave of an older block.

        `overlap/effective_sample_size` is the share of its tokens that would weigh as much, all alike, and
        `overlap/capped` the share whose weight was cut or masked. Both are from 0 to 1.
        """
        is_resampled = self.mode == "train" and self.recipe.resample_groups
        output = self._with_spread(inputs) if is_resampled else self._score(inputs)
        if self._next_block and self.mode == "train":
            weights, mask = output["importance_sampling_ratio"].double(), output["completion_mask"].bool()
            weights = weights[mask] if weights.shape == mask.shape else weights.flatten()  # of tokens, or completions
            caps = 0.0, self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
            capped = sum((weights == cap).sum() for cap in caps if cap is not None)
            sums = torch.stack([torch.ones_like(weights).sum(), weights.sum(), weights.square().sum(), capped])
            count, total, squares, capped = self.accelerator.reduce(sums).tolist()
            self._metrics["train"]["overlap/effective_sample_size"].append(total**2 / (count * squares or 1))
            self._metrics["train"]["overlap/capped"].append(capped / count)
        return output

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """Return (B, C) log-probabilities, (B, C) entropies or None, and the auxiliary loss of mixtures of experts.

        GRPOTrainer._get_per_token_logps_and_entropies scores prompt and completion as one text of a decoder, and rows
        of text at the padded width of all that was generated at once.
        """
        if not self.is_seq2seq:
            score = functools.partial(
                super()._get_per_token_logps_and_entropies, model, compute_entropy=compute_entropy, **kwargs
            )
            is_plain = all(value is None or value is False for value in kwargs.values())  # no images, no experts
            if not is_plain or self.pad_to_multiple_of or not self._has_relative_positions:
                return score(input_ids, attention_mask, logits_to_keep, batch_size)
            rows = batch_size or len(input_ids)
            # A CPU gains nothing from many rows at once. With reentrant gradient checkpointing each part would have a
            # backward pass of its own, and ZeRO-3 takes the gradients of one.
            if self.accelerator.device.type == "cpu" and not self.args.gradient_checkpointing:
                rows = -(-rows // 2)
            if self.longest_row and torch.is_grad_enabled():
                padding = (0, max(0, self.longest_row - input_ids.shape[1]))
                self.longest_row = 0
                scored = score(
                    pad(input_ids, padding), pad(attention_mask, padding), logits_to_keep + padding[1], rows
                )
                return tuple(values if values is None else values[:, :logits_to_keep] for values in scored)
            return score_by_length(score, input_ids, attention_mask, logits_to_keep, rows)
        size = batch_size or len(input_ids)
        start, temperature = self.model.config.decoder_start_token_id, self.temperature
        with self.accelerator.autocast():
            batches = [
                seq2seq.decoder_log_probs(model, ids, mask, logits_to_keep, start, temperature)
                for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
            ]
        log_probs, entropies = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return log_probs, entropies if compute_entropy else None, None

    # Tools

    @property
    def _needs_lockstep(self) -> bool:
        """Whether a turn needs all ranks: with a vLLM server or under ZeRO-3."""
        return self.accelerator.num_processes > 1 and (self.use_vllm or self.is_deepspeed_enabled)

    def _tool_call_loop(self, *args):
        """Call tools turn by turn, all ranks together, and count turns and tokens.

        In GRPOTrainer._tool_call_loop each rank loops until its own prompts call no more tools, while a turn of a vLLM
        server or of ZeRO-3 needs all ranks: completions go to the wrong prompts, or ranks wait for each other in
        different places (trl#6673). Here a rank that has finished joins in until no rank has a prompt left.

        `tools/turns` is the mean number of assistant messages a completion; `tools/tokens` the mean number of tokens
        that tools put in.
        """
        self._in_tool_loop = True
        try:
            with contextlib.chdir("."):  # a tool may leave it, and the run's folder is relative to it
                result = super()._tool_call_loop(*args)
            while self._needs_lockstep and self._generate_together([]) is not None:
                pass
        finally:
            self._in_tool_loop = False
        tool_masks, completions = result[:2]
        turns = [sum(message["role"] == "assistant" for message in completion) for completion in completions]
        tokens = [len(mask) - sum(mask) for mask in tool_masks]
        for name, values in (("tools/turns", turns), ("tools/tokens", tokens)):
            local = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
            self._metrics[self.mode][name].append(self.accelerator.gather(local).mean().item())
        return result

    def _generate_together(self, prompt_ids: list[list[int]]) -> tuple[list, list | None] | None:
        """Generate one turn of all ranks, of which this one has any number of prompts; None where no rank has one.

        The prompts of all ranks are shared out evenly, as GRPOTrainer._generate_single_turn wants them, and every rank
        takes the completions of its own prompts out of what all have generated.
        """
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        prompts_by_rank = gather_object([prompt_ids])
        prompts = [ids for rank_prompts in prompts_by_rank for ids in rank_prompts]
        if not prompts:
            return None
        share = -(-len(prompts) // ranks)
        prompts += prompts[-1:] * (share * ranks - len(prompts))
        own_share = prompts[rank * share : (rank + 1) * share]
        self._report(f"generating {len(prompts)} completions")
        ids, logprobs = self._until_answered(functools.partial(super()._generate_single_turn, own_share, None, {}, 1))
        start = sum(len(rank_prompts) for rank_prompts in prompts_by_rank[:rank])
        own = slice(start, start + len(prompt_ids))
        return gather_object(ids)[own], None if logprobs is None else gather_object(logprobs)[own]


def _as_json(value):
    """Return what json.dumps can write: a deque as a list, a number of numpy as Python's, anything else as text."""
    if isinstance(value, deque):
        return list(value)
    return value.item() if hasattr(value, "item") else str(value)


class EpochSampler(RepeatSampler):
    """A RepeatSampler that draws the order of the epoch in which the trainer is."""

    def __init__(self, trainer, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trainer = trainer

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            batches = len(self.trainer.callback_handler.train_dataloader)
            steps_an_epoch = max(1, -(-batches // self.trainer.args.gradient_accumulation_steps))
            for _ in range(self.trainer.state.global_step // steps_an_epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def score_by_length(score, input_ids, attention_mask, logits_to_keep: int, rows: int):
    """Score rows of similar length together, each part without padding that all its rows share.

    The figures are those of one batch; padded places have 0.

    Args:
        score: (input_ids, attention_mask, logits_to_keep) -> (rows, logits_to_keep) log-probabilities, entropies of
            the same shape or None, and None.
        input_ids: (B, P + C), prompts padded on the left and completions on the right.
        attention_mask: (B, P + C).
        logits_to_keep: C.
        rows: rows of a part. Every rank needs as many parts: under ZeRO-3 all ranks score together.
    """
    width = input_ids.shape[1]
    order = attention_mask.sum(dim=1).argsort()
    parts = []
    for chosen in order.split(rows):
        mask = attention_mask[chosen]
        used = mask.any(dim=0).nonzero()
        # At least one place of the completion: mask_truncated_completions leaves none of a truncated one.
        first, end = used[0].item(), max(used[-1].item() + 1, width - logits_to_keep + 1)
        ids, kept = input_ids[chosen, first:end], logits_to_keep - (width - end)
        scored = score(ids, mask[:, first:end], kept)
        parts.append([values if values is None else pad(values, (0, width - end)) for values in scored])
    back = order.argsort()
    return tuple(None if values[0] is None else torch.cat(values)[back] for values in zip(*parts, strict=True))


def build_trainer(
    recipe,
    args,
    model_args: ModelConfig,
    *,
    run: Path,
    train_dataset,
    eval_dataset,
    reward_funcs: list,
    tools: list | None = None,
    environment_factory=None,
    callbacks: list,
    longest_prompt: int | None = None,
) -> GRPOTrainer | SFTTrainer | Seq2SeqTrainer:
    """Build the trainer of a run.

    Args:
        recipe: our fields (config.Recipe).
        args: TRL's GRPOConfig, or config.SupervisedConfig where recipe.method is "sft".
        model_args: TRL's ModelConfig.
        run: the run's folder.
        train_dataset: rows with `prompt`; for SFT with `reference` too.
        eval_dataset: the same, or None.
        reward_funcs: functions, and names of reward models.
        tools: functions that the model may call.
        environment_factory: as TRL takes it.
        callbacks: in place of the two of transformers that print.
        longest_prompt: tokens, where it is known.
    """
    check_trl_version()
    name = model_args.model_name_or_path
    hub_options = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **hub_options)
    model_args.lora_task_type = seq2seq.SEQ2SEQ_TASK if config.is_encoder_decoder else "CAUSAL_LM"
    args.output_dir = str(run)
    loading = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if model_args.attn_implementation:
        loading["attn_implementation"] = model_args.attn_implementation
    args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    peft_config = get_peft_config(model_args)
    if peft_config and model_args.model_revision != "main":
        peft_config.revision = model_args.model_revision  # the adapter names its base with it
    options = {
        "quantization_config": get_quantization_config(model_args),
        "peft_config": peft_config,
        "callbacks": callbacks,
    }
    if recipe.method == "grpo":
        options |= {"tools": tools or None, "environment_factory": environment_factory}
        options["longest_row"] = longest_prompt + args.max_completion_length if longest_prompt else 0
        trainer = _build_grpo(name, config, recipe, args, reward_funcs, **datasets, **options)
    elif config.is_encoder_decoder:
        trainer = _build_seq2seq_sft(name, config, args, datasets, **options)
    else:
        datasets = {split: rows and _with_completion(rows) for split, rows in datasets.items()}
        trainer = SFTTrainer(name, args=args, **datasets, **options)
    if options["quantization_config"]:
        # TRL keeps the adapter in bfloat16 (trl#7268 for DoRA). An update under 1/256 of a weight is lost there.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # All three classes write the card by this method, also Trainer.push_to_hub, and know nothing of the run.
    trainer.create_model_card = functools.partial(_write_run_card, trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _write_run_card(trainer, *args, **kwargs) -> None:
    """Write the run's own card into its final checkpoint. The checkpoints before it get none."""
    from grpo_launcher.report import write_card

    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero() and folder.name == FINAL:
        write_card(folder, trainer.hub_model_id)


def _build_grpo(name: str, config, recipe, args, reward_funcs: list, **options) -> Trainer:
    if args.use_vllm and args.vllm_mode == "colocate":
        # TRL leaves the type to vLLM, which takes 16 bits for weights of 32. It has no argument for another.
        dtype = server_dtype({"bf16": args.bf16, "fp16": args.fp16, "dtype": args.model_init_kwargs["dtype"]})
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=dtype)
    if sends_files(recipe, args):
        # VLLMGeneration makes its client by this name and connects at once. It has no argument for another client.
        vllm_generation.VLLMClient = DiskSyncClient
    # TRL would load a reward model with the policy's model_init_kwargs, such as its revision and its class.
    load_reward_model = functools.partial(
        AutoModelForSequenceClassification.from_pretrained,
        num_labels=1,
        dtype=args.model_init_kwargs["dtype"],
        trust_remote_code=args.trust_remote_code,
    )
    rewards = [load_reward_model(reward) if isinstance(reward, str) else reward for reward in reward_funcs]
    if config.is_encoder_decoder:
        # Policy and reference are loaded with these. The class that config.json names may have no head.
        args.model_init_kwargs |= {"architecture": seq2seq.model_class(config), **seq2seq.no_dropout(config)}
    trainer = Trainer(name, args=args, reward_funcs=rewards, recipe=recipe, **options)
    args.model_init_kwargs.pop("architecture", None)  # callbacks write the arguments as JSON
    return trainer


def _with_completion(rows: Dataset) -> Dataset:
    """Rename `reference`: with a prompt and a completion SFTTrainer takes the loss on the completion alone."""

    def convert(row: dict) -> dict:
        is_text = isinstance(row["prompt"], str)
        return {"completion": row["reference"] if is_text else [{"role": "assistant", "content": row["reference"]}]}

    return rows.map(convert, remove_columns=[name for name in rows.column_names if name != "prompt"])


def _build_seq2seq_sft(name: str, config, args, datasets: dict, *, quantization_config, peft_config, callbacks):
    """Build transformers' trainer: TRL has no SFT for encoder-decoder models."""
    loading = {"trust_remote_code": args.trust_remote_code, "quantization_config": quantization_config}
    loading["device_map"] = None  # TRL's default is "auto" on a GPU, which neither ZeRO-3 nor DDP can use
    # Under ZeRO-3 ranks that skip different layers wait for each other for ever.
    loading |= {field: 0.0 for field in seq2seq.no_dropout(config) if "layerdrop" in field}
    model = create_model_from_path(name, seq2seq.model_class(config), **loading, **args.model_init_kwargs)
    if peft_config:
        is_zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=not is_zero3)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()  # as TRL's trainers do (transformers#42489)
            if is_zero3:
                args.gradient_checkpointing_kwargs = {"use_reentrant": True}  # the same (trl#2514)
    revision = args.model_init_kwargs["revision"]
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    tokenizer.padding_side = "right"  # one that GRPO has saved pads on the left, labels too
    limit = seq2seq.max_positions(config)
    trainer = Seq2SeqTrainer(
        model,
        args=args,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=callbacks,
        **{split: rows and seq2seq.tokenize_references(rows, tokenizer, limit) for split, rows in datasets.items()},
    )
    trainer.model_accepts_loss_kwargs = False  # they take num_items_in_batch, and do not divide by it
    return trainer
