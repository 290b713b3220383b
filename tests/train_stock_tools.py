"""train.py with TRL's own class in place of the one that keeps the ranks' turns together."""

import sys

import train
from grpo_launcher import trainer


class Nothing:
    """Mixed in where ToolLockstep would be."""


trainer.ToolLockstep = Nothing
train.main(sys.argv[1:])
