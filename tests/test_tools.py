"""Tools: bound, written into the prompt, called over several turns by two ranks that need different numbers of them, and learned to be used."""

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from statistics import mean

import pandas
import pytest
import trl
import yaml
from conftest import ROOT, marked, test_data
from tiny_models import make_model
from transformers import AutoTokenizer
from transformers.utils import get_json_schema

from grpo_launcher.messages import tool_calls, transcript
from grpo_launcher.plugins import load_rewards
from grpo_launcher.bind_tools import load_environment, load_tools, template_options
from grpo_launcher.config import Recipe, RecipeError

MINE = '''
def plain(city: str) -> str:
    """Say what the weather is.

    Args:
        city: A city.
    """
    return "rain"


def bare(city):
    return "rain"


def made(*, unit: str = "C", tokenizer=None):
    if unit not in "CF":
        raise ValueError(f"unit is {unit!r}; C or F")

    def weather(city: str) -> str:
        """Say what the weather is.

        Args:
            city: A city.
        """
        return f"{len(tokenizer.tokenize(city))} {unit}"

    return weather


class weather:
    pass


class Game:
    """A number to find."""

    def reset(self, **row):
        self.tries = 0

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: From 1 to 9.
        """
        self.tries += 1
        return "lower"

    def _hidden(self):
        return 5


class Rated(Game):
    def get_reward(self):
        return -float(self.tries)


class Needy(Game):
    def __init__(self, size):
        pass


class Undescribed(Game):
    def look(self, where):
        return "here"


def guess(number: int) -> str:
    """Guess.

    Args:
        number: From 1 to 9.
    """
    return "lower"
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own."""
    (tmp_path / "mine_tools.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine_tools", None)


@pytest.fixture(scope="module")
def qwen():
    """The Qwen2.5 tokenizer with the template of the Instruct models, in which TRL can read calls; the base models' it does not know."""
    tokenizer = AutoTokenizer.from_pretrained(test_data("qwen2.5_tokenizer"))
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja").read_text()
    return tokenizer


def test_a_setting_is_bound_and_the_model_does_not_see_it(mine, qwen):
    """Only what the model fills in is in the schema; a setting called tokenizer gets the model's."""
    (tool,) = load_tools(Recipe(tools=["mine_tools.made"], tool_kwargs={"made": {"unit": "F"}}), qwen)
    assert tool(city="Taipei") == f"{len(qwen.tokenize('Taipei'))} F"
    assert list(get_json_schema(tool)["function"]["parameters"]["properties"]) == ["city"]


@pytest.mark.parametrize(
    ("tools", "settings", "said"),
    {
        "no such function": (["grpo_launcher.tools.calculator.calculate"], None, "did you mean calculator?"),
        "no such module": (["tool.calculator"], None, "tools: tool.calculator: there is no module"),
        "a setting that is misspelt": (["mine_tools.made"], {"made": {"units": "F"}}, "no setting `units`; did you mean unit?"),
        "a setting that the tool refuses": (["mine_tools.made"], {"made": {"unit": "K"}}, "unit is 'K'; C or F"),
        "the tokenizer as a setting": (["mine_tools.made"], {"made": {"tokenizer": "x"}}, "no setting `tokenizer`"),
        "settings of a tool without any": (["mine_tools.plain"], {"plain": {"city": "x"}}, "has no settings"),
        "settings of no tool": (["mine_tools.plain"], {"other": {}}, "other is none of the tools (plain)"),
        "one that is needed": (["grpo_launcher.tools.search.search"], None, "grpo_launcher.tools.search.search needs corpus"),
        "a corpus that is not there": (["grpo_launcher.tools.search.search"], {"search": {"corpus": "nowhere.jsonl"}}, "nowhere.jsonl"),
        "neither hints nor docstring": (["mine_tools.bare"], None, "mine_tools.bare"),
        "one name twice": (["mine_tools.plain", "mine_tools.plain"], None, "two tools are called plain"),
    }.values(),
    ids=lambda value: None,
)
def test_what_cannot_be_bound_is_refused(tools, settings, said, mine, qwen):
    """Before anything expensive, naming the tool and what to do."""
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_tools(Recipe(tools=tools, tool_kwargs=settings), qwen)


def test_an_environments_methods_are_tools(mine):
    """All public ones but reset and get_reward, beside the recipe's own; and an environment that rates replies is reward enough."""
    recipe = Recipe(tools=["mine_tools.plain"], environment_factory="mine_tools.Rated")
    make, tools = load_environment(recipe, load_tools(recipe, None))
    assert [tool.__name__ for tool in tools] == ["plain", "guess"] and load_rewards(recipe) == []
    assert hasattr(make(), "get_reward") and load_environment(Recipe(tools=["mine_tools.plain"]), tools) == (None, tools)


@pytest.mark.parametrize(
    ("environment", "fields", "said"),
    {
        "no such class": ("mine_tools.Gmae", {}, "environment_factory: mine_tools.Gmae: "),
        "one that wants arguments": ("mine_tools.Needy", {}, "mine_tools.Needy() does not work, and is called without arguments: TypeError"),
        "no reset": ("mine_tools.weather", {}, "mine_tools.weather has no method `reset(**row)`"),
        "a method without hints": ("mine_tools.Undescribed", {}, "environment_factory: mine_tools.Undescribed.look: "),
        "a tool of the same name": ("mine_tools.Game", {"tools": ["mine_tools.guess"]}, "mine_tools.Game and tools both have guess"),
        "no reward at all": ("mine_tools.Game", {"reward_funcs": []}, "reward_funcs: give at least one, or give mine_tools.Game a method `get_reward()`"),
    }.values(),
    ids=lambda value: None,
)
def test_an_environment_that_cannot_be_used_is_refused(environment, fields, said, mine):
    """Before anything expensive, as a tool is."""
    recipe = Recipe(**{"environment_factory": environment, "reward_funcs": ["rewards.length.length_reward"]} | fields)
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_environment(recipe, load_tools(recipe, None))


@pytest.mark.slow
def test_an_environment_is_trained_in(mine, tmp_path, monkeypatch):
    """One process of train.py: the row reaches reset, calls reach the object of their reply, and its reward is logged under its class."""
    make_model(tmp_path / "model", 0)
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"prompt": [{"role": "user", "content": "Guess."}]})] * 4))
    monkeypatch.chdir(tmp_path)
    recipe = {"model_name_or_path": "model", "dataset_name": "rows.jsonl", "environment_factory": "mine_tools.Rated", "max_completion_length": 8}
    recipe |= {"num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 1, "max_tool_calling_iterations": 1}
    (tmp_path / "game.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--config", "game.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [json.loads(line) for line in (tmp_path / "trainOutput/game/1/metrics.jsonl").read_text().splitlines()]
    assert line["rewards/Rated/mean"] == line["reward"] == 0 and line["tools/call_frequency"] == 0


def test_a_template_that_cannot_hold_calls_is_refused_with_those_that_can(qwen):
    """TRL would find out in mid-run, or never."""
    from grpo_launcher.tools.calculator import calculator

    whole = qwen.chat_template
    assert template_options([calculator], qwen) == {"tools": [calculator]}
    for template in ("{% for m in messages %}{{ m.content }}{% endfor %}", whole.replace("<tool_call>", "<call>"), None):
        qwen.chat_template = template
        with pytest.raises(RecipeError, match=r"cannot use tools with the chat template of .*Qwen2\.5, Qwen3, Llama 3\.1"):
            template_options([calculator], qwen)
    qwen.chat_template = whole


CALLED = [
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2 plus 3"}}}]},
    {"role": "tool", "name": "calculator", "content": "{'error': 'unknown name plus'}"},
    {"role": "assistant", "content": "Again.", "tool_calls": [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2 + 3"}}}]},
    {"role": "tool", "name": "calculator", "content": "5"},
    {"role": "assistant", "content": "The answer is 5."},
]


def test_calls_are_read_with_their_results():
    """In order; a call whose result was cut off has none; a plain text has no calls."""
    assert [(call.arguments["expression"], call.result, call.failed) for call in tool_calls(CALLED)] == [
        ("2 plus 3", "{'error': 'unknown name plus'}", True),
        ("2 + 3", "5", False),
    ]
    assert tool_calls(CALLED[:3])[1].result is None and tool_calls("2 + 3 = 5") == []


def test_a_transcript_is_readable():
    """Calls and results a line each."""
    assert transcript(CALLED).splitlines() == [
        '→ calculator(expression="2 plus 3")', "← {'error': 'unknown name plus'}", "Again.", '→ calculator(expression="2 + 3")', "← 5", "The answer is 5.",
    ]  # fmt: skip
    assert transcript("5") == "5"


@pytest.fixture(scope="module")
def called(tmp_path_factory, launch):
    """called(task) → twelve finished steps of two ranks on a small task, by the model that was taught to call tools; each made once."""
    data, finished = tmp_path_factory.mktemp("tools") / "data", {}
    subprocess.run([sys.executable, "-m", "grpo_launcher.quickstart.tools", "--output", str(data)], cwd=ROOT, check=True, capture_output=True)

    def run(task: str):
        if task not in finished:
            folder = tmp_path_factory.mktemp(task)
            (folder / "data").symlink_to(data)
            finished[task] = launch(folder, str(ROOT / f"configs/quickstart_{task}.yaml"), "--max_steps", "12")
            assert finished[task].finish() == 0, finished[task].text()[-4000:]
        return finished[task]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "measures"),
    {"calculator": ["tool_success", "calculation_accuracy"], "search_qa": ["passage_retrieved", "answer_exact"]}.items(),
)
def test_calls_and_answers_become_right(called, task, measures):
    """More calls that work (for a search: that find the passage), and more right answers."""
    lines = called(task).metrics()
    for measure in measures:
        start, *_, end = [mean(line[f"rewards/{measure}/mean"] for line in part) for part in (lines[:2], lines[-4:])]
        assert end > start + 0.2, f"{measure}: {start:.2f} → {end:.2f}"


@pytest.mark.slow
def test_every_completion_belongs_to_its_prompt(called):
    """The ranks loop different numbers of turns, server and trainer agree on every token, and a taught model's calls are about its own prompt."""
    run = called("calculator")
    lines = run.metrics()
    assert len(lines) == 12 and max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-3
    kept = pandas.concat(map(pandas.read_parquet, sorted((run.run_folder() / "completions").glob("*.parquet"))))
    turns = kept.completion.map(lambda messages: sum(one["role"] == "assistant" for one in messages))
    assert {1, 2} <= set(turns) and abs(turns.mean() - mean(line["tools/turns"] for line in lines)) < 1e-6
    calls = [(row.prompt[-1]["content"], call) for row in kept.itertuples() for call in tool_calls(list(row.completion))[:1]][-128:]
    assert mean(call.arguments.get("expression", "-") in question for question, call in calls) > 0.7 and len({question for question, _ in calls}) > 8
    assert all(line["tools/tokens"] > 0 and line["tools/call_frequency"] > 0 for line in lines)
    assert "(turns with tools)" in run.text() and "→ calculator(expression=" in run.text()


@pytest.mark.slow
def test_the_stock_class_mixes_prompts_up(called):
    """The same run with TRL's own class fails, hangs or gives completions to the wrong prompts; when it does not, grpo_launcher/tool_lockstep.py can go."""
    folder = called("calculator").run_folder()
    home, stock = folder.parents[2], folder.parent / "stock"
    stock.mkdir()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (stock / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(stock)}))
    (stock / "accelerate.yaml").write_text((folder / "accelerate.yaml").read_text())
    (stock / "plan.json").write_text((folder / "plan.json").read_text().replace(str(ROOT / "train.py"), str(ROOT / "tests/train_stock_tools.py")))
    script = "import json, pathlib, sys; from grpo_launcher.launch.supervise import supervise; folder = pathlib.Path(sys.argv[1])\n"
    script += "sys.exit(supervise(json.loads((folder / 'plan.json').read_text()), folder, []))"
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRPO_TEST_MARK": mark}
    try:
        status = subprocess.run([sys.executable, "-c", script, str(stock)], cwd=home, env=environment, capture_output=True, timeout=120).returncode
    except subprocess.TimeoutExpired:
        status = None
    finally:
        for process in marked(mark):
            process.kill()
    metrics = stock / "metrics.jsonl"
    differences = [json.loads(line)["sampling/sampling_logp_difference/max"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
    lost = status is None or (status != 0 and "in _tool_call_loop" in (stock / "train.log").read_text())
    assert lost or max(differences) > 1e-2
