"""The model card of a final checkpoint, made from its run's folder alone; its words stand in card.md."""

import json
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from grpo_launcher.messages import reply, words
from grpo_launcher.callbacks import first_and_last, shorten
from grpo_launcher.seq2seq import saved
from grpo_launcher.report import plot_run
from grpo_launcher.runs import FINAL, label

# Fields of a recipe that the card says elsewhere, or that are this machine's business.
UNSAID = re.compile(r"hub_|vllm_|reward_|model_name|dataset_|(output_dir|run_name|prepare|use_cpu|push_to_hub|weight_sync|sample_every|report_to)$")


class RunCard:
    """A mixin for GRPOTrainer, which writes a draft of a card wherever it saves, and again before it pushes."""

    def create_model_card(self, *args, **kwargs):
        """Put our card into the final checkpoint, over TRL's or peft's; checkpoints before it get none."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and folder.name == FINAL:
            write_card(folder, self.hub_model_id)


def write_card(folder: Path, hub_id: str | None = None) -> None:
    """Write README.md and curves.png into a final checkpoint, over those that are there, and draw its run's own curves.

    hub_id: the checkpoint's name on the Hub, when it is pushed. No path of this machine gets into the card.
    """
    run = folder.parent
    if curves := plot_run(run):
        shutil.copy(curves, folder)
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    values, chosen = yaml.safe_load(text), yaml.safe_load(text.partition("\n# By default")[0])
    base, data, adapter = values["model_name_or_path"], values["dataset_name"], (folder / "adapter_config.json").exists()
    encoder, rewarded = saved(folder), values.get("method") != "sft"
    header = ModelCardData(
        base_model=base if _on_hub(base) else None,
        base_model_relation=("adapter" if adapter else "finetune") if _on_hub(base) else None,
        datasets=[data] if _on_hub(data) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="summarization" if encoder else "text-generation",
        tags=["trl", "grpo" if rewarded else "sft", *(["lora"] if adapter else [])],
    )
    samples, chat = _samples(run / "completions")
    system, versions = values["provenance"]["system_prompt"], values["provenance"]["versions"]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "…"}][0 if system else 1 :]
    weights, options = values.get("reward_weights") or [1.0] * len(values["reward_funcs"]), values.get("reward_kwargs") or {}
    recipe = {name: _public(value) for name, value in chosen.items() if not UNSAID.match(name)}
    recipe |= {"lora_dropout": values["lora_dropout"]} if adapter else {}  # whose default is not TRL's
    card = ModelCard.from_template(
        header,
        template_path=str(Path(__file__).with_name("card.md")),
        name=hub_id or label(run),
        base=_public(base),
        base_on_hub=_on_hub(base),
        data=_public(data),
        changes=first_and_last(run),
        curves=curves,
        samples=samples,
        place=hub_id or _public(f"{values['output_dir']}/{FINAL}"),
        prompt=json.dumps(messages if chat and not encoder else "…", ensure_ascii=False),
        limit=values["max_completion_length"],
        adapter=adapter,
        encoder=encoder,
        rewarded=rewarded,
        rewards=[
            (_public(name), weight, ", ".join(f"{key}: {value}" for key, value in _public(options.get(name.split(".")[-1], {})).items()))
            for name, weight in zip(values["reward_funcs"], weights, strict=True)
            if rewarded
        ],
        recipe=_fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(), "yaml"),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )
    card.save(folder / "README.md")


def _on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _public(value):
    """A value without folders of this machine: of a path that tells where it is, the last part."""
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "..", "file:")) else value


def _samples(folder: Path) -> tuple[list[dict], bool]:
    """A typical reply of the first and of the last step, to the two prompts that are most alike; and whether prompts are chat messages."""
    from pyarrow import parquet

    if not (files := sorted(folder.glob("*.parquet"))):
        return [], True
    steps = [{}, {}]  # prompt → its rows, of the first and of the last step
    for groups, file in zip(steps, (files[0], files[-1]), strict=True):
        for row in parquet.read_table(file).to_pylist():
            groups.setdefault(_asked(row["prompt"]), []).append(row)
    known = {asked: set(words(asked)) for groups in steps for asked in [*groups][:32]}
    pairs = [(first, last) for first in steps[0] if first in known for last in steps[1] if last in known]
    alike = max(pairs, key=lambda pair: len(known[pair[0]] & known[pair[1]]) / max(1, len(known[pair[0]] | known[pair[1]])))
    samples = []
    for groups, asked in zip(steps, alike, strict=True):
        row = sorted(groups[asked], key=lambda row: row["advantage"])[len(groups[asked]) // 2]
        said = reply(row["completion"])
        samples.append({"step": row["step"], "asked": _fenced(shorten(asked)), "length": len(said), "replied": _fenced(shorten(said, 800))})
    return samples, not isinstance(row["prompt"], str)


def _asked(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _fenced(text: str, kind: str = "text") -> str:
    """Text as Markdown leaves it alone, whatever stands in it."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{kind}\n{text}\n{fence}"
