"""The page in a real browser; and what needs none: what is shown, and what is hidden before a vote."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from browser import Browser, chromium
from conftest import ROOT

from grpo_launcher.chat import markup
from grpo_launcher.chat.checkpoints import CheckpointError, Manner
from grpo_launcher.chat.columns import Absent, End, Reply
from grpo_launcher.chat.page import Page, Talk
from grpo_launcher.chat.web import serve

REQUEST = SimpleNamespace(session_hash="one page")
MARKUP = "<img src=x onerror=\"document.title='broken'\">"


class Says:
    """A column with one reply, which it gives in pieces."""

    def __init__(self, name: str, text: str, breaks: bool = False):
        self.name, self.text, self.breaks, self.asked = name, text, breaks, []

    def stream(self, prompt, manner, stop=None, seed=None):
        """See grpo_launcher/chat/columns.py."""
        self.asked.append((prompt, manner))
        yield ""
        for word in self.text.split():
            yield f"{word} "
        if self.breaks:
            raise ConnectionError("the server\nis gone")
        return End(self.text, [1, 2], 2, False)


class Lengths:
    """Rewards like those of grpo_launcher.chat.scores."""

    left_out = ("judge is not given.",)

    def of(self, prompts, texts, ids):
        """Minus the length."""
        return {"length_reward": [-float(len(text)) for text in texts]}


@pytest.fixture
def page(tmp_path):
    """page(*columns) → a Page of them, laid out."""

    def make(*columns):
        made = Page(list(columns), Lengths(), Manner("Be kind.", temperature=0.5), tmp_path)
        made.blocks()
        return made

    return make


def send(page: Page, prompt: str, blind: bool = False, system: str = "Be kind.", talk: Talk | None = None) -> tuple[Talk, list[dict]]:
    """(the talk after a prompt, all that the page was sent)."""
    sent = list(page.send(prompt, blind, system, 0.5, talk or page._fresh(blind), REQUEST))
    return sent[-1][page.talk], sent


def shown(page: Page, update: dict) -> str:
    """All columns as HTML."""
    return "".join(getattr(update[view], "value", update[view]) for view in page.views if view in update)


def test_what_is_said_is_text(page):
    """Tags, entities and templates in a prompt, a reply, a name and an error arrive as they were written."""
    evil = MARKUP + "&lt; ${1} {{value}} `夸`"
    updates = send(page(Says(f"a{evil}", evil), Absent(f"b{evil}", evil)), evil)[1]
    assert len(updates) >= 3
    for update in updates:
        assert "<img" not in "".join(str(getattr(value, "value", value)) for value in update.values() if not isinstance(value, Talk))
    for turn in (Reply("a", evil), Reply("a", problem=evil)):
        assert (
            markup.column(evil, [(evil, turn)], True).count("&lt;img src=x onerror=&quot;document.title=&#x27;broken&#x27;&quot;&gt;&amp;lt; ${1} {{value}}")
            == 3
        )


def test_one_columns_failure_is_its_own(page):
    """In one line; what was said before it stays, and the next prompt goes on from what is whole."""
    good = Says("good", "All is well.")
    made = page(Absent("gone", "gone: there is no\nsuch folder."), Says("half", "Up to here", breaks=True), good)
    talk, sent = send(made, "How are you?")
    html = shown(made, sent[-1])
    assert '<div class="problem">gone: there is no such folder.</div>' in html
    assert "Up to here" in html and '<div class="problem">half: ConnectionError: the server</div>' in html
    assert "12 characters, 2 tokens · length_reward −12.00 · " in html and "judge is not given." in sent[-1][made.hint]
    send(made, "And now?", talk=talk, system="Be short.")
    assert [message["content"] for message in good.asked[1][0]] == ["Be short.", "How are you?", "All is well.", "And now?"]
    assert [message["content"] for message in made.columns[1].asked[1][0]] == ["Be short.", "And now?"]
    assert good.asked[1][1].system_prompt == "Be short."


def test_no_name_and_no_reward_is_seen_before_the_vote(page, tmp_path):
    """Each of six orders of two of three that can answer comes up; a vote names both, is kept once, and the next prompt hides them again."""
    made = page(Absent("gone", "gone"), Says("alpha", "one"), Says("beta", "two two"), Says("gamma", "three three three"))
    orders = set()
    for _ in range(60):
        talk, sent = send(made, "Which?", blind=True)
        seen = "".join(shown(made, update) for update in sent)
        assert not any(word in seen for word in ("alpha", "beta", "gamma", "length_reward", " s</div>"))
        assert talk.open
        orders.add(tuple(talk.shown))
    assert len(orders) == 6
    told = made.vote("B", talk)
    assert [f"{letter}: {made.columns[index].name}" in shown(made, told) for letter, index in zip("AB", talk.shown, strict=True)] == [True, True]
    assert "length_reward" in shown(made, told) and "win rate" in told[made.rates]
    assert "win rate" in page(*made.columns).standings(), "it is counted from the file"
    assert "send a prompt for another" in made.vote("A", talk)[made.hint]
    (line,) = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    a, b = (made.columns[index] for index in talk.shown)
    assert [line[key] for key in ("A", "B", "vote", "prompt", "system_prompt")] == [a.name, b.name, "B", "Which?", "Be kind."]
    assert [line["reply_A"], line["reply_B"]] == [a.text, b.text]
    assert line["sampling"]["temperature"] == 0.5 and isinstance(line["sampling"]["seed"], int) and line["time"].endswith("+00:00")


def test_a_pair_that_is_not_whole_has_no_vote(page, tmp_path):
    """The names are told, as the error tells one anyway."""
    made = page(Says("alpha", "one", breaks=True), Says("beta", "two"))
    talk, sent = send(made, "Which?", blind=True)
    assert not talk.open and "No vote" in sent[-1][made.hint] and "alpha" in shown(made, sent[-1])
    made.vote("A", talk)
    assert not (tmp_path / "votes.jsonl").exists()


def test_a_vote_that_cannot_be_kept_is_not_lost_silently(page, tmp_path):
    """The names stay hidden, so that the vote can be cast again."""
    made = page(Says("alpha", "one"), Says("beta", "two"))
    (tmp_path / "votes.jsonl").mkdir()
    talk, _ = send(made, "Which?", blind=True)
    told = made.vote("A", talk)
    assert str(tmp_path / "votes.jsonl") in told[made.hint] and "Is a directory" in told[made.hint] and talk.open and not talk.named


def test_stop_ends_the_reply_and_those_that_would_follow(page):
    """The column that speaks keeps what it has said; the next one is not asked."""

    class Endless(Says):
        def stream(self, prompt, manner, stop=None, seed=None):
            yield ""
            while not stop.is_set():
                yield "on and "
            return End("on and on", [1], 1, False)

    made = page(Endless("first", ""), Says("second", "never"))
    sent = made.send("Go on", False, "", 1.0, made._fresh(False), REQUEST)
    for _ in range(5):
        next(sent)
    made.stop(SimpleNamespace(session_hash="another page"))
    next(sent)
    made.stop(REQUEST)
    *_, last = sent
    html = shown(made, last)
    assert html.count("stopped") == 2 and "on and on" in html and "never" not in html and made.columns[1].asked == []


def test_a_busy_port_is_named():
    """And nothing was started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CheckpointError, match=rf"--port {port}: .*Address already in use"):
            serve([], Lengths(), Manner(), None, port)
    with pytest.raises(CheckpointError, match=r"--port 70000: .*0-65535"):
        serve([], Lengths(), Manner(), None, 70000)


