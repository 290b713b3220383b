"""train.py where a completion follows from its prompt and its place in the group, whatever the number of ranks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import train
from grpo_launcher.trainer import Trainer


def complete(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
    """Return between 5 and 12 tokens each."""
    completions = []
    for index, ids in enumerate(prompt_ids):
        place = index % num_generations
        tokens = [3 + (7 * place + 13 * position + sum(ids)) % 250 for position in range(4 + place)]
        completions.append(tokens + self.eos_token_ids)
    return completions, None


Trainer._generate_single_turn = complete
train.run(sys.argv[1:])
