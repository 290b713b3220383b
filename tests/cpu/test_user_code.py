"""A user's own files beside the run: the named functions are used, and nothing else is imported."""

import json

from helpers import ROOT, is_in_sync

REPORT = """
import os, sys
with open({log!r}, "a") as file:
    print(os.environ.get("RANK", "no rank"), " ".join(sys.argv), file=file)
raise ImportError("a file of the user's own")
"""
MY_REWARD = """
import datasets
assert hasattr(datasets, "load_dataset"), "Hugging Face's, not the user's"


def questions(completions, mood, *, mark="?", **kwargs):
    assert len(mood) == len(completions)
    return [float(completion[-1]["content"].count(mark)) for completion in completions]
"""
MINE = """
def other(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]
"""


def test_a_folder_full_of_names_of_ours(workplace, launch):
    """LoRA by the recipe, with two rewards by file, in a folder whose other files nobody may import."""
    log = workplace / "imported.txt"
    for name in ("tools.py", "chat.py", "datasets.py", "queue.py", "trl.py", "vllm.py"):
        (workplace / name).write_text(REPORT.format(log=str(log)))
    (workplace / "rewards").mkdir()
    (workplace / "rewards/mine.py").write_text(MINE)
    (workplace / "my_reward.py").write_text(MY_REWARD)
    rows = [{"prompt": [{"role": "user", "content": f"My day number {i}"}], "mood": "glad"} for i in range(16)]
    (workplace / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = launch(
        workplace,
        str(ROOT / "configs/tldr_lora.yaml"),
        *("--model_name_or_path", "data/quickstart-model", "--dtype", "float32", "--dataset_name", "rows.jsonl"),
        *("--reward_funcs", "my_reward.py:questions", "rewards/mine.py:other", "--reward_weights", "1", "0.1"),
        *("--reward_kwargs", '{"questions": {"mark": "."}}', "--max_steps", "3", "--learning_rate", "1e-3"),
        *("--warmup_steps", "0", "--gradient_accumulation_steps", "1", "--max_completion_length", "60"),
    ).finish()
    lines = [line for line in run.metrics() if "reward" in line]
    names = {name for name in lines[0] if name.startswith("rewards/") and name.endswith("/mean")}
    assert names == {"rewards/questions/mean", "rewards/other/mean"}
    assert len(lines) == 3 and is_in_sync(lines)
    assert not log.exists(), log.read_text()
    assert (run.run_folder() / "final-checkpoint/adapter_model.safetensors").exists()
    assert not (run.run_folder() / "final-checkpoint/model.safetensors").exists()
    assert run.leftovers() == []


def test_an_error_in_a_reward_is_shown_with_its_file(workplace, launch, server_url):
    """The traceback of the user's own function, and nothing is left."""
    (workplace / "mine.py").write_text(
        "def broken(completions, **kwargs):\n    raise RuntimeError('the judge is asleep')\n"
    )
    flags = ["--reward_funcs", "mine.py:broken", "--reward_kwargs", "{}", "--max_completion_length", "24"]
    flags += ["--vllm_server_base_url", server_url]
    run = launch(workplace, str(ROOT / "configs/quickstart.yaml"), *flags).finish(1)
    assert "RuntimeError: the judge is asleep" in run.text() and "mine.py" in run.text()
    assert run.leftovers() == []
