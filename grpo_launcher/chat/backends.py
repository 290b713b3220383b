"""The two ways to a completion: transformers in this process, and an OpenAI-compatible server.

A model of either kind has a `name`, a `source`, and a method `complete` that yields the completions of some prompts.
"""

import asyncio
import functools
import gc
import inspect
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psutil
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, TextStreamer

from grpo_launcher import hub, plugins, runs, seq2seq
from grpo_launcher.chat.models import Checkpoint, GenerationSettings, choose_checkpoints, run_settings
from grpo_launcher.errors import UserError, first_line
from grpo_launcher.messages import transcript

Prompt = str | list[dict]
STOP_PATIENCE_S = 3  # how long a stopped completion may go on before it is left alone


@dataclass
class Completion:
    """What a model wrote to a prompt, as far as it has come.

    Attributes:
        text: what the model wrote. With tools the transcript of `messages`.
        messages: with tools: what the model wrote and called, and the results. None without.
        token_ids: all tokens after the prompt. None where a server keeps them to itself.
        tokens: how many of them the model wrote. Results of tools do not count.
        truncated: all tokens were used up.
        stopped: the user stopped it.
        seconds: without loading the model.
        error: why there is no completion, or only a part of one.
    """

    text: str = ""
    messages: list[dict] | None = None
    token_ids: list[int] | None = None
    tokens: int | None = None
    truncated: bool = False
    stopped: bool = False
    seconds: float | None = None
    error: str | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)

    def as_messages(self) -> list[dict]:
        """Return it as chat messages."""
        return self.messages or [{"role": "assistant", "content": self.text}]


def describe_error(error: Exception, place: str) -> str:
    """Say in one line what went wrong, and where."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    return f"{place}: {type(error).__name__}: {first_line(error)}"


def chat_prompt(is_seq2seq: bool, system_prompt: str | None, history: list[dict], text: str) -> Prompt:
    """Return the prompt of a chat's next turn. A seq2seq model gets the text alone, behind the run's prefix."""
    if is_seq2seq:
        return (system_prompt or "") + text
    return [*system_message(system_prompt), *history, {"role": "user", "content": text}]


def system_message(system_prompt: str | None) -> list[dict]:
    """Return the message with which a prompt begins, or none."""
    return [{"role": "system", "content": system_prompt}] if system_prompt else []


@dataclass
class Turn:
    """A prompt and what each model wrote to it, by name. `columns` are the further columns of the prompt's row."""

    prompt: Prompt
    completions: dict[str, Completion]
    columns: dict = field(default_factory=dict)


def converse(
    model, turns: list[Turn], settings: GenerationSettings, rewards, stop: threading.Event
) -> Iterator[Completion]:
    """Let a model go on from its own completions: complete the last turn, and rate that.

    Yields the completion ten times a second while it grows, and at last when it is whole or has an `error`. It is
    generated in a thread, so that `stop` ends the wait for a tool or a silent server too.
    """
    *earlier, last = turns
    history = []
    for turn in earlier:
        completion = turn.completions[model.name]
        if completion.text and not completion.error:
            history += [{"role": "user", "content": turn.prompt}, *completion.as_messages()]
    prompt = chat_prompt(model.is_seq2seq, settings.system_prompt, history, last.prompt)
    completion = last.completions[model.name] = Completion()
    arguments = (model, prompt, settings, rewards, stop, completion)
    work = threading.Thread(target=_complete, args=arguments, daemon=True)
    work.start()
    stopped_at = None
    while work.is_alive():
        work.join(0.1)
        yield completion
        if stop.is_set():
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at > STOP_PATIENCE_S:
                problem = f"{model.name}: stopped while a tool or the model was at work, which goes on unseen."
                completion = last.completions[model.name] = replace(completion, stopped=True, error=problem)
                break
    yield completion


