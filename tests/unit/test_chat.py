"""Finding checkpoints, generating with them here and behind a server, and the chat's commands."""

import io
import json
import os
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from chat_models import LORA, TOKENS, WHOLE, chat, generated, spoil
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import SYSTEM, make_run
from transformers import AutoModelForCausalLM

import demo_in_chat
from grpo_launcher.chat.backends import Completion, LocalModel, ServerModel, Turn, converse, line_up
from grpo_launcher.chat.models import Checkpoint, GenerationSettings, choose_checkpoints, find_checkpoint, run_settings
from grpo_launcher.chat.terminal import Chat
from grpo_launcher.errors import UserError
from grpo_launcher.evaluate import RewardSet
from grpo_launcher.render import Report

GREEDY = GenerationSettings(temperature=0, max_new_tokens=TOKENS)
NO_REWARDS = RewardSet([])
pytestmark = pytest.mark.usefixtures("place")


def write(model, prompt, settings: GenerationSettings = GREEDY) -> Completion:
    """Return a model's completion of one prompt."""
    [(_, completion)] = model.complete([prompt], settings, 1)
    return completion


def local(*names: str) -> list[LocalModel]:
    """Return models that share their memory."""
    return line_up(list(names), None, []).models


def run_demo(capsys, *argv: str) -> tuple[int, str]:
    """Return exit status and output of demo_in_chat.py."""
    try:
        status = demo_in_chat.main(list(argv))
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# Which checkpoints there are


def test_a_run_stands_for_its_base_checkpoints_and_final():
    """Half-written ones are left out, the best one is marked, and steps are in order of their number."""
    chosen, problems, notes = choose_checkpoints([WHOLE, f"{WHOLE}/checkpoint-1", "adapter"])
    names = ["base", "checkpoint-1", "checkpoint-2 (best)", "final", "adapter"]
    assert [checkpoint.name for checkpoint in chosen] == names and problems == {} and notes == []
    assert chosen[-1] == Checkpoint("adapter", "adapter", base="base")
    assert [checkpoint.model for checkpoint in choose_checkpoints([LORA])[0]] == ["base"] * 3


def test_names_are_told_apart_and_many_checkpoints_are_thinned_out():
    """Base, first and final stay; what is left out is named."""
    for number in (2, 3):
        make_run(Path(f"trainOutput/whole/{number}"), "base")
        for name in [*(f"checkpoint-{step}" for step in range(10, 101, 10)), "final-checkpoint"]:
            Path(f"trainOutput/whole/{number}/{name}").mkdir()
            for file in ("model.safetensors", "trainer_state.json"):
                Path(f"trainOutput/whole/{number}/{name}/{file}").touch()
    chosen, _, notes = choose_checkpoints(["trainOutput/whole/2"], per_run=4)
    assert [checkpoint.name for checkpoint in chosen] == ["base", "checkpoint-10", "checkpoint-60", "final"]
    assert len(notes) == 1 and "checkpoint-20, checkpoint-30" in notes[0] and "checkpoint-60" not in notes[0]
    run = Path("trainOutput/whole/3")
    (run / "metrics.jsonl").write_text('{"step": 99}\n{"step": 100}\n')
    chosen, _, notes = choose_checkpoints([str(run)])
    assert chosen[-2].name == "checkpoint-90" and "checkpoint-100, whose weights are those of the final" in notes[0]
    os.utime(run / "checkpoint-100", (2**31, 2**31))  # of a run that goes on
    assert choose_checkpoints([str(run)])[0][-2].name == "checkpoint-100"
    finals = [f"trainOutput/whole/{number}/final-checkpoint" for number in (2, 3)]
    chosen, _, _ = choose_checkpoints([*finals, "trainOutput/whole/3/checkpoint-50"])
    assert [checkpoint.name for checkpoint in chosen] == ["whole/2 final", "whole/3 final", "checkpoint-50"]


def test_two_revisions_of_a_base_are_two_checkpoints():
    """They are kept in memory apart."""
    runs = [Path(f"trainOutput/revisions/{number}") for number in (1, 2)]
    for run, revision in zip(runs, ("main", "v1.0"), strict=True):
        make_run(run, "base", model_revision=revision)
    chosen, _, _ = choose_checkpoints([*map(str, runs)])
    assert [checkpoint.revision for checkpoint in chosen] == ["main", "v1.0"]
    assert chosen[1].model_key == f"{chosen[0].model_key}@v1.0"