WORDS = [MARKUP[:4], "<b>", "&lt;", "${1+1}", "{{value}}", "夸", "good", "walk", "rain", "a", "summer", "longer-than-the-others", "你好", "tea"]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two checkpoints of random weights, whose replies are 400 words drawn from WORDS, and some logged figures."""
    import torch
    import yaml
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("trainOutput") / "length" / "1"
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", chat_template=TEMPLATE)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    for seed, name in enumerate(["checkpoint-1", "checkpoint-2"]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(Qwen2Config(vocab_size=len(vocabulary), max_position_embeddings=512, **sizes, **ends)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "trainer_state.json").write_text("{}")
    recipe = {"model_name_or_path": "checkpoint-1", "max_completion_length": 400, "reward_funcs": ["rewards.length.length_reward"]}
    recipe["provenance"] = {"system_prompt": "a"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log(folder, range(1, 4))
    return folder


def log(folder, steps) -> None:
    """Log some steps of a run."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, "reward": float(step), "kl": step / 100}) + "\n" for step in steps)


@pytest.fixture(scope="module")
def server(run):
    """server(*arguments) → (process, address) of `demo_in_chat.py --web`."""
    started = []

    def start(*arguments):
        command = [sys.executable, str(ROOT / "demo_in_chat.py"), *arguments, "--web", "--port", "0"]
        env = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=run, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True))
        for line in started[-1].stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                return started[-1], found[0]
        raise AssertionError("the page did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    """A browser, or a skip."""
    if not chromium():
        pytest.skip("no Chromium is on the PATH (Debian: apt-get install chromium)")
    with Browser() as made:
        yield made


BLIND = "Blind: two of them as A and B, named after your vote"
SCORED = "[...document.querySelectorAll('.note')].filter(note => note.innerText.includes('length_reward')).length == 2"


@pytest.mark.slow
def test_the_page(run, server, browser):
    """What a reader does with it, from the first prompt to a second visit, and Ctrl-C in mid-reply."""
    process, address = server("checkpoint-1", "checkpoint-2")
    browser.open(address)
    browser.type("#prompt textarea", f"good rain {MARKUP}")
    browser.press_enter()
    browser.wait(SCORED)
    text = browser.text()
    assert text.count("400 tokens") == 2 and text.count("cut off") == 2
    assert text.count(MARKUP) == 2 and all(word in text for word in WORDS), "as they were written"
    assert browser.run("document.title") == "Checkpoints side by side"
    assert browser.run("document.documentElement.scrollWidth") <= 1280, "long words are broken"
    browser.click(BLIND)
    browser.type("#prompt textarea", "walk 夸")
    browser.click("Send")
    browser.click("B is better")
    browser.wait("document.body.innerText.includes('win rate')")
    (vote,) = [json.loads(line) for line in (run / "votes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {vote["A"], vote["B"]} == {"checkpoint-1", "checkpoint-2"} and (vote["vote"], vote["prompt"]) == ("B", "walk 夸")
    assert browser.wait("[...document.querySelectorAll('.said .name')].map(name => name.innerText)") == [f"A: {vote['A']}", f"B: {vote['B']}"]
    assert browser.run("[...document.querySelectorAll('.said .reply')].map(reply => reply.innerText)") == [vote["reply_A"], vote["reply_B"]]
    browser.click(BLIND)
    browser.type("#prompt textarea", "tea")
    browser.press_enter()
    browser.wait("document.querySelector('.asked')?.innerText == 'tea' && document.querySelector('.said .reply')?.innerText.length > 20")
    browser.click("Stop")
    browser.wait("[...document.querySelectorAll('.note')].filter(note => note.innerText.includes('stopped')).length == 2")
    assert "400 tokens" not in browser.text()
    browser.click("Reset")
    browser.wait("document.querySelectorAll('.said').length == 2 && !document.querySelector('.asked')")
    browser.click("Curves")
    source = "document.querySelector('img[src^=\"data:image\"]')?.src"
    first = browser.wait(source)
    assert browser.wait("document.querySelector('img[src^=\"data:image\"]').naturalWidth") > 300
    log(run, range(4, 9))
    browser.wait(f"{source} != {json.dumps(first)}")
    browser.open(f"{address}/?again")
    interval = "21% to 100%" if vote["B"] == "checkpoint-2" else "0% to 79%"  # of checkpoint-2 against checkpoint-1
    browser.wait(f"document.querySelector('.rates')?.innerText.includes('{interval}')")
    assert browser.asked and {url[: len(address) + 1] for url in browser.asked if not url.startswith(("data:", "blob:"))} == {f"{address}/"}
    assert browser.complaints == []

    browser.type("#prompt textarea", "good")
    browser.press_enter()
    browser.wait("document.querySelector('.said .reply')?.innerText.length > 20")
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and process.stdout.read().endswith("Ended.\n")
    assert not any(child.is_running() for child in family)
