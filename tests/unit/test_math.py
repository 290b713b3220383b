r"""Answers in \boxed{…}: what is right, what takes too long, and what becomes of the process that compares them."""

import json
import math
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from helpers import test_data
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_launcher.datasets import gsm8k
from grpo_launcher.plugins import load_rewards
from rewards import math as module
from rewards.math import chinese_number, math_format_reward, math_reward

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"  # one power of large integers, which nothing inside the process interrupts

RIGHT = {
    "as it is": ("72", "72"),
    "a number as answer": (72, "72"),
    "a float as answer": (-0.5, r"-\frac{1}{2}"),
    "behind GSM8K's mark": ("48 + 24 = 72\n#### 72", "72"),
    "a solution with its own box": (r"We see that \boxed{\frac{1}{2}}.", "0.5"),
    "new lines around it": ("72", "\n72\n"),
    "a box in the box": ("72", r"\boxed{72}"),
    "a unit": ("72", "72 km/h"),
    "a unit in LaTeX": ("72", r"72\text{ dollars}"),
    "a unit on the next line": ("72", "72\n\\text{ dollars}"),
    "a unit on both sides": ("72 km", r"72\,\mathrm{km}"),
    "a unit behind a root": (r"6\sqrt{3}", r"6\sqrt{3}\text{ cm}"),
    "a unit behind the root of the answer": (r"6\sqrt{3}\text{ cm}", r"6\sqrt{3}"),
    "a noun": ("2", r"\text{2 apples}"),
    "dollars": ("72", "$72"),
    "dollars of LaTeX": ("5.50", r"\$5.5"),
    "degrees": ("90", r"90^\circ"),
    "a full stop": ("12", "12."),
    "a sign of print": ("-3", "−3"),
    "a fraction": ("3/4", r"\frac{3}{4}"),
    "a fraction of another size": ("3/4", r"\dfrac{3}{4}"),
    "a fraction without braces": ("0.75", r"\dfrac34"),
    "a fraction that is not reduced": (r"\frac{3}{4}", "6/8"),
    "a decimal fraction": ("3/4", "0.75"),
    "thirds": ("1/3", "0.33333333"),
    "a mixed number": ("1.5", "1 1/2"),
    "a mixed number of LaTeX": ("3/2", r"1\frac{1}{2}"),
    "a mixed number in one sign": ("3/2", "1½"),
    "percent": ("50%", r"50\%"),
    "percent as a unit": ("50", r"50\%"),
    "hundredths for percent": ("50%", "0.5"),
    "a fraction for percent": ("50%", r"\frac{1}{2}"),
    "whole percent": ("3", "300%"),
    "thousands": ("1,234", "1234"),
    "thousands in the box": ("1234", "1,234"),
    "thousands of LaTeX": ("1234", "1{,}234"),
    "thousands with thin spaces": ("1234567", r"1\,234\,567"),
    "a power of ten": (r"1.5\times10^3", "1500"),
    "an exponent": ("1000", "1e3"),
    "Chinese": ("320", "三百二十"),
    "Chinese with a unit": ("320", "三百二十元"),
    "Chinese digits": ("2024", "二〇二四"),
    "Chinese thousands": ("12000", "一万二千"),
    "Chinese and digits": ("30000", "3万"),
    "Chinese in the answer": ("三百二十", "320"),
    "Chinese below zero": ("-3", "负三"),
    "a Chinese fraction": ("2/3", "三分之二"),
    "Chinese percent": ("50%", "百分之五十"),
    "Chinese with a point": ("2.05", "二点零五"),
    "other terms first": ("x^2+1", "1 + x^2"),
    "other factors": ("x^2 + 1", "(x-1)(x+1)+2"),
    "a fraction of polynomials": ("x^2+1", r"\frac{x^3+x}{x}"),
    "a square": ("x^2+2x+1", "(x+1)^2"),
    "a sum of fractions": (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
    "a root": (r"\sqrt{8}", r"2\sqrt{2}"),
    "a rational denominator": (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
    "a root as a number": (r"\sqrt{2}", "1.41421356"),
    "pi": (r"\frac{\pi}{2}", r"\pi/2"),
    "a power": ("2^{10}", "1024"),
    "a factorial": ("10!", "3628800"),
    "a logarithm": (r"\log_2 8", "3"),
    "a binomial coefficient": (r"\binom{5}{2}", "10"),
    "an identity": (r"\sin^2 x+\cos^2 x", "1"),
    "a complex number": ("2+3i", "3i+2"),
    "a variable of the answer": ("5", "x=5"),
    "an equation for its right side": ("x=5", "5"),
    "another form of an equation": ("y=2x+1", "y-2x=1"),
    "a calculation": ("72", "48+24=72"),
    "a point": (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"),
    "an interval": ("[0,1)", r"\left[0,1\right)"),
    "a union": (r"(-\infty,2]\cup[3,\infty)", r"[3,\infty)\cup(-\infty,2]"),
    "a set": (r"\{1,2,3\}", r"\{3,2,1\}"),
    "a list": ("1,2,3", "3, 2, 1"),
    "plus or minus": (r"\pm 3", "3,-3"),
    "an inequality": ("x>3", "3<x"),
    "an inequality as an interval": ("x>3", r"(3,\infty)"),
    "a vector": (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    "one brace that is a sign": (r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.",) * 2,
    "a word": (r"\text{Monday}", "Monday"),
    "a word in small letters": (r"\text{Monday}", r"\text{monday}"),
    "a Chinese word": (r"\text{星期一}", "星期一"),
    "a letter in brackets": ("B", r"\text{(B)}"),
    "a root of print": ("2√3", r"2\sqrt{3}"),
    "a root of print over brackets": (r"\sqrt{x+1}", "√(x+1)"),
    "a root of print over a letter": ("√x", r"\sqrt{x}"),
    "a square of print": ("x²+1", "x^2+1"),
    "a negative power of print": (r"\frac{1}{x^2}", "x⁻²"),
    "infinity of print": ("(-∞, 2]", r"(-\infty,2]"),
    "infinity alone": ("∞", r"\infty"),
    "a full-width point": ("（３，４）", "(3,4)"),
    "a full-width equation": ("x＝1", "1"),
    "euros": ("5 €", "5"),
    "newtons": ("5 N", "5"),
    "degrees in one sign": ("5", "5℃"),
    "won": ("5,000원", "5000"),
    "thousands with a plain space": ("1 234", "1234"),
    "a decimal comma of LaTeX": ("0.5", "0{,}5"),
    "a list without spaces": ("1,6", "6, 1"),
    "a point that looks like thousands": ("(1,234)", "(1, 234)"),
    "a negative denominator": ("-0.5", r"\frac{1}{-2}"),
}


@pytest.mark.parametrize(("gold", "answer"), RIGHT.values(), ids=RIGHT)
def test_what_is_right(gold, answer):
    """However it is written, as text and in chat."""
    text = rf"We add them. The answer is $\boxed{{{answer}}}$."
    completions = [text, [{"role": "assistant", "content": text}]]
    assert math_reward(completions, [gold] * 2) == [1.0, 1.0]


WRONG = {
    "another number": ("72", r"\boxed{27}"),
    "the other sign": ("72", r"\boxed{-72}"),
    "a digit more": ("72", r"\boxed{720}"),
    "a half more": ("72", r"\boxed{72.5}"),
    "one off in a million": ("1048577", r"\boxed{1048576}"),
    "rounded too far": ("1/3", r"\boxed{0.33}"),
    "a hundredth": ("72", r"\boxed{0.72}"),
    "two answers": ("72", r"\boxed{72 or 73}"),
    "a list of answers": ("72", r"\boxed{72, 73}"),
    "a range": ("72", r"\boxed{71 < x < 73}"),
    "right, and then wrong": ("72", r"\boxed{72} or \boxed{73}"),
    "an empty box": ("72", r"so 72 \boxed{}"),
    "a box of spaces": ("72", r"so 72 \boxed{ }"),
    "a box of signs": ("72", r"\boxed{?}"),
    "a box without an end": ("72", r"\boxed{72"),
    "no box": ("72", "72"),
    "nothing": ("72", ""),
    "a long box": ("72", r"\boxed{72" + "+0" * 500 + "}"),
    "Chinese tens of thousands": ("30", r"\boxed{3万}"),
    "Chinese tens of thousands for one": ("3", r"\boxed{3万}"),
    "English millions for one": ("5", r"\boxed{5 million}"),
    "another sign in a polynomial": ("x^2+1", r"\boxed{x^2-1}"),
    "another variable": ("x^2+1", r"\boxed{y^2+1}"),
    "another square": ("x^2+1", r"\boxed{(x+1)^2}"),
    "a root rounded too far": (r"\sqrt{2}", r"\boxed{1.414}"),
    "pi rounded": (r"\pi", r"\boxed{3.14}"),
    "a point turned around": ("(1,2)", r"\boxed{(2,1)}"),
    "a closed interval": ("[0,1)", r"\boxed{[0,1]}"),
    "a larger set": (r"\{1,2\}", r"\boxed{\{1,2,3\}}"),
    "another equation": ("5", r"\boxed{x=6}"),
    "the other direction": ("x>3", r"\boxed{x<3}"),
    "a vector turned around": (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}"),
    "another word": (r"\text{Monday}", r"\boxed{\text{Tuesday}}"),
    "infinity below": (r"\infty", r"\boxed{-\infty}"),
    "a fraction of nothing": ("72", r"\boxed{\frac{72}{0}}"),
    "more digits than an integer may have": ("72", r"\boxed{" + "九" * 900 + "}"),
    "units that no number has": ("72", r"\boxed{" + "亿" * 900 + "}"),
    "braces that are too many": ("72", r"\boxed{7}2}"),
    "a factor": ("2", r"\boxed{2mg}"),
    "another root of print": ("√2", r"\boxed{√3}"),
}


@pytest.mark.parametrize(("gold", "text"), WRONG.values(), ids=WRONG)
def test_what_is_wrong(gold, text):
    """The last box counts, and nothing but a box."""
    assert math_reward([text], [gold]) == [0.0]


NUMERALS = {
    "十": 10,
    "十五": 15,
    "两百五": 250,
    "一百零五": 105,
    "一百二": 120,
    "一千零一十": 1010,
    "一万二": 12000,
    "1,200万": 12_000_000,
    "3万5千": 35000,
    "1.2亿": 120_000_000,
    "三点五万": 35000,
    "一亿二千万": 120_000_000,
    "一万亿": 10**12,
    "壹仟贰佰叁拾": 1230,
    "貳萬": 20000,
    "三点一四": 3.14,
    "十点五": 10.5,
}


@pytest.mark.parametrize(("text", "value"), NUMERALS.items())
def test_a_chinese_number_is_read(text, value):
    """As it is, and in a box with a unit."""
    assert chinese_number(text) == value
    assert math_reward([rf"\boxed{{{text}个}}"], [value]) == [1.0]


def test_all_of_gsm8k_is_right_against_itself():
    """Rows as they are prepared; none is refused."""
    lines = test_data("gsm8k/gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [gsm8k.to_row(json.loads(line))["answer"] for line in lines]
    assert len(answers) == 1000
    assert all(map(math_reward.check_gold, answers))
    assert math_reward([rf"So it is \boxed{{{answer}}}." for answer in answers], answers) == [1.0] * 1000
    others = [str(float(answer) + 1) for answer in answers]
    assert math_reward([rf"So it is \boxed{{{other}}}." for other in others], answers) == [0.0] * 1000


def test_what_takes_too_long_costs_the_others_nothing():
    """It is not rated, within about its deadline."""
    answers = [rf"\boxed{{{n}\sqrt{{2}}}}" if n % 2 else rf"\boxed{{{n}+\sqrt{{2}}}}" for n in range(1, 64)]
    golds = [rf"\sqrt{{{2 * n * n}}}" for n in range(1, 64)]
    started = time.monotonic()
    scores = math_reward([*answers[:20], ENDLESS, *answers[20:]], [*golds[:20], r"\sqrt{2}", *golds[20:]], timeout=1.0)
    assert scores[20] is None
    assert scores[:20] + scores[21:] == [float(n % 2) for n in range(1, 64)]
    assert time.monotonic() - started < 25


def test_equal_completions_are_compared_once():
    """32 of the endless kind take one deadline."""
    started = time.monotonic()
    assert math_reward([ENDLESS] * 32, [r"\sqrt{2}"] * 32, timeout=1.0) == [None] * 32
    assert time.monotonic() - started < 20


def test_threads_get_their_own_scores():
    """Of one process, which outlives the thread that started it."""

    def ask(n):
        return math_reward([rf"\boxed{{x+{m}}}" for m in range(4)], [f"{n % 4}+x"] * 4)

    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(8))) == [[float(m == n % 4) for m in range(4)] for n in range(8)]
    pid = module._checker.process.pid
    assert ask(1) == [0, 1, 0, 0] and module._checker.process.pid == pid


def test_the_limit_of_all_rewards_ends_a_comparison():
    """What it would have answered is not taken for the next answer."""
    (reward,) = load_rewards(["rewards.math.math_reward"], {"math_reward": {"timeout": 600}}, timeout=1)
    assert reward(completions=[ENDLESS], answer=[r"\sqrt{2}"]) == [None]
    assert math_reward([r"\boxed{x+1}", r"\boxed{x}"], ["1+x"] * 2) == [1, 0]


@pytest.mark.parametrize("part", ["the process", "its fork"])
def test_a_process_that_was_killed_is_started_again(part):
    """One comparison may be lost, the next is right."""
    assert math_reward([r"\boxed{x+1}"], ["1+x"]) == [1]
    process = psutil.Process(module._checker.process.pid)
    victims = [process] if part == "the process" else process.children()
    for victim in victims:
        victim.kill()
    psutil.wait_procs([process], timeout=30)
    assert math_reward([r"\boxed{x+2}"], ["2+x"])[0] in (1, None)
    assert math_reward([r"\boxed{x+3}"], ["3+x"]) == [1]
    assert math_reward([r"\boxed{x+4}"], ["3+x"]) == [0]


def test_a_library_that_is_missing_is_named(monkeypatch):
    """Before any reward is given."""
    monkeypatch.setattr(module, "_checker", module._Checker())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"math_reward: .*Fix: pip install math-verify"):
        math_reward([r"\boxed{x+1}"], ["1+x"])
    assert math_reward([r"\boxed{72}"], ["72"]) == [1]


PARENT = """
from rewards import math
print(math.math_reward([r"\\boxed{x+1}"], ["1+x"]), math._checker.process.pid, flush=True)
if completion := input():
    math.math_reward([completion], [r"\\sqrt{2}"], timeout=4)
"""


@pytest.mark.parametrize("completion", ["", ENDLESS], ids=["at its end", "killed while it computes"])
def test_nothing_is_left_of_a_run(completion):
    """Neither the process nor its fork, which ends with its own limit of time at the latest."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT], text=True, **streams) as parent:
        score, pid = parent.stdout.readline().split()
        process = psutil.Process(int(pid))
        (fork,) = process.children()
        print(completion, file=parent.stdin, flush=True)
        if completion:
            deadline = time.monotonic() + 60
            while fork.cpu_times().user < 1:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            parent.kill()
        assert score == "[1.0]" and parent.wait(60) == (-signal.SIGKILL if completion else 0)
    assert psutil.wait_procs([process, fork], timeout=100)[1] == []


FORMS = {
    "words and a box": (r"48 and 24 make \boxed{72}", 1),
    "words behind it": ("We add.\n\\[\\boxed{72}\\]\nSo 72 clips.", 1),
    "braces in it": (r"Half of it: \boxed{\frac{1}{2}}", 1),
    "the box alone": (r"\boxed{72}", 0),
    "the box in dollars alone": (r" $\boxed{72}$", 0),
    "two boxes": (r"It is \boxed{72} and \boxed{72}", 0),
    "a box in a box": (r"It is \boxed{\boxed{72}}", 0),
    "an empty box": (r"It is \boxed{}", 0),
    "a box of spaces": ("It is \\boxed{ \n}", 0),
    "a box without an end": (r"It is \boxed{72", 0),
    "no box": ("It is 72", 0),
    "nothing": ("", 0),
}


@pytest.mark.parametrize(("text", "score"), FORMS.values(), ids=FORMS)
def test_the_form_is_words_and_one_box(text, score):
    """Whether the answer is right or not."""
    assert math_format_reward([text, [{"role": "assistant", "content": text}]]) == [score, score]


REFUSED = {
    "nothing": "",
    "a sign": "?",
    "a word": "seventy",
    "a word of two letters": "no",
    "what is not applicable": "N/A",
    "a sentence": "The answer is about 70",
    "a number of another size": "5 million",
    "a number and a half": "3 and a half",
    "a Chinese word": "星期一",
    "braces that do not match": r"\frac{1}{",
    "a list": ["72"],
    "a mapping": {"value": 72},
    "true": True,
    "nothing behind GSM8K's mark": "It is 72\n####",
}


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_an_answer_that_cannot_be_read_is_refused(answer):
    """With the value, before a run and by the reward."""
    for call in (lambda: math_reward.check_gold(answer), lambda: math_reward([r"\boxed{72}"], [answer])):
        with pytest.raises(ValueError, match=r"^math: answer is .* must be a number or an expression") as refusal:
            call()
        assert repr(answer) in str(refusal.value)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_row_without_an_answer_is_a_failed_rating(missing):
    """The others of its batch keep their own; an empty batch has none."""
    assert math_reward([r"\boxed{1}", r"\boxed{x}", ""], [missing, "x", missing]) == [None, 1, None]
    assert math_reward.check_gold(missing) is None
    assert math_reward([], []) == math_format_reward([]) == []


@pytest.mark.parametrize("timeout", [0, -1, math.nan])
def test_no_time_is_refused(timeout):
    """It would be no limit."""
    with pytest.raises(ValueError, match="math_reward: timeout is "):
        math_reward([r"\boxed{1}"], ["1"], timeout=timeout)


TEXT = st.text("十百千万亿点分之负一二零1.,-{}\\x^ 5/%", max_size=30)


@given(text=TEXT)
@settings(deadline=None, database=None, max_examples=200, derandomize=True)
def test_any_text_is_scored(text):
    """And raises nothing."""
    assert math_reward([rf"\boxed{{{text}}}"], ["72"])[0] in (0, 1, None)
