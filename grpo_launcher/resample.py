"""Groups that can teach: a group whose rewards are all the same is asked again, with other prompts.

DAPO's dynamic sampling (arXiv 2503.14476), for TRL's GRPOTrainer, which has none (trl#3708, trl#7242). With
`resample_groups: N` up to N further generations follow in a step, each as large as what is missing. All ranks see the
rows of all, so that each ends with as many as without. Which prompts had no spread is remembered: they are asked again
in their turn, and in place of another only where too few others are left.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from grpo_launcher.rollouts import IDS
from grpo_launcher.verdict import SAME

TOKENS, GROUPS = "resample/tokens", "resample/useful_groups"  # of a step: tokens generated, groups with spread
STOCK_TOKENS, STOCK_GROUPS = "resample/stock_tokens", "resample/stock_useful_groups"  # the same without resampling
TRIED = 50  # rows that are looked at for one that may have spread


def prompt_key(prompt) -> str:
    """Return a short name of a prompt."""
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).hexdigest()[:16]


def other_rows(dataset, count: int, seed: list[int], avoided: set[str], flat: set[str]) -> list[dict]:
    """Draw rows of a dataset, the same on all ranks.

    Args:
        dataset: with a column `prompt`.
        count: of rows.
        seed: the draw is the same for the same numbers.
        avoided: prompts that this step has asked already, by key; drawn where there is no other.
        flat: prompts whose group had no spread the last time.
    """
    generator = torch.Generator().manual_seed(hash(tuple(seed)) % 2**63)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    best, second, last = [], [], []
    for index in order[: TRIED * count]:
        row = dataset[index]
        key = prompt_key(row["prompt"])
        (last if key in avoided else second if key in flat else best).append(row)
        if len(best) == count:
            break
    found = [*best, *second, *last]
    return [found[number % len(found)] for number in range(count)]


def rows_of(output: dict) -> list[dict]:
    """Return the rows of all ranks, in TRL's order: what _generate_and_score_completions returns, taken apart.

    Each row is a copy: a view would be sent with the whole tensor behind it.
    """
    count = len(output["completion_ids"])
    columns = {name: values.cpu() for name, values in output.items() if torch.is_tensor(values) and values.ndim}
    return gather_object([{name: values[row].clone() for name, values in columns.items()} for row in range(count)])


def joined(rows: list[dict], pad_id: int, device) -> dict[str, torch.Tensor]:
    """Return rows as tensors again: prompts padded on the left, all else on the right."""
    output = {}
    for name, first in rows[0].items():
        parts, fill = [row[name] for row in rows], pad_id if name.endswith("_ids") else 0
        side = "left" if name.startswith("prompt_") else "right"
        padded = pad_sequence(parts, True, fill, padding_side=side) if first.ndim else torch.stack(parts)
        output[name] = padded.to(device)
    return output


@dataclass
class Group:
    """The completions of one prompt."""

    rows: list[dict]  # of tensors, as rows_of() gives them
    entries: list[dict]  # what TRL logs of each, by column
    has_spread: bool

    @property
    def prompt(self) -> str:
        """Its key."""
        return prompt_key(self.entries[0]["prompt", None])

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return sum(len(entry["extra", IDS]) for entry in self.entries)


def log_columns(logs: dict) -> dict:
    """Return the columns of TRL's table of completions by name, of which some stand one level deeper."""
    found = {}
    for name, values in logs.items():
        deeper = values.items() if isinstance(values, dict) else [(None, values)]
        found |= {(name, inner): column for inner, column in deeper if name != "images"}
    return found


def groups_of(output: dict, logs: dict, size: int, weights: torch.Tensor) -> list[Group]:
    """Return the groups that one call of _generate_and_score_completions has made, on all ranks.

    Args:
        output: what it returned.
        logs: the trainer's, whose columns end with these completions.
        size: of a group.
        weights: of the rewards, (number of rewards,).
    """
    rows, columns = rows_of(output), log_columns(logs)
    columns = {name: list(values)[-len(rows) :] for name, values in columns.items()}
    entries = [
        {name: values[row] for name, values in columns.items() if row < len(values)} for row in range(len(rows))
    ]
    rewards = torch.tensor([columns[name] for name in columns if name[0] == "rewards"]).T
    rewards = (rewards * weights.cpu()).nansum(dim=1).view(-1, size)
    spread = (rewards.max(dim=1).values - rewards.min(dim=1).values > SAME).tolist()
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]
    return [Group(rows[part], entries[part], has) for part, has in zip(parts, spread, strict=True)]


def write_logs(logs: dict, groups: list[Group]) -> None:
    """Let TRL's table hold the completions of these groups."""
    entries = [entry for group in groups for entry in group.entries]
    for name, column in log_columns(logs).items():
        column.clear()
        column.extend(entry.get(name) for entry in entries)


def summary(lines: list[dict]) -> str | None:
    """Return what resampling has cost, from the lines of metrics.jsonl; None where there was none."""
    lines = [line for line in lines if TOKENS in line]
    if not lines:
        return None
    tokens, groups, stock_tokens, stock_groups = (
        sum(line[name] for line in lines) for name in (TOKENS, GROUPS, STOCK_TOKENS, STOCK_GROUPS)
    )
    costs = [
        f"{cost / count:.0f}" if count else "no" for cost, count in ((tokens, groups), (stock_tokens, stock_groups))
    ]
    return f"Resampling: {costs[0]} tokens for a group with spread; without it {costs[1]}."
