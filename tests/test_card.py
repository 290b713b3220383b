"""The card of a final checkpoint: what it says, what it keeps to itself, that its commands work, and that it is what is pushed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hub_server import Hub
from huggingface_hub import ModelCard

from grpo_launcher.card import write_card

RECIPE = {
    "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dataset_name": "trl-lib/tldr",
    "reward_funcs": ["rewards.length.length_reward", "rewards.judge.judge_reward"],
    "reward_kwargs": {"judge_reward": {"template": "/home/jane/judge.txt", "model": "Qwen/Qwen2.5-7B-Instruct"}},
    "reward_weights": [1.0, 0.5],
    "learning_rate": 1e-6,
    "hub_token": "hf_secret",
    "output_dir": "/home/jane/trainOutput/short/3",
}
PROVENANCE = {"provenance": {"versions": {"trl": "1.16.0", "commit": "abc"}, "system_prompt": "Be short."}}


def user(text: str) -> list[dict]:
    """A prompt as chat messages."""
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}]


def rows(step: int, *asked: tuple) -> list[dict]:
    """What TRL keeps of a step: (prompt, reply, advantage) each."""
    return [
        {"step": step, "prompt": prompt, "completion": reply if isinstance(prompt, str) else [{"role": "assistant", "content": reply}], "advantage": advantage}
        for prompt, reply, advantage in asked
    ]


@pytest.fixture
def card(tmp_path):
    """card(recipe changes, first rows, last rows) → the card's text, of a run with these."""

    def write(changes: dict, *steps: list[dict], hub_id: str | None = None) -> str:
        import pyarrow.parquet

        run = tmp_path / "short/3"
        (run / "final-checkpoint").mkdir(parents=True)
        (run / "completions").mkdir()
        given = yaml.safe_dump(RECIPE | changes)
        rest = yaml.safe_dump({"max_completion_length": 64, "lora_dropout": 0.0} | PROVENANCE)
        (run / "recipe.yaml").write_text(f"# Given\n{given}\n# By default\n{rest}")
        (run / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "reward": float(n), "kl": 0.125}) + "\n" for n in range(1, 11)))
        for number, step in enumerate(steps):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(step), run / f"completions/completions_{number:05}.parquet")
        write_card(run / "final-checkpoint", hub_id)
        return (run / "final-checkpoint/README.md").read_text()

    return write


def test_the_card_tells_what_was_done(card, tmp_path):
    """Header for the Hub, first and last figures, rewards with weights and options, recipe, versions, curve."""
    text = card({})
    header = ModelCard(text).data.to_dict()
    assert header["base_model"] == "Qwen/Qwen2.5-1.5B-Instruct" and header["base_model_relation"] == "finetune"
    assert header["datasets"] == ["trl-lib/tldr"] and header["library_name"] == "transformers" and "grpo" in header["tags"]
    assert "# short/3\n" in text and "| reward | 2 | 8 |" in text and "| kl | 0.125 | 0.125 |" in text
    assert "| `rewards.length.length_reward` | 1.0 |  |" in text
    assert "| `rewards.judge.judge_reward` | 0.5 | model: Qwen/Qwen2.5-7B-Instruct, template: judge.txt |" in text
    assert yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.S)[1]) == {"learning_rate": 1e-6}
    assert "Made with commit abc, trl 1.16.0." in text and "merge_and_unload" not in text
    assert (tmp_path / "short/3/final-checkpoint/curves.png").read_bytes() == (tmp_path / "short/3/curves.png").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"model_name_or_path": "/home/jane/models/base", "dataset_name": "/home/jane/rows.jsonl"}], ids=["Hub", "folders"])
def test_nothing_of_this_machine_is_told(card, changes):
    """No folder and no token; what is no Hub id is not in the header."""
    text = card({"deepspeed": "/home/jane/zero.json", "vllm_server_port": 1234} | changes)
    assert not re.search("jane|hf_secret|1234", text)
    if changes:
        assert not {"base_model", "datasets", "base_model_relation"} & set(ModelCard(text).data.to_dict())
        assert "`base`, trained with" in text and "the prompts of `rows.jsonl`" in text


