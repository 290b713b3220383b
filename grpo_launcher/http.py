"""HTTP clients for OpenAI-compatible servers. What runs on this machine is never asked through a proxy."""

import ipaddress
import os
from urllib.parse import urlsplit

from grpo_launcher.errors import UserError, first_line


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


def http_client(url: str, **options):
    """Return the `http_client` of an openai.OpenAI that asks `url`; options are those of httpx.Client.

    Raises:
        UserError: a proxy of the environment cannot be used.
    """
    import openai

    return _make_client(openai.DefaultHttpxClient, url, options)


def async_http_client(url: str, **options):
    """Return the same for openai.AsyncOpenAI."""
    import openai

    return _make_client(openai.DefaultAsyncHttpxClient, url, options)


def _make_client(client_class: type, url: str, options: dict):
    if is_local(url):
        return client_class(trust_env=False, **options)
    names = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    try:
        for name in names:
            _ = urlsplit(os.environ[name]).port  # raises ValueError where it is no number
        return client_class(**options)
    except (ImportError, ValueError) as error:
        problem = f"a proxy that cannot be used for {url}: {first_line(error)}"
        raise UserError(" or ".join(names), problem, "write http://HOST:PORT, or unset the variable") from None
