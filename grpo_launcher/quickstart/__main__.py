"""Make what configs/quickstart.yaml needs, once: a small language model and the posts that it trains on.

python -m grpo_launcher.quickstart [--output data] [--seed N] [--overwrite]

data/quickstart-model  pre-trained on generated posts and summaries. That of seed 0 comes with the package; another
                       takes two to three minutes on two cores
data/quickstart        other posts of the same kind
"""

import random
import sys
from pathlib import Path

from grpo_launcher.datasets.tldr import to_row
from grpo_launcher.quickstart import Task, build
from grpo_launcher.quickstart.corpus import posts, praise_dialogue, strange_post

PRETRAINING_POSTS = 4000
ROWS = {"train": 640, "test": 64}


def make_model(folder: Path, seed: int) -> None:
    """Pre-train the model on summaries, and on a little of what other recipes and chats put to it."""
    from grpo_launcher.quickstart.pretrain import Dialogue, pretrain

    rng = random.Random(seed)
    dialogues = []
    for number, post in enumerate(posts(PRETRAINING_POSTS, seed)):
        row = to_row(post)
        system, user = row["prompt"]
        answer = {"role": "assistant", "content": row["reference"]}
        if number % 12 == 9:
            dialogues.append(Dialogue(praise_dialogue(rng)))
        elif number % 12 == 3:  # long prompts in unknown words must not confuse it, nor teach it to write them
            user = {"role": "user", "content": strange_post(rng)}
            dialogues.append(Dialogue([system, user, answer], prompt_weight=0.0))
        elif number % 6 == 0:  # a short prompt without a system prompt must not confuse it either
            title = user["content"].split("TITLE: ")[1].split("\n")[0]
            dialogues.append(Dialogue([{"role": "user", "content": f"{title}."}, answer]))
        else:
            dialogues.append(Dialogue([system, user, answer]))
    pretrain(dialogues, folder, seed)


def make_rows(seed: int) -> dict[str, list[dict]]:
    """Return posts of two other draws than the model's."""
    return {split: posts(count, seed + 1_000_000 * draw) for draw, (split, count) in enumerate(ROWS.items(), 1)}


if __name__ == "__main__":
    build(sys.argv[1:], __doc__, {"model": make_model}, {"quickstart": Task("tldr", make_rows)})
