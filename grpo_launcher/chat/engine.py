"""Replies of checkpoints, on a GPU or a CPU. Adapters on one base share it in memory; whole models are kept loaded while they fit."""

import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from grpo_launcher.chat.checkpoints import Checkpoint, CheckpointError, Manner
from grpo_launcher import seq2seq as encoder_decoder, hub


class Engine:
    """The models behind some checkpoints, loaded when first asked."""

    def __init__(self, checkpoints: list[Checkpoint], device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.models = {}  # folder or Hub id of a whole model → model, with the adapters that were asked for
        self.tokenizers, self.configs, self.stops, self.templates, self.tools = {}, {}, {}, {}, []
        self.wholes = {checkpoint.base or checkpoint.path for checkpoint in checkpoints}

    def prompt_ids(self, checkpoint: Checkpoint, prompt: str | list[dict], manner: Manner, room: bool = True) -> list[int]:
        """The tokens of a prompt (text, or chat messages in the checkpoint's own template), ready for the reply.

        Raises CheckpointError where they and the reply do not fit the model's context, which room=False leaves unchecked, and for messages that it cannot read.
        """
        tokenizer = self.tokenizer(checkpoint)
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif self.has_encoder(checkpoint):
            raise CheckpointError(f"{checkpoint.name}: the prompts are chat messages, and {encoder_decoder.PLAIN}")
        elif tokenizer.chat_template is None:
            raise CheckpointError(f"{checkpoint.name}: its tokenizer has no chat template, so it can continue a text and cannot chat.")
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **self.template(checkpoint, manner))["input_ids"]
        if room and not self.fits(checkpoint, len(ids), manner):
            raise CheckpointError(
                f"{checkpoint.name}: the prompt's {len(ids)} tokens and {manner.max_new_tokens} for the reply do not fit its context of "
                f"{self.context(checkpoint)}{' each' * self.has_encoder(checkpoint)}; shorten the prompt (in a chat /reset does), "
                "or allow fewer tokens for the reply."
            )
        return ids

    def template(self, checkpoint: Checkpoint, manner: Manner) -> dict:
        """What the chat template is given beside the messages: the run's own options, and its tools, which are bound once and serve all checkpoints.

        Raises CheckpointError where a tool cannot be bound, or the template cannot hold calls.
        """
        if manner.tools and checkpoint.path not in self.templates:
            from trl.chat_template_utils import add_response_schema

            from grpo_launcher.bind_tools import load_tools, template_options
            from grpo_launcher.config import Recipe, RecipeError

            tokenizer = self.tokenizer(checkpoint)
            try:
                self.tools = self.tools or load_tools(Recipe(tools=manner.tools, tool_kwargs=manner.tool_kwargs), tokenizer)
                self.templates[checkpoint.path] = template_options(self.tools, tokenizer)
            except RecipeError as error:
                raise CheckpointError(f"{checkpoint.name}: {error}") from error
            if getattr(tokenizer, "response_template", None) is None:
                add_response_schema(tokenizer)
        return manner.template_options | self.templates.get(checkpoint.path, {})

    def stream(
        self, checkpoint: Checkpoint, ids: list[int], manner: Manner, stop: threading.Event | None = None, seed: int | None = None
    ) -> Generator[str, None, list[int]]:
        """The reply to a prompt (tokens), piece by piece as it is drawn, behind an empty piece when the model is loaded; returns its tokens, as `replies` does.

        Setting `stop` ends it after the next token.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        self.model(checkpoint)  # else its loading would count among the reply's seconds
        yield ""
        left = threading.Event()  # nobody reads on

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                end = left.is_set() or (stop is not None and stop.is_set())
                return torch.full((input_ids.shape[0],), end, dtype=torch.bool, device=input_ids.device)

        streamer = TextIteratorStreamer(self.tokenizer(checkpoint), skip_prompt=True, skip_special_tokens=True)
        drawn, failed = [], []

        def draw():
            try:
                drawn.extend(self._generate(checkpoint, [ids], manner, seed, streamer=streamer, stopping_criteria=StoppingCriteriaList([Stopped()])))
            except Exception as error:
                failed.append(error)
                streamer.end()

        worker = threading.Thread(target=draw, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            left.set()
            worker.join()
        if failed:
            raise failed[0]
        return drawn[0]

    def replies(self, checkpoint: Checkpoint, prompts: list[list[int]], manner: Manner, seed: int | None = None) -> list[list[int]]:
        """The reply's tokens to each of a batch of prompts (tokens), up to and with the end-of-turn token; without it where cut off."""
        return self._generate(checkpoint, prompts, manner, seed)

    def tokenizer(self, checkpoint: Checkpoint):
        """A checkpoint's own tokenizer; an adapter's base's where none was saved beside it."""
        from transformers import AutoTokenizer

        if checkpoint.path not in self.tokenizers:
            own = not checkpoint.base or (Path(checkpoint.path) / "tokenizer_config.json").exists()
            self.tokenizers[checkpoint.path] = _load(AutoTokenizer, checkpoint.path if own else checkpoint.base, checkpoint)
        return self.tokenizers[checkpoint.path]

    def context(self, checkpoint: Checkpoint) -> int | None:
        """The most tokens of prompt and reply, of each of the two for a model with an encoder, from the config alone; None where it does not say."""
        if self.has_encoder(checkpoint):
            return encoder_decoder.places(self.config(checkpoint))
        return getattr(self.config(checkpoint).get_text_config(), "max_position_embeddings", None)

    def fits(self, checkpoint: Checkpoint, tokens: int, manner: Manner) -> bool:
        """Whether there is room for a prompt of so many tokens and a whole reply."""
        most, reply = self.context(checkpoint), manner.max_new_tokens
        return not most or (max(tokens, reply) if self.has_encoder(checkpoint) else tokens + reply) <= most

    def has_encoder(self, checkpoint: Checkpoint) -> bool:
        """Whether it reads plain text, the prompt apart from the reply; no weight is read for it."""
        return encoder_decoder.is_encoder_decoder(self.config(checkpoint))

    def ends(self, checkpoint: Checkpoint) -> set[int]:
        """The tokens that end a turn: the tokenizer's own, as in training, and those of the model's generation config. No weight is read for it.

        A reply whose last token is none of them was cut off or stopped.
        """
        from transformers import GenerationConfig

        if checkpoint.path in self.stops:  # asked for with every batch
            return self.stops[checkpoint.path]
        try:
            listed = GenerationConfig.from_pretrained(checkpoint.base or checkpoint.path).eos_token_id
        except OSError:  # a model need not have one
            listed = self.config(checkpoint).eos_token_id
        self.stops[checkpoint.path] = {*([listed] if isinstance(listed, int) else listed or []), self.tokenizer(checkpoint).eos_token_id} - {None}
        return self.stops[checkpoint.path]

    def config(self, checkpoint: Checkpoint):
        """The config of the model that a checkpoint is or stands on; no weight is read for it."""
        from transformers import AutoConfig

        name = checkpoint.base or checkpoint.path
        if name not in self.configs:
            self.configs[name] = _load(AutoConfig, name, checkpoint)
        return self.configs[name]

    def model(self, checkpoint: Checkpoint):
        """The loaded model that a checkpoint is or stands on; its adapter is attached, not switched on."""
        from peft import PeftModel

        name = checkpoint.base or checkpoint.path
        if name not in self.models:
            self._make_room(name)
            dtype = "auto" if self.device == "cuda" else torch.float32
            self.models[name] = _load(encoder_decoder.model_class(self.config(checkpoint)), name, checkpoint, dtype=dtype).to(self.device).eval()
        model = self.models[name]
        if checkpoint.base and _adapter(checkpoint) not in getattr(model, "peft_config", {}):
            try:
                if isinstance(model, PeftModel):
                    model.load_adapter(checkpoint.path, adapter_name=_adapter(checkpoint))
                else:
                    model = self.models[name] = PeftModel.from_pretrained(model, checkpoint.path, adapter_name=_adapter(checkpoint)).eval()
            except (RuntimeError, ValueError, OSError) as error:
                del self.models[name]  # its layers are wrapped already, and may hold a part of the adapter
                raise CheckpointError(f"{checkpoint.path}: this adapter does not fit its base {name}: {str(error).splitlines()[0]}") from error
        return model

    def _make_room(self, name: str) -> None:
        """Where not all models of this engine fit beside each other, only the one in use stays loaded."""
        sizes = {whole: _bytes(whole) for whole in self.wholes}
        unloaded = sum(size for whole, size in sizes.items() if whole not in self.models)
        if unloaded * (1 if self.device == "cuda" else 2) * 1.2 > _free(self.device):  # a CPU computes in float32
            self.models.clear()

    def _generate(self, checkpoint: Checkpoint, prompts: list[list[int]], manner: Manner, seed: int | None, **options) -> list[list[int]]:
        model, tokenizer = self.model(checkpoint), self.tokenizer(checkpoint)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        reads = self.has_encoder(checkpoint)
        if reads:
            ids, mask = (tensor.to(self.device) for tensor in encoder_decoder.encoder_inputs(prompts, pad).values())
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            base.generation_config = encoder_decoder.plain_generation(base)
        greedy = manner.temperature == 0
        drawing = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if greedy else {
            "do_sample": True, "temperature": manner.temperature, "top_p": manner.top_p, "top_k": manner.top_k or 0, "min_p": manner.min_p,
        }  # fmt: skip
        ends = self.ends(checkpoint)
        if seed is not None:
            torch.manual_seed(seed)
        with torch.inference_mode(), self._switched_to(model, checkpoint):
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=manner.max_new_tokens, pad_token_id=pad,
                eos_token_id=sorted(ends) or None, repetition_penalty=manner.repetition_penalty, **drawing, **options,
            )  # fmt: skip
        return [_until(row[1 if reads else longest :].tolist(), ends) for row in out]

    @contextmanager
    def _switched_to(self, model, checkpoint: Checkpoint):
        if checkpoint.base:
            model.set_adapter(_adapter(checkpoint))
        with model.disable_adapter() if hasattr(model, "disable_adapter") and not checkpoint.base else nullcontext():
            yield


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)


def _adapter(checkpoint: Checkpoint) -> str:
    return checkpoint.path.replace(".", "_")  # a module's name may hold no dot


def _load(kind, name: str, checkpoint: Checkpoint, **options):
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        if checkpoint.base == name:
            raise CheckpointError(
                f"{checkpoint.path}: this adapter stands on {name}, which cannot be read: {reason} Give its base: --base FOLDER_OR_HUB_ID. {hub.hint()}"
            ) from error
        raise CheckpointError(f"{name} is no folder with a model, and no Hub id that can be read: {reason} {hub.hint()}") from error


def _bytes(name: str) -> int:
    return sum(path.stat().st_size for path in Path(name).glob("*.safetensors")) if Path(name).is_dir() else 0


def _free(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available
