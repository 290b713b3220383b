"""The chat as people meet it: in a terminal, on the page in a browser, and with a real vLLM server."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pexpect
import psutil
import pytest
from browser import Browser, chromium
from chat_models import TOKENS, WHOLE, checkpoints, place  # noqa: F401
from helpers import ROOT
from tiny_models import SYSTEM, write_rollouts

import compare_checkpoints
from grpo_launcher.launch.hardware import free_ports

MARKUP = "<img src=x onerror=\"document.title='broken'\"> &lt; *a* 夸"
BLIND = "Blind: two models as A and B, named after your vote"
pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def spawn():
    """Return a function that runs demo_in_chat.py in a terminal of 100 columns. It is killed at the test's end."""
    children = []

    def start(*argv: str) -> pexpect.spawn:
        command = [str(ROOT / "demo_in_chat.py"), *argv]
        env = os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        options = {"dimensions": (40, 100), "encoding": "utf-8", "codec_errors": "replace", "timeout": 240}
        children.append(pexpect.spawn(sys.executable, command, env=env, **options))
        return children[-1]

    yield start
    for child in children:
        child.close(force=True)


def test_a_chat_in_a_terminal(spawn):
    """Completions grow side by side; Ctrl-C ends one and the chat goes on; commands answer; Ctrl-D leaves."""
    child = spawn(
        f"{WHOLE}/checkpoint-1", f"{WHOLE}/final-checkpoint", "--max_new_tokens", "1500", "--temperature", "0"
    )
    child.expect("rewards: length_reward")
    child.expect(f"system prompt: {SYSTEM}")
    child.expect("> ")
    for _ in range(2):
        child.send("Where is the cat? 猫在哪里?\r")
        child.expect(r"[1-9]\d characters[^│]*│[^│]*…")  # the first model writes, the second waits
        child.sendintr()
        child.expect("s, stopped")
        child.expect(r"tokens[^│]*│[^│]*[1-9]\d characters")  # the first has ended, the second writes
        child.sendintr()
        child.expect("s, stopped[^│]*│[^│]*s, stopped")
        child.expect("> ")
    for typed, words in {
        "/temperature warm": "give a number",
        "/temperature 0.7": r"Temperature 0\.7",
        "/reset": "forgotten",
        "/help": "forget the conversation",
        "/save chat.md": "Saved chat.md",
    }.items():
        child.send(f"{typed}\r")
        child.expect(words)
        child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    saved = Path("chat.md").read_text()
    assert saved.count("| checkpoint-1 | final |") == 2 and "猫在哪里?" in saved and "length\\_reward" in saved


def test_the_page_in_a_browser(spawn):
    """A prompt, curves, a blind vote and a second visit; Ctrl-C while a model writes."""
    if not chromium():
        pytest.skip("no Chromium is on the PATH (Debian: apt-get install chromium)")
    run = Path(WHOLE)
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 2.0}\n{"step": 2, "reward": 3.0}\n')
    child = spawn(f"{WHOLE}/checkpoint-1", f"{WHOLE}/final-checkpoint", "--web", "--max_new_tokens", "1000")
    child.expect(r"Open (http://127\.0\.0\.1:\d+/)")
    address = child.match[1]
    with Browser() as browser:
        browser.open(address)
        browser.type("textarea", f"Hello? {MARKUP}")
        browser.press_enter()
        browser.wait("document.querySelector('.bot')?.innerText.length > 60")
        browser.click("Stop")
        browser.wait("(document.body.innerText.match(/stopped]/g) || []).length >= 1")
        browser.wait("document.querySelectorAll('.bot').length == 2")
        assert browser.text().count(MARKUP) == 2 and browser.run("document.title") == "Checkpoints side by side"
        assert browser.run("document.documentElement.scrollWidth") <= 1280
        browser.click("Reset")
        browser.wait("document.querySelectorAll('.bot').length == 0")

        browser.click("Curves")
        picture = "document.querySelector('img[src^=\"data:image\"]')?.src"
        first = browser.wait(picture)
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "reward": 4.0}\n')
        browser.wait(f"{picture} != {json.dumps(first)}")
        assert browser.complaints == []
        assert all(url.startswith((address, "data:", "blob:", "ws:")) for url in browser.asked)

        browser.click("Side by side")
        browser.click(BLIND)
        browser.wait("document.body.innerText.includes('B is better')")
        browser.type("textarea", "Where?")
        browser.click("Send")
        browser.wait("[...document.querySelectorAll('button:enabled')].some(b => b.innerText.trim() == 'B is better')")
        assert "checkpoint-1" not in browser.text() and "length_reward" not in browser.text()
        browser.click("B is better")
        browser.wait("document.body.innerText.includes('The vote is kept')")
        [vote] = [json.loads(line) for line in (run / "votes.jsonl").read_text().splitlines()]
        assert f"A: {vote['A']}" in browser.text() and f"B: {vote['B']}" in browser.text() and vote["vote"] == "B"

        browser.open(address)
        browser.wait(f"document.body.innerText.includes('{'21% to 100%' if vote['B'] == 'final' else '0% to 79%'}')")
        browser.type("textarea", "Hello?")
        browser.press_enter()
        browser.wait("document.querySelectorAll('.bot').length >= 1")
        family = psutil.Process(child.pid).children(recursive=True)
        child.sendintr()
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0 and not any(process.is_running() for process in family)


