"""Which servers are asked without a proxy, and what is said of a proxy that cannot be used."""

import asyncio
import re

import pytest
from judge_server import JudgeServer

from grpo_launcher import hub
from grpo_launcher.errors import UserError
from grpo_launcher.http import async_http_client, http_client, is_local

ADDRESSES = {
    "http://localhost:8000/v1": True,
    "http://LOCALHOST": True,
    "https://127.0.0.1/v1": True,
    "http://127.8.9.1:8000": True,
    "http://[::1]:8000/v1": True,
    "http://0.0.0.0:8000": True,
    "http://user:password@localhost": True,
    "http://10.0.0.1:8000": False,
    "http://127.example.com": False,
    "http://localhost.example.com": False,
    "https://api.openai.com/v1": False,
    "localhost:8000": False,
    "": False,
}
UNUSABLE = {
    "socks without its package": ("all_proxy", "socks5://127.0.0.1:1080", "socksio"),
    "an unknown scheme": ("http_proxy", "socks4://127.0.0.1:1080", "socks4"),
    "a port that is no number": ("HTTPS_PROXY", "http://proxy:port", "port"),
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """No proxy but those that a test sets."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(("url", "local"), ADDRESSES.items())
def test_addresses_of_this_machine(url, local):
    assert is_local(url) == local


@pytest.mark.parametrize(("name", "proxy", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_proxy_that_cannot_be_used(name, proxy, said, monkeypatch):
    """It is named for servers elsewhere, and nobody asks it for those of this machine."""
    monkeypatch.setenv(name, proxy)
    with JudgeServer() as server, http_client(server.url) as client:
        assert client.get(f"{server.url}/models").status_code == 200

    async def ask(url):
        async with async_http_client(url) as client:
            return await client.get(f"{url}/models")

    with JudgeServer() as server:
        assert asyncio.run(ask(server.url)).status_code == 200
    for make in (http_client, async_http_client):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            make("https://api.example.com/v1")
        assert error.value.field == name and "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["hub-mirror.example", "https//hub-mirror.example", ""])
def test_a_mirror_of_the_hub_without_a_scheme(address, monkeypatch):
    """What to write is told, in place of a word about the network."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert f"HF_ENDPOINT is {address!r}" in hub.hint() and "write https://" in hub.hint()
