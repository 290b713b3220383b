"""From a recipe's dotted names to the tools that a model may call, with their settings bound."""

import copy
import difflib
import inspect
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl.chat_template_utils import add_response_schema, get_training_chat_template, is_chat_template_prefix_preserving, supports_tool_calling

from grpo_launcher.plugins import find
from grpo_launcher.config import Recipe, RecipeError


def load_tools(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Callable]:
    """The recipe's tools, each a function whose every parameter is the model's to fill in.

    A tool with settings is a function of keyword-only settings that returns the tool, so that the model sees none of them; a setting called
    `tokenizer` gets the model's own. Raises RecipeError naming the tool: unknown name or setting, two of one name, no type hints or docstring,
    a setting that the tool refuses.
    """
    settings = dict(recipe.tool_kwargs or {})
    tools = [_bind(name, settings, tokenizer) for name in recipe.tools or []]
    names = [tool.__name__ for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"tools: two tools are called {name}; the model could not tell them apart. Rename one of them.")
    for name in settings:
        raise RecipeError(f"tool_kwargs: {name} is none of the tools ({', '.join(names) or 'the recipe has none'}).")
    return tools


def _bind(name: str, settings: dict, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """One tool; takes its entry out of `settings`."""
    tool = find(name, "tools")
    parameters = inspect.signature(tool).parameters.values()
    if parameters and all(p.kind is p.KEYWORD_ONLY for p in parameters):
        tool = _set(name, tool, {p.name: p.default for p in parameters}, settings.pop(tool.__name__, {}), tokenizer)
    elif tool.__name__ in settings:
        raise RecipeError(f"tool_kwargs: {name} has no settings; all its parameters are the model's to fill in.")
    return _described(f"tools: {name}", tool)


def _described(what: str, tool: Callable) -> Callable:
    try:
        get_json_schema(tool)
    except Exception as error:  # transformers has several for what it cannot describe
        raise RecipeError(f"{what}: {str(error).strip() or error!r} The model reads type hints and a docstring in Google's style.") from None
    return tool


def load_environment(recipe: Recipe, tools: list[Callable]) -> tuple[Callable | None, list[Callable]]:
    """(the recipe's environment, `tools` and those of one of its objects, as TRL finds them); (None, `tools`) where it has none.

    Raises RecipeError: no such class, one that cannot be made without arguments, without `reset`, or with a tool that cannot be described or told apart.
    """
    name = recipe.environment_factory
    if not name:
        return None, tools
    make = find(name, "environment_factory")
    try:
        made = make()
    except Exception as error:
        raise RecipeError(f"environment_factory: {name}() does not work, and is called without arguments: {type(error).__name__}: {error}") from error
    methods = dict(inspect.getmembers(type(made), inspect.isfunction))
    if not recipe.reward_funcs and "get_reward" not in methods:
        raise RecipeError(f"reward_funcs: give at least one, or give {name} a method `get_reward()`.")
    if "reset" not in methods:
        raise RecipeError(f"environment_factory: {name} has no method `reset(**row)`, which begins every reply with the columns of its row.")
    offered = [method for method in methods if not method.startswith("_") and method not in ("reset", "get_reward")]
    if twice := {tool.__name__ for tool in tools} & {*offered}:
        raise RecipeError(f"environment_factory: {name} and tools both have {', '.join(twice)}; the model could not tell them apart. Rename one of them.")
    if not offered:
        raise RecipeError(f"environment_factory: {name} has no public method beside reset and get_reward, so the model could call nothing.")
    return make, [*tools, *(_described(f"environment_factory: {name}.{method}", getattr(made, method)) for method in offered)]


def _set(name: str, make: Callable, settable: dict, given: dict, tokenizer: PreTrainedTokenizerBase) -> Callable:
    for setting in given:
        if setting not in settable or setting == "tokenizer":
            near = difflib.get_close_matches(setting, settable, n=1)
            hint = f"; did you mean {near[0]}?" if near else f". It has: {', '.join(set(settable) - {'tokenizer'})}."
            raise RecipeError(f"tool_kwargs: {name} has no setting `{setting}`{hint}")
    given = given | ({"tokenizer": tokenizer} if "tokenizer" in settable else {})
    if missing := [setting for setting, default in settable.items() if default is inspect.Parameter.empty and setting not in given]:
        raise RecipeError(f"tool_kwargs: {name} needs {', '.join(missing)}: tool_kwargs: {{{make.__name__}: {{{missing[0]}: …}}}}.")
    try:
        return make(**given)
    except ValueError as error:
        raise RecipeError(f"tool_kwargs: {name}: {error}") from error


def template_options(tools: list[Callable], tokenizer: PreTrainedTokenizerBase) -> dict:
    """What `apply_chat_template` must be given beside the messages, so that a prompt with tools comes out as the trainer will see it.

    Raises RecipeError where TRL cannot write tools in the tokenizer's chat template, or cannot read the calls of a model that uses it.
    """
    if not tools:
        return {}
    try:
        if not supports_tool_calling(tokenizer):
            raise ValueError("it leaves tool calls or their results out")
        if getattr(tokenizer, "response_template", None) is None:
            add_response_schema(copy.copy(tokenizer))
        kept = is_chat_template_prefix_preserving(tokenizer)
        return {"tools": tools} if kept else {"tools": tools, "chat_template": get_training_chat_template(tokenizer)}
    except ValueError as error:
        raise RecipeError(
            f"tools: TRL cannot use tools with the chat template of {tokenizer.name_or_path}: {str(error).partition('. ')[0]}. "
            "Take a model whose template it knows: the instruct models of Qwen2.5, Qwen3, Llama 3.1 or 3.2, Gemma 4, GLM-4-MoE, gpt-oss, Nemotron 3, LFM2."
        ) from None
