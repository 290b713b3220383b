"""trainer.py: each override of TRL beside TRL's own class, which must still show the fault that it mends.

Where an assertion on the stock class fails, upstream has mended the fault, and the override can go.
"""

import functools
import hashlib
import itertools
import json
import re
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from helpers import run_code
from safetensors.torch import load_file
from tiny_models import TEMPLATE, make_encoder_model, make_model, make_tokenizer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from grpo_launcher import resample, trl_version, weight_sync
from grpo_launcher import trainer as trainer_module
from grpo_launcher.callbacks import Guards, RunLog, console, guard_limits
from grpo_launcher.config import build_dataclasses, load_config
from grpo_launcher.errors import UserError
from grpo_launcher.plugins import load_rewards
from grpo_launcher.report import plot_run
from grpo_launcher.runs import Run, read_metrics
from grpo_launcher.trainer import Trainer, build_trainer
from grpo_launcher.weight_sync import DiskSyncClient
from grpo_launcher.weight_sync_worker import DiskSyncWorker

NAN = float("nan")
ROWS = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": f"What of number {number}?"}] for number in range(16)],
        "reference": ["The cat waits."] * 16,
    }
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a causal model and a T5."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "causal", seed=0)
    make_encoder_model(folder / "t5", "t5")
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.save_pretrained(folder / "gpt2")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture
def build(models, tmp_path):
    """Return a function (reward functions, flags, options of build_trainer) -> the trainer of a run in tmp_path."""

    def make(reward_funcs: list, *flags: str, kind: str = "causal", rows: Dataset = ROWS, stock=False, **options):
        argv = ["--model_name_or_path", str(models / kind), "--dataset_name", "rows", "--use_cpu", "true"]
        argv += ["--bf16", "false", "--report_to", "none", "--per_device_train_batch_size", "4"]
        argv += ["--per_device_eval_batch_size", "4", "--num_generations", "4", "--max_completion_length", "8"]
        recipe, args, model_args = build_dataclasses(load_config([*argv, *flags]).values)
        if stock:
            args.output_dir = str(tmp_path)
            made = GRPOTrainer(str(models / kind), reward_funcs, args=args, train_dataset=rows, eval_dataset=rows)
        else:
            options = {"callbacks": [], "train_dataset": rows, "eval_dataset": rows, **options}
            made = build_trainer(recipe, args, model_args, run=tmp_path, reward_funcs=reward_funcs, **options)
        made.model.train()
        return made

    return make


def reward(name: str, *batches: list):
    """Return a reward function that gives these ratings, batch by batch."""
    ratings = iter(batches)

    def rate(completions, **columns):
        return next(ratings)

    rate.__name__ = name
    return rate


def test_rows_are_scored_without_the_padding_of_longer_ones(build):
    trainer = build([lambda completions, **columns: [0.0] * len(completions)], "--gradient_checkpointing", "false")
    model, lengths = trainer.model, [(6, 1), (3, 7), (5, 12), (4, 0), (2, 3)]  # tokens of prompt and completion
    ids = torch.randint(10, 100, (5, 18), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * (6 - p) + [1] * (p + c) + [0] * (12 - c) for p, c in lengths])
    computed = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].numel())
    )

    def score(method) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], int]:
        computed.clear()
        model.zero_grad()
        log_probs, entropies, _ = method(model, ids, mask, 12, compute_entropy=True)
        used = mask[:, 6:].bool()
        log_probs[used].sum().backward()
        return log_probs[used], entropies[used], [p.grad for p in model.parameters()], sum(computed)

    ours = score(trainer._get_per_token_logps_and_entropies)
    stock = score(functools.partial(GRPOTrainer._get_per_token_logps_and_entropies, trainer))
    torch.testing.assert_close(ours[:3], stock[:3], atol=1e-4, rtol=1e-3)
    assert (ours[3], stock[3]) == (3 * 9 + 2 * 17, 5 * 18)  # the three shortest rows, then the others
    trainer.longest_row = 30  # of the dataset: the first rows of a run are padded to it, and only they
    longest, next_one = (score(trainer._get_per_token_logps_and_entropies) for _ in range(2))
    torch.testing.assert_close(longest[:3], stock[:3], atol=1e-4, rtol=1e-3)
    assert (longest[3], next_one[3]) == (5 * 30, ours[3])
    trainer.args.gradient_checkpointing = True  # one forward pass alone
    assert score(trainer._get_per_token_logps_and_entropies)[3] == 5 * 18


