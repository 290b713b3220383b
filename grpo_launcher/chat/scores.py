"""The rewards of a recipe for replies outside a run: bound as the run binds them, called as TRL calls them."""

import asyncio
import inspect
import json
import sys
from pathlib import Path

from grpo_launcher.chat.checkpoints import recipe_values
from grpo_launcher import plugins as bind
from grpo_launcher.config import Recipe, RecipeError, RecipeParser, build


class Scores:
    """Rewards that can score a reply here, and a sentence for each one that cannot.

    rewards: the functions. left_out: the sentences; scoring adds one where a reward raises, and leaves it out from then on.
    """

    def __init__(self, run: Path | None = None, names: list[str] | None = None, columns: set[str] | None = None):
        """The rewards of a run's recipe, or those of `names` with the options that the recipe gives them.

        columns: what the rows hold beside the prompt. A reward that needs another is left out, and so is a reward model and one that is not `ready`.
        """
        self.rewards, self.left_out = [], []
        recipe = _recipe_of(run) if run else Recipe()
        for name in recipe.reward_funcs if names is None else names:
            try:
                self.rewards.append(_load(name, recipe.reward_kwargs or {}, columns or set()))
            except Exception as error:  # a reward of the user's own may raise anything while it is imported
                self.left_out.append(f"{name.rpartition('.')[2]} is not given: {_told(error)}")

    def of(
        self, prompts: list, replies: list[str | list[dict]], ids: list[list[int]] | None, columns: dict[str, list] | None = None
    ) -> dict[str, list[float | None]]:
        """Scores of B replies by reward: a number, or None for a reply that it could not judge.

        prompts: B, as chat messages or as text. replies: B, as text, or as messages where the model may call tools. ids: the tokens of each reply;
        None where they are not known, and then a reward that takes them gives None.
        columns: B values each, as the rows have them.
        """
        columns = {name: values for name, values in (columns or {}).items() if name not in bind.DROPPED}
        completions = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in replies] if isinstance(prompts[0], list) else replies
        passed = {"prompts": prompts, "completions": completions, "completion_ids": ids, "trainer_state": None}
        passed |= {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
        found = {}
        for reward in list(self.rewards):
            if ids is None and "completion_ids" in inspect.signature(reward).parameters:
                found[reward.__name__] = [None] * len(replies)
                continue
            try:
                scores = reward(**{**columns, **passed})
                found[reward.__name__] = asyncio.run(scores) if inspect.iscoroutine(scores) else scores
            except Exception as error:
                self.rewards.remove(reward)
                self.left_out.append(f"{reward.__name__} is left out from here on: {_told(error)}")
        return found


def _recipe_of(run: Path) -> Recipe:
    """The run's recipe, with the folders in which its launcher found the user's own modules."""
    plan = run / "plan.json"
    if plan.exists():
        folders = json.loads(plan.read_text(encoding="utf-8"))["trainer"].get("env", {}).get("PYTHONPATH", "")
        sys.path += [folder for folder in folders.split(":") if folder and folder not in sys.path]
    recipe_values(run)  # says so where it cannot be read
    values, _ = RecipeParser().read(["--config", str(run / "recipe.yaml")])
    return build(Recipe, values)


def _load(name: str, options: dict, columns: set[str]):
    if "/" in name:
        raise RecipeError("a reward model is loaded by the trainer alone.")
    function = bind.find(name)
    given = options.get(function.__name__)
    (reward,) = bind.load_rewards(Recipe(reward_funcs=[name], reward_kwargs={function.__name__: given} if given else None))
    if missing := sorted(set(bind.needs(reward)) - (columns - bind.DROPPED)):
        raise RecipeError(f"it needs the column {', '.join(missing)}, which is not there.")
    if hasattr(reward, "ready"):
        reward.ready()
    return reward


def _told(error: Exception) -> str:
    said = (str(error) or "no reason given").splitlines()[0][:300]
    return said if isinstance(error, RecipeError) else f"{type(error).__name__}: {said}"
