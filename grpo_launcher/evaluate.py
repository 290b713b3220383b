"""Put the same prompts to several models, score what they write, and compare each model with the first one."""

import hashlib
import inspect
import json
import os
import random
import re
import traceback
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

from grpo_launcher import plugins, runs
from grpo_launcher.chat.backends import Completion, Prompt, describe_error, file_mark
from grpo_launcher.chat.models import GenerationSettings, locate
from grpo_launcher.data import FILE_TYPES, check_prompt, load_splits
from grpo_launcher.errors import UserError, first_line
from grpo_launcher.messages import last_reply, tool_calls
from rewards.repetition import distinct_words_reward, ngram_repetition_reward
from rewards.rouge import rouge_reward

COMPLETIONS = runs.ROOT / "completions.parquet"
KEYS = ["checkpoint", "split", "row", "prompt", "columns", "text", "completion", "error"]  # all others are metrics
RESAMPLES = 9999
LEVEL = 0.05
METHOD = (
    f"Means over prompts with 95 % percentile bootstrap intervals ({RESAMPLES} resamples). Differences are from the "
    "first checkpoint, p is of a two-sided paired permutation test (random signs of the differences), Holm-corrected "
    "over all p of a split; * below 0.05. A prompt that a metric could not judge is left out of that metric. "
    "distinct-n is the mean over completions."
)


class RewardSet:
    """The rewards that can score completions outside a run.

    Args:
        names: as in a recipe's reward_funcs.
        options: as in a recipe's reward_kwargs.
        columns: of the rows, beside the prompt.

    Attributes:
        functions: the rewards by name.
        failed: names of those that raised while they scored. They score no more.
        problems: a sentence for each one that is left out. Scoring adds one where a reward raises.
    """

    def __init__(self, names: list[str], options: dict | None = None, columns: list[str] | None = None):
        self.functions, self.problems, self.failed = {}, [], []
        for name in names:
            function_name = re.split(r"[.:/]", name)[-1]
            own_options = {key: value for key, value in (options or {}).items() if key == function_name}
            try:
                (reward,) = plugins.load_rewards([name], own_options, columns=columns or [])
                if isinstance(reward, str):
                    raise UserError(name, "a reward model is loaded by the trainer alone")
                if hasattr(reward, "ready"):
                    reward.ready()
                self.functions[function_name] = reward
            except Exception as error:
                self._leave_out(function_name, error)

    @classmethod
    def of_run(cls, run: Path | None, columns: list[str] | None = None) -> "RewardSet":
        """Load the rewards of a run. Without a run there are none."""
        if run is None:
            return cls([])
        values = runs.load_run(run).values
        rewards = cls(values["reward_funcs"], values["reward_kwargs"], columns)
        if values["environment_factory"]:
            rewards.problems.append("The run's environment is not run here: neither its tools nor its reward.")
        return rewards

    def score(self, prompts: list[Prompt], completions: list[Completion], columns: dict[str, list]) -> dict[str, list]:
        """Return one score a completion by name of the reward, None for what it cannot judge."""
        is_chat = not isinstance(prompts[0], str)
        token_ids = [completion.token_ids for completion in completions]
        keywords = {name: values for name, values in columns.items() if name not in plugins.DROPPED_COLUMNS}
        keywords |= {
            "prompts": prompts,
            "completions": [each.as_messages() if is_chat else each.text for each in completions],
            "completion_ids": token_ids,
        }
        scores = {}
        for name, reward in list(self.functions.items()):
            if None in token_ids and "completion_ids" in inspect.signature(reward).parameters:
                scores[name] = [None] * len(completions)  # a server keeps them to itself
                continue
            try:
                scores[name] = plugins.call_reward(reward, **keywords)
            except Exception as error:
                del self.functions[name]
                self.failed.append(name)
                self._leave_out(name, error)
        return scores

    def _leave_out(self, name: str, error: Exception) -> None:
        fault = traceback.extract_tb(error.__traceback__)[-1]
        self.problems.append(f"{name} is left out: {describe_error(error, f'{fault.filename}:{fault.lineno}')}")