def test_where_positions_count_padding_all_rows_have_one_width(build):
    """As TRL scores them: else policy and reference would stand at other positions, and differ from the start."""
    trainer = build([reward("none", [0.0] * 4)], "--gradient_checkpointing", "false", kind="gpt2")
    trainer.model.eval()
    ids = torch.randint(10, 100, (5, 18), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * (6 - used) + [1] * (12 + used) for used in (2, 3, 4, 5, 6)])
    ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 12)[0]
    stock = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, 12)[0]
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_completions_without_any_rating_do_not_raise_the_weight_of_the_others(build, how):
    """TRL leaves them out of mean and standard deviation."""
    advantages = []
    for stock in (False, True):
        trainer = build([reward("judge", [1.0, 0.0, None, None])], "--multi_objective_aggregation", how, stock=stock)
        advantages.append(trainer._prepare_inputs([ROWS[0]] * 4)["advantages"].sort().values)
    torch.testing.assert_close(*advantages)
    assert advantages[0].abs().sum() > 1


def test_a_failed_rating_moves_no_advantage(build):
    """It takes its group's mean; TRL takes it for 0, and the advantages of all four differ."""
    judge, length = [None, 8.0, 8.0, 8.0], [1.0, 1.0, 1.0, 1.0]
    for stock in (False, True):
        trainer = build([reward("judge", judge), reward("length", length)], stock=stock)
        advantages = trainer._prepare_inputs([ROWS[0]] * 4)["advantages"].abs()
        assert (advantages > 0.3).all() if stock else (advantages == 0).all()


def call_rewards(trainer) -> torch.Tensor:
    """Let the trainer rate a batch of four completions."""
    return trainer._calculate_rewards([ROWS[0]] * 4, ROWS["prompt"][:4], ["text"] * 4, [[1]] * 4)


def test_a_reward_that_failed_for_a_whole_group_stays_out_of_it(build):
    judge = reward("judge", [None] * 4, [8.0, None, 4.0, 3.0])
    trainer = build([judge, reward("length", [1.0] * 4, [-1.0] * 4)])
    assert call_rewards(trainer)[:, 0].isnan().all()
    assert call_rewards(trainer)[:, 0].tolist() == [8.0, 5.0, 4.0, 3.0]
    metrics = trainer._metrics["train"]
    assert metrics["rewards/judge/failed"] == [1.0, 0.25] and metrics["rewards/length/failed"] == [0.0, 0.0]


def test_the_trainer_says_what_it_is_doing(build, tmp_path):
    """While a reward is called, and behind it."""
    seen = []

    def looks(completions, **columns):
        seen.append((tmp_path / "progress.txt").read_text())
        return [1.0] * len(completions)

    trainer = build([looks])
    trainer._prepare_inputs([ROWS[0]] * 4)
    assert seen == ["step 1: scoring"] and (tmp_path / "progress.txt").read_text() == "step 1: training"


ASYNC = """
import threading
begun = threading.Event()
async def judge(completions, completion_ids, prompts, reference, **columns):
    begun.set()
    assert all(sizes == len(reference) == 4 for sizes in map(len, (completions, completion_ids, prompts)))
    columns["log_metric"]("asked", 4.0)
    return [1.0, 2.0, 3.0, 4.0]
"""


