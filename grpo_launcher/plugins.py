"""Rewards, tools and environments: from the names in a recipe to functions with their options bound.

A name is `file.py:function` for a user's own code, or `package.module.function` for an installed package. A file is
loaded under a private module name, so that it neither hides an installed module of its name nor is hidden by one.
"""

import asyncio
import contextlib
import copy
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from types import ModuleType

from grpo_launcher.errors import UserError, closest_match, did_you_mean, first_line

# Columns of a row that TRL keeps from every reward.
DROPPED_COLUMNS = {"prompt", "completion", "completion_ids"}
# Keywords that TRL passes to every reward beside the columns.
TRL_KEYWORDS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def load_object(name: str, field: str):
    """Load what a name of the recipe's `field` names.

    Raises:
        UserError: there is no such file, module or object. An error inside the user's file passes through.
    """
    file, colon, attribute = name.rpartition(":")
    if not colon:
        file, _, attribute = name.rpartition(".")
    try:
        with contextlib.chdir("."):  # whatever the module does
            module = _load_file(file, field) if colon else _import_module(file, name, field)
    except SystemExit as error:
        problem = f"{file} calls sys.exit({error.code!r}) while it is loaded"
        raise UserError(field, problem, 'put what it does as a program under `if __name__ == "__main__":`') from error
    found = getattr(module, attribute, None)
    if not callable(found):
        if hasattr(module, attribute):
            raise UserError(field, f"{module.__file__}: {attribute} is no function")
        known = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(field, f"{module.__file__} has no function {attribute}", did_you_mean(attribute, known))
    return found


