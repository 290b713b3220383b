"""train.py with the weight sync switched off: the server keeps the base model's weights."""

import sys

import train
from grpo_launcher import weight_sync as disk_sync


def skip(self, metadata, named_params):
    """Take part in gathering the parameters, and send nothing."""
    for _ in named_params:
        pass


disk_sync.DiskSyncClient.update_named_params = skip
train.main(sys.argv[1:])