def test_an_async_reward_works_beside_scoring(build, tmp_path, monkeypatch):
    """A judge is asked once, and has begun before the trainer scores the completions."""
    (tmp_path / "mine.py").write_text(ASYNC)
    (reward,) = load_rewards([f"{tmp_path}/mine.py:judge"], timeout=60)
    trainer = build([reward], "--beta", "0.1")
    begun, stock, scored = reward.__wrapped__.__globals__["begun"], trainer._get_per_token_logps_and_entropies, []

    def score(*args, **kwargs):
        scored.append(begun.wait(20))
        return stock(*args, **kwargs)

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", score)
    for _ in range(2):
        output = trainer._generate_and_score_completions([ROWS[0]] * 4)
        assert output["advantages"].tolist() == sorted(output["advantages"].tolist())
        assert scored and all(scored)
        begun.clear()
    assert trainer._metrics["train"]["rewards/judge/mean"] == [2.5, 2.5]
    assert trainer._metrics["train"]["asked"] == [4.0, 4.0]


def test_a_measure_is_a_mean_over_completions(build):
    """One answered completion in the first batch, right, and three in the second, wrong: a quarter is right."""
    means = {}
    for stock in (False, True):
        measure = reward("right_of_answered", [1.0, None, None, None], [0.0, 0.0, 0.0, None])
        flags = ["--reward_weights", "1", "0", "--log_completions", "false", "--sample_every", "0"]
        trainer = build([reward("length", [1.0] * 4, [1.0] * 4), measure], *flags, stock=stock)
        for _ in range(2):
            ratings = call_rewards(trainer)[:, 1]
            trainer._metrics["train"]["rewards/right_of_answered/mean"].append(ratings.nanmean().item())
        assert ratings.isnan().tolist() == [False, False, False, True], "a measure's None stays"
        trainer.log({})
        means[stock] = trainer.state.log_history[-1]["rewards/right_of_answered/mean"]
        assert "rewards/right_of_answered/failed" not in trainer.state.log_history[-1]
    assert means == {False: 0.25, True: 0.5}
    measure = build([reward("a")], "--log_completions", "false", "--sample_every", "0")
    measure.log({})
    assert "rewards/a/mean" not in measure.state.log_history[-1], "a step begins anew"


def test_an_evaluation_leaves_the_kept_completions_alone(build, tmp_path):
    """TRL writes the held-out completions over those of the step."""
    kept = tmp_path / "completions/completions_00000.parquet"
    rows = ROWS.select(range(2))
    for stock in (True, False):
        trainer = build([reward("zero", *[[0.0] * 4] * 3)], stock=stock, rows=rows)
        trainer._prepare_inputs([{**ROWS[0], "prompt": [{"role": "user", "content": "Of the training."}]}] * 4)
        trainer.log({"loss": 0.0})
        trainer.evaluate()
        prompts = {prompt[-1]["content"] for prompt in pandas.read_parquet(kept).prompt}
        assert (prompts == {"Of the training."}) is not stock
        assert (trainer._logs["prompt"][-1][-1]["content"] == "Of the training.") is not stock


def test_a_column_of_any_kind_is_kept(build, tmp_path):
    """Of mixed types, of empty dicts; and what a reward logs under a column's name stands beside it."""

    def mine(completions, log_extra, **columns):
        log_extra("answer", ["parsed"] * len(completions))
        return [0.0] * len(completions)

    trainer = build([mine])
    answers = [72, "3/4", None, ["1", 2]]
    trainer._prepare_inputs([{**ROWS[0], "answer": answer, "extra_info": {}} for answer in answers])
    trainer.log({"loss": 0.0})
    kept = pandas.read_parquet(tmp_path / "completions/completions_00000.parquet")
    assert [json.loads(row)["answer"] for row in kept["dataset_row"]] == answers
    assert kept["answer"].tolist() == ["parsed"] * 4


