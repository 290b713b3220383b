"""Merge an adapter into its base, as ADAPTER/merged: python -m grpo_launcher.merge ADAPTER

A run trains a whole model or a new adapter on one, and a vLLM server loads a whole model. So a run that starts from an
adapter starts from the merged model.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from grpo_launcher.console import exit_status
from grpo_launcher.errors import UserError, first_line

ADAPTER_CONFIG = "adapter_config.json"
MERGED = "merged"


def merged_path(name: str) -> str:
    """Return what a run loads for `model_name_or_path`: the merged model of an adapter that has one, else `name`."""
    adapter, merged = Path(name), Path(name) / MERGED
    if not (adapter / ADAPTER_CONFIG).exists() or not merged.exists():
        return name
    newest = max((file.stat().st_mtime for file in adapter.glob("adapter_model.*")), default=0)
    return str(merged) if merged.stat().st_mtime >= newest else name


def needs_merge(name: str) -> str | None:
    """Return `name` where it is an adapter that must be merged before a run can start from it, else None."""
    is_adapter = (Path(name) / ADAPTER_CONFIG).exists()
    return name if is_adapter and merged_path(name) == name else None


def merge(adapter: Path) -> None:
    """Write base and adapter as one model, with the adapter's tokenizer. The folder appears when it is complete."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoTokenizer

    from grpo_launcher.seq2seq import model_class

    config = PeftConfig.from_pretrained(adapter)
    name, revision = config.base_model_name_or_path, config.revision or "main"
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    kind = model_class(AutoConfig.from_pretrained(name, revision=revision))
    base = kind.from_pretrained(name, revision=revision, dtype=dtype)
    draft = Path(tempfile.mkdtemp(prefix=f".{MERGED}-", dir=adapter))
    try:
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(draft)
        has_tokenizer = (adapter / "tokenizer_config.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else name, revision=revision)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)  # mkdtemp makes it readable for this user alone
        shutil.rmtree(adapter / MERGED, ignore_errors=True)
        draft.rename(adapter / MERGED)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main(argv: list[str]) -> None:
    """Merge the adapter that the command line names."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(argv) != 1 or not (Path(argv[0]) / ADAPTER_CONFIG).exists():
        raise UserError("ADAPTER", f"name one folder with {ADAPTER_CONFIG}", "python -m grpo_launcher.merge ADAPTER")
    try:
        merge(Path(argv[0]))
    except (OSError, ValueError) as error:
        problem = f"the adapter or its base cannot be read: {first_line(error)}"
        raise UserError(argv[0], problem, "check base_model_name_or_path in adapter_config.json") from error
    print(f"Wrote {argv[0]}/{MERGED}")


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
