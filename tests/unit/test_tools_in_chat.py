"""Tools in chat and comparison: a result goes back to the model, which goes on. Only what it writes is scripted."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console
from tiny_models import make_model, make_run
from transformers.utils import get_json_schema

import compare_checkpoints
import demo_in_chat
from grpo_launcher.chat import backends
from grpo_launcher.chat.backends import Completion, LocalModel, Turn, converse, line_up
from grpo_launcher.chat.models import GenerationSettings
from grpo_launcher.chat.terminal import Chat
from grpo_launcher.evaluate import RewardSet
from grpo_launcher.plugins import load_object
from grpo_launcher.render import Report, figures

RUN = "trainOutput/sums/1"
MY_TOOLS = '''
import threading

HOLD = threading.Event()


def calculator(expression: str) -> str:
    """Calculate.

    Args:
        expression: A sum.
    """
    if "plus" in expression:
        raise ValueError("unknown name plus")
    if expression == "hold":
        HOLD.wait(60)
    return str(sum(map(int, expression.split(" + "))))


async def later(city: str) -> str:
    """Say what the weather is.

    Args:
        city: A city.
    """
    return f"rain in {city}"


def weather(*, unit: str = "C"):
    def forecast(city: str) -> str:
        """Say what the weather is.

        Args:
            city: A city.
        """
        return f"20 {unit}"

    return forecast


def results(completions, **kwargs):
    return [float(sum(message["role"] == "tool" for message in each)) for each in completions]
'''


def call(expression: str, tool: str = "calculator", name: str = "expression") -> str:
    """Return a call as Qwen2.5 writes it."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': {name: expression}})}\n</tool_call>"