def test_a_measure_that_applied_nowhere_is_not_the_best(build):
    flags = ["--metric_for_best_model", "eval_rewards/a/mean", "--eval_strategy", "steps"]
    none, half = ({"eval_rewards/a/mean": value} for value in (None, 0.5))
    with pytest.raises(TypeError):
        build([reward("a")], *flags, stock=True)._determine_best_metric(none, None)
    trainer = build([reward("a")], *flags)
    assert trainer._determine_best_metric(none, None) is False and trainer._determine_best_metric(half, None) is True


def test_a_sample_is_printed_now_and_then_in_place_of_trls_table(build, capfd, monkeypatch):
    monkeypatch.setattr(console, "_width", 100)
    trainer = build([reward("zero", [0.0] * 4)], "--sample_every", "3")
    trainer._prepare_inputs([ROWS[0]] * 4)
    for trainer.state.global_step in range(1, 7):
        trainer.log({"loss": 0.0})
    trainer.log({"train_runtime": 1.0})
    output = capfd.readouterr().out
    assert [f"sample at step {step}" in output for step in range(1, 7)] == [True, False, True, False, False, True]
    assert output.count("sample at step") == 3 and "Advantage" not in output


# The first day: what a run says of itself within two steps


def plant(models, monkeypatch, ends: bool = True) -> None:
    """Let every model write ten numbered replies in turn, whole or cut off after eight tokens."""
    tokenizer = AutoTokenizer.from_pretrained(models / "causal")
    numbers = itertools.count()

    def single_turn(self, prompt_ids, *args, **kwargs):
        texts = [f"The cat {next(numbers) % 10}{' waits' * 8 * (not ends)}<|im_end|>" for _ in prompt_ids]
        return [tokenizer(text)["input_ids"][:8] for text in texts], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", single_turn)


FIRST_DAY = {
    "all wrong": (lambda number: 0.0, True, ["100% all wrong", "supervised fine-tuning"]),
    "all right": (lambda number: 1.0, True, ["100% all right", "harder prompts"]),
    "all cut off": (lambda number: 0.0, False, ["100% of the completions are cut off at 8", "100% all cut off"]),
    "one constant": (lambda number: 0.5, True, ["100% all the same", "reward_check"]),
    "healthy": (lambda number: number, True, []),
}


@pytest.mark.parametrize("case", FIRST_DAY)
def test_a_failure_of_the_first_day_gets_its_verdict_once(build, models, monkeypatch, capsys, case):
    rate, ends, said = FIRST_DAY[case]
    plant(models, monkeypatch, ends)

    def mine(completions, **columns):
        return [float(rate(int(completion[-1]["content"].split()[2]))) for completion in completions]

    trainer = build([mine], "--max_steps", "2", "--save_strategy", "no", "--learning_rate", "0")
    trainer.train()
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Verdict on step")]
    assert len(verdicts) == (2 if case == "all cut off" else bool(said)), verdicts
    assert all(text in "".join(verdicts) for text in said) and all("Verdict on step 1:" in line for line in verdicts)


def test_a_hopeless_run_is_refused_after_two_steps(build, models, monkeypatch, tmp_path):
    plant(models, monkeypatch)
    guards = Guards(tmp_path, guard_limits(None, beta=0.0, refuse_hopeless=True))
    flags = ["--max_steps", "5", "--save_strategy", "no", "--learning_rate", "0"]
    trainer = build([reward("zero", *[[0.0] * 4] * 5)], *flags, callbacks=[guards, RunLog(tmp_path)])
    trainer.train()
    assert guards.stopped and trainer.state.global_step == 2


# Resampling