class CompletionCache:
    """Completions that were generated once, in a parquet file. What another process adds meanwhile stays."""

    def __init__(self, path: Path = COMPLETIONS):
        self.path, self.new = path, []
        self.completions = {row["key"]: row["completion"] for row in self._read().to_dict("records")}

    def add(self, key: str, completion: Completion, **columns) -> None:
        """Keep a completion, and columns for people who read the file. It is on disk after the next save."""
        self.completions[key] = json.dumps(asdict(completion), ensure_ascii=False)
        self.new.append(columns | {"key": key, "text": completion.text, "completion": self.completions[key]})

    def save(self) -> None:
        """Write what is new, in one move."""
        if not self.new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        pd.concat([self._read(), pd.DataFrame(self.new)]).drop_duplicates("key").to_parquet(draft)
        draft.replace(self.path)
        self.new = []

    def _read(self) -> pd.DataFrame:
        if not self.path.exists():
            return pd.DataFrame()
        try:
            return pd.read_parquet(self.path).astype({"key": str, "completion": str})
        except (ValueError, KeyError, OSError) as error:
            problem = f"holds no completions that can be read: {first_line(error)}"
            raise UserError(str(self.path), problem, "move it away; they are generated again") from error


def evaluate(
    models: list, rows: dict[str, list[dict]], rewards: RewardSet, settings: GenerationSettings, batch_size: int = 32
) -> pd.DataFrame:
    """Let every model complete every prompt, and score the completions.

    Args:
        models: of chat.backends.
        rows: rows with `prompt` and further columns, by split.
        rewards: further metrics.
        settings: the same for all models. Sampling needs a seed.
        batch_size: completions that are generated at once.

    Returns:
        One row for each model, split and prompt: the columns KEYS, and one for each metric. Where `error` says why
        there is no completion, the metrics are NaN.
    """
    cache, counts, frames = CompletionCache(), Counter(), []
    if settings.temperature == 0:
        settings = replace(settings, seed=None)
    for model in models:
        for split, split_rows in rows.items():
            prompts = [row["prompt"] for row in split_rows]
            try:
                completions = _complete(model, prompts, settings, batch_size, cache, counts)
            except Exception as error:
                completions = [Completion(error=describe_error(error, model.name)) for _ in prompts]
            finally:
                cache.save()
            frame = pd.DataFrame({"checkpoint": model.name, "split": split, "row": range(len(prompts))})
            frame["prompt"], frame["completion"] = prompts, completions
            frame["columns"] = [{name: row[name] for name in row if name != "prompt"} for row in split_rows]
            frame["text"] = [completion.text for completion in completions]
            frame["error"] = pd.Series([completion.error for completion in completions], dtype=object)
            complete = frame["error"].isna()
            if complete.any():
                metrics = measure(frame[complete], rewards)
                frame = frame.join(pd.DataFrame(metrics, index=frame.index[complete], dtype=float))
            frames.append(frame)
    print(f"{counts['generated']} completions generated, {counts['kept']} taken from {cache.path}", flush=True)
    frame = pd.concat(frames, ignore_index=True)
    return frame.drop(columns=rewards.failed, errors="ignore")


def _complete(
    model,
    prompts: list[Prompt],
    settings: GenerationSettings,
    batch_size: int,
    cache: CompletionCache,
    counts: Counter,
) -> list[Completion]:
    """Return a model's completions, from the cache as far as it has them."""
    fingerprint, seen, keys = model.fingerprint(), Counter(), []
    if fingerprint and (files := _tool_files(settings)):
        fingerprint = [*fingerprint, files]
    decoding = json.dumps(asdict(replace(settings, system_prompt=None)))  # the prompts hold it
    for prompt in prompts:
        text = json.dumps(prompt, ensure_ascii=False)
        nth = seen[text] if settings.temperature > 0 else 0  # a prompt that comes twice is sampled twice
        seen[text] += 1
        keys.append(hashlib.sha256(json.dumps([fingerprint, decoding, text, nth]).encode()).hexdigest())
    kept = cache.completions if fingerprint else {}
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in kept}
    counts.update(generated=len(missing), kept=sum(key in kept for key in keys))
    completions, missing_keys = {}, list(missing)
    with tqdm(total=len(missing), desc=model.name, unit="completion", disable=not missing) as bar:
        for index, completion in model.complete(list(missing.values()), settings, batch_size):
            key = missing_keys[index]
            completions[key] = completion
            if fingerprint and not completion.error:
                prompt = json.dumps(missing[key], ensure_ascii=False)
                cache.add(key, completion, checkpoint=model.name, path=model.source, prompt=prompt, settings=decoding)
            bar.update()
    return [completions[key] if key in completions else Completion(**json.loads(kept[key])) for key in keys]