SCRIPT = {  # last word of the prompt -> what the model writes in each turn
    "sum": ["I calculate.\n" + call("2 + 3"), "The answer is 5."],
    "fail": [call("2 plus 3"), call("2 + 3"), "The answer is 5."],
    "crash": [call("two"), "I do not know."],
    "nothing": [call("3", "search"), "I do not know."],
    "weather": [call("Paris", "later", "city"), "It rains."],
    "forever": [call("1 + 1")] * 9,
    "hold": [call("hold"), "Held."],
    "plain": ["Hello."],
}
TRANSCRIPTS = {
    "sum": 'I calculate.\n→ calculator(expression="2 + 3")\n← 5\nThe answer is 5.',
    "fail": "→ calculator(expression=\"2 plus 3\")\n← {'error': 'unknown name plus'}\n"
    '→ calculator(expression="2 + 3")\n← 5\nThe answer is 5.',
    "crash": "→ calculator(expression=\"two\")\n← {'error': \"invalid literal for int() with base 10: 'two'\"}\n"
    "I do not know.",
    "nothing": "→ search(expression=\"3\")\n← {'error': 'Tool search not found.'}\nI do not know.",
    "weather": '→ later(city="Paris")\n← rain in Paris\nIt rains.',
    "forever": "\n← 2\n".join(['→ calculator(expression="1 + 1")'] * 4),
    "plain": "Hello.",
}


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Make a run with tools and script what its models write. `prompts` holds what they were given."""
    monkeypatch.chdir(tmp_path)
    Path("my_tools.py").write_text(MY_TOOLS)
    make_model(Path("base"), 0, context=6000)
    tools = [f"my_tools.py:{name}" for name in ("calculator", "later")]
    fields = {"reward_funcs": "my_tools.py:results", "max_tool_calling_iterations": 3, "max_completion_length": 600}
    make_run(Path(RUN), "base", tools=tools, temperature=0.5, **fields)
    make_model(Path(RUN, "final-checkpoint"), 1, context=6000)
    rows = [{"prompt": prompt(word), "reference": "The answer is 5."} for word in ("sum", "fail", "plain")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = []

    def generate(model, prompt_ids, settings, stop, on_text):
        completions = []
        for ids in prompt_ids:
            text = model.tokenizer.decode(ids)
            prompts.append(text)
            question = text.rpartition("<|im_start|>user\nMake a ")[2]
            turns = SCRIPT[question.partition("<|im_end|>")[0]]
            turn = turns[question.count("<|im_start|>assistant") - 1]
            written = model.tokenizer(turn)["input_ids"] + [model.tokenizer.eos_token_id]
            completions.append(written[: settings.max_new_tokens])
            if on_text:
                on_text(model.tokenizer.decode(completions[-1], skip_special_tokens=True))
        return completions

    monkeypatch.setattr(LocalModel, "_generate", generate)
    lineup = line_up([f"{RUN}/final-checkpoint"], None, [])
    return SimpleNamespace(prompts=prompts, model=lineup.models[0], settings=lineup.settings)


def prompt(word: str) -> list[dict]:
    """Return a prompt of SCRIPT."""
    return [{"role": "user", "content": f"Make a {word}"}]


def write(scripted, word: str, **changes) -> Completion:
    """Return the whole completion to a word of SCRIPT."""
    [(_, completion)] = scripted.model.complete([prompt(word)], replace(scripted.settings, **changes), 1)
    return completion


@pytest.mark.parametrize("word", TRANSCRIPTS)
def test_a_call_is_run_and_the_model_goes_on(scripted, word):
    """Until it calls no more, or as often as the recipe allows. What a tool raises is told to the model."""
    completion = write(scripted, word)
    assert completion.text == TRANSCRIPTS[word]
    calculator = load_object("my_tools.py:calculator", "tools")
    assert get_json_schema(calculator)["function"]["description"] in scripted.prompts[0]
    assert len(scripted.prompts) == 1 + TRANSCRIPTS[word].count("←")
    turns = zip(scripted.prompts, scripted.prompts[1:], completion.messages[1::2], strict=False)
    for before, after, message in turns:
        assert after.startswith(before)
        assert f"<tool_response>\n{message['content']}\n</tool_response>" in after[len(before) :]
    tokens = [len(scripted.model.tokenizer(turn)["input_ids"]) + 1 for turn in SCRIPT[word][: len(scripted.prompts)]]
    assert completion.tokens == sum(tokens) and not completion.truncated
    assert len(completion.token_ids) - completion.tokens >= 20 * TRANSCRIPTS[word].count("←")


def test_all_turns_and_results_share_the_tokens(scripted):
    """A result for which there is no room is left out. A turn is cut where the tokens end."""
    whole = write(scripted, "sum")
    first = len(scripted.model.tokenizer(SCRIPT["sum"][0])["input_ids"])
    short = write(scripted, "sum", max_new_tokens=first + 5)
    assert short.text == TRANSCRIPTS["sum"].partition("\n←")[0] and figures(short)[-1] == "ended on a tool call"
    cut = write(scripted, "sum", max_new_tokens=len(whole.token_ids) - 4)
    assert cut.truncated and len(cut.token_ids) == len(whole.token_ids) - 4
    assert "← 5\nThe answer" in cut.text and "5." not in cut.text


def test_results_are_shown_while_the_model_goes_on(scripted):
    """Between what it wrote before and after."""
    pieces = []
    [(_, whole)] = scripted.model.complete([prompt("sum")], scripted.settings, 1, threading.Event(), pieces.append)
    assert "2 + 3" in pieces[0] and pieces[1:] == ["\n← 5\n", "The answer is 5."]
    assert whole.text == TRANSCRIPTS["sum"]


def test_a_tool_that_hangs_can_be_left(scripted, monkeypatch):
    """Stopping ends the wait, the column says why, and the next completion comes."""
    monkeypatch.setattr(backends, "STOP_PATIENCE_S", 0.1)
    stop, turn = threading.Event(), Turn("Make a hold", {})
    for completion in converse(scripted.model, [turn], scripted.settings, RewardSet([]), stop):
        if "hold" in completion.text:
            stop.set()
    assert completion.stopped and "a tool or the model was at work" in completion.error
    load_object("my_tools.py:calculator", "tools").__globals__["HOLD"].set()
    assert write(scripted, "plain").text == "Hello."


def test_a_tool_that_cannot_be_loaded_is_the_columns_problem(scripted):
    """In the words of a recipe's refusal."""
    cases = {
        "no function gone": {"tools": ["my_tools.py:gone"]},
        "no setting units. Fix: did you mean unit?": {
            "tools": ["my_tools.py:weather"],
            "tool_kwargs": {"weather": {"units": "F"}},
        },
    }
    for words, changes in cases.items():
        settings = replace(scripted.settings, **changes)
        *_, completion = converse(scripted.model, [Turn("Make a sum", {})], settings, RewardSet([]), threading.Event())
        assert words in completion.error
    [(_, served)] = [*scripted.model.complete([prompt("plain")], GenerationSettings(temperature=0), 1)]
    assert served.messages is None and served.text == "Hello."


