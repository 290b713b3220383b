"""The rehearsal of --doctor: two steps of a recipe with random weights, two layers deep."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig

from grpo_launcher.data import load_tokenizer
from grpo_launcher.datasets.tldr import to_row
from grpo_launcher.preflight_runner import PROJECT, Report
from grpo_launcher.quickstart.corpus import posts
from grpo_launcher.quickstart.pretrain import Dialogue, pretrain
from grpo_launcher.seq2seq import model_class

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
# At a high learning rate a server that keeps old weights is seen in the log-probabilities of the second step.
STEPS = {"max_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "warmup_steps": 0}
STEPS |= {"lr_scheduler_type": "constant", "report_to": "none", "sample_every": 0, "push_to_hub": "false"}
GENERATION = {"max_completion_length": 32, "vllm_importance_sampling_correction": "true"}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": 2}


def prepare_rehearsal(report: Report, argv: list[str], folder: Path) -> list[str]:
    """Write a model with random weights into `folder`, and return the arguments of train.py that use it.

    Where the recipe's model or data are not there, the quickstart stands in, with posts made on the spot.

    Args:
        report: of the recipe, without problems.
        argv: the recipe, as for train.py.
        folder: an empty one.
    """
    model, values = folder / "model", report.values
    changes = STEPS | {"model_name_or_path": model}
    if report.missing:
        rows = [to_row(post) for post in posts(200, seed=0)]
        answers = [{"role": "assistant", "content": row["reference"]} for row in rows]
        dialogues = [Dialogue([*row["prompt"], answer]) for row, answer in zip(rows, answers, strict=True)]
        pretrain(dialogues, model, seed=0, steps=1)
        for split in ("train", "test"):
            Dataset.from_list(rows).to_parquet(folder / "rows" / f"{split}.parquet")
        argv = ["--config", str(PROJECT / "configs/quickstart.yaml")]
        changes |= GENERATION | EVALUATION | {"dataset_name": folder / "rows"}
    else:
        trust = {"trust_remote_code": values["trust_remote_code"]}
        config = AutoConfig.from_pretrained(values["model_name_or_path"], revision=values["model_revision"], **trust)
        text_config = config.get_text_config()
        for name in LAYERS:
            if hasattr(text_config, name):
                setattr(text_config, name, 2)
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:2]
        torch.manual_seed(0)
        model_class(config).from_config(config, **trust).save_pretrained(model)
        load_tokenizer(values).save_pretrained(model)
        changes |= GENERATION if values["method"] == "grpo" else {}
        changes |= EVALUATION if values["dataset_test_split"] in report.data.splits else {}
    return [*argv, *(word for name, value in changes.items() for word in (f"--{name}", str(value)))]
