"""Drawing the replies that are not kept yet, with transformers or vLLM, and keeping them."""

import hashlib
import json
from collections import Counter

from tqdm import tqdm

from grpo_launcher.chat import offline
from grpo_launcher.chat.checkpoints import Checkpoint, CheckpointError
from grpo_launcher.chat.comparison import Comparison, dropping, require
from grpo_launcher.chat.kept import Replies, mark
from grpo_launcher.messages import transcript


def draw(comparison: Comparison, store: Replies, with_vllm: bool, batch_size: int) -> dict[Checkpoint, dict[str, list[dict]]]:
    """Every checkpoint's reply to every row, by split, as rows of the store; those that are not in it are drawn and kept there."""
    needed = {checkpoint: _questions(comparison, checkpoint, with_vllm) for checkpoint in comparison.asked}
    missing = {each: list({question["key"]: question for question in needed[each] if question["key"] not in store}.values()) for each in needed}
    there = sum(question["key"] in store for questions in needed.values() for question in questions)
    print(f"{sum(map(len, missing.values()))} replies to draw, {there} are kept in {store.path}", flush=True)
    groups = {}
    for each in comparison.asked:  # vLLM serves a model and the adapters on it together
        groups.setdefault(each.base or each.path if with_vllm else each, []).append(each)
    try:
        for group in groups.values():
            asked = {each: missing[each] for each in group if missing[each]}
            if asked:
                with dropping(comparison, list(asked)):
                    if with_vllm:
                        _draw_with_vllm(comparison, asked, store)
                    else:
                        _draw_with_transformers(comparison, asked, store, batch_size)
                store.save()
    finally:
        store.save()
    require(comparison)
    return {each: {split: [store[one["key"]] for one in needed[each] if one["split"] == split] for split in comparison.rows} for each in comparison.asked}


def _questions(comparison: Comparison, checkpoint: Checkpoint, with_vllm: bool) -> list[dict]:
    """One a row: the columns of the store that are known before the reply is. `key` changes with weights, prompt and decoding."""
    manner, engine = comparison.manner, comparison.engine
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    decoding = {name: getattr(manner, name) for name in names} | {"seed": comparison.seed, "engine": "vllm" if with_vllm else f"transformers, {engine.device}"}
    if manner.tools:
        decoding |= {name: getattr(manner, name) for name in ("tools", "tool_kwargs", "max_tool_calling_iterations")}
    weights = mark(checkpoint, engine)
    questions, before = [], Counter()
    for split, rows in comparison.rows.items():
        for prompt, ids in zip(rows["prompt"], comparison.prompts[checkpoint][split], strict=True):
            nth = before[tuple(ids)] if comparison.seed is not None else 0  # a prompt that comes twice is drawn twice, if by lot
            before[tuple(ids)] += 1
            key = hashlib.sha256(json.dumps([weights, decoding, ids, nth]).encode()).hexdigest()
            seed = None if comparison.seed is None else int(hashlib.sha256(f"{comparison.seed} {ids} {nth}".encode()).hexdigest()[:8], 16)
            known = {"key": key, "checkpoint": checkpoint.name, "path": checkpoint.path, "split": split, "decoding": json.dumps(decoding)}
            questions.append(known | {"prompt": json.dumps(prompt, ensure_ascii=False), "prompt_ids": ids, "seed": seed})
    return questions


def _draw_with_transformers(comparison: Comparison, asked: dict[Checkpoint, list[dict]], store: Replies, batch_size: int) -> None:
    """In batches of like length, the longest first: what does not fit into memory shows at once."""
    for checkpoint, questions in asked.items():
        order = sorted(questions, key=lambda question: -len(question["prompt_ids"]))
        ends = comparison.engine.ends(checkpoint)
        with tqdm(total=len(order), desc=checkpoint.name, unit="reply") as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                asked = (checkpoint, [question["prompt_ids"] for question in batch], comparison.manner, batch[0]["seed"])
                if comparison.manner.tools:
                    from grpo_launcher.chat import turns

                    drawn = turns.replies(comparison.engine, *asked)
                else:
                    drawn = [(None, ids, None) for ids in comparison.engine.replies(*asked)]
                for question, (messages, ids, tokens) in zip(batch, drawn, strict=True):
                    _keep(comparison, checkpoint, question, ids, not ids or ids[-1] not in ends, store, messages, tokens)
                bar.update(len(batch))


def _draw_with_vllm(comparison: Comparison, asked: dict[Checkpoint, list[dict]], store: Replies) -> None:
    pairs = {each: [(question["prompt_ids"], question["seed"]) for question in questions] for each, questions in asked.items()}
    for checkpoint, drawn in offline.replies(pairs, comparison.engine.ends(next(iter(asked))), comparison.manner):
        with dropping(comparison, [checkpoint]):
            if isinstance(drawn, str):
                raise CheckpointError(f"{checkpoint.path}: {drawn}")
            for question, (ids, cut_off) in zip(asked[checkpoint], drawn, strict=True):
                _keep(comparison, checkpoint, question, ids, cut_off, store)


def _keep(
    comparison: Comparison, checkpoint: Checkpoint, question: dict, ids: list[int], cut_off: bool, store: Replies,
    messages: list[dict] | None = None, tokens: int | None = None,
) -> None:  # fmt: skip
    text = transcript(messages) if messages else comparison.engine.tokenizer(checkpoint).decode(ids, skip_special_tokens=True)
    kept = {"messages": messages and json.dumps(messages, ensure_ascii=False), "tokens": tokens}
    store.add(question | kept | {"reply": text, "reply_ids": ids, "cut_off": cut_off})
