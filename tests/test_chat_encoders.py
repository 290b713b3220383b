"""Chat and comparison of models with an encoder: replies are those of model.generate, prompts plain text, and what cannot be is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from compared import Compare
from peft import PeftModel
from tiny_models import make_adapter, make_encoder_model, make_model, make_run
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

import demo_in_chat
from grpo_launcher.chat.checkpoints import find
from grpo_launcher.chat.columns import draw
from grpo_launcher.chat.gather import gather
from grpo_launcher.seq2seq import prefix
from grpo_launcher.preflight import gather as gather_facts

PREFIX, TOKENS, PLACES = "summarize: ", 24, 40
CAT = "The cat sat on the mat."


def enliven(folder: Path, seed: int) -> None:
    """Weights with which it says something else at each step and to each prompt."""
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """t5, bart of few places, an adapter on each, a causal model, a run of t5 with a checkpoint and an adapter, and rows of unlike length."""
    folder = tmp_path_factory.mktemp("encoders")
    for seed, name in enumerate(("t5", "bart")):
        make_encoder_model(folder / name, name, PLACES)
        enliven(folder / name, seed)
    for number, base in enumerate(("t5", "bart")):
        make_adapter(folder / f"{base}-lora", folder / base, number, named=base)
    make_model(folder / "causal", 0)
    run = folder / "trainOutput/short/1"
    make_run(run, "t5", dataset_name="rows", reward_funcs="rewards.rouge.rouge_reward", temperature=0.5, max_completion_length=TOKENS)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"provenance": {"system_prompt": PREFIX}}))
    make_encoder_model(run / "final-checkpoint", "t5")
    enliven(run / "final-checkpoint", 2)
    shutil.copytree(folder / "t5-lora", run / "checkpoint-2")
    (run / "checkpoint-2/trainer_state.json").write_text("{}")
    rows = [{"prompt": f"{PREFIX}{CAT}{' It looked at the moon.' * count}", "reference": "The cat sat."} for count in range(4)]
    chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    for name, these in {"rows": rows, "chat": chat}.items():
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text("\n".join(map(json.dumps, these)))
    return folder


@pytest.fixture
def there(made, tmp_path, monkeypatch):
    """The same, stood in; what is written stays apart."""
    for path in made.iterdir():
        if path.name != "trainOutput":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(made / "trainOutput", tmp_path / "trainOutput", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generated(folder: str, prompt: str, adapter: str | None = None) -> list[int]:
    """What model.generate itself says to one prompt, greedily, without what its own generation config wishes for."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=model.config.decoder_start_token_id)
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    with torch.inference_mode():
        return model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=TOKENS)[0, 1:].tolist()


def test_a_comparison_of_models_adapters_and_a_run(there, capfd):
    """In batches of unlike length each says what model.generate says to it alone; ROUGE is measured, and prompts are tokens as the trainer has them."""
    compare = Compare(there, capfd)
    asked = ["t5", "t5-lora", "trainOutput/short/1/final-checkpoint", "trainOutput/short/1/checkpoint-2", "--data", "rows", "--json", "out.json"]
    status, said = compare(*asked)
    assert status == 0, said
    metrics = json.loads((there / "out.json").read_text())["splits"]["test"]["metrics"]
    assert set(metrics["ROUGE-L"]) == set(metrics["rouge_reward"]) == {"t5", "t5-lora", "final", "checkpoint-2"}
    bases = {"t5": ("t5", None), "t5-lora": ("t5", "t5-lora"), "final": ("trainOutput/short/1/final-checkpoint", None)}
    tokenizer, rows = AutoTokenizer.from_pretrained("t5"), compare.kept()
    for name, (base, adapter) in bases.items():
        replies = {json.loads(row["prompt"]): row for row in rows if row["checkpoint"] == name}
        assert len(replies) == 4
        for prompt, row in replies.items():
            assert row["reply_ids"] == generated(base, prompt, adapter) and row["prompt_ids"] == tokenizer(prompt)["input_ids"]
            assert row["reply"] == tokenizer.decode(row["reply_ids"], skip_special_tokens=True)
    assert len({str(row["reply_ids"]) for row in rows if row["prompt"] == rows[0]["prompt"]}) == 3
    assert "0 replies to draw, 16 are kept" in compare(*asked, "--overwrite")[1]


