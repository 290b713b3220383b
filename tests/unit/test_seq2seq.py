"""seq2seq.py: how encoder-decoder models are loaded, sampled and scored, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import make_encoder_model, make_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from trl.trainer.utils import disable_dropout_in_model

from grpo_launcher import seq2seq
from grpo_launcher.config import build_dataclasses, load_config
from grpo_launcher.errors import UserError
from grpo_launcher.trainer import build_trainer

TARGETS = {"t5": ["q", "v"], "mt5": ["q", "v"], "bart": ["q_proj", "v_proj"], "pegasus": ["q_proj", "v_proj"]}
ROWS = Dataset.from_dict(
    {"prompt": [f"summarize: The cat sat on the {'roof and looked at the moon ' * (n % 4)}." for n in range(32)]}
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of each kind, and a causal one."""
    folder = tmp_path_factory.mktemp("encoders")
    for kind in TARGETS:
        make_encoder_model(folder / kind, kind)
    make_model(folder / "causal", seed=0)
    return folder


@pytest.fixture
def build(models, tmp_path):
    """Return a function (kind, flags) -> the GRPO trainer of a run."""

    def make(kind: str, *flags: str):
        argv = ["--model_name_or_path", str(models / kind), "--dataset_name", "rows", "--use_cpu", "true"]
        argv += ["--bf16", "false", "--report_to", "none", "--max_completion_length", "12", "--beta", "0.04"]
        argv += ["--temperature", "0.7", "--num_generations", "4"]
        recipe, args, model_args = build_dataclasses(load_config([*argv, *flags]).values)
        options = {"reward_funcs": [lambda completions, **columns: [0.0] * len(completions)], "callbacks": []}
        made = build_trainer(recipe, args, model_args, run=tmp_path, train_dataset=ROWS, eval_dataset=None, **options)
        made.model.train()
        return made

    return make


