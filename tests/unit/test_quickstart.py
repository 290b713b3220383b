"""The quickstart: what it generates, how its folders are made, and that its training loops train."""

import hashlib
import json
import os
import random
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from helpers import write_checkpoint
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from grpo_launcher.datasets import everyday
from grpo_launcher.errors import UserError
from grpo_launcher.quickstart import Task, build, corpus, encoder, pretrain, smollm2, summaries, tools
from grpo_launcher.quickstart import __main__ as quickstart
from grpo_launcher.tools import calculator

DIGESTS = {  # of what is generated with seed 0: the documented figures were measured with it
    "posts": "3adc52d3d17d",
    "strange post": "ff717fc94372",
    "praise": "abc601273527",
    "requests": "74d15b1a16b1",
    "articles": "958c8eadd282",
    "sums": "25247ca30182",
    "questions": "f01a0aaf5945",
    "sum dialogues": "3d36337c83bf",
    "question dialogues": "fec18314f0e4",
}


def test_what_is_generated_stays_the_same():
    """With one seed, on every machine."""
    rng = random.Random(0)
    generated = {
        "posts": corpus.posts(50, 0),
        "strange post": corpus.strange_post(random.Random(0)),
        "praise": [corpus.praise_dialogue(random.Random(seed)) for seed in range(20)],
        "requests": everyday.make_rows(0),
        "articles": encoder.make_articles(20, 0),
        "sums": tools.make_sums(50, 0),
        "questions": tools.make_questions(0),
        "sum dialogues": [tools._sum_dialogue(row, rng, tools.SHARES) for row in tools.make_sums(20, 0)],
        "question dialogues": [tools._question_dialogue(rng, tools.SHARES) for _ in range(50)],
    }
    texts = {name: json.dumps(content, ensure_ascii=False) for name, content in generated.items()}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()} == DIGESTS


def test_summaries_are_longer_than_the_target_and_of_known_words():
    """At about 200 characters there would be nothing to learn."""
    rows = corpus.posts(300, seed=7)
    assert 270 < mean(len(row["completion"]) for row in rows) < 400
    words = {word for row in rows for text in row.values() for word in corpus.words(text)}
    assert words <= corpus.vocabulary() and len(words) > 200


def test_pre_training_and_the_splits_are_different_draws():
    """A test post was seen neither in pre-training nor in training."""
    rows = quickstart.make_rows(0)
    assert {split: len(posts) for split, posts in rows.items()} == {"train": 640, "test": 64}
    seen = {row["prompt"] for row in [*corpus.posts(quickstart.PRETRAINING_POSTS, 0), *rows["train"]]}
    assert not seen & {row["prompt"] for row in rows["test"]}
    articles = {split: {row["article"] for row in part} for split, part in encoder.make_rows(0).items()}
    assert {split: len(part) for split, part in articles.items()} == {"train": 512, "validation": 128, "test": 128}
    assert not articles["test"] & (articles["train"] | articles["validation"])


@pytest.mark.parametrize("kind", range(3), ids=["right call", "wrong call", "guess"])
def test_dialogues_with_tools_are_right_wrong_or_guesses(kind):
    """A right call repeats the question, and the answer repeats its result."""
    shares = [int(index == kind) for index in range(3)]
    rng = random.Random(0)
    for row in tools.make_sums(20, seed=1):
        expression = row["question"].removeprefix("What is ").removesuffix("?")
        assert 0 <= int(calculator(expression)) <= 9
        question, *turn, answer = tools._sum_dialogue(row, rng, shares)
        assert question["content"] == row["question"] and answer["content"].startswith("The answer is ")
        if kind == 2:
            assert turn == []
            continue
        call, result = turn
        assert (call["tool_calls"][0]["function"]["arguments"]["expression"] == expression) == (kind == 0)
        assert result["content"].startswith("{'error': ") == (kind == 1)
        assert kind == 1 or answer["content"] == f"The answer is {result['content']}."
    for _ in range(20):
        question, *turn, answer = tools._question_dialogue(rng, shares)
        if kind == 2:
            assert turn == []
            continue
        call, result = turn
        is_question = call["tool_calls"][0]["function"]["arguments"]["query"] == question["content"].removesuffix("?")
        name = question["content"].split()[2]
        assert is_question == (f"] {name} keeps " in result["content"]) == (kind == 0)
        assert answer["content"].removeprefix("<answer>the ").removesuffix("</answer>") in result["content"]