def test_bart_draws_as_it_was_trained(there, capfd):
    """Not with the beams and the least length that its file asks for; and prompt and reply have its places each, not together."""
    compare = Compare(there, capfd)
    status, said = compare("bart", "bart-lora", "--data", "rows", "--rewards")
    assert status == 0 and "prompts of test leave no room for a reply of 24 tokens in a context of 40 each (bart" in " ".join(said.split())
    rows = compare.kept()
    assert max(len(row["prompt_ids"]) for row in rows) + TOKENS > PLACES >= max(len(row["prompt_ids"]) for row in rows)
    for row in rows:
        assert row["reply_ids"] == generated("bart", json.loads(row["prompt"]), "bart-lora" if row["checkpoint"] == "bart-lora" else None)


def test_with_a_causal_model_on_the_same_text(there, capfd):
    """Both answer plain text, which is said; chat messages the one with an encoder cannot read, which costs the other nothing."""
    compare = Compare(there, capfd)
    status, said = compare("causal", "t5", "--data", "rows", "--rewards", "--json", "out.json")
    said = " ".join(said.split())
    assert status == 0 and "t5 has an encoder, and causal has none: each reads the same text" in said and "lengths in tokens cannot be compared" in said
    assert {one["n"] for one in json.loads((there / "out.json").read_text())["splits"]["test"]["metrics"]["ROUGE-1"].values()} == {4}
    status, said = compare("causal", "t5", "--data", "chat", "--rewards")
    assert status == 1 and "Not compared: t5: the prompts are chat messages, and a model with an encoder takes plain-text prompts" in said
    assert "causal" in said[said.index("ROUGE-1") :]


def test_vllm_is_refused_for_it(there, capfd, monkeypatch):
    """With the reason, before a model loads."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    status, said = Compare(there, capfd)("t5", "--data", "rows", "--engine", "vllm")
    assert status == 1 and "--engine vllm: t5 has an encoder, and vLLM runs models without one only" in said


def test_a_chat_sends_text_behind_what_the_run_put_before_its_prompts(there, capsys):
    """Each prompt alone; the pieces are the reply, and adapters share their base."""
    assert demo_in_chat.main(["--prompt", CAT, "--temperature", "0", "--output", "it.json"]) == 0
    told = json.loads(Path("it.json").read_text())
    replies = {one["column"]: one for one in told["rows"][0]["replies"]}
    assert {name: one["ids"] for name, one in replies.items()} == {
        "base": generated("t5", PREFIX + CAT),
        "checkpoint-2": generated("t5", PREFIX + CAT, "t5-lora"),
        "final": generated("trainOutput/short/1/final-checkpoint", PREFIX + CAT),
    }
    assert told["notes"][0].startswith("With an encoder: base, checkpoint-2, final: each prompt is read alone")
    columns, _, manner, _ = gather(["trainOutput/short/1"], None, [], 4)
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    messages = [{"role": "system", "content": PREFIX}, *before, {"role": "user", "content": CAT}]
    grown = [reply.text for reply in draw(columns[2], messages, manner.__class__(temperature=0, max_new_tokens=TOKENS))]
    assert grown[-1] == replies["final"]["text"] and len(grown) > 3 and all(grown[-1].startswith(text.rstrip("�")) for text in grown)
    engine = columns[0].engine
    for column in columns[:2]:
        assert engine.model(column.checkpoint) is engine.models["t5"]
    assert engine.has_encoder(find("t5-lora"))


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        (["summarize: A cat.", "summarize: A dog: it barks."], "summarize: "),
        (["摘要：猫坐在垫子上", "摘要：狗"], "摘要："),
        (["summarize: text: A", "summarize: text: B"], "summarize: text: "),
        (["A cat.", "A dog."], None),
        (["summarize: A cat."], None),
        (["One: x", "Two: x"], None),
    ],
)
def test_what_stands_before_every_prompt(prompts, found):
    """Up to its last colon."""
    assert prefix(prompts) == found


def test_a_run_keeps_what_stands_before_its_prompts(there):
    """As it keeps a system prompt, so that a chat can put it there too."""
    facts = gather_facts(
        ["--model_name_or_path", "t5", "--dataset_name", "rows", "--dataset_train_split", "test", "--reward_funcs", "rewards.rouge.rouge_reward"]
    )
    assert facts["data"]["system_prompt"] == PREFIX and facts["problems"] == facts["missing"] == []
