"""The page: what it shows, what it hides before a vote, what it keeps, and that it answers over HTTP."""

import json
import socket
import threading
from types import SimpleNamespace

import gradio
import pytest
from gradio_client import Client
from tiny_models import write_rollouts

from grpo_launcher.chat.backends import Completion
from grpo_launcher.chat.models import GenerationSettings
from grpo_launcher.chat.rollouts_tab import RolloutsTab
from grpo_launcher.chat.web import Page, append_vote, read_votes, win_rates
from grpo_launcher.errors import UserError

SETTINGS = GenerationSettings("Be kind.", temperature=0.5)
REQUEST = SimpleNamespace(session_hash="one page")


class FakeModel:
    """A model that writes the same to every prompt, in pieces."""

    is_seq2seq = False

    def __init__(self, name: str, text: str, error: Exception | None = None):
        self.name, self.text, self.error, self.prompts = name, text, error, []

    def complete(self, prompts, settings, batch_size, stop=None, on_text=None):
        """Write, and raise where the model is to fail."""
        self.prompts.append((prompts[0], settings))
        for word in self.text.split():
            on_text(f"{word} ")
        if self.error:
            raise self.error
        yield 0, Completion(self.text, tokens=2)


class Lengths:
    """Rewards that score minus the length."""

    problems = ("judge is left out.",)

    def score(self, prompts, completions, columns):
        """Return one score."""
        return {"length_reward": [-float(len(completion.text)) for completion in completions]}


@pytest.fixture
def page(tmp_path):
    """Return a function that lays a page of some models out."""

    def make(*models) -> Page:
        made = Page(list(models), Lengths(), SETTINGS, tmp_path)
        made.blocks()
        return made

    return make


def send(page: Page, prompt: str, blind: bool = False, system: str = "Be kind.", conversation=None):
    """Send a prompt; return the conversation after it, and all updates of the page."""
    conversation = conversation or page.new_conversation(blind)
    updates = list(page.send(prompt, blind, system, 0.5, conversation, REQUEST))
    return updates[-1][page.state], updates


def shown(page: Page, update: dict) -> str:
    """Return what an update shows in the columns."""
    chats = [update[chat] for chat in page.chats if chat in update]
    return json.dumps([each if isinstance(each, list) else [each.value, each.label] for each in chats], default=str)


def test_rollouts_by_step_and_by_prompt(tmp_path):
    """The nearest kept step; one prompt's completions in all steps, the best first, as text."""
    run = tmp_path / "run"
    with gradio.Blocks(), gradio.Tab("Rollouts") as tab:
        empty = RolloutsTab(run, gradio.Timer(5), tab)
    assert len(empty.rows(0)) == 0 and list(empty.look(0, 0))[2] == gradio.skip()
    for step in (2, 9):
        rows = [
            {
                "prompt": f"Prompt {number // 2}?",
                "completion": f"<b>Reply {number} of {step}",
                "a": float(number),
                "b": 1.0,
            }
            for number in range(4)
        ]
        write_rollouts(run, step, rows, reward_funcs=["a", "b"], num_generations=2)
    with gradio.Blocks(), gradio.Tab("Rollouts") as tab:
        made = RolloutsTab(run, gradio.Timer(5), tab)
    assert made.rows(3)["completion"].tolist() == [f"<b>Reply {number} of 2" for number in range(4)]
    assert made.rows(8)["reward"].tolist() == [1, 2, 3, 4] and made.rows(8)["a"].tolist() == [0, 1, 2, 3]
    shown = made.across_steps(9, SimpleNamespace(row_value=[2]))
    places = [shown.index(text) for text in ("step 2", "step 9", "Reply 3 of 2", "Reply 2 of 2", "Reply 3 of 9")]
    assert places == sorted(places) and "Reply 0" not in shown and "<b>Reply" not in shown
    assert made.look(-1, 2)[1].value == 2, "nor does the first look move who was quicker"
    newest, slider, figure = made.look(2, 9)
    assert newest == 9 and slider.value == 9 and len(figure.axes) == 2
    write_rollouts(run, 12, rows)
    assert made.look(9, 2)[1].value == 2, "who looks at an older step stays there"
    assert made.look(12, 2) == (gradio.skip(),) * 3


