r"""Reward the answer in \boxed{…} of a worked problem. Numbers are compared here, all else by math-verify."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading

from grpo_launcher.messages import CHINESE, gold_value, last_reply, without_marks
from rewards.calculation import in_ascii, is_same_number, last_number

LONGEST = 1000  # characters of an answer; a longer one is wrong
MEMORY = 2**30  # bytes of the process that compares

_NAMES = r"\\(?:text\w*|math\w+|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+"  # words that LaTeX may hold
_ONES, _TENS = "〇零一壹二贰貳两兩三叁參四肆五伍六陆陸七柒八捌九玖", "十拾百佰千仟万萬亿億"
_PLAIN = str.maketrans(_ONES + _TENS + "点點", "0011222223334455666778899十十百百千千万万亿亿..", ",")
_UNITS = {"亿": 8, "万": 4, "千": 3, "百": 2, "十": 1}  # name: zeros
_CHINESE_NUMBER = re.compile(
    rf"(?:\d[\d,]*(?:\.\d+)?(?=[{_TENS}]))?[{_ONES}{_TENS}][\d{_ONES}{_TENS}]{{0,20}}(?:[点點][{_ONES}]+[万萬亿億]?)?"
)
_CHINESE_FORMS = [(r"\b100分之([\d.]+)", r"\1%"), (r"([\d.]+)分之([\d.]+)", r"\2/\1"), (r"[负負](?=\d)", "-")]

_LATEX = [(r"√\s*(\d+(?:\.\d+)?|\([^()]*\))", r"\\sqrt{\1}"), ("√", r"\\sqrt "), ("∞", r"\\infty ")]


def math_reward(completions, answer, *, timeout: float = 3.0, **columns) -> list[float | None]:
    r"""Reward 1 for the right answer in the last \boxed{…}, else 0.

    Args:
        answer: B numbers or texts: 72, "1,234", "3/4", "50%", "三百二十", LaTeX; "x^2 + 1" is right in any equal form.
            A unit is ignored. A word must stand in \text{…}.
        timeout: seconds of computing for one comparison.

    Returns:
        B rewards, 0 or 1; None for a row without an answer, and for what could not be compared in time.

    Source: Hugging Face, math-verify; Cobbe et al. 2021 (arXiv:2110.14168) for GSM8K.
    """
    if not timeout > 0:
        raise ValueError(f"math_reward: timeout is {timeout} and must be over 0")
    pairs = list(zip(map(_gold, answer), (boxed(last_reply(completion)) for completion in completions), strict=True))
    scores = {pair: _score(*pair, timeout) for pair in dict.fromkeys(pairs)}
    return [scores[pair] for pair in pairs]


def math_format_reward(completions, **columns) -> list[float]:
    r"""Reward 1 for words and then one \boxed{…} that is not empty, else 0."""
    return [float(_has_form(last_reply(completion))) for completion in completions]


def _has_form(text: str) -> bool:
    before, *boxes = text.split(r"\boxed{")
    return len(boxes) == 1 and bool(re.search(r"\w", before) and boxed(text))


def boxed(text: str) -> str | None:
    r"""Return what stands in the last \boxed{…} of a text, or None."""
    start, depth = text.rfind(r"\boxed{"), 0
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if brace[0] == "}" and not depth:
            return text[start + len(r"\boxed{") : start + brace.start()].strip()
    return None


def _gold(value) -> str | None:
    def read(value) -> str | None:
        text = str(value).rpartition("####")[2].strip()
        text = boxed(text) or text
        symbols = re.sub(_NAMES, "", text)
        is_expression = (
            re.search(r"\w", _in_digits(text))
            and boxed(rf"\boxed{{{text}}}") == text  # its braces match
            and not re.search(r"[A-Za-z]{4}|^(?:[Yy]es|[Nn]o|N/A)$", symbols)  # math-verify takes it for a product
            and not CHINESE.search(symbols)
        )
        is_readable = last_number(_in_digits(text), whole=True) or is_expression
        return text if isinstance(value, str | int | float) and is_readable else None

    wanted = r"a number or an expression, such as 72, \frac{1}{2} or \text{east}"
    return gold_value(value, "math: answer", wanted, read)


math_reward.check_gold = _gold


def _score(gold: str | None, text: str | None, timeout: float) -> float | None:
    if gold is None:
        return None
    if not text or len(text) > LONGEST:
        return 0.0
    if without_marks(gold).split() == without_marks(text).split():
        return 1.0
    gold, text = _in_digits(gold), _in_digits(text)
    expected, actual = last_number(gold, whole=True), last_number(text, whole=True)
    if expected and actual:
        is_whole = expected.value.is_integer() and actual.value.is_integer()
        return float(is_same_number(actual, expected, tolerance=1e-12 if is_whole else 1e-6))
    return _checker.compare(gold, text, timeout)


def _in_digits(text: str) -> str:
    r"""Write 三百二十 as 320, 负三 as -3, 三分之二 as 2/3, 百分之五十 as 50%, √2 as \sqrt{2}."""
    text = _CHINESE_NUMBER.sub(lambda match: f"{chinese_number(match[0]):.15g}", in_ascii(text))
    for pattern, replacement in _CHINESE_FORMS + _LATEX:
        text = re.sub(pattern, replacement, text)
    return text


def chinese_number(text: str) -> float:
    """Return the value of a number: 三百二十 is 320, 二〇二四 2024, 三点五 3.5, 1.2亿 120000000, 一万二 12000."""
    text = text.translate(_PLAIN)
    for unit, zeros in _UNITS.items():
        if unit in text:
            above, _, below = text.rpartition(unit)
            if len(below) == 1 and below.isdigit():
                below += "0" * (zeros - 1)  # 一万二 is short for 一万二千
            return (chinese_number(above) if above else 1.0) * 10**zeros + (chinese_number(below) if below else 0.0)
    return float(text)


class _Checker:
    """A process with math-verify, whose own limit of time needs a main thread and cannot end a power of integers."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def compare(self, gold: str, text: str, seconds: float) -> float | None:
        """Return 1 for equal, 0 for different, None where the comparison did not come to its end."""
        with self.lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                self.process.stdin.write(json.dumps([gold, text, seconds]) + "\n")
                return json.loads(self.process.stdout.readline() or "null")
            except BrokenPipeError:  # somebody killed it
                return None
            except BaseException:  # reward_timeout: what it answers later is for nobody
                if self.process and self.process.poll() is None:
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process = None
                raise

    def _start(self) -> None:
        # It ends with its stdin, which closes when this process ends. PR_SET_PDEATHSIG would end it with this thread.
        command, pipe = [sys.executable, "-P", "-m", "rewards.math"], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, start_new_session=True)
        if not self.process.stdout.readline():
            raise RuntimeError("math_reward: math-verify does not start, see above. Fix: pip install math-verify")


_checker = _Checker()


def _serve() -> None:
    """Answer each line [gold, answer, seconds] in a fork. Where one takes too long a new fork costs no import."""
    from math_verify import parse, verify

    def compare(*answers) -> float:
        parsed = [parse(rf"\boxed{{{answer}}}", parsing_timeout=None) for answer in answers]
        return float(verify(*parsed, timeout_seconds=None))

    logging.disable()  # math-verify warns that it has no limit of time
    compare(r"\sqrt{2}", r"\sqrt{3}"), compare("(x+1)^2", "x^2+2x+1")  # the first are slow
    print("ready", flush=True)
    while child := os.fork():
        if os.waitpid(child, 0)[1] != signal.SIGPROF:  # else it was in the middle of a line
            return
        print("null", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        *answers, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        score = compare(*answers)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(score, flush=True)


if __name__ == "__main__":
    _serve()
