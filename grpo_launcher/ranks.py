"""accelerate launch for the ranks of one machine, which meet at an address that other machines do not reach.

python -m grpo_launcher.ranks [option of accelerate launch ...]
"""

import socket
import sys

from accelerate.commands.launch import main
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

HOST, BACKEND = "127.0.0.1", "loopback"


class Loopback(StaticTCPRendezvous):
    """torch's meeting point of one machine, at a free port of HOST. torch's own listens on all addresses."""

    def __init__(self, params: RendezvousParameters):
        listener = socket.create_server((HOST, 0))
        port = listener.getsockname()[1]
        super().__init__(HOST, port, rank=0, world_size=1, run_id=params.run_id, timeout=600)
        self._store = TCPStore(HOST, port, 1, True, self.timeout, master_listen_fd=listener.detach())

    def get_backend(self) -> str:
        """Return the name by which it is asked for."""
        return BACKEND


if __name__ == "__main__":
    rendezvous_handler_registry.register(BACKEND, Loopback)
    sys.argv[1:1] = ["--rdzv_backend", BACKEND]  # accelerate does not read it from its file
    main()