def test_one_models_failure_is_its_own(page):
    """What it wrote before stays, and its next prompt goes on from what is whole."""
    good, half = (
        FakeModel("good", "All is well."),
        FakeModel("half", "Up to here", ConnectionError("the server\nis gone")),
    )
    made = page(half, good)
    conversation, updates = send(made, "How are you?")
    text = shown(made, updates[-1])
    assert (
        "Up to here" in text
        and "half: ConnectionError: the server" in text
        and "judge is left out." in updates[-1][made.hint]
    )
    assert "12 characters, 2 tokens \\u00b7 length_reward \\u221212.00" in text
    send(made, "And now?", conversation=conversation, system="Be short.")
    assert [message["content"] for message in good.prompts[1][0]] == [
        "Be short.",
        "How are you?",
        "All is well.",
        "And now?",
    ]
    assert [message["content"] for message in half.prompts[1][0]] == ["Be short.", "And now?"]
    assert good.prompts[1][1].temperature == 0.5 and isinstance(good.prompts[1][1].seed, int)


def test_no_name_and_no_reward_is_seen_before_the_vote(page, tmp_path):
    """Each order of two of three comes up. A vote names both and is kept once; the page counts it from the file."""
    made = page(FakeModel("alpha", "one"), FakeModel("beta", "two two"), FakeModel("gamma", "three three three"))
    orders = set()
    for _ in range(60):
        conversation, updates = send(made, "Which?", blind=True)
        text = "".join(shown(made, update) for update in updates)
        assert not any(word in text for word in ("length_reward", " s]", "beta", "gamma")) and conversation.can_vote
        orders.add(tuple(conversation.shown))
    assert len(orders) == 6
    update = made.vote("B", conversation)
    names = conversation.shown
    assert f"A: {names[0]}" in shown(made, update) and f"B: {names[1]}" in shown(made, update)
    assert "length_reward" in shown(made, update) and list(update[made.rates]["won"]) in ([0], [1])
    assert "send a prompt for another" in made.vote("A", conversation)[made.hint]
    [line] = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [line["A"], line["B"], line["vote"], line["prompt"]] == [*names, "B", "Which?"]
    assert line["settings"]["system_prompt"] == "Be kind." and isinstance(line["settings"]["seed"], int)
    assert line["completion_A"] == made.models[names[0]].text and line["time"].endswith("+00:00")


def test_a_pair_that_is_not_whole_has_no_vote(page, tmp_path):
    """The names are told, as the error tells one anyway."""
    made = page(FakeModel("alpha", "one", ValueError("out of memory")), FakeModel("beta", "two"))
    conversation, updates = send(made, "Which?", blind=True)
    assert not conversation.can_vote and "No vote" in updates[-1][made.hint] and "alpha" in shown(made, updates[-1])
    made.vote("A", conversation)
    assert not (tmp_path / "votes.jsonl").exists()


def test_a_vote_that_cannot_be_kept_can_be_cast_again(page, tmp_path):
    """The reason is told and the names stay hidden."""
    made = page(FakeModel("alpha", "one"), FakeModel("beta", "two"))
    (tmp_path / "votes.jsonl").mkdir()
    conversation, _ = send(made, "Which?", blind=True)
    update = made.vote("A", conversation)
    assert "Is a directory" in update[made.hint] and conversation.can_vote and not conversation.named


