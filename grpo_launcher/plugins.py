"""From a recipe's dotted names to reward functions, with their options bound and their contract checked."""

import difflib
import functools
import importlib
import inspect
import math
import os
from collections.abc import Callable

from grpo_launcher.config import Recipe, RecipeError

DROPPED = {"prompt", "completion", "completion_ids"}  # columns of a row that TRL keeps from every reward
# What it hands to every reward beside the others.
FROM_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def load_rewards(recipe: Recipe, columns: list[str] | None = None, weights: list[float] | None = None) -> list[Callable | str]:
    """The recipe's rewards, options bound: functions, or the id of a reward model as it stands (TRL loads that one).

    columns: the dataset's, so that a reward that needs one that is missing is refused here; None leaves that unchecked.
    Raises RecipeError naming the reward: unknown name, unknown option, two of one name, no **kwargs, a column missing.
    """
    if not recipe.reward_funcs and not recipe.environment_factory:
        raise RecipeError("reward_funcs: give at least one, for example rewards.length.length_reward.")
    options = dict(recipe.reward_kwargs or {})
    rewards = [_bind(name, options, columns) for name in recipe.reward_funcs]
    names = [metric_name(reward) for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"reward_funcs: two rewards are called {name}; they would share one metric. Rename one of them.")
    for name in options:
        raise RecipeError(f"reward_kwargs: {name} is none of the rewards in reward_funcs ({', '.join(names)}).")
    if weights is not None and len(weights) != len(rewards):
        raise RecipeError(f"reward_weights: {len(weights)} weights for {len(rewards)} rewards ({', '.join(names)}).")
    return rewards


def metric_name(reward: Callable | str) -> str:
    """What TRL calls a reward in its metrics: a function's name, or the last part of a reward model's id."""
    return reward.rstrip("/").split("/")[-1] if isinstance(reward, str) else reward.__name__


def _bind(name: str, options: dict, columns: list[str] | None) -> Callable | str:
    """One reward; takes its entry out of `options`."""
    if "/" in name or os.path.isdir(name):
        return name
    function = find(name)
    parameters = inspect.signature(function).parameters.values()
    settable = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    given = options.pop(function.__name__, {})
    for option in given:
        if option not in settable:
            near = difflib.get_close_matches(option, settable, n=1)
            hint = f"; did you mean {near[0]}?" if near else f". It has: {', '.join(settable) or 'none'}."
            raise RecipeError(f"reward_kwargs: {name} has no option `{option}`{hint}")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise RecipeError(f"reward_funcs: {name} must end in **columns: TRL passes every column and more as keywords.")
    if columns is not None:
        missing = set(needs(function)) - (set(columns) - DROPPED)
        if missing:
            raise RecipeError(
                f"reward_funcs: {name} needs {', '.join(sorted(missing))}, and the dataset has only {', '.join(columns)} "
                "(TRL drops columns called completion or completion_ids: rename those)."
            )
    return _checked(function, given)


def needs(reward: Callable) -> list[str]:
    """The columns that a row must have for this reward, as far as its parameters say."""
    parameters = inspect.signature(reward).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [name for name in wanted if name not in FROM_TRL]


def find(name: str, field: str = "reward_funcs") -> Callable:
    """The function that a dotted name names. Raises RecipeError, naming the recipe's field."""
    of_hub = " A reward model of the Hub is written owner/name." if field == "reward_funcs" else ""
    module_name, _, function_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the module is there; something that it imports is not
        raise RecipeError(
            f"{field}: {name}: there is no module `{module_name or name}`. Write module.function; modules are looked for in this "
            f"project, beside the recipe and in the folder you stand in.{of_hub}"
        ) from None
    except ValueError:
        raise RecipeError(f"{field}: {name}: write module.function.{of_hub}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"{field}: {name}: {module.__file__} has no function `{function_name}`{hint}")
    return function


def _checked(function: Callable, options: dict) -> Callable:
    """The reward with its options, whose result is held against the contract: one finite number or None a completion.

    A reward that depends on a service or a model has an attribute `ready`, a function of the same options that raises ValueError
    where it cannot be had; it is called once before a run starts.

    TRL does not look for inf or nan: under group scaling one of them silently turns the advantages of its whole group to 0.
    """

    def check(scores, completions):
        scores = list(scores)
        if len(scores) != len(completions):
            raise ValueError(f"reward {function.__name__}: {len(scores)} scores for {len(completions)} completions; return one each.")
        for index, score in enumerate(scores):
            if score is None:
                continue
            if not hasattr(score, "__float__"):
                raise TypeError(f"reward {function.__name__}: {score!r} for completion {index} is no number.")
            if not math.isfinite(score):
                raise ValueError(
                    f"reward {function.__name__}: {score} for completion {index}: {completions[index]!r:.200}. "
                    "Return a finite number, or None for what cannot be judged."
                )
        return scores

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def reward(completions, **columns):
            return check(await function(completions=completions, **options, **columns), completions)
    else:

        @functools.wraps(function)
        def reward(completions, **columns):
            return check(function(completions=completions, **options, **columns), completions)

    if hasattr(function, "ready"):
        reward.ready = functools.partial(function.ready, **options)
    return reward
