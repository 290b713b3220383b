"""Reward a completion with a judge's ratings by several criteria, which stand in a YAML file."""

import math
from functools import partial
from pathlib import Path

import yaml

from rewards.judge import Form, check_service, json_texts, rate, read_score, without_thoughts

INSTRUCTIONS = """You rate a reply to a prompt by each of these criteria, independently of the others.
0 means that the reply does not meet it at all, 5 that it does by half, 10 that it does fully.
Answer with a JSON object of these names, each with an integer from 0 to 10, and nothing else."""


async def rubric_reward(
    prompts,
    completions,
    *,
    rubric: str | None = None,
    model: str = "qwen2.5:7b",
    base_url: str = "http://127.0.0.1:11434/v1",
    concurrency: int = 16,
    timeout: float = 60.0,
    retries: int = 3,
    max_tokens: int = 2048,
    **columns,
) -> list[float | None]:
    """Reward the weighted mean of a judge's ratings, all of a completion in one request.

    The mean of each criterion is logged as `rubric/NAME`. Options but `rubric` are those of `judge_reward`.

    Args:
        rubric: YAML file with a list of criteria: {name: brief, weight: 2, text: The reply has one sentence.}
            It must be given. A weight is 1 where there is none.

    Returns:
        B ratings in [0, 10]; None where the judge gave no readable one.

    Source: Gunjal et al. 2025, Rubrics as Rewards (arXiv:2507.17746).
    """
    weights, form = _read_rubric(rubric)
    service = {"model": model, "base_url": base_url, "concurrency": concurrency, "timeout": timeout}
    ratings = await rate(form, prompts, completions, **service, retries=retries, max_tokens=max_tokens)
    rated = [rating for rating in ratings if rating is not None]
    if rated and "log_metric" in columns:
        for name in weights:
            columns["log_metric"](f"rubric/{name}", sum(rating[name] for rating in rated) / len(rated))
    return [None if rating is None else _weighted_mean(rating, weights) for rating in ratings]


def _weighted_mean(rating: dict[str, float], weights: dict[str, float]) -> float:
    return sum(rating[name] * weight for name, weight in weights.items()) / sum(weights.values())


def _read_rubric(path: str | None) -> tuple[dict[str, float], Form]:
    """Return the weight of each criterion by name, and what the judge fills in.

    Raises:
        ValueError: no such file, or a criterion that cannot be used.
    """
    file = Path(path or "").expanduser()
    if not file.is_file():
        raise ValueError(f"rubric_reward: rubric {str(path)!r} is no file. Fix: write a YAML file of criteria.")
    try:
        items = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        items = None
    if not isinstance(items, list) or not items:
        raise ValueError(f"rubric_reward: {file} is no list of criteria. Fix: write - {{name: brief, text: …}}.")
    weights, texts = {}, {}
    for number, item in enumerate(items, 1):
        criterion = item if isinstance(item, dict) else {}
        name, text, weight = criterion.get("name"), criterion.get("text"), criterion.get("weight", 1)
        has_name = isinstance(name, str) and name.isidentifier() and name not in weights
        has_text = isinstance(text, str) and bool(text.strip())
        has_weight = type(weight) in (int, float) and 0 < weight < math.inf
        if not (has_name and has_text and has_weight) or set(criterion) - {"name", "text", "weight"}:
            fix = "give it a name of its own in letters and _, a text, and a weight over 0 or none"
            raise ValueError(f"rubric_reward: criterion {number} of {file} is {item!r:.100}. Fix: {fix}.")
        weights[name], texts[name] = float(weight), text.strip()
    listed = "\n".join(f"- {name}: {text}" for name, text in texts.items())
    return weights, Form("rubric_reward", f"{INSTRUCTIONS}\n\n{listed}", tuple(weights), partial(_read, names=weights))


def _read(answer: str, names) -> dict[str, float] | None:
    """Return the ratings in the JSON object of an answer, or None where one is missing or is no number in [0, 10]."""
    ratings = json_texts(without_thoughts(answer))
    values = {name: read_score(ratings.get(name)) for name in names}
    return None if None in values.values() else values


def _ready(**options) -> None:
    options = rubric_reward.__kwdefaults__ | options
    check_service(_read_rubric(options["rubric"])[1], options)


rubric_reward.ready = _ready
