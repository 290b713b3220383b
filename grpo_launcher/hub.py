"""Whether the Hugging Face Hub can be reached.

Standard library only: it is called before anything of Hugging Face is imported.
"""

import os
import re
import socket
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from urllib.parse import urlsplit


def bypass_proxies() -> None:
    """Ask servers on this machine without a proxy, in this process and in those that it starts."""
    hosts = os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).replace(" ", "").split(",")
    if hosts != ["*"]:  # all hosts, where it stands alone
        hosts = dict.fromkeys([*hosts, "127.0.0.1", "localhost", "::1", "0.0.0.0"])  # noqa: S104  # nothing listens here
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, hosts))
    schemes = "https?|socks5h?" if find_spec("socksio") else "https?"
    proxy = re.compile(rf"((({schemes})://)?([^@/]*@)?([\w.-]+|\[[\da-f:]+\])(:\d{{1,5}})?/?)?", re.IGNORECASE)
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        if not proxy.fullmatch(os.environ[name].strip()):  # with such a one httpx could not even ask 127.0.0.1
            print(f"Warning: {name} is not used: no http://HOST:PORT (socks5:// needs socksio).", file=sys.stderr)
            del os.environ[name]


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
    key = "for what is gated or private accept its terms there and set HF_TOKEN"
    return f"name a local folder or file, or check the name; {key}; the Hub was asked at {endpoint()} ({mirror})"
