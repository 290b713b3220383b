"""Tools in a real run: two ranks that need different numbers of turns, and a model that was taught to call."""

from statistics import mean

import pandas
import pytest
from helpers import ROOT, Launch, is_in_sync, means, run_here

from grpo_launcher.messages import tool_calls


@pytest.fixture(scope="module")
def run(tmp_path_factory, launch) -> Launch:
    """Six steps of configs/quickstart_calculator.yaml."""
    folder = tmp_path_factory.mktemp("tools")
    run_here("grpo_launcher.quickstart.tools", cwd=folder)
    return launch(folder, str(ROOT / "configs/quickstart_calculator.yaml"), "--max_steps", "6").finish()


@pytest.mark.parametrize("measure", ["tool_success", "calculation_accuracy"])
def test_calls_and_answers_become_right(run, measure):
    """More calls that work, and more right answers."""
    first, last = means(run.metrics(), f"rewards/{measure}/mean", first=2, last=3)
    assert last > first + 0.15, f"{measure}: {first:.2f} -> {last:.2f}"


def test_every_completion_belongs_to_its_prompt(run):
    """Server and trainer agree on every token, and a call is about its own prompt."""
    lines = run.metrics()
    assert len(lines) == 6 and is_in_sync(lines)
    table = pandas.concat(map(pandas.read_parquet, sorted((run.run_folder() / "completions").glob("*.parquet"))))
    turns = table.completion.map(lambda messages: sum(message["role"] == "assistant" for message in messages))
    assert {1, 2} <= set(turns) and abs(turns.mean() - mean(line["tools/turns"] for line in lines)) < 1e-6
    calls = [
        (row.prompt[-1]["content"], call)
        for row in table.itertuples()
        for call in tool_calls(list(row.completion))[:1]
    ][-128:]
    assert mean(call.arguments.get("expression", "-") in prompt for prompt, call in calls) > 0.6
    assert len({prompt for prompt, _ in calls}) > 8
    assert all(line["tools/tokens"] > 0 and line["tools/call_frequency"] > 0 for line in lines)
    assert "(turns with tools)" in run.text() and "→ calculator(expression=" in run.text()