def test_reports_and_chat_go_on_from_calls_and_results(scripted, capsys):
    """The console, Markdown and HTML show them, the reward sees them, and so does the model at the next prompt."""
    assert demo_in_chat.main([f"{RUN}/final-checkpoint", "base", "--prompts", "rows.jsonl", "--output", "it"]) == 0
    assert "← 5" in capsys.readouterr().out
    turns = json.loads(Path("it.json").read_text())["turns"]
    assert [turn["completions"]["base"]["rewards"] for turn in turns] == [
        {"results": 1},
        {"results": 2},
        {"results": 0},
    ]
    assert [message["role"] for message in turns[0]["completions"]["base"]["messages"]][1] == "tool"
    assert all(Path(f"it{suffix}").read_text().count("← 5") == 4 for suffix in (".md", ".html"))
    chat = Chat(
        [scripted.model], RewardSet.of_run(Path(RUN)), scripted.settings, Report("", [""]), Console(quiet=True)
    )
    scripted.prompts.clear()
    chat.turn("Make a sum")
    chat.turn("Make a plain")
    assert len(scripted.prompts) == 3 and scripted.prompts[2].startswith(
        scripted.prompts[1] + "The answer is 5.<|im_end|>"
    )


def test_a_comparison_scores_all_messages(scripted, capfd):
    """Completions are kept with their messages; tools that changed generate anew."""
    argv = [
        f"{RUN}/final-checkpoint",
        "base",
        "--data",
        "rows.jsonl",
        "--splits",
        "train",
        "--output",
        "out",
        "--overwrite",
    ]
    assert compare_checkpoints.main(argv) == 0
    assert "tools calculator, later" in " ".join(capfd.readouterr().out.split())
    metrics = json.loads(Path("out/comparison.json").read_text())["splits"]["train"]["metrics"]
    means = {metric: figures_of["final"]["mean"] for metric, figures_of in metrics.items()}
    assert means["results"] == means["tool calls"] == 1 and means["failed tool calls"] == pytest.approx(1 / 3)
    assert means["characters"] == pytest.approx((16 + 16 + 6) / 3) and means["ROUGE-1"] == pytest.approx(2 / 3)
    rows = pd.read_parquet("trainOutput/completions.parquet")
    kept = json.loads(rows[rows["prompt"].str.contains("fail")]["completion"].iloc[0])
    assert kept["text"] == TRANSCRIPTS["fail"] and kept["messages"][1]["content"] == "{'error': 'unknown name plus'}"
    assert compare_checkpoints.main(argv) == 0 and "0 completions generated, 6 taken" in capfd.readouterr().out
    os.utime("my_tools.py", (2**31, 2**31))
    assert compare_checkpoints.main(argv) == 0 and "6 completions generated, 0 taken" in capfd.readouterr().out
    run_file = Path(RUN, "run.json")
    run_file.write_text(
        run_file.read_text().replace('"max_tool_calling_iterations": 3', '"max_tool_calling_iterations": 1')
    )
    assert compare_checkpoints.main(argv) == 0 and "6 completions generated, 0 taken" in capfd.readouterr().out
