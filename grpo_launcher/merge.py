"""An adapter to start from: python -m grpo_launcher.merge ADAPTER merges it into its base, as ADAPTER/merged, once.

A run trains a whole model or a new adapter on one, and a vLLM server starts from a whole model: an adapter goes on as part of its base.
"""

import shutil
import sys
import tempfile
from pathlib import Path

ADAPTER = "adapter_config.json"
MERGED = "merged"


def start(name: str) -> str:
    """What a run loads for a model_name_or_path: of an adapter that was merged the folder with the two as one, of anything else the same."""
    merged = Path(name) / MERGED
    return str(merged) if (Path(name) / ADAPTER).exists() and merged.exists() and _newer(merged, Path(name)) else name


def needed(name: str) -> str | None:
    """The adapter that has to be merged before a run can start from it, or None."""
    return name if (Path(name) / ADAPTER).exists() and start(name) == name else None


def merge(adapter: Path) -> None:
    """Write base and adapter as one model, with the adapter's tokenizer, into its own folder `merged`, which appears when it is whole."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoTokenizer

    from grpo_launcher.seq2seq import model_class

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model = model_class(AutoConfig.from_pretrained(base)).from_pretrained(base, dtype="auto" if torch.cuda.is_available() else torch.float32)
    draft = Path(tempfile.mkdtemp(prefix=f".{MERGED}-", dir=adapter))
    try:
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(draft)
        AutoTokenizer.from_pretrained(adapter if (adapter / "tokenizer_config.json").exists() else base).save_pretrained(draft)
        draft.chmod(0o755)
        shutil.rmtree(adapter / MERGED, ignore_errors=True)
        draft.rename(adapter / MERGED)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _newer(merged: Path, adapter: Path) -> bool:
    return merged.stat().st_mtime >= max((file.stat().st_mtime for file in adapter.glob("adapter_model.*")), default=0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / ADAPTER).exists():
        sys.exit(f"usage: python -m grpo_launcher.merge ADAPTER, a folder with {ADAPTER}")
    try:
        merge(Path(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {sys.argv[1]}: the adapter or its base cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}")
    print(f"Wrote {sys.argv[1]}/{MERGED}")