def test_rollouts_in_a_browser(spawn):
    """Another step, a text to search for, an order, one prompt in all steps; a new step comes by itself."""
    if not chromium():
        pytest.skip("no Chromium is on the PATH (Debian: apt-get install chromium)")
    run = Path(WHOLE)
    for step in (1, 2, 3):
        write_step(run, step)
    child = spawn(f"{WHOLE}/final-checkpoint", "--web")
    child.expect(r"Open (http://127\.0\.0\.1:\d+/)")
    with Browser() as browser:
        browser.open(child.match[1])
        browser.click("Rollouts")
        browser.wait("document.body.innerText.includes('Reply 0 of step 3')")
        browser.wait("document.querySelector('img[src^=\"data:image\"]') !== null")
        browser.type("input[type=number]", "2")
        browser.press_enter()
        browser.wait("document.body.innerText.includes('Reply 0 of step 2')")
        browser.type("input[placeholder='Search...']", "Reply 3")
        browser.wait("!document.body.innerText.includes('Reply 0 of step 2')")
        browser.type("input[placeholder='Search...']", "")
        browser.wait("document.body.innerText.includes('Reply 0 of step 2')")
        first = f"{SEEN}('[role=gridcell]').find(cell => cell.innerText.startsWith('Reply')).innerText"
        assert browser.run(first).startswith("Reply 0")
        browser.click_at(f"{SEEN}('th').find(cell => cell.innerText.trim().startsWith('reward'))")
        browser.click_at(f"{SEEN}('th .cell-menu-button')[0]")
        browser.click("Sort ascending")
        browser.wait(f"{first}.startsWith('Reply 3')")
        browser.click_at(f"{SEEN}('[role=gridcell]').find(cell => cell.innerText.startsWith('Reply 3'))")
        browser.wait(f"{SEEN}('th').map(cell => cell.innerText).join().includes('step 1,step 2,step 3')")
        assert "Reply 2 of step 1" in browser.text() and "Reply 0 of step 1" not in browser.text()
        browser.type("input[type=number]", "3")
        browser.press_enter()
        browser.wait("document.body.innerText.includes('Reply 0 of step 3')")
        write_step(run, 4)
        browser.wait("document.body.innerText.includes('Reply 0 of step 4')")
        assert browser.complaints == [] and browser.run("document.documentElement.scrollWidth") <= 1280


SEEN = "((name) => [...document.querySelectorAll(name)].filter(e => e.getBoundingClientRect().width > 0))"


def write_step(run: Path, step: int) -> None:
    """Write the completions of a step: two prompts, two replies each, the last with the lowest reward."""
    rows = [
        {
            "prompt": f"Prompt {number // 2}?",
            "completion": f"Reply {number} of step {step}.",
            "length_reward": -float(number),
        }
        for number in range(4)
    ]
    write_rollouts(run, step, rows)


def test_a_served_checkpoint_beside_the_same_one_here(tmp_path):
    """Behind a real vLLM server it writes the same, greedily. What does not fit is refused for that prompt alone."""
    [port] = free_ports(1)
    command = [
        sys.executable,
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        f"{WHOLE}/final-checkpoint",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "192", "--generation-config", "vllm"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()[
                    -3000:
                ]
                time.sleep(0.5)
        argv = [f"{WHOLE}/final-checkpoint", "--server", f"http://127.0.0.1:{port}", "--data", "rows", "--rewards"]
        assert compare_checkpoints.main([*argv, "--max_new_tokens", str(TOKENS), "--json", "out.json"]) == 0
        result = json.loads(Path("out.json").read_text())
        here, served = result["splits"]["test"]["metrics"]["tokens"].values()
        assert here["mean"] == served["mean"] and here["n"] == served["n"] == 5
        assert "1 of 6 prompts of test are left out for all: final-checkpoint at" in " ".join(result["notes"])
        assert re.search("the server refused the prompt.*192", " ".join(result["notes"]))
        characters = result["splits"]["test"]["metrics"]["characters"]
        assert (
            abs(characters[f"final-checkpoint at 127.0.0.1:{port}"]["difference"]) <= 1
        )  # half a character at the end
    finally:
        server.terminate()
        server.wait(30)
