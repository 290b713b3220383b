"""train.py without our lockstep: TRL's own tool loop on several ranks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import train
from grpo_launcher.trainer import Trainer

Trainer._needs_lockstep = False
train.run(sys.argv[1:])
