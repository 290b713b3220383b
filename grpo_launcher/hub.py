"""Whether the Hub can be asked. Standard library only, and to be called before anything of Hugging Face is imported."""

import os
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit


def endpoint() -> str:
    """The Hub's address, or its mirror's (HF_ENDPOINT)."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def use_cache_if_unreachable(timeout: float = 3) -> None:
    """Set HF_HUB_OFFLINE where the Hub does not answer: its client would retry for a minute before it says so.

    Behind a proxy nothing can be told from here, so nothing is set.
    """
    if "HF_HUB_OFFLINE" in os.environ or any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    address = urlsplit(endpoint())
    reached = []

    def connect():
        with suppress(OSError), socket.create_connection((address.hostname, address.port or {"http": 80}.get(address.scheme, 443)), timeout):
            reached.append(True)

    probe = threading.Thread(target=connect, daemon=True)  # looking up a name heeds no timeout
    probe.start()
    probe.join(timeout)
    if not reached:
        os.environ["HF_HUB_OFFLINE"] = "1"


def hint() -> str:
    """What to say where something of the Hub was not found."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return f"The Hub was not asked ({endpoint()} does not answer, or HF_HUB_OFFLINE is set; HF_ENDPOINT names a mirror): a local folder or file works."
    return f"The Hub was asked at {endpoint()} (HF_ENDPOINT names a mirror); a local folder or file works too."