def _tool_files(settings: GenerationSettings) -> list:
    """Return what changes when a file of the tools does: code that a recipe names, or a corpus in an option."""
    names = [tool.rpartition(":")[0] for tool in settings.tools]
    names += [value for options in settings.tool_kwargs.values() for value in options.values()]
    return [file_mark(Path(name)) for name in names if isinstance(name, str) and Path(name).is_file()]


def measure(frame: pd.DataFrame, rewards: RewardSet) -> dict[str, list]:
    """Return one value a completion by metric: rewards, ROUGE where there is a reference, lengths, repetition."""
    completions, rows = list(frame["completion"]), list(frame["columns"])
    shared = set.intersection(*(set(row) for row in rows))
    columns = {name: [row[name] for row in rows] for name in shared}
    metrics = rewards.score(list(frame["prompt"]), completions, columns)
    for name, scores in metrics.items():
        for completion, score in zip(completions, scores, strict=True):
            completion.rewards[name] = score
    messages = [completion.as_messages() for completion in completions]
    texts = [last_reply(each) for each in messages]
    references = columns.get("reference", [None])
    if all(isinstance(reference, str) for reference in references):
        for kind in ("1", "2", "L"):
            metrics[f"ROUGE-{kind}"] = rouge_reward(texts, references, weights={f"rouge{kind}": 1.0})
    metrics["characters"] = [len(text) for text in texts]
    metrics["tokens"] = [completion.tokens for completion in completions]
    metrics["truncated"] = [completion.truncated for completion in completions]
    if any(completion.messages for completion in completions):
        calls = [tool_calls(each) for each in messages]
        metrics["tool calls"] = [len(each) for each in calls]
        metrics["failed tool calls"] = [sum(call.failed for call in each) for each in calls]
    metrics["distinct-1"] = distinct_words_reward(texts)
    for n in (2, 3):
        metrics[f"distinct-{n}"] = [1 + share for share in ngram_repetition_reward(texts, n=n)]
    return metrics


