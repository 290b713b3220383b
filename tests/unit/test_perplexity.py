"""The perplexity reward against a computation by hand, one reply at a time."""

import math

import pytest
import torch

from rewards.perplexity import _load, perplexity_ready, perplexity_reward

PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say something about the rain."}]
REPLIES = [
    "It rained.",
    "The rain fell on the garden and everybody was glad about it, for it had been a dry summer.",
    "zq zq 雨 zq",
    "x",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A very small model with random weights, its logits spread so that scores differ, and a chat template."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_launcher.quickstart.pretrain import make_tokenizer

    folder = tmp_path_factory.mktemp("judge")
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template = turn + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = make_tokenizer([*REPLIES, "a dry summer in the garden"] * 5, template)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    network = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    network.lm_head.weight.data *= 10
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_hand(model: str, prompt, answer: str) -> float:
    """10·clamp(1 − (ln ppl − 1)/10) of one reply, without a batch."""
    network, tokenizer = _load(model)
    text = (
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    )
    before, after = tokenizer(text)["input_ids"], tokenizer(answer)["input_ids"]
    logs = network(torch.tensor([before + after])).logits[0].log_softmax(-1)
    surprise = -sum(logs[len(before) + i - 1, token].item() for i, token in enumerate(after)) / len(after)
    return 10 * max(0.0, min(1.0, 1 - (surprise - 1) / 10))


@pytest.mark.parametrize("prompt", [PROMPT, "About the rain: "], ids=["chat", "plain"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_no_reply_feels_its_batch(prompt, batch_size, model):
    """A published perplexity averages over the padding."""
    completions = (
        REPLIES if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in REPLIES]
    )
    scores = perplexity_reward([prompt] * 4, completions, model=model, batch_size=batch_size)
    expected = [by_hand(model, prompt, text) for text in REPLIES]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 2) for score in scores}) > 2, "the test would not see a mix-up"


def test_empty_and_overlong_replies_have_a_score(model):
    """Empty is 0; of what the model's context cannot hold the rest counts."""
    scores = perplexity_reward([PROMPT, PROMPT, ""], ["", "rain " * 500, "rain"], model=model)
    assert scores[0] == 0 and all(math.isfinite(score) and 0 <= score <= 10 for score in scores)


def test_the_model_is_whole_while_zero_3_is_on(model):
    """Transformers would split it over the ranks; and the setting is as before afterwards."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    _load.cache_clear()
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        network, _ = _load(model)
        assert is_deepspeed_zero3_enabled()
        assert all(parameter.numel() and not hasattr(parameter, "ds_id") for parameter in network.parameters())
    finally:
        del kept
        _load.cache_clear()


def test_a_model_that_is_not_there_is_named(monkeypatch):
    """Before a run starts."""
    with pytest.raises(ValueError, match="perplexity_reward: model data/nothing is no folder"):
        perplexity_ready(model="data/nothing")