def make_small(folder, seed):
    """Write a tokenizer in place of a model."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    make_tokenizer(template).save_pretrained(folder)
    (folder / "seed").write_text(str(seed))


def test_folders_are_made_once_and_whole(tmp_path, capsys):
    """What is there stays, --overwrite makes it anew, and a failure leaves nothing."""

    def fail(folder, seed):
        (folder / "half").touch()
        raise RuntimeError("the power is gone")

    tasks = {"quickstart": Task("tldr", lambda seed: {"train": corpus.posts(20, seed), "test": corpus.posts(4, 9)})}
    argv = ["--output", str(tmp_path / "data")]
    with pytest.raises(RuntimeError, match="the power is gone"):
        build(argv, "", {"small": fail}, tasks)
    assert not (tmp_path / "data").exists()
    build([*argv, "--seed", "3"], "", {"small": make_small}, tasks)
    made = load_dataset(str(tmp_path / "data/quickstart"))
    assert (len(made["train"]), len(made["test"])) == (20, 4)
    assert made["train"][0]["reference"] == corpus.posts(1, 3)[0]["completion"].strip()
    build(argv, "", {"small": fail}, tasks)
    assert (tmp_path / "data/quickstart-small/seed").read_text() == "3"
    build([*argv, "--overwrite"], "", {"small": make_small}, tasks)
    assert (tmp_path / "data/quickstart-small/seed").read_text() == "0"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["quickstart", "quickstart-small"]
    assert (tmp_path / "data/quickstart").stat().st_mode & 0o777 == (tmp_path / "data").stat().st_mode & 0o777


@pytest.mark.parametrize("name", ["model", "tool-model"])
def test_the_models_of_seed_0_come_with_the_package(name, tmp_path):
    """They end their turns. Another seed is trained."""
    build(["--output", str(tmp_path)], "", {name: make_small}, {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"quickstart-{name}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / f"quickstart-{name}")
    row = corpus.posts(1, 7)[0] if name == "model" else {"prompt": "What is 2 + 3 - 1?"}
    messages = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    completion = model.generate(**prompt, do_sample=False, max_new_tokens=200)[0, prompt["input_ids"].shape[1] :]
    words = tokenizer.decode(completion)
    assert words.endswith("<|im_end|>") and (words.startswith("My ") or '<tool_call>\n{"name": "calc' in words), words
    build(["--output", str(tmp_path), "--seed", "1", "--overwrite"], "", {name: make_small}, {})
    assert (tmp_path / f"quickstart-{name}/seed").read_text() == "1"


def test_the_tasks_of_the_tools_become_datasets(tmp_path):
    """Sums; questions, and the corpus that answers them."""
    build(["--output", str(tmp_path)], "", {"small": make_small}, tools.TASKS)
    sums = load_dataset(str(tmp_path / "quickstart_calculator"))
    assert (len(sums["train"]), len(sums["test"])) == (360, 40) and sums["train"][0]["needs_tool"] is True
    assert len((tmp_path / "quickstart_search_qa/corpus.jsonl").read_text().splitlines()) == 300
    questions = load_dataset(str(tmp_path / "quickstart_search_qa"), data_files={"test": "test.parquet"})["test"]
    assert len(questions) == 30 and all(questions["passage_id"][:])


QUESTION = {"role": "user", "content": "Which letter comes first?"}
ANSWER = {"role": "assistant", "content": "The letter A comes first."}


def test_the_loss_is_on_what_the_assistant_writes():
    """It has weight 1, the prompt its own, padding none."""
    tokenizer = pretrain.make_tokenizer(["a b c"], pretrain.qwen2_5_chat_template)
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1 + 2"}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    dialogues = [
        pretrain.Dialogue([QUESTION, ANSWER]),
        pretrain.Dialogue([QUESTION, *turns, ANSWER], prompt_weight=0.0, tools=(calculator,)),
    ]
    ids, weights = pretrain._encode(tokenizer, dialogues)
    assert ids.shape == weights.shape and ids.shape[0] == 2
    learned = [tokenizer.decode(row[weight == 1]) for row, weight in zip(ids, weights, strict=True)]
    assert learned[0] == "The letter A comes first.<|im_end|>"
    called = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1 + 2"}}\n</tool_call><|im_end|>'
    assert learned[1] == f"{called}The letter A comes first.<|im_end|>"
    assert set(weights[0].tolist()) == {0.0, 0.5, 1.0} and set(weights[1].tolist()) == {0.0, 1.0}
    assert (weights[ids == tokenizer.pad_token_id] == 0).all() and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_model_learns_its_dialogues(tmp_path, monkeypatch):
    """The same one with the same seed. It ends its turn."""
    monkeypatch.setattr(pretrain, "DRILL_STEPS", 1)
    dialogues = [pretrain.Dialogue([QUESTION, ANSWER])] * 8
    for name, steps in {"one": 2, "two": 2, "longer": 12}.items():
        pretrain.pretrain(dialogues, tmp_path / name, 0, steps, drill=dialogues)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "longer")]
    assert weights[0] == weights[1] != weights[2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "longer")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "longer")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template([QUESTION], **options)
    completion = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(completion) == "The letter A comes first.<|im_end|>"


@pytest.mark.parametrize("kind", encoder.MODELS)
def test_a_model_with_an_encoder_is_pre_trained(kind, tmp_path, monkeypatch):
    """First to copy tokens, then to repeat sentences. It has no dropout, and its tokenizer ends a text."""
    monkeypatch.setattr(encoder, "COPYING_STEPS", 2)
    monkeypatch.setattr(encoder, "REPEATING_STEPS", 2)
    monkeypatch.setattr(encoder, "PRETRAINING_ARTICLES", 40)
    encoder.MODELS[kind](tmp_path, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id and tokenizer.chat_template is None
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}
    assert model.config.decoder_start_token_id is not None and model.config.pad_token_id == tokenizer.pad_token_id


def test_the_training_loop_minimises():
    """With a warm-up, and to the end of its steps."""
    set_seed(0)
    model = torch.nn.Linear(4, 1)
    features = torch.randn(16, 4)
    losses = []

    def compute_loss(step):
        assert step == len(losses)
        loss = (model(features) - features.sum(1, keepdim=True)).pow(2).mean()
        losses.append(loss.item())
        return loss

    pretrain.train(model, compute_loss, steps=200, learning_rate=0.1)
    assert len(losses) == 200 and losses[-1] < 0.01 * losses[0]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that summaries.main() runs. None is really run; those in `failing` fail."""
    monkeypatch.chdir(tmp_path)
    ran = []
    failing = []

    def run(words):
        ran.append(words)
        return SimpleNamespace(returncode=7 if any(part in " ".join(words) for part in failing) else 0)

    monkeypatch.setattr(summaries.subprocess, "run", run)
    return SimpleNamespace(ran=ran, failing=failing)