def comparable(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str], list[str]]:
    """Keep what can be compared in pairs.

    Returns:
        The rows of prompts that all models completed, the error of each model that completed nothing of a split, and
        notes.

    Raises:
        UserError: nothing is left.
    """
    failed, notes = {}, []
    for (name, _), rows in frame.groupby(["checkpoint", "split"], sort=False):
        if rows["error"].notna().all():
            failed[name] = rows["error"].iloc[0]
    kept = frame[~frame["checkpoint"].isin(failed)]
    for split, rows in kept[kept["error"].notna()].groupby("split", sort=False):
        left_out, all_rows = rows["row"].unique(), frame[frame["split"] == split]["row"].nunique()
        notes.append(f"{len(left_out)} of {all_rows} prompts of {split} are left out for all: {rows['error'].iloc[0]}")
        kept = kept[(kept["split"] != split) | ~kept["row"].isin(left_out)]
    if kept.empty:
        raise UserError("nothing is left to compare", " ".join([*failed.values(), *notes]))
    return kept, failed, notes


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return means with intervals, and each model's difference from the first one with a test; see METHOD.

    Args:
        frame: of `evaluate`, as far as it is `comparable`.

    Returns:
        One row for each split, metric and checkpoint: n, mean, low, high, difference, difference_low, difference_high,
        p and p_holm. NaN where there are too few values.
    """
    records = []
    for split, rows in frame.groupby("split", sort=False):
        names = rows["checkpoint"].unique()
        for metric in [name for name in frame.columns if name not in KEYS]:
            table = rows.pivot(index="row", columns="checkpoint", values=metric)
            for name in names:
                record = {"split": split, "metric": metric, "checkpoint": name} | _mean_with_interval(table[name])
                record |= dict.fromkeys(["difference", "difference_low", "difference_high", "p"], np.nan)
                if name != names[0]:
                    differences = table[name] - table[names[0]]
                    difference = _mean_with_interval(differences)
                    record["difference"], record["p"] = difference["mean"], permutation_p(differences)
                    record["difference_low"], record["difference_high"] = difference["low"], difference["high"]
                records.append(record)
    summary = pd.DataFrame(records)
    return summary.assign(p_holm=summary.groupby("split")["p"].transform(holm))


def _mean_with_interval(values: pd.Series) -> dict[str, float]:
    """Return n, mean, and the 95 % percentile bootstrap interval of the mean. NaN where there are too few values."""
    values = values.dropna().to_numpy(float)
    if len(values) < 2:
        return {"n": len(values), "mean": values.mean() if len(values) else np.nan, "low": np.nan, "high": np.nan}
    result = stats.bootstrap((values,), np.mean, method="percentile", **_resampling(values))
    interval = result.confidence_interval
    return {"n": len(values), "mean": values.mean(), "low": interval.low, "high": interval.high}


def permutation_p(differences: pd.Series) -> float:
    """Return the p of a mean paired difference this large if signs were chance. NaN for fewer than two pairs."""
    values = differences.dropna().to_numpy(float)
    if len(values) < 2:
        return np.nan
    return stats.permutation_test((values,), np.mean, permutation_type="samples", **_resampling(values)).pvalue


def _resampling(values: np.ndarray) -> dict:
    """Return scipy's options. No table of resamples has more than about a million cells."""
    return {"n_resamples": RESAMPLES, "batch": max(1, 10**6 // len(values)), "rng": np.random.default_rng(0)}


def holm(p: pd.Series) -> pd.Series:
    """Return Holm's step-down correction. NaN stays NaN and does not count."""
    ordered = p.dropna().sort_values()
    corrected = ordered * np.arange(len(ordered), 0, -1)
    return corrected.cummax().clip(upper=1.0).reindex(p.index)


def data_rows(data: str, splits: list[str], limit: int | None = None, config: str | None = None) -> dict[str, list]:
    """Return the first rows of some splits of a dataset.

    Raises:
        UserError: a split that is missing, empty or without prompts.
    """
    try:
        dataset = load_splits(data, config)
    except UserError as error:
        raise UserError(f"data {error.field}", f"cannot be read: {error.problem}", error.fix) from error
    rows, field = {}, f"data {data}"
    for split in splits:
        if split not in dataset:
            raise UserError(field, f"there is no split {split!r}, only {', '.join(dataset)}")
        columns = dataset[split].column_names
        if not len(dataset[split]) or "prompt" not in columns:
            problem = f"its split {split} has no rows with a column prompt, only {', '.join(columns) or 'nothing'}"
            raise UserError(field, problem)
        counts = [name for name in ("prompt_tokens", "prompt_tokenizer") if name in columns]  # of process_dataset.py
        rows[split] = dataset[split].remove_columns(counts).to_list()[:limit]
        for number, row in enumerate(rows[split], 1):
            check_prompt(row["prompt"], isinstance(row["prompt"], list), f"{data}, split {split}, row {number}")
    return rows


def sample_rows(run: Path | None, count: int, seed: int) -> list[dict]:
    """Draw rows of a run's own test split."""
    if run is None:
        raise UserError("--sample", "these checkpoints belong to no run", "give prompts: --prompts FILE")
    values = runs.load_run(run).values
    split = values["dataset_test_split"]
    rows = data_rows(locate(values["dataset_name"], run), [split], config=values["dataset_config"])[split]
    return random.Random(seed).sample(rows, min(count, len(rows)))


def file_rows(path: Path) -> list[dict]:
    """Read prompts: a file of rows with `prompt`, or a text with one prompt a line."""
    if path.suffix.lower() in FILE_TYPES:
        return data_rows(str(path), ["train"])["train"]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}", f"cannot be read: {first_line(error)}", "give UTF-8 text") from error
    rows = [{"prompt": line.strip()} for line in lines if line.strip()]
    if not rows:
        raise UserError(f"--prompts {path}", "holds no prompt")
    return rows
