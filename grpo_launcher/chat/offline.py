"""Replies by vLLM: one model and the adapters on it, in a process of its own, so that the next one finds the memory free."""

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from grpo_launcher.chat.checkpoints import ADAPTER, Checkpoint, Manner
from grpo_launcher.launch import hardware, processes

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told; an adapter of rank 12 takes 16


def replies(asked: dict[Checkpoint, list[tuple[list[int], int | None]]], ends: set[int], manner: Manner) -> Iterator[tuple[Checkpoint, list | str]]:
    """The replies of some checkpoints on one model, one checkpoint after another: [tokens, whether cut off] for each prompt, or why there are none.

    asked: prompts as (tokens, seed), the seed being None where nothing is drawn by lot. ends: the tokens that end a reply.
    """
    first = next(iter(asked))
    adapters = [checkpoint.path for checkpoint in asked if checkpoint.base]
    rank = max((json.loads((Path(path) / ADAPTER).read_text(encoding="utf-8"))["r"] for path in adapters), default=0)
    longest = max(len(ids) for prompts in asked.values() for ids, _ in prompts)
    drawing = {"temperature": manner.temperature, "top_p": manner.top_p, "top_k": manner.top_k, "min_p": manner.min_p or 0.0}
    question = {
        "model": {
            "model": first.base or first.path,
            "max_model_len": longest + manner.max_new_tokens,
            "enable_lora": bool(adapters),
            **({"max_lora_rank": next((size for size in RANKS if size >= rank), rank)} if adapters else {}),
        },
        "drawing": drawing | {"repetition_penalty": manner.repetition_penalty, "max_tokens": manner.max_new_tokens, "stop_token_ids": sorted(ends)},
        "asked": [{"name": each.name, "adapter": each.path if each.base else None, "prompts": prompts} for each, prompts in asked.items()],
    }
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parent.parent.parent), os.environ.get("PYTHONPATH", "")])
    if not hardware.find_gpus():
        question["model"] |= {"dtype": "float32", "enforce_eager": True}
        env["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        env["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, hardware.find_cpus()[0])))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "question.json").write_text(json.dumps(question), encoding="utf-8")
        log = Path(folder) / "log.txt"
        with open(log, "wb") as stderr:  # what the user should see, the bar, goes to the child's stdout
            child = processes.start([sys.executable, "-P", "-m", "grpo_launcher.chat.offline", folder], env, stdout=2, stderr=stderr)
        try:
            for at, checkpoint in enumerate(asked):
                answer = Path(folder) / f"{at}.json"
                while not answer.exists() and child.poll() is None:
                    time.sleep(0.1)
                if answer.exists():
                    yield checkpoint, json.loads(answer.read_text(encoding="utf-8"))
                else:
                    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                    yield checkpoint, f"vLLM's process ended with status {child.returncode} before it replied. {''.join(last)}"
        finally:
            processes.stop(child)


def answer(folder: Path) -> None:
    """The child: reads question.json and writes an answer for each checkpoint."""
    question = json.loads((folder / "question.json").read_text(encoding="utf-8"))
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    try:
        model = LLM(**question["model"], generation_config="vllm", seed=0)
    except Exception as error:  # what vLLM cannot serve it says in many ways
        for at in range(len(question["asked"])):
            _write(folder, at, f"vLLM cannot load {question['model']['model']}: {_reason(error)}")
        return
    for at, asked in enumerate(question["asked"]):
        adapter = LoRARequest(f"adapter-{at}", at + 1, asked["adapter"]) if asked["adapter"] else None
        try:
            prompts = [{"prompt_token_ids": ids} for ids, _ in asked["prompts"]]
            sampling = [SamplingParams(**question["drawing"], seed=seed, detokenize=False) for _, seed in asked["prompts"]]
            made = model.generate(prompts, sampling, use_tqdm=functools.partial(_bar, asked["name"]), lora_request=adapter)
            _write(folder, at, [[list(one.outputs[0].token_ids), one.outputs[0].finish_reason == "length"] for one in made])
        except Exception as error:
            _write(folder, at, f"vLLM cannot reply with {asked['name']}: {_reason(error)}")


def _write(folder: Path, at: int, told: list | str) -> None:
    """The answer for one checkpoint, in one move."""
    draft = folder / "draft.json"
    draft.write_text(json.dumps(told), encoding="utf-8")
    draft.rename(folder / f"{at}.json")


def _bar(name: str, *items, **options) -> tqdm:
    """One bar a checkpoint, on the stream that the user sees; vLLM would show a second one for its tokens."""
    return tqdm(*items, **options | {"desc": name, "unit": "reply", "file": sys.stdout, "disable": options["desc"] == "Rendering prompts"})


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:300]}"


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