def _load_file(file: str, field: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(field, f"there is no file {file}")
    name = f"grpo_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for the file's own imports; last, so that nothing installed is hidden
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(field, f"{file} is no file of Python", "give it a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        wanted = str(getattr(error, "name", "")).partition(".")[0]
        beside = importlib.machinery.PathFinder.find_spec(wanted, [str(path.parent)])
        is_hidden = beside and wanted in sys.modules and sys.modules[wanted].__spec__.origin != beside.origin
        if isinstance(error, ImportError) and is_hidden:
            problem = f"{path} imports {wanted}, and an installed module of that name hides the one beside it"
            raise UserError(field, problem, f"give {wanted} another name") from error
        raise
    return module


def _import_module(module_name: str, name: str, field: str) -> ModuleType:
    if not module_name:
        fix = "write package.module.function, as rewards.length.length_reward, or file.py:function"
        raise UserError(field, f"{name} is no function of a module", fix)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        own = f"{module_name.replace('.', '/')}.py:{name.rpartition('.')[2]}"
        fix = f"write file.py:function for a file of your own, here {own}"
        raise UserError(field, f"{name}: no module {module_name} is installed", fix) from None


def load_rewards(
    reward_funcs: list[str],
    reward_kwargs: dict | None = None,
    *,
    columns: list[str] | None = None,
    weights: list[float] | None = None,
    timeout: float = 0,
) -> list[Callable | str]:
    """Load rewards and bind their options.

    Args:
        reward_funcs: names, as in a recipe. The id of a reward model stays as it is: TRL loads it.
        reward_kwargs: options by function name.
        columns: of the dataset. A reward that needs a column that is not there is refused. None: not checked.
        weights: reward_weights of the recipe.
        timeout: seconds for one call, after which all its scores are None. 0: no limit.

    Raises:
        UserError: unknown name or option, two rewards of one name, no **kwargs, a missing column.
    """
    options = dict(reward_kwargs or {})
    rewards = [_bind_reward(name, options, columns, timeout) for name in reward_funcs]
    names = [metric_name(reward) for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                "reward_funcs", f"two rewards are called {name} and would share one metric", "rename one of them"
            )
    for name in options:
        match = closest_match(name, names)
        fix = f"did you mean {match}?" if match else "take it out: --reward_kwargs '{}' replaces those of the recipe"
        raise UserError("reward_kwargs", f"{name} is none of the rewards in reward_funcs", fix)
    if weights is not None and len(weights) != len(rewards):
        raise UserError(
            "reward_weights",
            f"{len(weights)} weights for {len(rewards)} rewards",
            f"give one each: {', '.join(names)}",
        )
    return rewards


def call_reward(reward: Callable, **columns) -> list[float | None]:
    """Call a reward as TRL does, outside a trainer.

    Args:
        reward: of load_rewards; it may be a coroutine function.
        columns: prompts, completions and all others, one value a completion in each.
    """
    stand_ins = {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    scores = reward(**stand_ins | columns)
    return asyncio.run(scores) if inspect.iscoroutine(scores) else scores


def metric_name(reward: Callable | str) -> str:
    """Return TRL's name of a reward in metrics: a function's name, or the last part of a reward model's id."""
    return reward.rstrip("/").split("/")[-1] if isinstance(reward, str) else reward.__name__


def required_columns(reward: Callable) -> list[str]:
    """Return the columns that a row must have for this reward, as far as its parameters tell."""
    parameters = inspect.signature(reward).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    return [name for name in required if name not in TRL_KEYWORDS]


def is_reward_model(name: str) -> bool:
    """Whether a name in reward_funcs is the Hub id or folder of a reward model."""
    return ":" not in name and ("/" in name or os.path.isdir(name))


def _bind_reward(name: str, options: dict, columns: list[str] | None, timeout: float) -> Callable | str:
    """Load one reward and take its options out of `options`."""
    if is_reward_model(name):
        return name
    function = load_object(name, "reward_funcs")
    own_name = re.split("[.:]", name)[-1]
    if getattr(function, "__name__", None) != own_name:  # a partial, a lambda, a method, an object with __call__
        loaded = function
        is_function = isinstance(loaded, functools.partial) or inspect.isroutine(loaded)
        function = functools.partial(loaded if is_function else loaded.__call__)  # which may be async
        function.__name__ = own_name
        for kept in ("ready", "check_gold"):
            if hasattr(loaded, kept):
                setattr(function, kept, getattr(loaded, kept))
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    settable = [option for option, default in defaults.items() if default is not inspect.Parameter.empty]
    given = options.pop(function.__name__, {})
    for option, value in given.items():
        if option in defaults and option not in settable:
            fix = f"write {option}=VALUE among its parameters: without a default it is a column of the dataset"
            raise UserError("reward_kwargs", f"{name}: its option {option} has no default", fix)
        if option not in settable:
            raise UserError("reward_kwargs", f"{name} has no option {option}", did_you_mean(option, settable))
        if isinstance(value, str) and isinstance(defaults[option], int | float):
            fix = "write it without quotes, as 1.0e-2 and not 1e-2, or true or false"
            raise UserError("reward_kwargs", f"{function.__name__}: {option} is the text {value!r}", fix)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        fix = "let its parameters end in **kwargs: TRL passes every column and more as keywords"
        raise UserError("reward_funcs", f"{name} takes no further keywords", fix)
    missing = set(required_columns(function)) - (set(columns or []) - DROPPED_COLUMNS)
    if columns is not None and missing:
        there = ", ".join(columns) or "no other"
        problem = f"{name} needs the column {', '.join(sorted(missing))}, and the dataset has {there}"
        fix = "rename a column. TRL drops columns called completion or completion_ids, so call a gold text reference"
        raise UserError("reward_funcs", problem, fix)
    return _with_checked_scores(function, given, timeout)


def _with_checked_scores(function: Callable, options: dict, timeout: float) -> Callable:
    """Bind options, and check every result: one finite number or None a completion.

    TRL does not look for inf and nan. Under group scaling one of them silently sets its group's advantages to 0.
    A reward that needs a service has an attribute `ready`: a function of the same options that raises ValueError or
    OSError where the service cannot be had. It is called once before a run. An attribute `check_gold` is kept: a
    function of one value of the column that the reward needs, which raises ValueError where it cannot be used, and
    takes None.
    """
    home = os.getcwd()  # the run's folder is relative to it, whatever the function does

    @functools.wraps(function)
    def reward(completions, **columns):
        try:
            with _time_limit(timeout), no_exit(f"the reward {function.__name__}"):
                scores = function(completions=completions, **options, **columns)
                return check_scores(scores, completions, function.__name__)
        except _OutOfTime:
            return _unrated(function.__name__, completions, timeout)
        finally:
            os.chdir(home)

    bound = AsyncReward(function, options, timeout) if inspect.iscoroutinefunction(function) else reward
    if hasattr(function, "ready"):
        bound.ready = functools.partial(_ready, function, options)
    return bound


def _ready(function: Callable, options: dict):
    """Call the reward's `ready`. Raises ValueError also for an OSError, which does not say whose service it is."""
    try:
        return function.ready(**options)
    except OSError as error:
        raise ValueError(f"{function.__name__}: {error}") from error


class AsyncReward:
    """An async reward. start() begins a call whose scores the next call returns."""

    def __init__(self, function: Callable, options: dict, timeout: float):
        functools.update_wrapper(self, function)
        self._options, self._timeout, self._started, self._home = options, timeout, None, os.getcwd()

    def start(self, loop: asyncio.AbstractEventLoop, /, **columns) -> None:
        """Begin to score in the event loop of another thread."""
        self._started = asyncio.run_coroutine_threadsafe(self._scores(**columns), loop)

    async def __call__(self, /, **columns) -> list[float | None]:
        """Return the scores of what was started, else of these columns."""
        started, self._started = self._started, None
        return await (asyncio.wrap_future(started) if started else self._scores(**columns))

    async def _scores(self, /, completions, **columns) -> list[float | None]:
        name = self.__name__
        try:
            async with asyncio.timeout(self._timeout or None) as limit:
                with no_exit(f"the reward {name}"):
                    scores = await self.__wrapped__(completions=completions, **self._options, **columns)
                return check_scores(scores, completions, name)
        except TimeoutError:
            if not limit.expired():
                raise
            return _unrated(name, completions, self._timeout)
        finally:
            os.chdir(self._home)


@contextlib.contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Turn a user's sys.exit() into an error: it would end the run as if all were well."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"{what} called sys.exit({error.code!r})") from error


class _OutOfTime(BaseException):
    """No `except Exception` of a reward takes it."""


@contextlib.contextmanager
def _time_limit(seconds: float):
    """Raise _OutOfTime in the block after so many seconds. Only the main thread gets signals, and so has a limit.

    A thread sends the signal: a reward may use the one alarm that a process has, as math-verify does.
    """
    main = threading.main_thread()
    if not seconds or threading.current_thread() is not main:
        yield
        return
    ended = threading.Event()

    def stop(*_):
        if not ended.is_set():
            raise _OutOfTime

    def watch():
        wait = seconds
        while not ended.wait(wait):
            signal.pthread_kill(main.ident, signal.SIGVTALRM)
            wait = 1  # again, where a bare `except:` took it

    before, watcher = signal.signal(signal.SIGVTALRM, stop), threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            ended.set()
    finally:  # the signal may come in the lines above
        ended.set()
        watcher.join()
        signal.signal(signal.SIGVTALRM, before)


def _unrated(name: str, completions: list, timeout: float) -> list[None]:
    problem = f"{name} took over {timeout:g} s and rates none of {len(completions)} completions"
    print(f"Warning: {problem}. Fix: mend the reward, or raise reward_timeout.", flush=True)
    return [None] * len(completions)


def check_scores(scores, completions: list, name: str) -> list[float | None]:
    """Return the scores as floats, or raise ValueError naming the reward and what is wrong with its scores."""
    is_list = isinstance(scores, Iterable) and not isinstance(scores, str | bytes | bytearray | Mapping | Set)
    if not is_list or len(getattr(scores, "shape", [1])) != 1:  # a table of one column is no list of numbers either
        shown = " ".join(f"{scores!r:.200}".split())
        problem = f"{shown} of type {type(scores).__name__} for {len(completions)} completions"
        raise ValueError(f"reward {name}: {problem}; return a list with one number each.")
    scores = list(scores)
    if len(scores) != len(completions):
        raise ValueError(f"reward {name}: {len(scores)} scores for {len(completions)} completions; return one each.")
    for index, score in enumerate(scores):
        is_number = not isinstance(score, str | bytes | bytearray) and not getattr(score, "shape", ())
        try:
            is_finite = is_number and abs(float(score)) < 3.4e38  # TRL keeps 32 bits
        except (OverflowError, TypeError, ValueError):
            is_finite = False
        if score is not None and not is_finite:
            raise ValueError(
                f"reward {name}: {score!r:.200} for completion {index}: {completions[index]!r:.200}. "
                "Return a finite number, or None for what cannot be judged."
            )
    return [None if score is None else float(score) for score in scores]


def load_tools(tools: list[str] | None, tool_kwargs: dict | None, tokenizer) -> list[Callable]:
    """Load tools and bind their settings: functions of which the model fills in every parameter.

    A tool with settings is a function of keyword-only settings that returns the tool: the model sees none of them.
    A setting called `tokenizer` gets the model's tokenizer.

    Raises:
        UserError: unknown name or setting, two tools of one name, a tool without type hints or docstring.
    """
    settings = dict(tool_kwargs or {})
    loaded = [_bind_tool(name, settings, tokenizer) for name in tools or []]
    names = [tool.__name__ for tool in loaded]
    for name in names:
        if names.count(name) > 1:
            raise UserError("tools", f"two tools are called {name}", "rename one of them")
    for name in settings:
        raise UserError("tool_kwargs", f"{name} is none of the tools", did_you_mean(name, names))
    return loaded


def _bind_tool(name: str, settings: dict, tokenizer) -> Callable:
    """Load one tool and take its settings out of `settings`."""
    tool = load_object(name, "tools")
    parameters = inspect.signature(tool).parameters.values()
    if parameters and all(p.kind is p.KEYWORD_ONLY for p in parameters):
        defaults = {p.name: p.default for p in parameters}
        tool = _make_tool(name, tool, defaults, settings.pop(tool.__name__, {}), tokenizer)
    elif getattr(tool, "__name__", None) in settings:
        raise UserError("tool_kwargs", f"{name} has no settings", "leave it out: the model fills in all parameters")
    _check_schema("tools", name, tool)
    return tool


def _make_tool(name: str, factory: Callable, defaults: dict, given: dict, tokenizer) -> Callable:
    settable = [setting for setting in defaults if setting != "tokenizer"]
    for setting in given:
        if setting not in settable:
            raise UserError("tool_kwargs", f"{name} has no setting {setting}", did_you_mean(setting, settable))
    if "tokenizer" in defaults:
        given = given | {"tokenizer": tokenizer}
    for setting, default in defaults.items():
        if default is inspect.Parameter.empty and setting not in given:
            raise UserError(
                "tool_kwargs", f"{name} needs {setting}", f"tool_kwargs: {{{factory.__name__}: {{{setting}: ...}}}}"
            )
    try:
        return factory(**given)
    except ValueError as error:
        raise UserError("tool_kwargs", f"{name}: {error}") from error


def _check_schema(field: str, name: str, tool: Callable) -> None:
    from transformers.utils import DocstringParsingException, TypeHintParsingException, get_json_schema

    if not hasattr(tool, "__name__"):  # a partial, or an object with __call__
        raise UserError(field, f"{name} is no function", "write `def`, with type hints and a Google-style docstring")
    try:
        get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise UserError(
            field, f"{name}: {first_line(error)}", "give it type hints and a Google-style docstring"
        ) from error


def load_environment(
    environment_factory: str | None, tools: list[Callable], has_rewards: bool = True
) -> tuple[Callable | None, list[Callable]]:
    """Load an environment class.

    Args:
        environment_factory: its name, as in a recipe, or None.
        tools: those of the recipe.
        has_rewards: whether the recipe has reward_funcs. Else the environment must rate its rollouts itself.

    Returns:
        The class or None, and all tools: the recipe's and the environment's public methods.

    Raises:
        UserError: no `reset`, no tool, no reward, or a tool that has no schema or the name of another.
    """
    name, field = environment_factory, "environment_factory"
    if not name:
        return None, tools
    factory = load_object(name, field)
    parameters = inspect.signature(factory).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if any(p.default is p.empty and p.kind not in variadic for p in parameters):
        raise UserError(field, f"{name} needs arguments, and TRL gives none", "give them defaults")
    environment = factory()
    methods = dict(inspect.getmembers(type(environment), inspect.isfunction))
    if not has_rewards and "get_reward" not in methods:
        raise UserError("reward_funcs", "empty", f"give at least one, or give {name} a method get_reward()")
    if "reset" not in methods:
        raise UserError(
            field, f"{name} has no method reset(**row)", "add it: it begins a rollout with the columns of its row"
        )
    public = [method for method in methods if not method.startswith("_") and method not in ("reset", "get_reward")]
    if not public:
        raise UserError(
            field, f"{name} has no public method beside reset and get_reward", "add one: the model calls it as a tool"
        )
    shared = {tool.__name__ for tool in tools} & set(public)
    if shared:
        raise UserError(field, f"{name} and tools both have {', '.join(shared)}", "rename one of them")
    for method in public:
        _check_schema(field, f"{name}.{method}", getattr(environment, method))
    return factory, [*tools, *(getattr(environment, method) for method in public)]


def chat_template_options(tools: list[Callable], tokenizer) -> dict:
    """Return the arguments of `apply_chat_template` beside the messages, as the trainer passes them.

    Raises:
        UserError: TRL cannot write tools in the tokenizer's chat template, or cannot read the calls of its model.
    """
    from trl import chat_template_utils as templates

    if not tools:
        return {}
    try:
        if not templates.supports_tool_calling(tokenizer):
            raise ValueError("it leaves tool calls or their results out")
        if getattr(tokenizer, "response_template", None) is None:
            templates.add_response_schema(copy.copy(tokenizer))
        if templates.is_chat_template_prefix_preserving(tokenizer):
            return {"tools": tools}
        return {"tools": tools, "chat_template": templates.get_training_chat_template(tokenizer)}
    except ValueError as error:
        reason = first_line(error).partition(". ")[0]
        problem = f"TRL cannot use them with the chat template of {tokenizer.name_or_path}: {reason}"
        models = "Qwen2.5, Qwen3, Llama 3.1 or 3.2, Gemma 4, GLM-4-MoE, gpt-oss, LFM2"
        raise UserError("tools", problem, f"use an instruct model whose template TRL knows: {models}") from error