def test_what_a_run_wrote_is_found_from_any_folder(place, monkeypatch):
    """Its base, and the files that its tools read; its settings are taken over."""
    Path("corpus.jsonl").write_text('{"text": "nothing"}')
    settings = {"tools": "grpo_launcher.tools.search", "tool_kwargs": '{"search": {"corpus": "corpus.jsonl", "k": 2}}'}
    make_run(Path("trainOutput/search/1"), "base", temperature=0.5, **settings)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    settings = run_settings(place / "trainOutput/search/1")
    assert settings.tool_kwargs == {"search": {"corpus": str(place / "corpus.jsonl"), "k": 2}}
    assert (settings.system_prompt, settings.temperature, settings.max_new_tokens) == (SYSTEM, 0.5, 24)
    assert find_checkpoint(str(place / LORA / "final-checkpoint")).base == str(place / "base")


@pytest.mark.parametrize("content", ["{", "{}", '{"base_model_name_or_path": null}', "[]"])
def test_an_adapter_that_names_no_base_is_refused(content, capsys):
    shutil.copytree("adapter", "lost")
    Path("lost/adapter_config.json").write_text(content)
    assert demo_in_chat.main(["lost", "--prompt", "Hello?"]) == 2
    assert "adapter_config.json names no base model" in capsys.readouterr().err
    assert find_checkpoint("lost", base="base").base == "base"


# Transformers in this process


def test_weights_of_an_older_form_are_a_checkpoint_too():
    """PyTorch's .bin, whole or in parts, of a model and of an adapter. Completions of other weights are not taken."""
    state = load_file("base/model.safetensors")
    for name in ("old", "parts"):
        shutil.copytree("base", name, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(state, "old/pytorch_model.bin")
    parts = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(state)}
    for file in set(parts.values()):
        torch.save({name: state[name] for name in state if parts[name] == file}, f"parts/{file}")
    Path("parts/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    shutil.copytree("adapter", "lora", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file("adapter/adapter_model.safetensors"), "lora/adapter_model.bin")
    ids = {model.name: write(model, chat("Where is the cat?")).token_ids for model in local("old", "parts", "lora")}
    base = generated("base", chat("Where is the cat?"))
    assert ids == {"old": base, "parts": base, "lora": generated("base", chat("Where is the cat?"), "adapter")}
    for name, weights in {"old": "pytorch_model.bin", "lora": "adapter_model.bin"}.items():
        [model] = local(name)
        before = model.fingerprint()
        os.utime(f"{name}/{weights}", (1, 1))
        assert model.fingerprint() != before


def test_adapters_share_one_base_and_generate_what_generate_generates():
    """Switching back and forth changes nothing, and the base without adapters is the base."""
    models = local(LORA)
    completions = {}
    for model in [*models, *reversed(models)]:
        ids = write(model, chat("Where is the cat?")).token_ids
        assert completions.setdefault(model.name, ids) == ids
    assert completions == {
        "base": generated("base", chat("Where is the cat?")),
        "checkpoint-1": generated("base", chat("Where is the cat?"), f"{LORA}/checkpoint-1"),
        "final": generated("base", chat("Where is the cat?"), f"{LORA}/final-checkpoint"),
    }
    [shared] = models[0].pool.models.values()
    count = sum(weight.numel() for name, weight in shared.named_parameters() if "lora_" not in name)
    assert count == AutoModelForCausalLM.from_pretrained("base").num_parameters()


def test_models_that_do_not_fit_together_are_loaded_in_turn(monkeypatch):
    """The one in use alone stays in memory."""
    models = local("base", f"{WHOLE}/final-checkpoint")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 0}))
    for model in models:
        assert write(model, "The cat").token_ids == generated(model.checkpoint.path, "The cat")
    assert list(models[0].pool.models) == [f"{WHOLE}/final-checkpoint"]


def test_a_model_of_the_hub_has_a_size_too(monkeypatch):
    """Its files are not looked for: its config says how many weights it has."""
    [model] = local("base")
    write(model, "The cat")
    for free, kept in {10**9: 1, 1000: 0}.items():
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: type("Memory", (), {"available": free}))
        model.pool._make_room("somebody/model", model.config)
        assert len(model.pool.models) == kept