def test_samples_are_typical_replies_to_prompts_that_are_alike(card):
    """Of the first and of the last step, the middle one of the group by advantage."""
    bike, soup = user("My brother sold my bike."), user("How is soup made?")
    first = rows(1, (soup, "worst", -1.0), (soup, "typical soup", 0.0), (soup, "best", 1.0), (bike, "x", 0.0))
    last = rows(10, (user("How is good soup made?"), "typical last", 0.1), (user("A cat."), "y", 0.0))
    text = card({}, first, last)
    assert text.index("Step 1,") < text.index("typical soup") < text.index("Step 10,") < text.index("typical last")
    assert not re.search("worst|best|bike|cat", text.split("## Use")[0].split("## Samples")[1])
    assert "12 characters were replied" in text


def test_replies_cannot_leave_their_frame(card):
    """Whatever Markdown stands in them."""
    text = card({}, rows(1, ("Say:", "```\n# A heading\n````", 0.0)), rows(2, ("Say:", "fine", 0.0)))
    assert "`````text\n```\n# A heading\n````\n`````\n" in text
    assert 'prompt = "…"' in text  # plain-text prompts are no chat messages


@pytest.fixture(scope="module")
def pushed(taught):
    """A short LoRA run by train.py alone, pushed to the Hub: folder, what the Hub was sent."""
    hub, folder = Hub(), taught(0)
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_none"}
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs/quickstart.yaml"), "--output_dir", "pushed"]
    command += ["--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2"]
    command += ["--use_peft", "true", "--lora_target_modules", "all-linear", "--push_to_hub", "true", "--hub_model_id", "somebody/short"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    hub.close()
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, hub.commits


@pytest.mark.slow
def test_the_final_checkpoint_alone_is_pushed_with_its_card(pushed):
    """Once, and nothing else of the run: its logs tell of this machine."""
    folder, commits = pushed
    assert len(commits) == 1
    here = {path.name: path.read_bytes() for path in (folder / "pushed/final-checkpoint").iterdir()}
    assert commits[0] == here
    assert {"README.md", "curves.png", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(here)
    card = here["README.md"].decode()
    assert "# somebody/short" in card and "lora_dropout: 0.0" in card and str(folder) not in card
    assert ModelCard(card).data.library_name == "peft" and "lora" in ModelCard(card).data.tags


@pytest.mark.slow
def test_the_card_s_commands_load_and_merge_the_adapter(pushed):
    """As they stand in it, from the folder in which the run was started; the merged model computes what base and adapter do."""
    folder, _ = pushed
    text = (folder / "pushed/final-checkpoint/README.md").read_text().replace("somebody/short", "pushed/final-checkpoint")
    program, merge = (re.search(f"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "bash"))
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True)
    assert said.returncode == 0 and len(said.stdout.split()) > 3, said.stderr[-3000:]
    done = subprocess.run(["bash", "-c", merge], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder / "merged")("My brother sold my bike.", return_tensors="pt")["input_ids"]
    base, merged = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("data/quickstart-model", "merged"))
    with torch.inference_mode():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "pushed/final-checkpoint")(ids).logits
        assert (adapted - plain).abs().max() > 1e-2
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_full_run_carries_a_card_that_loads_it(quickstart_run):
    """In place of TRL's, with the run's own curve and samples."""
    run = quickstart_run(0)
    final = run.run_folder() / "final-checkpoint"
    text = (final / "README.md").read_text()
    assert "# quickstart/1" in text and "## Samples" in text and "Step 20, asked:" in text and (final / "curves.png").exists()
    assert not (run.run_folder() / "README.md").exists() and (run.run_folder() / "curves.svg").exists()
    program = re.search("```python\n(.*?)```", text, re.S)[1]
    said = subprocess.run([sys.executable, "-c", program], cwd=run.folder, capture_output=True, text=True)
    assert said.returncode == 0 and len(said.stdout.split()) > 3, said.stderr[-3000:]


def test_a_push_without_a_name_is_refused():
    """Before anything is loaded; it would be called by the run's number."""
    from grpo_launcher.config import RecipeError, RecipeParser

    with pytest.raises(RecipeError, match="push_to_hub: give hub_model_id too"):
        RecipeParser().parse(["--config", str(ROOT / "configs/quickstart.yaml"), "--push_to_hub", "true"])
