"""What a step's tool calls came to, beside what TRL logs of them."""

import torch


class ToolMetrics:
    """A mixin for GRPOTrainer, which logs `tools/call_frequency` (calls a completion) and `tools/failure_frequency` (failed calls a call).

    `tools/turns` is the mean number of the model's turns a completion, 1 where it calls no tool; `tools/tokens` the mean number of tokens that tools put in.
    """

    def _tool_call_loop(self, *args):
        done = super()._tool_call_loop(*args)
        masks, completions = done[:2]
        turns = [sum(message["role"] == "assistant" for message in completion) for completion in completions]
        tokens = [len(mask) - sum(mask) for mask in masks]
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in {"tools/turns": turns, "tools/tokens": tokens}.items():
            everywhere = self.accelerator.gather(torch.tensor(values, dtype=torch.float32, device=self.accelerator.device))
            metrics[name].append(everywhere.mean().item())
        return done
