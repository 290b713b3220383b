"""Pre-training of the small models: their tokenizer, the training loop, and a Qwen2 of one million parameters."""

import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import qwen2_5_chat_template

STEPS = 500
BATCH = 8  # dialogues
DRILL_STEPS = 160
DRILL_BATCH = 32
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Dialogue:
    """A dialogue to learn: chat messages, the last of them the assistant's."""

    messages: list[dict]
    prompt_weight: float = 0.5  # in the loss, of what the assistant does not write: words are learned there too
    tools: tuple[Callable, ...] = ()  # whose schemas stand in the prompt


def make_tokenizer(texts: list[str], chat_template: str | None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 1,536 ids, with Qwen2.5's special tokens.

    It splits texts as Qwen2.5 does, because transformers and vLLM do so, whatever its file says, when they load it
    beside a Qwen2 model. A turn ends with <|im_end|> and padding is <|endoftext|>: with one id for both, masking the
    padding would mask the end too.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, vocab_size=1536, special_tokens=special_tokens, show_progress=False)
    options = {"padding_side": "left", "model_max_length": 2048, "chat_template": chat_template}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/tokenizer.json"
        bpe.save(path)
        return PreTrainedTokenizerFast(
            tokenizer_file=path, eos_token="<|im_end|>", pad_token="<|endoftext|>", **options
        )


def train(model, compute_loss: Callable[[int], torch.Tensor], steps: int, learning_rate: float) -> None:
    """Minimise compute_loss(step) over `steps` steps, with a warm-up of 20 and a linear decay to 0.

    Steps are counted, not seconds, so that a busy machine makes the same model.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    pause = 0.1 if sys.stderr.isatty() else 15  # seconds between two lines, which a file keeps
    for step in tqdm(range(steps), desc="pre-training the base model", unit="step", mininterval=pause):
        compute_loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def pretrain(
    dialogues: list[Dialogue], output: Path, seed: int, steps: int = STEPS, drill: Sequence[Dialogue] = ()
) -> None:
    """Train a tokenizer with Qwen2.5's chat template and a model on dialogues, and save both into the folder `output`.

    The drill comes first: short dialogues, many in a batch, until the model can copy what they copy.
    """
    set_seed(seed)
    texts = [text for dialogue in dialogues for text in _texts(dialogue)]
    tokenizer = make_tokenizer(texts, qwen2_5_chat_template)
    special_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,  # at the usual 0.02 so narrow a model learns to ignore the prompt
        bos_token_id=None,
        **special_tokens,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(**special_tokens)

    def learn(batches: list[list[Dialogue]], steps: int) -> None:
        def compute_loss(step: int) -> torch.Tensor:
            ids, weights = _encode(tokenizer, batches[step % len(batches)])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()

        train(model, compute_loss, steps, LEARNING_RATE)

    if drill:
        learn(_batches(drill, DRILL_BATCH, seed), DRILL_STEPS)
    learn(_batches(dialogues, BATCH, seed), steps)
    model.bfloat16().float().save_pretrained(output)  # such a file takes half of the space in an archive
    tokenizer.save_pretrained(output)


def _batches(dialogues: Sequence[Dialogue], size: int, seed: int) -> list[list[Dialogue]]:
    """Return all dialogues in batches of similar length, so that there is little padding, in random order."""
    rng = random.Random(seed)
    order = rng.sample(dialogues, len(dialogues))
    order.sort(key=lambda dialogue: (len(dialogue.tools), len(dialogue.messages[-2]["content"]) // 500))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def _texts(dialogue: Dialogue) -> list[str]:
    """Return what the tokenizer learns from a dialogue: its texts; with tools, the template's markup of them too."""
    if dialogue.tools:
        schemas = [get_json_schema(tool) for tool in dialogue.tools]
        return render_jinja_template([dialogue.messages], tools=schemas, chat_template=qwen2_5_chat_template)[0]
    calls = [json.dumps(call) for message in dialogue.messages for call in message.get("tool_calls", [])]
    return [*(message["content"] for message in dialogue.messages), *calls]


def _encode(tokenizer, dialogues: list[Dialogue]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids (B, T) and loss weights (B, T): 1 for what the assistant writes, 0 for padding.

    Every turn is tokenized by itself, as it is when the model writes it.
    """
    all_ids = []
    all_weights = []
    for dialogue in dialogues:
        options = {"tools": dialogue.tools or None, "tokenize": False}
        ids = []
        weights = []
        seen = 0  # characters of the dialogue
        for index in [index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"]:
            before = tokenizer.apply_chat_template(dialogue.messages[:index], add_generation_prompt=True, **options)
            after = tokenizer.apply_chat_template(dialogue.messages[: index + 1], **options).rstrip("\n")
            for text, weight in ((before[seen:], dialogue.prompt_weight), (after[len(before) :], 1.0)):
                new_ids = tokenizer(text)["input_ids"]
                ids += new_ids
                weights += [weight] * len(new_ids)
            seen = len(after)
        all_ids.append(torch.tensor(ids))
        all_weights.append(torch.tensor(weights))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(all_ids, batch_first=True, padding_value=tokenizer.pad_token_id), pad(all_weights, batch_first=True)
