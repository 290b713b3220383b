"""HTTP clients for OpenAI-compatible servers. What runs on this machine is never asked through a proxy."""

import os
import re
from urllib.parse import urlsplit

from grpo_launcher.errors import UserError, first_line


def is_local(url: str) -> bool:
    """Whether an address is one of this machine: localhost, 127.0.0.0/8, ::1, or 0.0.0.0, which leads there."""
    host = urlsplit(url).hostname or ""
    return re.fullmatch(r"(.+\.)?localhost|127(\.\d+){1,3}|::1|0\.0\.0\.0", host) is not None


def http_client(url: str, **options):
    """Return the `http_client` of an openai.OpenAI for `url`; a proxy that cannot be used is a UserError."""
    import openai

    return _make_client(openai.DefaultHttpxClient, url, options)


def async_http_client(url: str, **options):
    """Return the same for an openai.AsyncOpenAI."""
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