def _complete(model, prompt: Prompt, settings: GenerationSettings, rewards, stop, completion: Completion) -> None:
    """Fill a completion in while it is generated."""
    began = []

    def on_text(piece: str) -> None:
        began.append(began[0] if began else time.monotonic())
        completion.text += piece
        completion.seconds = time.monotonic() - began[0]

    try:
        [(_, whole)] = model.complete([prompt], settings, 1, stop, on_text)
        vars(completion).update(vars(replace(whole, seconds=completion.seconds, stopped=stop.is_set())))
        if completion.text and not completion.error:
            scores = rewards.score([prompt], [completion], {})
            completion.rewards = {name: values[0] for name, values in scores.items()}
    except Exception as error:
        completion.error = describe_error(error, model.name)


class ModelPool:
    """Whole models in memory. Adapters share their base. Models stay loaded while there is room for all of them."""

    def __init__(self, checkpoints: list[Checkpoint]):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.lock = threading.Lock()
        self.models, self.tools = {}, {}
        self.names = {checkpoint.model_key for checkpoint in checkpoints}

    @contextmanager
    def active(self, checkpoint: Checkpoint, config):
        """Lend a checkpoint's model, with its adapter switched on or all adapters off, to one caller at a time."""
        with self.lock:
            model = self._load(checkpoint, config)
            if checkpoint.base:
                model.set_adapter(_adapter_name(checkpoint))
            without_adapters = not checkpoint.base and hasattr(model, "disable_adapter")
            with torch.inference_mode(), model.disable_adapter() if without_adapters else nullcontext():
                yield model

    def bound_tools(self, settings: GenerationSettings, tokenizer) -> list[Callable]:
        """Return the run's tools. They are loaded once for all checkpoints, as one may read a large corpus."""
        key = json.dumps([settings.tools, settings.tool_kwargs])
        if key not in self.tools:
            self.tools[key] = plugins.load_tools(settings.tools, settings.tool_kwargs, tokenizer)
        return self.tools[key]

    def _load(self, checkpoint: Checkpoint, config):
        from peft import PeftModel

        name, adapter = checkpoint.model_key, _adapter_name(checkpoint)
        if name not in self.models:
            self._make_room(name, config)
            dtype = "auto" if self.device == "cuda" else torch.float32
            model = _from_pretrained(seq2seq.model_class(config), checkpoint.model, checkpoint, dtype=dtype)
            if config.is_encoder_decoder:
                model.generation_config = seq2seq.plain_generation_config(model)
            self.models[name] = model.to(self.device).eval()
        model = self.models[name]
        if not checkpoint.base or adapter in getattr(model, "peft_config", {}):
            return model
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(checkpoint.path, adapter_name=adapter)
            else:
                self.models[name] = PeftModel.from_pretrained(model, checkpoint.path, adapter_name=adapter).eval()
        except (RuntimeError, ValueError, OSError) as error:
            del self.models[name]  # it may hold a part of the adapter by now
            raise UserError(
                checkpoint.path, f"this adapter does not fit its base {name}: {first_line(error)}"
            ) from error
        return self.models[name]

    def _make_room(self, name: str, config) -> None:
        """Forget all loaded models where the missing ones do not fit beside them. The model `name` is one of these."""
        missing = [Path(name) for name in self.names if name not in self.models]
        size = sum(file.stat().st_size for folder in missing for file in folder.glob("*model*"))
        if not Path(name).exists():  # of the Hub; most files there have 16 bits a weight
            with torch.device("meta"):
                model = seq2seq.model_class(config).from_config(config)
            size += 2 * model.num_parameters()
        if self.device == "cuda":
            free = torch.cuda.mem_get_info()[0]
        else:
            free = psutil.virtual_memory().available
            size *= 2  # weights are kept in float32 here
        if size * 1.2 > free:
            self.models.clear()
            gc.collect()
            torch.cuda.empty_cache()


