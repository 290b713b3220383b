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
# peft imports bitsandbytes where it finds it, which takes a quarter of the preflight's time. Nothing is quantised.
CHILD = """import sys
sys.modules["bitsandbytes"] = None
from grpo_launcher.preflight import main
del sys.modules["bitsandbytes"]
main()"""


@dataclass
class ModelInfo:
    """What the config says about the model. source: where the number of parameters comes from."""

    parameters: int
    source: str
    context: int | None = None  # tokens; of the encoder and of the decoder each for a seq2seq model
    heads: int | None = None
    is_seq2seq: bool = False


@dataclass
class DataInfo:
    """What the dataset holds. None: not known, as in a stream."""

    columns: list[str] = field(default_factory=list)
    rows: int | None = None
    eval_rows: int | None = None
    longest_prompt: int | None = None  # tokens
    system_prompt: str | None = None  # or the text that every plain-text prompt begins with
    max_prompt: int | None = None  # tokens; longer prompts of a stream are left out


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
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    adapter: str | None = None  # to be merged into its base before the run

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what main() wrote."""
        content = json.loads(text)
        for name, kind in {"layout": Layout, "model": ModelInfo, "data": DataInfo}.items():
            content[name] = content[name] and kind(**content[name])
        for gpus in ("train_gpus", "server_gpus") if content["layout"] else ():
            setattr(content["layout"], gpus, [Gpu(**gpu) for gpu in getattr(content["layout"], gpus)])
        return cls(**content)


def run_preflight(argv: list[str], hardware: Hardware, options: Options, start: Callable = subprocess.Popen) -> Report:
    """Run preflight() in a child process.

    Args:
        argv: the recipe, as for train.py.
        hardware: what there is, or what is assumed.
        options: the launcher's command line.
        start: starts a process; the launcher's own keeps it from outliving a signal.

    Raises:
        UserError: the child failed. Its traceback is on standard error by then.
    """
    request = json.dumps({"argv": argv, "hardware": asdict(hardware), "options": asdict(options)})
    env = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    env = {name: value for name, value in env.items() if name not in RANK_VARIABLES}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = start([sys.executable, "-P", "-c", CHILD], env=env | {"DS_ACCELERATOR": "cpu"}, **pipes)
    output, _ = child.communicate(request.encode())
    if not output:  # it comes whole, whatever a user's module does to the exit status after that
        raise UserError("preflight", f"it ended with exit status {child.returncode}", "see its output above")
    return Report.from_json(output.decode())
