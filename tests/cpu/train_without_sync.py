"""train.py with the weight sync switched off: the server keeps the base model's weights."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import train
from grpo_launcher import weight_sync


def skip(self, metadata, named_params):
    """Take part in gathering the parameters, and send nothing."""
    for _ in named_params:
        pass


weight_sync.DiskSyncClient.update_named_params = skip
train.run(sys.argv[1:])
