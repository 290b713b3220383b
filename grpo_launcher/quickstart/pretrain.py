"""The quickstart's base model: a one-million-parameter Qwen2 that learns to summarise the corpus in a minute or two on two cores."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import render_jinja_template

STEPS, BATCH, LEARNING_RATE = 500, 8, 4e-3
DRILL_STEPS, DRILL_BATCH = 160, 32
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class Dialogue(NamedTuple):
    """What the model is taught to say: chat messages, the last of them the assistant's."""

    messages: list[dict]
    weight: float = 0.5  # of a token that the assistant does not say in the loss, where one that it says has 1: it teaches words too
    tools: tuple[Callable, ...] = ()  # that stand in the prompt


def make_base(dialogues: list[Dialogue], output: Path, seed: int, steps: int = STEPS, drill: Sequence[Dialogue] = ()) -> None:
    """Teach a base model with Qwen2.5's chat template; the folder `output` appears when it is whole.

    drill: short dialogues that are taught first, many at once, until the model can copy what they copy.
    """
    import trl

    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        pretrain(dialogues, template.read_text(encoding="utf-8"), draft, seed, steps, drill)
        draft.chmod(0o755)
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"Wrote {output}")


def make_tokenizer(texts: list[str], chat_template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1,536 ids over `texts`, with Qwen2.5's special tokens and the given chat template.

    Texts are split as Qwen2.5 does, whatever the file says, when transformers or vLLM load the tokenizer beside a Qwen2 model.
    The end of a turn is <|im_end|> and padding is <|endoftext|>: were they one id, masking the padding would mask the end too.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe.train_from_iterator(texts, vocab_size=1536, special_tokens=SPECIALS, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(os.path.join(folder, "tokenizer.json"))
        return PreTrainedTokenizerFast(
            tokenizer_file=os.path.join(folder, "tokenizer.json"),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="left",
            model_max_length=2048,
            chat_template=chat_template,
        )


def pretrain(dialogues: list[Dialogue], chat_template: str, output: Path, seed: int, steps: int = STEPS, drill: Sequence[Dialogue] = ()) -> None:
    """Train tokenizer and model on whole dialogues and save both into the folder `output`.

    A count of steps and not of seconds ends it, so that a busy machine makes the same model, only later.
    """
    set_seed(seed)
    tokenizer = make_tokenizer([text for dialogue in dialogues for text in _texts(dialogue, chat_template)], chat_template)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.08,  # at the usual 0.02 attention stays flat so long in a model this narrow that it learns to ignore the prompt
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)

    if drill:
        _learn(model, tokenizer, _batches(drill, DRILL_BATCH, random.Random(seed)), DRILL_STEPS, "drilling it to copy")
    _learn(model, tokenizer, _batches(dialogues, BATCH, random.Random(seed)), steps, "teaching the base model")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _learn(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, batches: list[list[Dialogue]], steps: int, what: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for step in tqdm(range(steps), desc=what, unit="step"):
        ids, weights = _encode(tokenizer, batches[step % len(batches)])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _batches(dialogues: Sequence[Dialogue], size: int, rng: random.Random) -> list[list]:
    """All dialogues in batches of like length, so that little of one is padding, in an order of their own."""
    order = rng.sample(dialogues, len(dialogues))
    order.sort(key=lambda dialogue: (len(dialogue.tools), len(dialogue.messages[-2]["content"]) // 500))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def _texts(dialogue: Dialogue, chat_template: str) -> list[str]:
    """All that the tokenizer should know of a dialogue; where tools are in it, the template's markup of them too."""
    if dialogue.tools:
        return render_jinja_template([dialogue.messages], tools=[get_json_schema(tool) for tool in dialogue.tools], chat_template=chat_template)[0]
    calls = [json.dumps(call) for message in dialogue.messages for call in message.get("tool_calls", [])]
    return [*(message["content"] for message in dialogue.messages), *calls]


def _encode(tokenizer, dialogues) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and loss weights (B, T): 1 on what the assistant says and its end, the dialogue's own on the rest, 0 on padding.

    Every turn is encoded by itself, as it is when the model writes it.
    """
    rows = []
    for messages, weight, tools in dialogues:
        ids, weights, written = [], [], 0
        for at in [at for at, message in enumerate(messages) if message["role"] == "assistant"]:
            before = tokenizer.apply_chat_template(messages[:at], tools=tools or None, tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: at + 1], tools=tools or None, tokenize=False).rstrip("\n")
            asked, said = (tokenizer(text)["input_ids"] for text in (before[written:], after[len(before) :]))
            ids, weights, written = ids + asked + said, weights + [weight] * len(asked) + [1.0] * len(said), len(after)
        rows.append((ids, weights))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])
    return ids, weights
