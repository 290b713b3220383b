"""Measures: rewards of weight 0, which teach nothing and are reported; and what evaluation must leave alone."""

from collections import defaultdict

import torch


class Measures:
    """A mixin for GRPOTrainer, which reports a reward's mean over batches of each batch's mean.

    A measure may be None where it does not apply (whether an answer is right, of a reply that gives none), so batches with one such item and
    with thirty would weigh alike. Here `rewards/NAME/mean` of a reward with weight 0 is the mean over all items of the step, or of the evaluation.
    """

    def __init__(self, *args, **kwargs):
        self._measured = defaultdict(list)  # (mode, name) → values of all ranks, batch by batch
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rewards of all ranks, (B, number of rewards)."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, weight, values in zip(self.reward_func_names, self.reward_weights.tolist(), rewards.T, strict=True):
            if weight == 0:
                self._measured[self.model.training, name].append(values)
        return rewards

    def log(self, logs, start_time=None):
        """TRL's, with the means of the measures over items."""
        mode = "train" if self.model.training else "eval"
        for name in self.reward_func_names:
            if batches := self._measured.pop((self.model.training, name), None):
                self._metrics[mode][f"rewards/{name}/mean"] = [torch.cat(batches).nanmean().item()]  # TRL logs None where it is nan
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        """TRL's, which would write the held-out replies over those that were kept of the same step, and print them for those."""
        kept, self.log_completions = self.log_completions, False
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.log_completions = kept

    def _determine_best_metric(self, metrics, trial):
        """A measure that applied to no item is no best one; transformers would fall over the None."""
        wanted = f"eval_{self.args.metric_for_best_model}".replace("eval_eval_", "eval_")
        return False if metrics.get(wanted, 0) is None else super()._determine_best_metric(metrics, trial)
