"""Models with an encoder: what is refused, what is counted, and that the trainer scores and loads them as they are."""

import json

import pytest
import torch
from tiny_models import make_encoder_model, make_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from trl.trainer import grpo_trainer

from grpo_launcher import seq2seq as encoder_decoder
from grpo_launcher.preflight import gather
from grpo_launcher.config import RecipeParser
from grpo_launcher.trainer import trainer_class

KINDS = ["t5", "mt5", "bart", "pegasus"]
TARGETS = {"t5": ["q", "v"], "mt5": ["q", "v"], "bart": ["q_proj", "v_proj"], "pegasus": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with one of each kind, a causal model, and rows of unlike length."""
    folder = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        make_encoder_model(folder / kind, kind)
    make_model(folder / "causal", seed=0)
    rows = [
        {"prompt": f"summarize: The cat sat on the {'roof and looked at the moon ' * (number % 4)}.", "reference": "The cat waits."} for number in range(32)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def trainer(home, tmp_path, monkeypatch):
    """trainer(kind, *flags) → the trainer that train.py would build, in this process."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", grpo_trainer.create_model_from_path)  # what is rebound is put back

    def make(kind: str, *flags: str):
        fixed = ["--model_name_or_path", kind, "--dataset_name", "rows.jsonl", "--reward_funcs", "rewards.rouge.rouge_reward", "--max_completion_length", "12"]
        argv = [*fixed, "--beta", "0.04", "--output_dir", str(tmp_path / "run"), "--temperature", "0.7", "--num_generations", "4", *flags]
        recipe, args, model = RecipeParser().parse(argv)
        from trl import get_peft_config

        from grpo_launcher.plugins import load_rewards
        from grpo_launcher.data import load_rows

        config = AutoConfig.from_pretrained(kind)
        model.lora_task_type = encoder_decoder.TASK[encoder_decoder.is_encoder_decoder(config)]
        args.model_init_kwargs = {"dtype": "float32"}
        rows = load_rows("rows.jsonl")["train"]
        options = {"reward_funcs": load_rewards(recipe), "args": args, "train_dataset": rows, "peft_config": get_peft_config(model)}
        made = trainer_class(args, recipe, config)(model=kind, **options)
        made.model.train()
        return made

    return make


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_teacher_forcing(kind, lora, trainer, home):
    """Against the model's own loss path, one unpadded row at a time, from a fresh load; and without dropout the reference is the policy, to the bit."""
    flags = ["--use_peft", "true", "--lora_target_modules", *TARGETS[kind]] if lora else []
    made = trainer(kind, "--num_iterations", "2", *flags)
    batch = made._prepare_inputs([made.train_dataset[at // 4] for at in range(8)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():  # with it the CPU takes another kernel
        logps, entropies, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True)
    assert torch.equal(logps, batch["ref_per_token_logps"]) and torch.equal(logps, batch["old_per_token_logps"])
    assert {row.sum().item() for row in batch["prompt_mask"]} != {batch["prompt_ids"].shape[1]}, "some prompts are padded"
    independent = AutoModelForSeq2SeqLM.from_pretrained(home / kind).eval()
    for row in range(8):
        prompt, reply = (batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()] for part in ("prompt", "completion"))
        with torch.no_grad():
            logits = independent(input_ids=prompt[None], labels=reply[None]).logits[0] / 0.7
        expected = logits.log_softmax(-1)
        assert logps[row, : len(reply)].tolist() == pytest.approx(expected[range(len(reply)), reply].tolist(), abs=1e-5)
        assert entropies[row, : len(reply)].tolist() == pytest.approx((-(expected.exp() * expected).sum(-1)).tolist(), abs=1e-4)


def test_replies_are_drawn_as_the_model_says(trainer, home):
    """Without beams, forced tokens and a shortest length that its generation config asks for, which is left as it was."""
    made = trainer("bart", "--top_k", "1")
    drawn, _ = made._generate_single_turn(made._tokenize_prompts([made.train_dataset[at]["prompt"] for at in range(4)])[0], None, {}, 1)
    assert made.model.generation_config.num_beams == 4, "saved as it was"
    independent, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(home / "bart").eval(), AutoTokenizer.from_pretrained(home / "bart")
    for at, reply in enumerate(drawn):
        ids, said = tokenizer(made.train_dataset[at]["prompt"], return_tensors="pt")["input_ids"], [independent.config.decoder_start_token_id]
        while len(said) <= 12 and (len(said) == 1 or said[-1] != tokenizer.eos_token_id):
            said.append(independent(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits[0, -1].argmax().item())
        assert reply == said[1:]


def test_a_config_that_names_a_model_without_a_head_is_loaded_with_one(trainer, home):
    """As that of facebook/bart-base does; reference and policy alike."""
    path = home / "bart/config.json"
    text = path.read_text()
    path.write_text(text.replace("BartForConditionalGeneration", "BartModel"))
    try:
        made = trainer("bart")
    finally:
        path.write_text(text)
    assert {type(model).__name__ for model in (made.model, made.ref_model)} == {"BartForConditionalGeneration"}
    assert made.model.config.dropout == made.model.config.attention_dropout == made.model.config.encoder_layerdrop == 0


def test_the_kind_is_read_from_the_config(home):
    """By its one field, and of a saved folder from what lies in it."""
    assert [encoder_decoder.is_encoder_decoder(AutoConfig.from_pretrained(home / name)) for name in ("t5", "bart", "causal")] == [True, True, False]
    assert [encoder_decoder.saved(home / name) for name in ("t5", "causal")] == [True, False]


REFUSED = {
    "vLLM": (["--use_vllm", "true"], "use_vllm: t5 has an encoder (t5), and vLLM runs models without one only"),
    "tools": (["--tools", "grpo_launcher.tools.calculator.calculator"], "tools: t5 has an encoder (t5): a reply is not read again"),
    "chat messages": (["--dataset_name", "chat.jsonl"], "chat.jsonl holds chat messages, and a model with an encoder takes plain-text prompts"),
    "a LoRA target of another architecture": (
        ["--use_peft", "true", "--lora_target_modules", "q_proj", "v"],
        "a t5 model has no q_proj; its linear layers are",
    ),
    "one LoRA target alone": (["--use_peft", "true", "--lora_target_modules", "q"], "q alone is a pattern for a module's whole path"),
    "a tokenizer without a pad token": (["--model_name_or_path", "padless"], "the tokenizer of padless has no pad token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_reason(case, home, monkeypatch):
    """Before a weight is read."""
    monkeypatch.chdir(home)
    (home / "chat.jsonl").write_text("\n".join([json.dumps({"prompt": [{"role": "user", "content": "Hello"}], "reference": "Hi"})] * 16))
    if not (home / "padless").exists():
        make_encoder_model(home / "padless", "t5")
        file = home / "padless/tokenizer_config.json"
        file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "pad_token"}))
    flags, said = REFUSED[case]
    base = [] if "--model_name_or_path" in flags else ["--model_name_or_path", "t5"]
    rows = [] if "--dataset_name" in flags else ["--dataset_name", "rows.jsonl"]
    problems = gather([*base, *rows, "--reward_funcs", "rewards.rouge.rouge_reward", *flags])["problems"]
    assert any(said in problem for problem in problems), problems


@pytest.fixture
def facts(home, monkeypatch):
    """facts(kind, *flags) → what the launcher would know of it."""
    monkeypatch.chdir(home)
    fixed = ["--dataset_name", "rows.jsonl", "--reward_funcs", "rewards.rouge.rouge_reward"]
    return lambda kind, *flags: gather(["--model_name_or_path", kind, *fixed, *flags])


@pytest.mark.parametrize("gpus", [0, 1, 2, 4])
def test_every_device_trains(gpus, facts, make_plan):
    """No server, and the plan says why."""
    made = make_plan(facts("t5"), gpus)
    assert made.problems == [] and made.server is None and made.values["use_vllm"] is False and made.ranks == (gpus or 2)
    assert "generation by transformers on each, as the model has an encoder" in made.layout
    assert "relative places, no limit" in "".join(made.lines)
    assert "vLLM runs no models with an encoder" in make_plan(facts("t5"), gpus, colocate=True).problems[-1]


def test_prompt_and_reply_have_the_places_each_for_itself(facts, make_plan, home):
    """An article over the encoder's limit is refused with how to shorten it, a reply over the decoder's too; their sum may be more."""
    known = facts("bart", "--max_completion_length", "250")
    known["data"]["longest_prompt"] = 250
    assert make_plan(known, 0).problems == []
    known["data"]["longest_prompt"] = 257
    (problem,) = make_plan(known, 0).problems
    assert "the longest prompt has 257 tokens, and the encoder takes 256" in problem and "--max_prompt_length 256" in problem and "--too_long cut" in problem
    assert "max_completion_length: 300 tokens, and the decoder takes 256" in make_plan(facts("bart", "--max_completion_length", "300"), 0).problems[0]