class LocalModel:
    """A checkpoint whose completions transformers generates in this process.

    Raises:
        UserError: its config or its tokenizer cannot be read. The weights are read with the first prompt.
    """

    def __init__(self, checkpoint: Checkpoint, pool: ModelPool):
        self.checkpoint, self.pool, self.name = checkpoint, pool, checkpoint.name
        self.source = f"{checkpoint.path} on {checkpoint.base}" if checkpoint.base else checkpoint.path
        self.config = _from_pretrained(AutoConfig, checkpoint.model, checkpoint)
        self.is_seq2seq = self.config.is_encoder_decoder
        has_tokenizer = not checkpoint.base or (Path(checkpoint.path) / "tokenizer_config.json").exists()
        path = checkpoint.path if has_tokenizer else checkpoint.base
        self.tokenizer = _from_pretrained(AutoTokenizer, path, checkpoint)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # As in training: the tokenizer's token ends a completion, and those of the generation config.
        try:
            listed = GenerationConfig.from_pretrained(checkpoint.model, revision=checkpoint.revision).eos_token_id
        except OSError:  # a model need not have that file
            listed = self.config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        self.eos_ids = sorted({*listed, self.tokenizer.eos_token_id} - {None})

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and completion together, for a seq2seq model of each. None: no limit."""
        return seq2seq.max_positions(self.config.get_text_config())

    def fingerprint(self) -> list:
        """Return what changes when the weights, the tokenizer or the device do."""
        marks = [self.pool.device]
        for name in filter(None, (self.checkpoint.path, self.checkpoint.base)):
            if not Path(name).is_dir():
                marks.append([name, getattr(self.config, "_commit_hash", None)])
                continue
            for file in sorted(Path(name).resolve().iterdir()):
                if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model"):
                    marks.append(file_mark(file))
        return marks

    def complete(
        self, prompts: list[Prompt], settings: GenerationSettings, batch_size: int, stop=None, on_text=None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) in batches of similar length, the longest first, as they use the most memory.

        `on_text` gets the pieces of a single completion, the first one empty when the model is loaded.
        """
        tools = self.pool.bound_tools(settings, self.tokenizer)
        options = settings.chat_template_kwargs | plugins.chat_template_options(tools, self.tokenizer)
        ids = [self._prompt_ids(prompt, settings, options) for prompt in prompts]
        problems = [self._too_long(prompt_ids, settings) for prompt_ids in ids]
        yield from ((index, Completion(error=problem)) for index, problem in enumerate(problems) if problem)
        order = [index for index, problem in enumerate(problems) if problem is None]
        order.sort(key=lambda index: -len(ids[index]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            batch_ids, seeded = [ids[index] for index in batch], with_seed(settings, batch[0])
            yield from zip(batch, self._complete_batch(batch_ids, seeded, options, stop, on_text), strict=True)

    def _prompt_ids(self, prompt: Prompt, settings: GenerationSettings, options: dict) -> list[int]:
        if isinstance(prompt, str) and settings.tools:
            raise UserError(self.name, "the prompts are plain text, and the run's tools need chat messages")
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if self.is_seq2seq:
            raise UserError(self.name, f"the prompts are chat messages, and {seq2seq.PLAIN_TEXT}")
        if self.tokenizer.chat_template is None:
            raise UserError(self.name, "its tokenizer has no chat template, so it can only continue plain text")
        options = {"add_generation_prompt": True, "return_dict": True} | options
        return self.tokenizer.apply_chat_template(prompt, **options)["input_ids"]

    def _too_long(self, prompt_ids: list[int], settings: GenerationSettings) -> str | None:
        """Say that a prompt leaves no room for a whole completion, or return None."""
        prompt, most, context = len(prompt_ids), settings.max_new_tokens, self.context
        needed = max(prompt, most) if self.is_seq2seq else prompt + most
        if not context or needed <= context:
            return None
        each = " each" if self.is_seq2seq else ""
        problem = f"the prompt's {prompt} tokens and {most} new ones do not fit its context of {context}{each}"
        return str(UserError(self.name, problem, "shorten the prompt, or allow fewer new tokens"))

    def _complete_batch(self, prompt_ids, settings, options, stop, on_text) -> list[Completion]:
        if settings.tools:
            rollouts = self._call_tools(prompt_ids, settings, options, stop, on_text)
        else:
            rollouts = [(None, ids, len(ids)) for ids in self._generate(prompt_ids, settings, stop, on_text)]
        completions = []
        for messages, ids, tokens in rollouts:
            text = transcript(messages) if messages else self.tokenizer.decode(ids, skip_special_tokens=True)
            truncated = len(ids) >= settings.max_new_tokens and ids[-1] not in self.eos_ids
            completions.append(Completion(text, messages, ids, tokens, truncated))
        return completions

    def _call_tools(self, prompt_ids, settings, options, stop, on_text) -> list[tuple[list[dict], list[int], int]]:
        """Generate, call tools and go on, as in training. Return messages, all ids, and how many the model wrote.

        The loop is TRL's own, a method of GRPOTrainer (trl 1.16.0). `trainer` has the attributes that it uses.
        """
        from trl import GRPOTrainer
        from trl.chat_template_utils import add_response_schema, parse_response

        tokenizer, tools = self.tokenizer, options["tools"]
        if getattr(tokenizer, "response_template", None) is None:
            add_response_schema(tokenizer)
        callables = {tool.__name__: _synchronous(tool) for tool in tools}
        completions = self._generate(prompt_ids, settings, stop, on_text)
        pairs = zip(prompt_ids, completions, strict=True)
        messages = [[parse_response(tokenizer, ids, prefix=prompt, tools=tools)] for prompt, ids in pairs]

        def next_turn(grown_ids, *_, **__):
            if on_text:
                results = itertools.takewhile(lambda message: message["role"] == "tool", reversed(messages[0]))
                on_text(f"\n{transcript(list(results)[::-1])}\n")
            room = settings.max_new_tokens - min(map(len, grown_ids)) + max(map(len, prompt_ids))
            turn = replace(settings, seed=None, max_new_tokens=max(1, min(room, settings.max_new_tokens)))
            return self._generate(grown_ids, turn, stop, on_text), None

        limit = settings.max_tool_calling_iterations
        trainer = SimpleNamespace(
            use_vllm=False, _is_vlm=False, environment_factories=None, tools=tools, _generate_single_turn=next_turn,
            _sync_tool_dicts=[callables] * len(prompt_ids), _async_tool_dicts=[{}] * len(prompt_ids),
            processing_class=tokenizer, _tokenizer=tokenizer, chat_template=options.get("chat_template"),
            chat_template_kwargs=settings.chat_template_kwargs, max_completion_length=settings.max_new_tokens,
            max_tool_calling_iterations=sys.maxsize if limit is None else limit,
            model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=self.context or sys.maxsize)),
        )  # fmt: skip
        trainer._get_tool_suffix_ids = functools.partial(GRPOTrainer._get_tool_suffix_ids, trainer)
        empty = [[] for _ in prompt_ids]
        with chdir("."):  # a tool may leave the working directory
            masks, messages, ids, *_ = GRPOTrainer._tool_call_loop(
                trainer, empty, prompt_ids, completions, messages, None, None, {}
            )
        return list(zip(messages, ids, map(sum, masks), strict=True))

    def _generate(self, prompt_ids, settings, stop, on_text) -> list[list[int]]:
        """Generate one turn for a batch: the ids up to and with the end-of-turn token, without it where truncated."""
        side = "right" if self.is_seq2seq else "left"
        inputs = self.tokenizer.pad({"input_ids": prompt_ids}, padding_side=side, return_tensors="pt")
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            names = ("temperature", "top_p", "top_k", "min_p")
            sampling = {"do_sample": True} | {name: getattr(settings, name) for name in names}
        with self.pool.active(self.checkpoint, self.config) as model:
            if on_text:
                on_text("")
                streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
                streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
                sampling["streamer"] = streamer
            if stop:
                sampling["stopping_criteria"] = [
                    lambda ids, *_, **__: torch.full((len(ids),), stop.is_set()).to(ids.device)
                ]
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            rows = model.generate(
                **inputs.to(model.device), **sampling, max_new_tokens=settings.max_new_tokens,
                repetition_penalty=settings.repetition_penalty, eos_token_id=self.eos_ids or None,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        prompt_length = 1 if self.is_seq2seq else inputs["input_ids"].shape[1]
        return [self._until_end(row[prompt_length:].tolist()) for row in rows]

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [position for position, token in enumerate(ids) if token in self.eos_ids]
        return ids[: ends[0] + 1] if ends else ids


class ServerModel:
    """A model behind an OpenAI-compatible server. A key comes from OPENAI_API_KEY in the environment.

    Args:
        address: http://HOST:PORT, with #MODEL where the server has several models. Without it the first one is taken.
    """

    is_seq2seq = False

    def __init__(self, address: str):
        import openai

        url, _, wanted = address.partition("#")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--server {address}", "no address of a server", "write http://HOST:PORT")
        self.source = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        timeout = openai.Timeout(600.0, connect=5.0)  # a busy server may take long until the first token
        self.client = openai.OpenAI(base_url=self.source, api_key=self.key or "none", timeout=timeout, max_retries=0)
        try:
            names = [model.id for model in self.client.models.list().data or []]
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            problem = f"no list of models from {self.source}/models: {self._describe(error)}"
            raise UserError(f"--server {address}", problem) from None
        if not names or (wanted and wanted not in names):
            raise UserError(f"--server {address}", f"no such model, only {', '.join(names) or 'none'}")
        self.model = wanted or names[0]
        self.name = f"{self.model.rstrip('/').split('/')[-1]} at {parts.netloc.rpartition('@')[2]}"

    def fingerprint(self) -> None:
        """Return None: what a server serves may change unseen, so its completions are not kept."""

    def complete(
        self, prompts: list[Prompt], settings: GenerationSettings, batch_size: int, stop=None, on_text=None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as they come, with `batch_size` requests at a time."""
        left = threading.Event()
        with ThreadPoolExecutor(batch_size) as executor:
            futures = {}
            for index, prompt in enumerate(prompts):
                stops = [event for event in (left, stop) if event]
                futures[executor.submit(self._ask, prompt, with_seed(settings, index), stops, on_text)] = index
            try:
                yield from ((futures[future], future.result()) for future in as_completed(futures))
            finally:
                left.set()
                executor.shutdown(wait=False, cancel_futures=True)

    def _ask(self, prompt: Prompt, settings: GenerationSettings, stops: list, on_text) -> Completion:
        import openai

        text, tokens, finish_reason = "", None, None
        try:
            with self._request(prompt, settings) as chunks:
                for chunk in chunks:
                    if any(stop.is_set() for stop in stops):
                        return Completion(text, tokens=tokens)
                    tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                    for choice in chunk.choices:
                        piece = (choice.text if isinstance(prompt, str) else choice.delta.content) or ""
                        text, finish_reason = text + piece, choice.finish_reason or finish_reason
                        if on_text:
                            on_text(piece)
        except openai.BadRequestError as error:
            return Completion(error=f"{self.name}: the server refused the prompt: {self._describe(error)}")
        except openai.OpenAIError as error:
            raise UserError(self.name, f"the server does not answer, or went away: {self._describe(error)}") from error
        if finish_reason is None:
            raise UserError(self.name, "the server went away in mid-completion")
        return Completion(text, tokens=tokens, truncated=finish_reason == "length")

    def _request(self, prompt: Prompt, settings: GenerationSettings):
        # A server that knows no more than OpenAI's own fields refuses others, so only what was changed is sent.
        names = ("top_k", "min_p", "repetition_penalty", "chat_template_kwargs")
        given = {name: getattr(settings, name) for name in names}
        changed = {name: value for name, value in given.items() if value != getattr(GenerationSettings(), name)}
        options = {
            "model": self.model, "temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed,
            "max_tokens": settings.max_new_tokens, "extra_body": changed,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if isinstance(prompt, str):
            return self.client.completions.create(prompt=prompt, **options)
        return self.client.chat.completions.create(messages=prompt, **options)

    def _describe(self, error: Exception) -> str:
        """Return the first line of an error without the key, which some servers repeat."""
        text = first_line(error)
        return text.replace(self.key, "…") if self.key else text


@dataclass
class Lineup:
    """The models that a command works with, the run whose settings hold, and why others are not among them."""

    models: list
    run: Path | None
    settings: GenerationSettings
    problems: dict[str, str]
    notes: list[str]

    @property
    def facts(self) -> list[str]:
        """Say what the models are."""
        return [f"{model.name}: {model.source}" for model in self.models]


def line_up(names: list[str], base: str | None, servers: list[str], per_run: int | None = None) -> Lineup:
    """Find checkpoints and servers; see models.choose_checkpoints.

    Raises:
        UserError: none of them can be used.
    """
    checkpoints, problems, notes = choose_checkpoints(names, base, per_run)
    pool, models = ModelPool(checkpoints), []
    openers = [functools.partial(LocalModel, checkpoint, pool) for checkpoint in checkpoints]
    openers += [functools.partial(ServerModel, address) for address in dict.fromkeys(servers)]
    for opener in openers:
        try:
            models.append(opener())
        except UserError as error:
            problems[error.field] = str(error)
    if not models:
        raise UserError("no checkpoint can be used", " ".join(problems.values()))
    found_runs = list(
        {checkpoint.run.resolve(): checkpoint.run for checkpoint in checkpoints if checkpoint.run}.values()
    )
    settings = [run_settings(run) for run in found_runs] or [GenerationSettings()]
    if any(each != settings[0] for each in settings):
        notes.append(f"The runs generated in different ways. All models are asked as {runs.label(found_runs[0])} did.")
    served = [model for model in models if isinstance(model, ServerModel)]
    if settings[0].tools:
        notes += [
            f"{model.name} is asked without the run's tools, which only run on this machine." for model in served
        ]
    local = [model for model in models if model not in served]
    for model in local[1:]:
        if model.is_seq2seq != local[0].is_seq2seq:
            notes.append(f"{model.name} is another kind of model than {local[0].name} (seq2seq or not).")
        elif model.tokenizer.chat_template != local[0].tokenizer.chat_template:
            notes.append(f"{model.name} has another chat template than {local[0].name}.")
        elif model.tokenizer.get_vocab() != local[0].tokenizer.get_vocab():
            notes.append(f"{model.name} has another tokenizer than {local[0].name}: token counts do not compare.")
    return Lineup(models, found_runs[0] if found_runs else None, settings[0], problems, notes)


def file_mark(file: Path) -> list:
    """Return what changes when a file does."""
    return [str(file), file.stat().st_size, file.stat().st_mtime_ns]


def with_seed(settings: GenerationSettings, index: int) -> GenerationSettings:
    """Give each batch a seed of its own, so that equal prompts get different completions."""
    return settings if settings.seed is None else replace(settings, seed=settings.seed + index)


def _synchronous(tool: Callable) -> Callable:
    """Return a tool that can be called without an event loop."""
    if not inspect.iscoroutinefunction(tool):
        return tool
    return lambda **arguments: asyncio.run(tool(**arguments))


def _adapter_name(checkpoint: Checkpoint) -> str:
    return checkpoint.path.replace(".", "_")  # the name of a torch module may hold no dot


def _from_pretrained(kind, name: str, checkpoint: Checkpoint, **options):
    if name == checkpoint.model:
        options["revision"] = checkpoint.revision
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if checkpoint.base != name:
            problem = f"no folder with a model, and no Hub id that can be read: {first_line(error)}"
            raise UserError(name, problem, hub.hint()) from error
        problem = f"this adapter stands on {name}, which cannot be read: {first_line(error)}. {hub.hint()}"
        raise UserError(checkpoint.path, problem, "give its base: --base FOLDER_OR_HUB_ID") from error