def test_a_supervised_run_on_a_gpu_spreads_no_model(build, monkeypatch):
    """TRL lets transformers place a model on GPUs where nothing else is said, and ZeRO-3 refuses that."""
    monkeypatch.setattr("trl.trainer.utils.PartialState", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr("transformers.integrations.accelerate.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setitem(globals(), "ROWS", ROWS.add_column("reference", ["The cat."] * len(ROWS)))
    assert next(build("t5", "--method", "sft").model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_supervised_step_is_the_same_in_one_batch_and_in_four(kind, build, models, monkeypatch):
    """Also from a tokenizer that GRPO has saved, which pads on the left."""
    rows = ROWS.select(range(8)).add_column("reference", ["The cat.", "The cat sat."] * 4)
    monkeypatch.setitem(globals(), "ROWS", rows)
    tokenizer = AutoTokenizer.from_pretrained(models / kind, padding_side="left")
    tokenizer.save_pretrained(models / kind)
    figures = []
    for size, batches in ((8, 1), (2, 4)):
        flags = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", batches, "--max_steps", 1]
        flags += ["--learning_rate", 0, "--logging_steps", 1, "--save_strategy", "no"]
        trainer = build(kind, "--method", "sft", *map(str, flags))
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.model.config.dropout = 0.0
        trainer.train()
        figures.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert figures[1] == pytest.approx(figures[0], rel=0.1)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", TARGETS)
def test_log_probabilities_are_those_of_teacher_forcing(kind, lora, build, models):
    """Against the model's own loss path, one unpadded row at a time; and the reference is the policy, to the bit."""
    flags = ["--use_peft", "true", "--lora_target_modules", *TARGETS[kind]] if lora else []
    trainer = build(kind, "--num_iterations", "2", *flags)
    batch = trainer._prepare_inputs([ROWS[row // 4] for row in range(8)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    with torch.no_grad():  # with gradients the CPU takes another kernel
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, compute_entropy=True
        )
        chunked, nothing, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, batch_size=3
        )
    assert torch.equal(logps, batch["ref_per_token_logps"]) and torch.equal(logps, batch["old_per_token_logps"])
    assert nothing is None and torch.allclose(chunked, logps, atol=1e-5)
    assert len(set(batch["prompt_mask"].sum(dim=1).tolist())) > 1, "some prompts are padded"
    model = AutoModelForSeq2SeqLM.from_pretrained(models / kind).eval()
    for row in range(8):
        prompt, completion = (
            batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
        )
        with torch.no_grad():
            logits = model(input_ids=prompt[None], labels=completion[None]).logits[0] / 0.7
        expected = logits.log_softmax(-1)
        steps = range(len(completion))
        assert torch.allclose(logps[row, : len(steps)], expected[steps, completion], atol=1e-5)
        assert torch.allclose(entropies[row, : len(steps)], -(expected.exp() * expected).sum(-1), atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_trls_disable_dropout_does_not_reach_all(kind, models):
    """When this fails, the dropout fields need not be 0 from loading on."""
    model = AutoModelForSeq2SeqLM.from_pretrained(models / kind).train()
    disable_dropout_in_model(model)
    ids = torch.arange(3, 40)[None]
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        outputs.append(model(input_ids=ids, decoder_input_ids=ids).logits)
    assert not torch.allclose(*outputs)


def test_completions_are_sampled_as_the_model_says(build, models):
    """Without beams, forced tokens and a least length that the generation config asks for, which stays as it was."""
    trainer = build("bart", "--top_k", "1")
    prompt_ids = trainer._tokenize_prompts(ROWS["prompt"][:4])[0]
    completions, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    assert trainer.model.generation_config.num_beams == 4
    model = AutoModelForSeq2SeqLM.from_pretrained(models / "bart").eval()
    end = AutoTokenizer.from_pretrained(models / "bart").eos_token_id
    for prompt, completion in zip(prompt_ids, completions, strict=True):
        ids = [model.config.decoder_start_token_id]
        while len(ids) <= 12 and (len(ids) == 1 or ids[-1] != end):
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids])).logits
            ids.append(logits[0, -1].argmax().item())
        assert completion == ids[1:]


def test_a_config_that_names_a_class_without_a_head_is_loaded_with_one(build, models):
    """As that of facebook/bart-base does; policy and reference alike, both without dropout."""
    path = models / "bart/config.json"
    text = path.read_text()
    path.write_text(text.replace("BartForConditionalGeneration", "BartModel"))
    try:
        trainer = build("bart")
    finally:
        path.write_text(text)
    for model in (trainer.model, trainer.ref_model):
        assert type(model).__name__ == "BartForConditionalGeneration"
        assert model.config.dropout == model.config.attention_dropout == model.config.encoder_layerdrop == 0


def test_the_kind_is_read_from_the_config(models, tmp_path):
    configs = [AutoConfig.from_pretrained(models / name) for name in ("t5", "bart", "causal")]
    assert [seq2seq.max_positions(config) for config in configs] == [None, 256, 2048]
    (tmp_path / "adapter_config.json").write_text('{"task_type": "SEQ_2_SEQ_LM"}')
    folders = (models / "t5", tmp_path, models / "causal")
    assert [seq2seq.is_seq2seq_checkpoint(folder) for folder in folders] == [True, True, False]


def test_what_such_a_model_cannot_do_is_refused(models):
    values = {"model_name_or_path": "t5", "use_vllm": False, "tools": None, "environment_factory": None}
    config, tokenizer = AutoConfig.from_pretrained(models / "t5"), AutoTokenizer.from_pretrained(models / "t5")

    def fields(**changes) -> list[str]:
        return [error.field for error in seq2seq.check_seq2seq(values | changes, config, tokenizer)]

    assert fields() == []
    assert fields(use_vllm=True, tools=["grpo_launcher.tools.calculator"]) == ["use_vllm", "tools"]
    assert fields(environment_factory="game.py:Game") == ["environment_factory"]
    tokenizer.pad_token = None
    config.decoder_start_token_id = None
    assert fields() == ["model_name_or_path"] * 2


def test_prompts_are_padded_on_the_right():
    inputs = seq2seq.encoder_inputs([[1, 2, 3], [4]], pad_token_id=0)
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {
        "input_ids": [[1, 2, 3], [4, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


@pytest.mark.parametrize(
    ("prompts", "prefix"),
    [
        (["summarize: a", "summarize: b"], "summarize: "),
        (["TL;DR: en: a", "TL;DR: en: b: c"], "TL;DR: en: "),
        (["摘要：一", "摘要：二"], "摘要："),
        (["summarize: a: x", "summarize: b: y"], "summarize: "),
        (["a: x", "b: y"], None),
        (["no colon", "here"], None),
        (["same: a", "same: a"], None),
    ],
)
def test_what_all_prompts_begin_with(prompts, prefix):
    assert seq2seq.common_prefix(prompts) == prefix


def test_references_become_labels_and_a_long_one_is_refused(models):
    rows = Dataset.from_dict({"prompt": ["summarize: The cat sat."], "reference": ["The cat waits."], "other": [1]})
    tokenizer = AutoTokenizer.from_pretrained(models / "bart")
    (row,) = seq2seq.tokenize_references(rows, tokenizer, limit=256)
    assert set(row) == {"input_ids", "attention_mask", "labels"}
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == "The cat waits."
    assert row["labels"][-1] == tokenizer.eos_token_id
    with pytest.raises(UserError, match="decoder takes 2") as refused:
        seq2seq.tokenize_references(rows, tokenizer, limit=2)
    assert refused.value.field == "dataset_name"
