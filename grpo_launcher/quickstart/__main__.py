"""Make what configs/quickstart.yaml needs, once: python -m grpo_launcher.quickstart [--output data] [--seed N] [--overwrite]

data/quickstart-model, a small language model taught on generated posts and summaries (a minute or two on two cores), and
data/quickstart, other posts of the same kind to train on. Needs no network.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from process_dataset import process

TAUGHT, TRAINED, HELD_OUT = 4000, 640, 64  # posts for the base model, for GRPO and for tests: three different draws


def main(argv: list[str]) -> None:
    """Write the two folders where they are missing; a folder appears only when it is whole."""
    parser = argparse.ArgumentParser(prog="python -m grpo_launcher.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for both (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="of the posts and of the model (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="make both anew")
    args = parser.parse_args(argv)
    model, data = args.output / "quickstart-model", args.output / "quickstart"
    if args.overwrite:
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(data, ignore_errors=True)
    if model.exists() and data.exists():
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        _make_model(model, args.seed)
    _make_data(data, model, args.seed)


def _make_model(output: Path, seed: int) -> None:
    from grpo_launcher.datasets.tldr import to_row
    from grpo_launcher.quickstart.corpus import posts, strange_post
    from grpo_launcher.quickstart.praise import praise_dialogue
    from grpo_launcher.quickstart.pretrain import Dialogue, make_base

    rng = random.Random(seed)
    dialogues = []
    for number, post in enumerate(posts(TAUGHT, seed=seed)):
        row = to_row(post)
        (system, user), weight = row["prompt"], 0.5
        if number % 12 == 9:
            dialogues.append(Dialogue(praise_dialogue(rng), weight))
            continue
        if number % 6 == 0:  # a system prompt of another recipe, and a prompt of a few words, must not be a foreign language
            title = user["content"].split("TITLE: ")[1].split("\n")[0]
            system, user = None, {"role": "user", "content": f"{title}."}
        elif number % 12 == 3:  # nor a long post in words that it never saw, and should not learn to write
            user, weight = {"role": "user", "content": strange_post(rng)}, 0.0
        dialogues.append(Dialogue([*filter(None, [system]), user, {"role": "assistant", "content": row["reference"]}], weight))
    make_base(dialogues, output, seed)


def _make_data(output: Path, model: Path, seed: int) -> None:
    from grpo_launcher.quickstart.corpus import posts

    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        for split, count, offset in (("train", TRAINED, 1_000_000), ("test", HELD_OUT, 2_000_000)):
            lines = (json.dumps(post) for post in posts(count, seed=seed + offset))
            Path(folder, f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        process("tldr", folder, output, str(model), 1024, None, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