def test_resampled_groups_cost_fewer_tokens_and_the_figures_stay_those_of_the_first(build, tmp_path):
    """Of 40 prompts 32 never have spread. The rest does in almost every group, whatever the model writes."""
    rows = Dataset.from_dict({"prompt": [f"Number {number}?" for number in range(40)], "number": list(range(40))})

    def mine(completions, number, **columns):
        return [float(n % 5 == 0) * (hash_of(text) % 7) for text, n in zip(completions, number, strict=True)]

    def measure(completions, **columns):
        return [1.0] * len(completions)

    def hash_of(text):
        return int(hashlib.sha256(text.encode()).hexdigest(), 16)

    flags = ["--resample_groups", "2", "--max_steps", "20", "--save_strategy", "no", "--learning_rate", "0"]
    flags += ["--per_device_train_batch_size", "32", "--reward_weights", "1", "0"]
    trainer = build([mine, measure], *flags, rows=rows, callbacks=[RunLog(tmp_path)])
    trainer.train()
    lines = read_metrics(tmp_path)
    tokens, useful, stock_tokens, stock_useful = (
        sum(line[name] for line in lines)
        for name in (resample.TOKENS, resample.GROUPS, resample.STOCK_TOKENS, resample.STOCK_GROUPS)
    )
    assert stock_useful == pytest.approx(0.2 * 8 * 20, abs=8), "8 groups a step"
    assert tokens / useful < 0.6 * stock_tokens / stock_useful
    assert np.mean([line["resample/useful_groups"] for line in lines[10:]]) > 7
    for line in lines:
        assert line["rewards/measure/mean"] == 1
        assert line["frac_reward_zero_std"] == pytest.approx(1 - line[resample.STOCK_GROUPS] / 8)
    kept = pandas.read_parquet(tmp_path / "completions/completions_00020.parquet")
    assert len(kept) == 32 and len({*kept["prompt"]}) == 8
    groups = kept.groupby("prompt")
    assert (groups["mine"].std() > 0).sum() == lines[-1]["resample/useful_groups"]
    numbers = [json.loads(row)["number"] for row in kept["dataset_row"]]
    assert kept["mine"].tolist() == mine(kept["completion"], numbers), "each row is of one piece"
    assert groups["advantage"].mean().abs().max() < 1e-3


# Tools on several ranks


class Ranks:
    """Two ranks as threads, with accelerate's gather_object and gather between them."""

    def __init__(self, monkeypatch):
        self.barrier, self.parts = threading.Barrier(2, timeout=10), {}
        self.rank = threading.local()
        monkeypatch.setattr(trainer_module, "gather_object", self.gather_object)

    def gather_object(self, objects: list) -> list:
        self.parts[self.rank.index] = objects
        self.barrier.wait()
        gathered = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return gathered

    def run(self, function) -> list:
        """Return function(rank) of both ranks."""
        results = [None, None]

        def call(index: int) -> None:
            self.rank.index = index
            results[index] = function(index)

        threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "a rank waits for ever"
        return results

    def trainer(self, rank: int) -> Trainer:
        """Return a trainer of one rank without a model."""
        made = Trainer.__new__(Trainer)
        made.accelerator = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            device="cpu",
            gather=lambda tensor: torch.tensor(self.gather_object(tensor.tolist())),
        )
        made.model, made.is_seq2seq, made.use_vllm = SimpleNamespace(training=True), False, True
        made._in_tool_loop, made._recovery, made._metrics = False, None, {"train": defaultdict(list)}
        return made


