"""What lies between this machine and others: proxies, and the address of the Hub."""

import os
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import requests
from helpers import ROOT

from grpo_launcher import hub
from grpo_launcher.launch.supervise import _is_healthy

PROXY = "http://127.0.0.1:9"  # nobody listens there
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "no_proxy", "NO_PROXY")


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    """The address of a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def set_proxies(monkeypatch):
    """A function that sets proxies, and nothing else of the kind."""

    def put(**proxies: str) -> None:
        for name in PROXIES:
            monkeypatch.setenv(name, "")  # so that it is as before after the test
            monkeypatch.delenv(name)
        for name, value in proxies.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    "proxies",
    [
        {"http_proxy": PROXY},
        {"HTTP_PROXY": PROXY, "ALL_PROXY": PROXY, "NO_PROXY": "intranet, .example.org"},
        {"http_proxy": PROXY, "no_proxy": ""},
        {"all_proxy": "socks5://127.0.0.1:9"},
        {"ALL_PROXY": "socks://127.0.0.1:9", "http_proxy": PROXY},
    ],
)
def test_a_server_on_this_machine_is_asked_without_a_proxy(proxies, url, set_proxies):
    """By the clients of the launcher, of TRL, and of judge and chat. What was exempt before stays so."""
    set_proxies(**proxies)
    hub.bypass_proxies()
    hub.bypass_proxies()
    assert _is_healthy(url)
    assert (
        urllib.request.urlopen(url).status
        == requests.get(url, timeout=9).status_code
        == httpx.get(url).status_code
        == 200
    )
    exempt = os.environ["no_proxy"].split(",")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] and len(exempt) == len(set(exempt))
    assert {host.strip() for host in proxies.get("NO_PROXY", "").split(",") if host} <= set(exempt)
    if "socks" not in str(proxies):
        with pytest.raises(httpx.ConnectError):
            httpx.get("http://a.example")


def test_every_process_of_the_project_is_prepared(url, set_proxies):
    """By the import of the package alone."""
    set_proxies(http_proxy=PROXY)
    code = f"import grpo_launcher, urllib.request; urllib.request.urlopen({url!r})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "proxy", ["socks://h:1080", "socks4://h:1080", "http://:80", "http://h:port", "a b", "ftp://h:1"]
)
def test_a_proxy_that_cannot_be_used_is_told_in_one_line(proxy, set_proxies, capsys):
    """Once, and without its address, which may hold a password."""
    set_proxies(HTTPS_PROXY=proxy)
    hub.bypass_proxies()
    hub.bypass_proxies()
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("Warning: HTTPS_PROXY is not used: ") and proxy not in line and "HTTPS_PROXY" not in os.environ
    )
    httpx.Client().close()


@pytest.mark.parametrize("proxy", ["", "h:3128", "http://u:p%40@h.example:3128/", "https://[::1]:3128", "HTTP://h"])
def test_other_proxies_stay(proxy, set_proxies, capsys):
    set_proxies(https_proxy=proxy, no_proxy="*")
    hub.bypass_proxies()
    assert (os.environ["https_proxy"], os.environ["no_proxy"]) == (proxy, "*") and capsys.readouterr().err == ""
    httpx.Client().close()


@pytest.mark.parametrize("endpoint", ["hub-mirror.example", "hub-mirror.example/hf", ""])
def test_an_address_of_the_hub_without_its_scheme_is_told(endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert repr(endpoint) in hub.hint() and "write https://" in hub.hint() and "was not asked" not in hub.hint()
    monkeypatch.setenv("HF_ENDPOINT", "https://hub-mirror.example")
    assert "https://hub-mirror.example" in hub.hint() and "HF_ENDPOINT names a mirror" in hub.hint()


def test_a_command_is_not_confused_by_files_of_the_working_directory(tmp_path):
    """`python -m` looks there first. An installed project is started from anywhere, also from its own folder."""
    for name in ("tempfile", "shutil", "logging", "re", "urllib", "socket"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} of the user')")
    command = [sys.executable, "-m", "grpo_launcher.merge", "--help"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for folder in (tmp_path, ROOT):
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "Merge an adapter" in done.stdout, done.stderr
