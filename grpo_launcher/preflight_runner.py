"""Start the preflight in a child process and read its report. Standard library only: the launcher imports no torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grpo_launcher.errors import UserError
from grpo_launcher.layout import Gpu, Hardware, Layout, Options

PROJECT = Path(__file__).resolve().parent.parent
# They tell a process that it is one of several ranks.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CHILD = """
from grpo_launcher.launch.processes import exit_at_once
from grpo_launcher.slow_imports import quick_imports
with quick_imports():
    from grpo_launcher.preflight import main
main()
exit_at_once(0)
"""


@dataclass
class ModelInfo:
    """What the config says about the model. source: where the number of parameters comes from."""

    parameters: int
    source: str
    context: int | None = None  # tokens; of the encoder and of the decoder each for a seq2seq model
    heads: int | None = None
    is_seq2seq: bool = False
    layers: int = 0
    hidden: int = 0
    vocabulary: int = 0
    trainable: int = 0  # parameters; with LoRA those of the adapter
    reward_parameters: int = 0  # of all models that rewards keep on every rank
    row_tokens: int = 0  # the longest prompt and completion
    row_activations: float = 0  # bytes that the backward pass of such a row needs of the forward pass; 0: not known


@dataclass
class DataInfo:
    """What the dataset holds. None: not known, as in a stream."""

    columns: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    rows: int | None = None
    eval_rows: int | None = None
    longest_prompt: int | None = None  # tokens
    system_prompt: str | None = None  # or the text that every plain-text prompt begins with
    max_prompt: int | None = None  # tokens; longer prompts of a stream are left out
    prompts_mark: int | None = None  # a checksum of the training split's, in their order


@dataclass
class Report:
    """The result of the preflight. problems refuse a run; missing refuses it too, but not a --dry-run."""

    name: str = ""
    values: dict = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    layout: Layout | None = None
    model: ModelInfo | None = None
    data: DataInfo | None = None
    lines: list[str] = field(default_factory=list)  # of the plan, for people
    lighter: str = ""  # settings that take less memory
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    adapter: str | None = None  # to be merged into its base before the run
    torch: str = ""  # its version, what it is built for, and the GPUs that it sees
    rehearsal: "Report | None" = None  # where one was asked for
    recipe_text: str = ""  # the recipe file as it stands; the launcher reads it

    @classmethod
    def from_dict(cls, content: dict) -> "Report":
        """Read what main() wrote."""
        if content.get("rehearsal"):
            content["rehearsal"] = cls.from_dict(content["rehearsal"])
        for name, kind in {"layout": Layout, "model": ModelInfo, "data": DataInfo}.items():
            content[name] = content[name] and kind(**content[name])
        for gpus in ("train_gpus", "server_gpus") if content["layout"] else ():
            setattr(content["layout"], gpus, [Gpu(**gpu) for gpu in getattr(content["layout"], gpus)])
        return cls(**content)


def run_preflight(
    argv: list[str],
    hardware: Hardware,
    options: Options,
    start: Callable = subprocess.Popen,
    rehearsal: str | None = None,
) -> Report:
    """Run preflight() in a child process.

    Args:
        argv: the recipe, as for train.py.
        hardware: what there is, or what is assumed.
        options: the launcher's command line.
        start: starts a process; the launcher's own keeps it from outliving a signal.
        rehearsal: folder for the model of a rehearsal (--doctor), or None for no rehearsal.

    Raises:
        UserError: the child failed. Its traceback is on standard error by then.
    """
    request = {"argv": argv, "hardware": asdict(hardware), "options": asdict(options), "rehearsal": rehearsal}
    env = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    env = {name: value for name, value in env.items() if name not in RANK_VARIABLES}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = start([sys.executable, "-P", "-c", CHILD], env=env | {"DS_ACCELERATOR": "cpu"}, **pipes)
    output, _ = child.communicate(json.dumps(request).encode())
    if not output:  # it comes whole, whatever a user's module does to the exit status after that
        raise UserError("preflight", f"it ended with exit status {child.returncode}", "see its output above")
    return Report.from_dict(json.loads(output))
