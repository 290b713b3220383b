"""A failed rating is not a zero: what a reward could not judge takes its group's mean, so that it moves no advantage."""

import torch


class FailedRewards:
    """A mixin for GRPOTrainer, which adds 0 to the weighted sum for a reward that is None, and so shifts the whole group's advantages.

    A reward sees one rank's slice, and groups straddle ranks, so only the gathered rewards can be mended. Where a reward failed
    for a whole group it stays out of that group. `rewards/NAME/failed` is the share of ratings, 0 to 1, that NAME could not give. A reward of
    weight 0 moves nothing: its None stays, and means that it does not apply.
    """

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rewards of all ranks, (B, number of rewards), in which NaN stands only where a reward failed for the whole group."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode, group = ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)
        counts = self.reward_weights.to(rewards.device) != 0
        failed = rewards.isnan() & counts
        for name, share, rated in zip(self.reward_func_names, failed.float().mean(dim=0).tolist(), counts.tolist(), strict=True):
            if rated:
                self._metrics[mode][f"rewards/{name}/failed"].append(share)
        means = rewards.view(-1, group, rewards.shape[1]).nanmean(dim=1).repeat_interleave(group, dim=0)
        return torch.where(failed, means, rewards)