def test_stop_ends_a_completion_after_the_next_token():
    """What was written stays, and it does not count as truncated. Pieces come before it is whole."""
    [model] = local("base")
    turn, stop, seen = Turn(chat("Where?")[1]["content"], {}), threading.Event(), []
    on_text = seen.append
    [(_, whole)] = model.complete(["The cat"], replace(GREEDY, max_new_tokens=40), 1, None, on_text)
    assert "".join(seen) == whole.text and len(seen) > 3
    for completion in converse(model, [turn], replace(GREEDY, max_new_tokens=1900), NO_REWARDS, stop):
        if len(completion.text) > 10:
            stop.set()
    assert completion.stopped and not completion.truncated and completion.error is None
    assert completion.token_ids == generated("base", chat("Where?")[1:], tokens=completion.tokens)


def test_one_bad_model_does_not_lose_the_others(capsys):
    """Its column says why, the others are there, and the exit status tells."""
    for kind, words in {
        "weights cut short": "SafetensorError",
        "adapter of another model": "does not fit its base",
    }.items():
        bad = spoil(kind)
        status, _ = run_demo(capsys, bad, "base", "--prompt", "Hello?", "--output", f"{kind[:7]}.json")
        [turn] = json.loads(Path(f"{kind[:7]}.json").read_text())["turns"]
        assert (
            status == 1
            and words in turn["completions"]["bad"]["error"]
            and "\n" not in turn["completions"]["bad"]["error"]
        )
        assert turn["completions"]["base"]["text"] and turn["completions"]["base"]["error"] is None
        Path("bad").rename(f"bad {kind}")
    bad = spoil("adapter without base")
    status, text = run_demo(capsys, bad, "base", "--prompt", "Hello?", "--output", "c.json")
    assert status == 1 and "this adapter stands on moved/away" in " ".join(text.split()) and "--base" in text
    assert run_demo(capsys, bad, "--base", "base", "--prompt", "Hello?", "--output", "d.json")[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([f"{WHOLE}/checkpoint-10"], "checkpoint-10: this checkpoint is not whole"),
        (["empty"], "empty: this folder holds no checkpoint"),
        (["--base=~/none", "~/none"], "HOME/none: there is no such folder"),
        (["./nowhere"], "./nowhere: there is no such folder"),
        (["--server", "http://127.0.0.1:9"], "no list of models from http://127.0.0.1:9/v1/models"),
        (["--server", "localhost:8000"], "write http://HOST:PORT"),
        (["base", "--sample", "2"], "--sample: these checkpoints belong to no run"),
        (["base", "--prompts", "none.txt"], "--prompts none.txt: cannot be read"),
        (["base", "--prompt", "Hello?", "--output", "there.md"], "there.md: exists already"),
        (["base", "--temperature", "-1"], "--temperature: -1.0 is less than 0"),
        (["base", "--output", "x"], "--output belongs to"),
    ],
)
def test_what_cannot_be_shown_is_refused(argv, words, capsys):
    """With exit status 2 and one sentence that names it."""
    Path("there.md").touch()
    mode = (
        []
        if {"--sample", "--prompts", "--prompt", "--temperature", "--output"} & set(argv)
        else ["--prompt", "Hello?"]
    )
    status, text = run_demo(capsys, *argv, *mode)
    assert status == 2 and words.replace("HOME", os.environ["HOME"]) in text and "Traceback" not in text


# A chat


def make_chat(*names: str, **settings) -> Chat:
    """Return a greedy chat that prints into a buffer."""
    lineup = line_up(list(names), None, [])
    rewards = RewardSet.of_run(lineup.run)
    settings = replace(lineup.settings, temperature=0, **settings)
    return Chat(lineup.models, rewards, settings, Report("", [""]), Console(file=io.StringIO(), width=100))


def test_a_chat_goes_on_from_each_models_own_completions():
    """/reset and /system begin anew. The run's system prompt comes first, and its rewards rate each completion."""
    session = make_chat(f"{WHOLE}/checkpoint-1", f"{WHOLE}/final-checkpoint")
    for command in ["", "", "/reset", "/system Bark."]:
        if command:
            assert "forgotten" in session.command(*command.partition(" ")[::2])
        session.turn("Where is the cat?")
    first, second, third, fourth = ([each.text for each in turn.completions.values()] for turn in session.report.turns)
    assert first == third and not set(first) & {*second, *fourth}
    history = [*chat("Where is the cat?"), {"role": "assistant", "content": first[1]}, chat("Where is the cat?")[1]]
    last = session.report.turns[1].completions["final"]
    assert last.token_ids == generated(f"{WHOLE}/final-checkpoint", history)
    assert last.rewards == {"length_reward": -abs(50 - len(last.text))}