def test_ranks_with_different_numbers_of_turns_keep_their_prompts(monkeypatch):
    """Rank 0 has prompts for one turn, rank 1 for three; every turn is of all ranks, evenly shared out."""
    ranks, shares = Ranks(monkeypatch), []
    turns = {0: [[[10], [11], [12]]], 1: [[[20]], [[21], [22]], [[23]]]}

    def single_turn(self, prompt_ids, images, fields, num_generations, has_tool_images=False):
        """As with a server: completions are sliced as if all ranks had sent equally many prompts."""
        shares.append(len(prompt_ids))
        everything = ranks.gather_object(prompt_ids)
        own = slice(ranks.rank.index * len(prompt_ids), (ranks.rank.index + 1) * len(prompt_ids))
        return [[token + 100 for token in ids] for ids in everything][own], [[0.5]] * len(prompt_ids)

    def loop(self, *args):
        completions = [self._generate_single_turn(prompts, None, {}, 1) for prompts in turns[ranks.rank.index]]
        ids = [ids for turn, _ in completions for ids in turn]
        assert all(len(turn) == len(logprobs) for turn, logprobs in completions)
        masks = [[1, 0, 0, 1]] * len(ids)
        messages = [[{"role": "assistant"}, {"role": "tool"}, {"role": "assistant"}]] * len(ids)
        return masks, messages, ids, None, 0, 0, []

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", single_turn)
    monkeypatch.setattr(GRPOTrainer, "_tool_call_loop", loop)
    monkeypatch.setattr(Trainer, "_report", lambda self, work: None)
    trainers = [ranks.trainer(rank) for rank in range(2)]
    results = ranks.run(lambda rank: trainers[rank]._tool_call_loop([], [], [], [], None, None, {}))
    assert results[0][2] == [[110], [111], [112]] and results[1][2] == [[120], [121], [122], [123]]
    assert sorted(shares) == [1, 1, 1, 1, 2, 2], "turns of 4, 2 and 1 prompts"
    for made in trainers:
        assert made._metrics["train"] == {"tools/turns": [2.0], "tools/tokens": [2.0]} and not made._in_tool_loop


