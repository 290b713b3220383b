"""Whether the Hugging Face Hub can be reached.

Standard library only: it is called before anything of Hugging Face is imported.
"""

import os
import re
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit


def endpoint() -> str:
    """The Hub's address, or its mirror's (HF_ENDPOINT)."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def use_cache_if_unreachable(timeout: float = 3) -> None:
    """Set HF_HUB_OFFLINE where the Hub does not answer: its client would retry for a minute before it says so.

    Behind a proxy nothing can be found out here, so nothing is set.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if "HF_HUB_OFFLINE" in os.environ or any(os.environ.get(name) for name in proxies):
        return
    address = urlsplit(endpoint())
    port = address.port or (80 if address.scheme == "http" else 443)
    is_reached = threading.Event()

    def connect():
        with suppress(OSError), socket.create_connection((address.hostname, port), timeout):
            is_reached.set()

    probe = threading.Thread(target=connect, daemon=True)  # looking up a name heeds no timeout
    probe.start()
    probe.join(timeout)
    if not is_reached.is_set():
        os.environ["HF_HUB_OFFLINE"] = "1"


def hint() -> str:
    """Return what to do where something of the Hub was not found."""
    if not re.match(r"https?://[^/]", endpoint()):
        return f"HF_ENDPOINT is {endpoint()!r} and no address: write https://HOST"
    mirror = "HF_ENDPOINT names a mirror"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        reason = f"{endpoint()} does not answer, or HF_HUB_OFFLINE is set"
        return f"name a local folder or file; the Hub was not asked ({reason}; {mirror})"
    return f"name a local folder or file, or check the name; the Hub was asked at {endpoint()} ({mirror})"
