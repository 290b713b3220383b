"""A user's code: found by file or by installed module, bound to its options, and checked."""

import asyncio
import importlib.util
import re
import signal
import sys
import traceback
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEMPLATE, make_tokenizer
from transformers.utils import get_json_schema
from trl.trainer.utils import is_async_callable

from grpo_launcher.errors import UserError
from grpo_launcher.plugins import (
    call_reward,
    chat_template_options,
    check_scores,
    load_environment,
    load_object,
    load_rewards,
    load_tools,
    metric_name,
    required_columns,
)

MINE = '''
import sys


def closed(completions):
    return [0.0]


def needs_gold(completions, gold, **columns):
    return [0.0]


def needs_completion(completions, completion, **columns):
    return [0.0]


def short(completions, **columns):
    return [0.0]


def infinite(completions, **columns):
    return [0.0, float("inf")]


def unknown(completions, **columns):
    return [float("nan")] * len(completions)


def text(completions, **columns):
    return ["1"] * len(completions)


async def late(completions, *, score=None, **columns):
    return [score] * len(completions)


def length_reward(completions, *, target=1, **columns):
    return [float(target)] * len(completions)


def strict(completions, *, goal, **columns):
    return [0.0] * len(completions)


def ends(completions, **columns):
    sys.exit(0)


async def ends_late(completions, **columns):
    sys.exit(0)


number = 5


def weather(city: str) -> str:
    """Say what the weather is.

    Args:
        city: A city.
    """
    return "rain"


def bare(city):
    return "rain"


def thermometer(*, unit: str = "C", tokenizer=None):
    if unit not in "CF":
        raise ValueError(f"unit is {unit!r}")

    def measure(city: str) -> str:
        """Say how warm it is.

        Args:
            city: A city.
        """
        return f"{len(tokenizer.tokenize(city))} {unit}"

    return measure


def archive(*, corpus: str):
    return weather


def guess(number: int) -> str:
    """Guess.

    Args:
        number: From 1 to 9.
    """
    return "lower"


class Game:
    """A number to find."""

    def reset(self, **row):
        self.tries = 0

    guess = staticmethod(guess)

    def ask(self, number: int) -> str:
        """Ask for a hint.

        Args:
            number: From 1 to 9.
        """
        return "lower"

    def _hidden(self):
        return 5


class Rated(Game):
    def get_reward(self):
        return -1.0


class Undescribed(Game):
    def look(self, where):
        return "here"


class Still:
    def reset(self, **row):
        pass


class NoReset:
    ask = Game.ask
'''


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Loading a file adds its folder to sys.path, and the module to sys.modules: only for the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("grpo_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def mine(tmp_path) -> str:
    """The path of a file of a user's own."""
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


@pytest.fixture(scope="module")
def tokenizer():
    """A small tokenizer with the chat template of Qwen2.5, in which TRL can read tool calls."""
    return make_tokenizer(TEMPLATE)


@pytest.mark.parametrize("file", ["tools.py", "datasets.py", "chat.py", "queue.py", "colorsys.py", "rewards/mine.py"])
def test_a_users_file_is_loaded_whatever_it_is_called(file, tmp_path, monkeypatch):
    """It neither is replaced by an installed module of its name nor replaces it."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("def own(completions, **columns):\n    return [7.0] * len(completions)\n")
    (reward,) = load_rewards([f"{path}:own"])
    assert reward(completions=["a"]) == [7.0] and metric_name(reward) == "own"
    for name in ("queue", "colorsys"):  # small modules, which may be imported again
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert not hasattr(importlib.import_module(name), "own")
    for name in ("datasets", "rewards", "grpo_launcher.tools", "grpo_launcher.chat"):
        assert not Path(importlib.util.find_spec(name).origin).is_relative_to(tmp_path)


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def name():\n    return {folder!r}\n")
    loaded = [load_object(f"{tmp_path}/{folder}/mine.py:name", "tools") for folder in ("a", "b", "a")]
    assert [function() for function in loaded] == ["a", "b", "a"] and loaded[0] is loaded[2]


def test_a_users_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "my_halves.py").write_text("def half(number):\n    return number / 2\n")
    (tmp_path / "mine.py").write_text("from my_halves import half\ndef f():\n    return half(3)\n")
    assert load_object(f"{tmp_path}/mine.py:f", "tools")() == 1.5
    del sys.modules["my_halves"]


@pytest.mark.parametrize("source", ["import json\n\n1 / 0\n", "import json\n\nimport nothing_of_the_kind\n"])
def test_an_error_inside_a_users_file_shows_file_and_line(source, tmp_path):
    """It is not taken for a file that is not there, neither now nor at a second try."""
    path = tmp_path / "mine.py"
    path.write_text(source)
    for _ in range(2):
        with pytest.raises((ZeroDivisionError, ModuleNotFoundError)) as error:
            load_object(f"{path}:f", "reward_funcs")
        last = traceback.extract_tb(error.value.__traceback__)
        assert (str(path), 3) in [(frame.filename, frame.lineno) for frame in last]


def test_a_missing_dependency_of_an_installed_module_is_named(tmp_path, monkeypatch):
    """It is not the module itself that is missing, even where the two names begin alike."""
    (tmp_path / "nothing_more.py").write_text("import nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="'nothing'"):
        load_object("nothing_more.f", "reward_funcs")


def test_rewards_of_trl_work_by_their_dotted_name():
    """TRL's package is imported lazily, and its rewards take **kwargs."""
    names = ["trl.rewards.think_format_reward", "trl.rewards.accuracy_reward"]
    form, accuracy = load_rewards(names, columns=["prompt", "solution"])
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>\nx\n</think>\ny", "y")]
    assert form(completions=completions, prompts=["p", "p"], trainer_state=None) == [1.0, 0.0]
    assert metric_name(accuracy) == "accuracy_reward" and required_columns(accuracy) == ["solution"]
    if importlib.util.find_spec("math_verify"):
        completions = [[{"role": "assistant", "content": r"So \boxed{4}."}], [{"role": "assistant", "content": "5"}]]
        assert accuracy(completions=completions, solution=["$4$", "$4$"]) == [1.0, 0.0]


CALLABLES = """
import functools


def near(completions, *, target=20, **columns):
    return [float(-abs(target - len(text))) for text in completions]


short = functools.partial(near, target=5)


class Near:
    def __init__(self, target):
        self.target = target

    def __call__(self, completions, **columns):
        return near(completions, target=self.target)

    def ready(self):
        raise ValueError("asleep")


class Late(Near):
    async def __call__(self, completions, **columns):
        return near(completions, target=self.target)


medium, long, late = Near(50), functools.partial(Near(3)), Late(4)
method, quick = Near(5).__call__, lambda completions, *, points=1, **columns: [points * 1.0 for _ in completions]
"""


def test_partials_and_callable_objects_are_called_as_the_recipe_calls_them(tmp_path):
    """Options and readiness are theirs too. Tools of the kind are refused: a model cannot read their parameters."""
    (tmp_path / "mine.py").write_text(CALLABLES)
    own_names = ["short", "medium", "long", "method", "quick", "late"]
    names = [f"{tmp_path}/mine.py:{name}" for name in own_names]
    *rewards, late = load_rewards(names, {"short": {"target": 6}, "quick": {"points": 3}})
    assert [metric_name(reward) for reward in (*rewards, late)] == own_names
    scores = [reward(completions=["abcd"], prompts=["p"]) for reward in rewards]
    assert scores == [[-2.0], [-46.0], [-1.0], [-1.0], [3.0]]
    assert is_async_callable(late) and asyncio.run(late(completions=["abc"])) == [-1.0]
    with pytest.raises(ValueError, match="asleep"):
        rewards[1].ready()
    for name in names[:2]:
        with pytest.raises(UserError, match="is no function") as error:
            load_tools([name], None, None)
        assert error.value.field == "tools"


@pytest.mark.parametrize("source", ["from json import own", "import rewards.own", "from queue import own as f"])
def test_a_neighbour_that_an_installed_module_hides_is_named(source, tmp_path):
    """Else the traceback would point at the installed module."""
    (tmp_path / "rewards").mkdir()
    for name in ("json.py", "queue.py", "rewards/own.py"):
        (tmp_path / name).write_text("own = f = len")
    (tmp_path / "mine.py").write_text(f"{source}\n\ndef f():\n    pass\n")
    with pytest.raises(UserError, match="hides the one beside it") as error:
        load_object(f"{tmp_path}/mine.py:f", "reward_funcs")
    assert source.split()[1].split(".")[0] in error.value.fix


def test_what_a_neighbour_lacks_is_an_error_of_the_users_own(tmp_path):
    (tmp_path / "own_helpers.py").touch()
    (tmp_path / "mine.py").write_text("from own_helpers import nothing")
    with pytest.raises(ImportError, match="nothing"):
        load_object(f"{tmp_path}/mine.py:f", "reward_funcs")
    del sys.modules["own_helpers"]


LEAVES = """
import os, tempfile
os.chdir("/")
def for_good(completions, **columns):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    return [1.0] * len(completions)
async def while_others_wait(completions, **columns):
    os.chdir("/")
    return [1.0] * len(completions)
"""


def test_a_module_or_reward_that_changes_the_working_directory_harms_nothing(tmp_path, monkeypatch):
    """Even for a folder that is gone afterwards. The paths of a run are relative to where it was started."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(LEAVES)
    for_good, while_others_wait = load_rewards(["mine.py:for_good", "mine.py:while_others_wait"])
    assert Path.cwd() == tmp_path
    assert for_good(completions=["a"]) == asyncio.run(while_others_wait(completions=["a"])) == [1.0]
    assert Path.cwd() == tmp_path


SLOW = """
import asyncio, signal, time
def has_an_alarm(completions, **columns):
    signal.alarm(30)
    signal.alarm(0)
    while True:
        pass
def is_lazy(completions, **columns):
    return map(time.sleep, [60, 60])
def sleeps(completions, **columns):
    time.sleep(60)
def loops(completions, **columns):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass
def resists(completions, **columns):
    while True:
        try:
            time.sleep(60)
        except:
            if time.monotonic() - start > 1:
                raise
async def waits(completions, **columns):
    await asyncio.sleep(60)
async def is_told(completions, **columns):
    raise TimeoutError("of its own")
def quick(completions, **columns):
    return [1.0] * len(completions)
start = time.monotonic()
"""


@pytest.mark.parametrize("name", ["sleeps", "loops", "resists", "has_an_alarm", "is_lazy", "waits"])
def test_a_reward_that_hangs_rates_nothing_within_its_time(name, tmp_path, capsys):
    """Ranks wait for each other: without a limit one reward would hold them all."""
    (tmp_path / "slow.py").write_text(SLOW)
    handler = signal.getsignal(signal.SIGVTALRM)
    slow, quick = load_rewards([f"{tmp_path}/slow.py:{name}", f"{tmp_path}/slow.py:quick"], timeout=0.2)
    scores = slow(completions=["a", "b"])
    assert (asyncio.run(scores) if name == "waits" else scores) == [None, None]
    assert f"Warning: {name} took over 0.2 s" in (printed := capsys.readouterr().out) and "reward_timeout" in printed
    assert quick(completions=["a"]) == [1.0]
    assert signal.getsignal(signal.SIGVTALRM) == handler


def test_columns_of_any_name_reach_an_async_reward(tmp_path):
    (tmp_path / "own.py").write_text("async def f(completions, self, loop, **columns):\n    return [float(self[0])]")
    (reward,) = load_rewards([f"{tmp_path}/own.py:f"])
    assert asyncio.run(reward(completions=["a"], self=["2"], loop=["3"])) == [2.0]


def test_a_timeout_of_the_rewards_own_ends_the_run(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (told,) = load_rewards([f"{tmp_path}/slow.py:is_told"], timeout=60)
    with pytest.raises(TimeoutError, match="of its own"):
        asyncio.run(told(completions=["a"]))


REFUSED_REWARDS = {  # names with MINE for the user's file, other arguments, field, part of the message
    "no file": (["nowhere.py:f"], {}, "reward_funcs", "no file nowhere.py"),
    "no function": (["MINE:needs_golf"], {}, "reward_funcs", "did you mean needs_gold?"),
    "no module": (["rewards.lenght.length_reward"], {}, "reward_funcs", "file.py:function"),
    "file in a folder": (["rewards.mine.score"], {}, "reward_funcs", "here rewards/mine.py:score"),
    "no function of a module": (["rewards.length.lenght_reward"], {}, "reward_funcs", "did you mean length_reward?"),
    "no dot": (["length_reward"], {}, "reward_funcs", "package.module.function"),
    "no **kwargs": (["MINE:closed"], {}, "reward_funcs", "**kwargs"),
    "no such column": (["MINE:needs_gold"], {"columns": ["prompt"]}, "reward_funcs", "needs the column gold"),
    "column that TRL drops": (
        ["MINE:needs_completion"],
        {"columns": ["prompt", "completion"]},
        "reward_funcs",
        "call a gold text reference",
    ),
    "one name twice": (["MINE:length_reward", "rewards.length.length_reward"], {}, "reward_funcs", "length_reward"),
    "no such option": (
        ["rewards.length.length_reward"],
        {"reward_kwargs": {"length_reward": {"taget": 100}}},
        "reward_kwargs",
        "did you mean target?",
    ),
    "text for a number": (
        ["rewards.length.length_reward"],
        {"reward_kwargs": {"length_reward": {"target": "2e2"}}},
        "reward_kwargs",
        "without quotes",
    ),
    "no default": (["MINE:strict"], {"reward_kwargs": {"strict": {"goal": 3}}}, "reward_kwargs", "no default"),
    "no function but a number": (["MINE:number"], {}, "reward_funcs", "number is no function"),
    "a file that ends its process": (["ENDS:f"], {}, "reward_funcs", "sys.exit(0)"),
    "a notebook": (["NOTEBOOK:f"], {}, "reward_funcs", "no file of Python"),
    "options of no reward": (
        ["rewards.length.length_reward"],
        {"reward_kwargs": {"lenght_reward": {}}},
        "reward_kwargs",
        "did you mean length_reward?",
    ),
    "too many weights": (["MINE:short"], {"weights": [1.0, 2.0]}, "reward_weights", "2 weights for 1"),
}


@pytest.mark.parametrize(("names", "arguments", "field", "message"), REFUSED_REWARDS.values(), ids=REFUSED_REWARDS)
def test_a_reward_that_cannot_be_used_is_refused(names, arguments, field, message, mine, tmp_path):
    files = {"MINE": mine, "ENDS": f"{tmp_path}/ends.py", "NOTEBOOK": f"{tmp_path}/mine.ipynb"}
    Path(files["ENDS"]).write_text("import sys\nsys.exit(0)\n")
    Path(files["NOTEBOOK"]).write_text("{}")
    for word, file in files.items():
        names = [name.replace(word, file) for name in names]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_rewards(names, **arguments)
    assert error.value.field == field


@pytest.mark.parametrize("name", ["ends", "ends_late"])
def test_a_reward_that_ends_its_process_is_an_error(name, mine):
    """The run would end with status 0, and without a word."""
    (reward,) = load_rewards([f"{mine}:{name}"])
    with pytest.raises(RuntimeError, match=f"{name} called sys.exit"):
        call_reward(reward, prompts=["p"], completions=["a"])


def test_options_are_bound_and_names_kept(mine):
    """An option reaches the function, async stays async, and a reward model passes through."""
    options = {"length_reward": {"target": 3}, "late": {"score": 0.5}}
    length, late, model = load_rewards(["rewards.length.length_reward", f"{mine}:late", "owner/model"], options)
    assert length(completions=["abcd"], prompts=["p"]) == [-1.0] and length.__name__ == "length_reward"
    assert is_async_callable(late) and asyncio.run(late(completions=["a"], prompts=["p"])) == [0.5]
    assert model == "owner/model" and metric_name(model) == "model"
    assert options["length_reward"] == {"target": 3}, "the recipe's values stay as they are"


@pytest.mark.parametrize(
    ("name", "message"),
    {"short": "1 scores for 2", "infinite": "inf for completion 1", "unknown": "nan for", "text": "'1' for"}.items(),
)
def test_a_bad_score_names_reward_and_completion(name, message, mine):
    (reward,) = load_rewards([f"{mine}:{name}"])
    with pytest.raises(ValueError, match=f"reward {name}: {message}"):
        reward(completions=["a", "b"], prompts=["p", "p"])


NO_SCORES = {
    "a column": np.ones((2, 1)),
    "a tensor's column": torch.ones(2, 1),
    "a row": np.ones((1, 2)),
    "a dict": {0: 0.5, 1: 0.7},
    "a set": {0.5, 0.7},
    "a text": "12",
    "bytes": b"12",
    "one number": np.float64(1),
    "too many": iter([1, 2, 3]),
    "arrays of one element": [np.ones(1), np.ones(1)],
    "texts": np.array(["1", "2"]),
    "an integer without end": [10**400, 1],
    "too large for 32 bits": [0.5, -1e39],
    "a decimal that is no number": [Decimal("NaN"), 1],
    "complex numbers": [1j, 2j],
}


@pytest.mark.parametrize("scores", NO_SCORES.values(), ids=NO_SCORES)
def test_what_is_not_one_number_a_completion_is_refused_by_the_rewards_name(scores):
    """As a whole, before TRL trains on the keys of a dict."""
    with pytest.raises(ValueError, match="reward mine: "):
        check_scores(scores, ["a", "b"], "mine")


SCORES = {
    "a tuple": (1, None),
    "an array": np.array([1, None]),
    "tensors without dimensions": [torch.tensor(1.0), None],
    "numbers of NumPy": [np.int64(1), None],
    "decimals": [Decimal(1), None],
    "fractions": [Fraction(1), None],
    "booleans": [True, None],
    "a generator": (score for score in (1.0, None)),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_scores_become_floats(scores):
    """So that TRL can make one tensor of them, whatever a reward counts with."""
    checked = check_scores(scores, ["a", "b"], "mine")
    assert checked == [1.0, None] and type(checked[0]) is float


def test_a_setting_of_a_tool_is_bound_and_hidden_from_the_model(mine, tokenizer):
    """Only what the model fills in is in the schema. A setting called tokenizer gets the model's."""
    (tool,) = load_tools([f"{mine}:thermometer"], {"thermometer": {"unit": "F"}}, tokenizer)
    assert tool(city="Taipei") == f"{len(tokenizer.tokenize('Taipei'))} F"
    assert list(get_json_schema(tool)["function"]["parameters"]["properties"]) == ["city"]


REFUSED_TOOLS = {
    "no function": (["MINE:wether"], None, "tools", "did you mean weather?"),
    "no module": (["tool.calculator"], None, "tools", "no module tool"),
    "no such setting": (["MINE:thermometer"], {"thermometer": {"units": "F"}}, "tool_kwargs", "did you mean unit?"),
    "refused by the tool": (["MINE:thermometer"], {"thermometer": {"unit": "K"}}, "tool_kwargs", "unit is 'K'"),
    "the tokenizer": (["MINE:thermometer"], {"thermometer": {"tokenizer": "x"}}, "tool_kwargs", "tokenizer"),
    "no settings at all": (["MINE:weather"], {"weather": {"city": "x"}}, "tool_kwargs", "has no settings"),
    "settings of no tool": (["MINE:weather"], {"wether": {}}, "tool_kwargs", "did you mean weather?"),
    "needed setting": (["MINE:archive"], None, "tool_kwargs", "needs corpus"),
    "neither hints nor docstring": (["MINE:bare"], None, "tools", "docstring"),
    "one name twice": (["MINE:weather", "MINE:weather"], None, "tools", "two tools are called weather"),
}


@pytest.mark.parametrize(("names", "settings", "field", "message"), REFUSED_TOOLS.values(), ids=REFUSED_TOOLS)
def test_a_tool_that_cannot_be_used_is_refused(names, settings, field, message, mine, tokenizer):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_tools([name.replace("MINE", mine) for name in names], settings, tokenizer)
    assert error.value.field == field


def test_public_methods_of_an_environment_are_tools(mine):
    """All but reset and get_reward, beside the recipe's own."""
    tools = load_tools([f"{mine}:weather"], None, None)
    factory, all_tools = load_environment(f"{mine}:Rated", tools, has_rewards=False)
    assert [tool.__name__ for tool in all_tools] == ["weather", "ask", "guess"]
    assert factory().get_reward() == -1.0
    assert load_environment(None, tools) == (None, tools)


@pytest.mark.parametrize(
    ("name", "tools", "has_rewards", "field", "message"),
    {
        "no such class": ("Gmae", [], True, "environment_factory", "did you mean Game?"),
        "no reset": ("NoReset", [], True, "environment_factory", "reset(**row)"),
        "no tool": ("Still", [], True, "environment_factory", "no public method"),
        "no hints": ("Undescribed", [], True, "environment_factory", "Undescribed.look"),
        "name of a tool": ("Game", ["guess"], True, "environment_factory", "guess"),
        "no reward": ("Game", [], False, "reward_funcs", "get_reward()"),
    }.values(),
)
def test_an_environment_that_cannot_be_used_is_refused(name, tools, has_rewards, field, message, mine):
    loaded = load_tools([f"{mine}:{tool}" for tool in tools], None, None)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_environment(f"{mine}:{name}", loaded, has_rewards)
    assert error.value.field == field


def test_a_chat_template_without_tool_calls_is_refused(mine):
    """TRL would find out in mid-run, or never. The fix names models that work."""
    tools = load_tools([f"{mine}:weather"], None, None)
    assert chat_template_options(tools, make_tokenizer(TEMPLATE)) == {"tools": tools}
    assert chat_template_options([], make_tokenizer(None)) == {}
    for template in ("{{ messages[0].content }}", TEMPLATE.replace("<tool_call>", "<call>"), None):
        with pytest.raises(UserError, match=r"Qwen2\.5, Qwen3, Llama 3\.1") as error:
            chat_template_options(tools, make_tokenizer(template))
        assert error.value.field == "tools"