def test_stop_ends_a_completion_and_those_that_would_follow(page):
    """What was written stays; the next model is not asked. Another page's button does nothing here."""
    endless, second = FakeModel("first", ""), FakeModel("second", "never")

    def complete(prompts, settings, batch_size, stop=None, on_text=None):
        on_text("on and on")
        stop.wait(30)
        yield 0, Completion("on and on", tokens=3)

    endless.complete = complete
    made = page(endless, second)
    updates = made.send("Go on", False, "", 1.0, made.new_conversation(False), REQUEST)
    next(updates)
    next(updates)
    made.stop(SimpleNamespace(session_hash="another page"))
    next(updates)
    made.stop(REQUEST)
    *_, last = updates
    assert shown(made, last).count("stopped") == 2 and "on and on" in shown(made, last) and second.prompts == []


def test_curves_are_drawn_when_there_is_more(page, tmp_path):
    """And left alone where the page has seen them."""
    made = page(FakeModel("alpha", "one"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 2.0}\n')
    seen, figure = made.curves(None)
    assert seen and figure is not None and made.curves(seen)[1]["__type__"] == "update"


def test_the_page_answers_over_http(page, tmp_path):
    """A whole prompt through gradio's own server. It answers to this machine's name alone. A busy port is named."""
    made = page(FakeModel("alpha", "one <b>two</b>"))
    thread = threading.Thread(target=made.serve, args=(0,), daemon=True)
    thread.start()
    while not made.address:
        thread.join(0.05)
        assert thread.is_alive()
    client = Client(made.address, verbose=False)
    *_, last = client.submit("Hello?", False, "", 1.0, api_name="/send")
    text = json.dumps(last)
    assert (
        "one &lt;b&gt;two&lt;/b&gt;" in text
        and "length_reward" in text
        and made.models["alpha"].prompts[0][0][0]["content"] == "Hello?"
    )
    with socket.create_connection(("127.0.0.1", int(made.address.rstrip("/").rpartition(":")[2]))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert b" 400 " in connection.recv(100)
    with pytest.raises(UserError, match="--port"):
        page(FakeModel("beta", "two")).serve(int(made.address.rstrip("/").rpartition(":")[2]))
    with pytest.raises(UserError, match="--port 70000"):
        page(FakeModel("beta", "two")).serve(70000)
    gradio.close_all(verbose=False)


@pytest.mark.parametrize(
    ("won", "of", "rate", "interval"),
    [
        (81, 263, "31%", "26% to 37%"),
        (15, 148, "10%", "6% to 16%"),
        (0, 20, "0%", "0% to 16%"),
        (20, 20, "100%", "84% to 100%"),
    ],
)
def test_the_interval_is_wilsons(won, of, rate, interval):
    """The published figures: R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    votes = [{"A": "base", "B": "final", "vote": "B" if number < won else "A"} for number in range(of)]
    assert win_rates(votes).to_numpy().tolist() == [["final", "base", won, of - won, 0, rate, interval]]


def test_a_win_counts_wherever_the_model_stood():
    """Ties are counted apart and move no rate."""
    pairs = [
        ("base", "final", "B"),
        ("final", "base", "A"),
        ("final", "base", "B"),
        ("base", "final", "tie"),
        ("a", "base", "tie"),
    ]
    tied, decided = win_rates([{"A": a, "B": b, "vote": vote} for a, b, vote in pairs]).to_numpy().tolist()
    assert decided[:6] == ["final", "base", 2, 1, 1, "67%"] and tied == ["base", "a", 0, 0, 1, "", ""]


def test_votes_of_two_pages_at_once_are_all_kept(tmp_path):
    """Long lines, in Chinese, from two threads; lines that are no votes are left out."""
    path = tmp_path / "votes.jsonl"
    path.write_text('{"A": "base", "B"\n[]\n{"A": "base", "B": "final", "vote": "C"}\n\n')

    def vote(name: str) -> None:
        for number in range(50):
            append_vote(path, {"A": name, "B": "final", "vote": "A", "completion_A": f"{number}夸\u2028" * 2000})

    threads = [threading.Thread(target=vote, args=(name,)) for name in ("base", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_votes(path)) == 100 and "夸" in path.read_text(encoding="utf-8")
