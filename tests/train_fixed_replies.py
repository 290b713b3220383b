"""train.py where a reply is a function of its prompt and of its place in its group, so that any number of ranks trains on the same replies."""

import sys

import train
from grpo_launcher.seq2seq import EncoderDecoder


def replies(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
    """Between 5 and 12 tokens each."""
    ends, places = self.eos_token_ids, [at % num_generations for at in range(len(prompt_ids))]
    return [[3 + (7 * at + 13 * place + sum(ids)) % 250 for place in range(4 + at)] + ends for at, ids in zip(places, prompt_ids, strict=True)], None


EncoderDecoder._generate_single_turn = replies
train.main(sys.argv[1:])