def test_the_summarisers_are_trained_one_after_the_other(commands):
    """The models are made, then SFT, GRPO from there, GRPO from the base model; then all four are compared."""
    assert summaries.main(["--model", "bart", "--seed", "4", "--beta", "0.1"]) == 0
    make, supervised, lora, whole, compare = map(" ".join, commands.ran)
    home = "trainOutput/summaries/bart-4"
    assert "grpo_launcher.quickstart.encoder" in make and "--model bart --seed 4" in make
    assert "quickstart_summaries_sft.yaml" in supervised and f"_path {home}/data/quickstart-bart " in supervised
    assert "quickstart_summaries_lora.yaml" in lora and f"_path {home}/supervised/final-checkpoint " in lora
    assert "quickstart_summaries.yaml" in whole and f"_path {home}/data/quickstart-bart " in whole
    assert all("--seed 4 --beta 0.1" in command for command in (supervised, lora, whole))
    assert compare.index("supervised/") < compare.index("grpo-lora/") < compare.index("grpo/")


def test_the_same_command_goes_on_where_it_was_stopped(commands, tmp_path):
    """A finished run is passed over, an unfinished one resumed, and one without a checkpoint begun anew."""
    home = tmp_path / "out"
    (home / "supervised/final-checkpoint").mkdir(parents=True)
    (home / "supervised/final-checkpoint/README.md").touch()
    whole = ["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"]
    write_checkpoint(home / "grpo-lora/checkpoint-12", *whole)
    (home / "grpo/checkpoint-12").mkdir(parents=True)
    commands.failing.append("quickstart_summaries.yaml")
    assert summaries.main(["--output", str(home)]) == 7, "the exit status of the command that failed"
    _, lora, whole = map(" ".join, commands.ran)
    assert "quickstart_summaries_lora.yaml" in lora and lora.endswith("--resume")
    assert "--resume" not in whole and not (home / "grpo").exists()


# SmolLM2


def test_a_request_is_asked_once_and_kept_to():
    """No request of the test split is trained on."""
    rows = everyday.make_rows(0)
    requests = [row["prompt"] for split in ("train", "test") for row in rows[split]]
    assert len(set(requests)) == len(requests) == 240 and len(rows["test"]) == 32
    row = everyday.to_row(rows["train"][0])
    assert row["prompt"] == [{"role": "user", "content": requests[0]}] and row["reference"] == requests[0]


def test_the_model_comes_from_the_hub_where_it_answers(tmp_path, monkeypatch):
    def download(name, *, local_dir, **options):
        (local_dir / "config.json").write_text(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(smollm2, "_install", lambda *args: pytest.fail("the package is fetched too"))
    smollm2.make_model(tmp_path, 0)
    assert (tmp_path / "config.json").read_text() == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_where_nothing_answers_the_cause_is_told(tmp_path, monkeypatch):
    """Neither the Hub, which is off in all tests, nor an index of packages."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"LocalEntryNotFoundError.*gguf"):
        smollm2.make_model(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
