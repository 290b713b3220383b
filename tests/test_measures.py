"""Measures and the loss: what is reported of a reward of weight 0, and what Dr. GRPO leaves out of TRL's own loss."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import make_model
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from grpo_launcher.failed_rewards import FailedRewards
from grpo_launcher.measures import Measures

NAN = float("nan")


class Logged:
    """In the place of GRPOTrainer: rewards as they are after the gather, (B, rewards), batch by batch, and its log."""

    num_generations = num_generations_eval = 2
    reward_func_names = ("choice_reward", "right_of_answered")
    reward_weights = torch.tensor([1.0, 0.0])

    def __init__(self, *batches):
        self.batches, self.model = iter(batches), SimpleNamespace(training=True)
        self.args = SimpleNamespace(metric_for_best_model="eval_rewards/right_of_answered/mean")
        self._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
        self.log_completions, self.seen = True, None

    def _calculate_rewards(self, *_):
        rewards = torch.tensor(next(self.batches))
        for index, name in enumerate(self.reward_func_names):
            self._metrics["train"][f"rewards/{name}/mean"].append(rewards[:, index].nanmean().item())
        return rewards

    def log(self, logs, start_time=None):
        self.seen = dict(self._metrics["train"])
        self._metrics["train"].clear()

    def evaluate(self):
        return self.log_completions

    def _determine_best_metric(self, metrics, trial):
        return True


class Trainer(Measures, FailedRewards, Logged):
    """As grpo_launcher.trainer composes it."""


def test_a_measure_is_a_mean_over_items_and_its_none_no_failure():
    """One answered reply in the first batch and three in the second: a quarter is right, not the half that the batches' means give."""
    trainer = Trainer([[1.0, 1.0], [0.0, NAN], [0.0, NAN], [0.0, NAN]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [NAN, NAN]])
    for _ in range(2):
        rewards = trainer._calculate_rewards(None, None, None, None)
    assert rewards[3].tolist() == pytest.approx([1.0, NAN], nan_ok=True), "a failed rating takes its group's mean; a measure's None stays"
    trainer.log({})
    assert trainer.seen["rewards/right_of_answered/mean"] == [0.25]
    assert trainer.seen["rewards/choice_reward/mean"] == [0.25, 1.0] and trainer.seen["rewards/choice_reward/failed"] == [0.0, 0.25]
    assert "rewards/right_of_answered/failed" not in trainer.seen
    trainer.log({})
    assert trainer.seen == {}, "the next step begins anew"


def test_evaluation_keeps_its_replies_to_itself_and_none_is_no_best():
    """TRL would write them over those of the step; transformers would compare None with a number."""
    trainer = Trainer()
    assert trainer.evaluate() is False and trainer.log_completions is True
    assert trainer._determine_best_metric({"eval_rewards/right_of_answered/mean": None}, None) is False
    assert trainer._determine_best_metric({"eval_rewards/right_of_answered/mean": 0.5}, None) is True


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
    """loss(loss_type, lengths, advantages) → TRL's own loss of replies of these many tokens, of 16 that a reply may have, at the first update."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, seed=0)
    made = {}

    def compute(kind: str, lengths: list[int], advantages: list[float]) -> float:
        if kind not in made:
            options = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 16, "use_cpu": True, "bf16": False, "report_to": "none"}
            args = GRPOConfig(output_dir=str(folder / "run"), loss_type=kind, scale_rewards="none", **options)
            rows = Dataset.from_dict({"prompt": ["The cat"] * 4})
            made[kind] = GRPOTrainer(str(folder), lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=rows)
            made[kind].current_gradient_accumulation_steps = 1
        trainer = made[kind]
        prompt = AutoTokenizer.from_pretrained(folder)("The cat", return_tensors="pt")["input_ids"].repeat(2, 1)
        mask = torch.tensor([[1] * length + [0] * (16 - length) for length in lengths])
        replies = torch.full((2, 16), 7)
        inputs = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": replies, "completion_mask": mask}
        inputs |= {"advantages": torch.tensor(advantages), "num_items_in_batch": mask.sum()}
        return trainer._compute_loss(trainer.model, inputs).item()

    return compute


def test_a_token_weighs_the_same_in_a_long_reply_and_in_a_short_one(loss):
    """GRPO divides by a reply's own length, so that a long wrong reply is let off; Dr. GRPO by one constant (Liu et al. 2025, section 3.1)."""
    short, long = loss("dr_grpo", [4, 16], [-1.0, 0.0]), loss("dr_grpo", [4, 16], [0.0, -1.0])
    assert short == pytest.approx(4 / (2 * 16), abs=1e-5) and long == pytest.approx(16 / (2 * 16), abs=1e-5)
    biased = loss("grpo", [4, 16], [-1.0, 0.0]), loss("grpo", [4, 16], [0.0, -1.0])
    assert biased == pytest.approx((0.5, 0.5), abs=1e-5), "a test that tells the two apart"