def test_commands_of_the_chat():
    """Each says what it did, or what is wrong; /save replaces nothing."""
    session = make_chat("base", max_new_tokens=2)
    assert "once there is one" in session.command("/save", "a.md")
    session.turn("Hello?")
    answers = {
        ("/temperature", "warm"): "give a number",
        ("/temperature", "0.7"): "Temperature 0.7",
        ("/dance", ""): "no command /dance",
        ("/help", ""): "forget the conversation",
        ("/save", "a.md"): "Saved a.md",
        ("/save", "a.md "): "exists already",
        ("/save", "a.docx"): "end its name in",
    }
    for (name, value), words in answers.items():
        assert words in session.command(name, value)
    assert session.settings.temperature == 0.7 and "| base |" in Path("a.md").read_text()


# A server


class FakeServer(BaseHTTPRequestHandler):
    """An OpenAI-compatible server. It drops the connection where the prompt says so, and refuses long prompts."""

    def log_message(self, *args):
        """Write nothing."""

    def do_GET(self):
        """List two models."""
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in ("first", "org/tiny")]
        self.answer(200, json.dumps({"object": "list", "data": models}), "application/json")

    def do_POST(self):
        """Stream three words."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        prompt = body["messages"][-1]["content"]
        if len(prompt) > 200:
            self.answer(400, '{"error": {"message": "too long: 2048 tokens, key secret-key"}}', "application/json")
            return
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny"}
        pieces = [{"delta": {"content": word}} for word in ("The ", "cat ", "sat")]
        lines = [json.dumps(chunk | {"choices": [piece | {"index": 0, "finish_reason": None}]}) for piece in pieces]
        if "drop" not in prompt:
            end = {"delta": {}, "index": 0, "finish_reason": "length"}
            usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
            lines += [
                json.dumps(chunk | {"choices": [end]}),
                json.dumps(chunk | {"choices": [], "usage": usage}),
                "[DONE]",
            ]
        missing = 1000 if "drop" in prompt else 0
        self.answer(200, "".join(f"data: {line}\n\n" for line in lines), "text/event-stream", missing)

    def answer(self, status: int, body: str, kind: str, missing: int = 0) -> None:
        """Send a body, of which `missing` bytes never come."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode()) + missing))
        self.end_headers()
        self.wfile.write(body.encode())
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    """Return a running FakeServer; `address` is where."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        server.requests, server.address = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_served_model_writes_and_says_what_went_wrong(server):
    """Sampling is sent as it is, what was not changed is not; the key is in no message."""
    model = ServerModel(f"{server.address}#org/tiny")
    assert model.name == f"tiny at 127.0.0.1:{server.server_port}"
    settings = GenerationSettings(temperature=0.5, top_k=7, max_new_tokens=3, seed=4)
    completions = dict(model.complete([chat("one"), chat("two"), chat("x" * 300)], settings, batch_size=2))
    assert [(each.text, each.tokens, each.truncated) for each in completions.values()].count(
        ("The cat sat", 3, True)
    ) == 2
    assert "too long: 2048 tokens" in completions[2].error and "secret" not in completions[2].error
    sent = next(body for body in server.requests if body["messages"] == chat("two"))
    expected = {"model": "org/tiny", "temperature": 0.5, "max_tokens": 3, "top_k": 7, "seed": 5}
    assert sent.items() >= expected.items() and not {"min_p", "repetition_penalty", "chat_template_kwargs"} & set(sent)

    turn = Turn("drop it", {})
    *_, last = converse(model, [turn], settings, NO_REWARDS, threading.Event())
    assert last.text == "The cat sat" and "went away" in last.error and "\n" not in last.error
    with pytest.raises(UserError, match="no such model"):
        ServerModel(f"{server.address}#other")


def test_a_served_model_beside_a_local_one(server, capsys):
    """In one report; completions of a server are not kept, as it may serve something else next time."""
    argv = [
        "base",
        "--server",
        server.address,
        "--prompt",
        "Hello?",
        "--temperature",
        "0",
        "--overwrite",
        "--output",
        "it.json",
    ]
    assert run_demo(capsys, *argv)[0] == 0
    status, text = run_demo(capsys, *argv)
    assert status == 0 and "1 completions generated, 1 taken" in text
    [turn] = json.loads(Path("it.json").read_text())["turns"]
    assert turn["completions"][f"first at 127.0.0.1:{server.server_port}"]["text"] == "The cat sat"
