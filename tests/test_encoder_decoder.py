"""Models with an encoder: what is refused, what is counted, and that the trainer scores and loads them as they are."""

import json

import pytest
from tiny_models import make_encoder_model, make_model
from grpo_launcher.preflight import gather

KINDS = ["t5", "mt5", "bart", "pegasus"]


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
