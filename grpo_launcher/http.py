"""HTTP clients for OpenAI-compatible servers. What runs on this machine is never asked through a proxy."""

import ipaddress
from urllib.parse import urlsplit


def is_local(url: str) -> bool:
    """Whether an address is one of this machine: localhost, 127.0.0.0/8, ::1, or 0.0.0.0 and ::, which lead there."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