def test_the_stock_server_mode_hands_completions_to_the_wrong_prompts(monkeypatch):
    """Rank 0 sends one prompt and rank 1 two (trl#6673). When this fails, the turns need no sharing out any more."""
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.__dict__ |= dict.fromkeys(["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
    generation.mode, generation.max_completion_length = "server", 8
    generation.accelerator = SimpleNamespace(process_index=1, is_main_process=False)
    sent = [[10], [20], [21]]
    completions = [[110], [120], [121]]
    module = sys.modules[VLLMGeneration.__module__]
    monkeypatch.setattr(module, "gather_object", lambda objects: sent)

    def broadcast(objects: list, from_process: int) -> None:
        objects[0] = (sent, completions, None, None)

    monkeypatch.setattr(module, "broadcast_object_list", broadcast)
    assert generation.generate([[20], [21]], None, 1)[1] != [[120], [121]]


def weather(city: str) -> str:
    """Say what the weather is.

    Args:
        city: A city.
    """
    return f"rain in {city}"


def test_a_tool_is_called_and_its_turns_are_counted(build, models, monkeypatch):
    """One rank: half of the completions call the tool, and answer in a second turn."""
    tokenizer = AutoTokenizer.from_pretrained(models / "causal")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    turns = [[call, "Sun.<|im_end|>"] * 2, ["It rains.<|im_end|>"] * 2]

    def single_turn(self, prompt_ids, *args, **kwargs):
        return [tokenizer(text)["input_ids"] for text in turns.pop(0)], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", single_turn)
    flags = ["--max_completion_length", "400", "--max_tool_calling_iterations", "2"]
    trainer = build([reward("zero", [0.0] * 4)], *flags, tools=[weather])
    trainer._prepare_inputs([ROWS[0]] * 4)
    metrics = trainer._metrics["train"]
    assert metrics["tools/turns"] == [1.5] and metrics["tools/call_frequency"] == [0.5]
    assert metrics["tools/tokens"][0] > 1 and metrics["tools/failure_frequency"] == [0.0]
    roles = [message["role"] for message in trainer._logs["completion"][0]]
    assert roles == ["assistant", "tool", "assistant"] and "rain in Rome" in str(trainer._logs["completion"][0])


class Game:
    """A number to find."""

    def reset(self, **row):
        """Begin with the row's columns."""
        self.reference = row["reference"]

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: From 1 to 9.
        """
        return "lower"

    def get_reward(self) -> float:
        """Rate the rollout."""
        return float(self.reference == "The cat waits.")


def test_an_environment_rates_its_completions_in_a_run(build, tmp_path, capsys):
    """One step of training: reset gets the row, and the reward is logged under the class."""
    log = RunLog(tmp_path)
    flags = ["--max_tool_calling_iterations", "1", "--max_steps", "1", "--save_strategy", "no"]
    trainer = build([], *flags, environment_factory=Game, callbacks=[log])
    assert not any(isinstance(callback, PrinterCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    (line,) = read_metrics(tmp_path)
    assert line["rewards/Game/mean"] == line["reward"] == 1.0 and line["rewards/Game/failed"] == 0
    assert "step 1/1  reward    +1.00" in capsys.readouterr().out


# What build_trainer builds


@pytest.mark.parametrize(("flags", "dtype"), [([], "float32"), (["--bf16", "true"], "bfloat16")])
def test_vllm_in_the_trainer_computes_in_the_trainers_type(build, monkeypatch, flags, dtype):
    """TRL leaves it to vLLM, which takes 16 bits for weights of 32: seen on a GPU as another policy."""
    made = []

    class Made(Exception):
        """The engine was asked for."""

    def engine(*args, **options):
        made.append(options)
        raise Made

    monkeypatch.setattr(trainer_module.vllm_generation, "LLM", engine, raising=False)
    monkeypatch.setattr(trainer_module.vllm_generation, "is_vllm_available", lambda *args: True)
    with pytest.raises(Made):
        build([reward("zero")], "--use_vllm", "true", "--vllm_mode", "colocate", *flags)
    assert made[0]["dtype"] == dtype


def test_another_trl_is_refused(monkeypatch):
    for version in ("1.15.0", None):

        def installed(name: str, version=version) -> str:
            if version is None:
                raise trl_version.importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(trl_version.importlib.metadata, "version", installed)
        with pytest.raises(UserError, match=r"1\.16\.0"):
            trl_version.check_trl_version()


def test_a_reward_model_is_loaded_beside_an_encoder_decoder(build, models, tmp_path):
    """TRL would load it with the class of the policy. And the arguments can be written as JSON."""
    tokenizer = AutoTokenizer.from_pretrained(models / "causal")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_labels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rows = Dataset.from_dict({"prompt": [f"summarize: number {number}." for number in range(8)]})
    trainer = build([str(tmp_path / "judge"), reward("zero", [0.0] * 4)], kind="t5", rows=rows)
    assert trainer.reward_func_names == ["judge", "zero"]
    inputs = trainer._prepare_inputs([rows[0]] * 4)
    assert inputs["advantages"].isfinite().all()
    assert json.loads(trainer.args.to_json_string())["model_init_kwargs"]["dropout_rate"] == 0


class Hub:
    """As much of the Hub as a push asks for; `pushed` holds file name -> content of each push."""

    def __init__(self):
        self.pushed = []

    def create_repo(self, name: str, **options):
        """Return the repository of that name."""
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path: str, **options) -> None:
        """Keep the folder's files."""
        self.pushed.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_sft_learns_the_reference_and_pushes_the_final_checkpoint_with_its_card(
    kind, build, models, tmp_path, monkeypatch
):
    """Both kinds of model, with LoRA. The card's programs generate, and merge the adapter."""
    hub = Hub()
    monkeypatch.setattr(sys.modules["transformers.trainer"], "hf_api", lambda: hub)
    rows = ROWS if kind == "causal" else ROWS.map(lambda row: {"prompt": row["prompt"][0]["content"]})
    flags = [
        "--method",
        "sft",
        "--max_steps",
        "6",
        "--learning_rate",
        "3e-2",
        "--use_peft",
        "true",
        "--save_steps",
        "3",
    ]
    flags += ["--lora_target_modules", *(["q", "v"] if kind == "t5" else ["q_proj", "v_proj"])]
    flags += ["--push_to_hub", "true", "--hub_model_id", "somebody/short", "--max_completion_length", "5"]
    log = RunLog(tmp_path, is_sft=True)
    trainer = build([], *flags, kind=kind, rows=rows, callbacks=[log])
    values = load_config(["--model_name_or_path", str(models / kind), "--dataset_name", "rows", *flags]).values
    Run(tmp_path, "mine", values, []).write()
    trainer.train()
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert len(losses) == 6 and losses[-1] < losses[0]

    final = tmp_path / "final-checkpoint"
    trainer.args.output_dir = str(final)
    plot_run(tmp_path)
    trainer.save_model()  # pushes it
    (pushed,) = hub.pushed
    assert pushed == {path.name: path.read_bytes() for path in final.iterdir()}
    assert {"README.md", "curves.png", "adapter_model.safetensors", "tokenizer.json"} <= set(pushed)
    card = pushed["README.md"].decode()
    assert "# somebody/short" in card and "fine-tuned (SFT)" in card and str(tmp_path) not in card
    earlier = [path.read_text() for path in tmp_path.glob("checkpoint-*/README.md")]
    assert not any("fine-tuned (SFT)" in text for text in earlier)
    adapter = json.loads((final / "adapter_config.json").read_text())
    assert adapter["task_type"] == {"causal": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[kind]

    programs = re.findall("```python\n(.*?)```", card.replace("somebody/short", str(final)), re.DOTALL)
    assert "".join(run_code(program, tmp_path) for program in programs).strip()
    assert (tmp_path / "merged/model.safetensors").exists()


# Weight sync through shared memory


def test_weights_reach_the_server_as_files(tmp_path, monkeypatch):
    """The request names a folder that holds them while it is answered; nothing stays."""
    monkeypatch.setenv("GRPO_SHARED_MEMORY", str(tmp_path))
    client, requests = DiskSyncClient.__new__(DiskSyncClient), []
    client.base_url = "http://server"

    def post(url: str, json: dict) -> None:
        files = sorted(Path(json["kwargs"]["path"]).iterdir())
        requests.append((url, json["method"], [load_file(file) for file in files]))

    client._post = post
    monkeypatch.setattr(weight_sync, "BUCKET", 40)
    weight = torch.arange(6.0).reshape(2, 3)
    client.init_communicator(torch.device("cpu"))
    client.update_named_params([], iter([("head", weight.T), ("tied", weight), ("last", weight)]))
    ((url, method, files),) = requests
    assert url == "http://server/collective_rpc" and method == DiskSyncWorker.load_weights_from.__name__
    assert [[*file] for file in files] == [["head", "tied"], ["last"]]  # the trainer copies no more at a time
    assert torch.equal(files[0]["head"], weight.T) and torch.equal(files[0]["tied"], weight)
    assert list(tmp_path.iterdir()) == []


def test_the_stock_client_refuses_a_cpu():
    """When this fails, TRL can sync weights without CUDA, and weight_sync.py may go."""
    client = VLLMClient.__new__(VLLMClient)
    client.group_port, client.base_url = 1, "http://server"
    client.get_server_info = lambda: {"weight_transfer_config": {"backend": "nccl"}}
    client.get_world_size = lambda: 1
    with pytest.raises(NotImplementedError):
        client.init_communicator(torch.device("cpu"))


@pytest.mark.parametrize(("device", "tied", "repacked"), [("cpu", True, 1), ("cpu", False, 0), ("cuda", True, 0)])
def test_a_tied_head_is_packed_again_on_a_cpu(device, tied, repacked, monkeypatch):
    calls, module = [], ModuleType("utils")
    module.dispatch_cpu_unquantized_gemm = lambda head, remove_weight: calls.append(head)
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.utils", module)
    worker, loaded = DiskSyncWorker(), []
    model = SimpleNamespace(config=SimpleNamespace(tie_word_embeddings=tied), lm_head="head")
    worker.device = torch.device(device)
    worker.reload_weights = lambda *, weights_path: loaded.append(weights_path)  # of vLLM's Worker
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    worker.load_weights_from("folder")
    assert loaded == ["folder"] and calls == ["head"] * repacked
