"""Two tools that a model may call: `calculator`, and `search` in a corpus. A ValueError is a message that it reads."""

import ast
import contextlib
import decimal
import hashlib
import inspect
import json
import operator
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from grpo_launcher.messages import CHINESE, words

# Decimals are exact where people expect it (0.1 + 0.2), and bounded in time and memory whatever a model writes.
LIMITS = {"rounding": decimal.ROUND_HALF_UP, "Emax": 30, "Emin": -30}
ERRORS = {
    decimal.DivisionByZero: "division by zero",
    decimal.InvalidOperation: "it has no value",
    decimal.Overflow: "a number on the way is larger than 1e30",
    decimal.Subnormal: "a number on the way is closer to 0 than 1e-30",
}
CONTEXT = decimal.Context(prec=60, traps=list(ERRORS), **LIMITS)
SHORTER = decimal.Context(prec=50, **LIMITS)  # makes 1 of the 0.99999… that 1 / 3 * 3 is
SIGNS = {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full-width
SIGNS |= {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"}
THOUSANDS = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3})+(?![\d,])")
GRAMMAR = "write numbers, + - * / // % (remainder) ** ( ), abs, ceil, floor, max, min, round and sqrt only"
GRAMMAR += "; 20 percent is 20 / 100"


def calculator(expression: str) -> str:
    """Calculate an arithmetic expression exactly.

    Args:
        expression: Numbers with + - * / // % ** ( ), abs, ceil, floor, max, min, round and sqrt, such as
            "(48 + 24 / 2) * 1.5".
    """
    if not isinstance(expression, str) or not expression.strip() or len(expression) > 500:
        raise ValueError("the expression must be text of 1 to 500 characters, such as '2 * (3 + 4)'")
    text = " ".join(expression.translate(str.maketrans(SIGNS)).lower().split())
    names = re.findall(r"(?<![\w.])[^\W\d]\w*", text)
    unknown = [name for name in names if name not in FUNCTIONS]
    if unknown:
        raise ValueError(f"cannot read {unknown[0]!r:.40}; {GRAMMAR}")
    if names and THOUSANDS.search(text):  # max(1,234) could mean either
        raise ValueError(
            "beside a function write thousands without commas, and a space behind a comma: max(1234, 567)"
        )
    if re.search(r"%\s*(?:[-+*/)=]|$)", text):  # else 20% + 5 would be a remainder
        raise ValueError(f"cannot read {text!r:.60}; {GRAMMAR}")
    text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    try:
        with decimal.localcontext(CONTEXT):
            value = _evaluate(ast.parse(text, mode="eval").body, text)
            places = 10 if not value or abs(value) >= Decimal("0.1") else 9 - value.adjusted()  # 10 digits
            result = f"{value:.{places}f}".rstrip("0").rstrip(".")
    except tuple(ERRORS) as error:
        raise ValueError(f"cannot calculate {text!r:.60}: {ERRORS[type(error)]}") from None
    except (SyntaxError, TypeError, UnicodeError, RecursionError, MemoryError):
        raise ValueError(f"cannot read {text!r:.60}; {GRAMMAR}") from None
    return "0" if result == "-0" else result


def _evaluate(node: ast.AST, text: str) -> Decimal:
    match node:
        case ast.Constant(value=number) if type(number) in (int, float):
            return CONTEXT.create_decimal(ast.get_source_segment(text, node))  # the node holds 0.1 as a binary float
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _evaluate(node.operand, text)
        case ast.BinOp() if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](_evaluate(node.left, text), _evaluate(node.right, text))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*[_evaluate(argument, text) for argument in node.args])
    raise SyntaxError


def _power(base: Decimal, exponent: Decimal) -> Decimal:
    if not exponent:
        return Decimal(1)
    if not base and exponent < 0:
        raise decimal.DivisionByZero
    return base**exponent


def _floor(value: Decimal) -> Decimal:
    return SHORTER.plus(value).to_integral_value(decimal.ROUND_FLOOR)


def _round(value: Decimal, places: Decimal = Decimal(0)) -> Decimal:
    return SHORTER.plus(value).quantize(Decimal(1).scaleb(-places))


FUNCTIONS = {"abs": abs, "max": max, "min": min, "round": _round, "sqrt": Decimal.sqrt, "floor": _floor}
FUNCTIONS["ceil"] = lambda value: -_floor(-value)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.Pow: _power, ast.FloorDiv: lambda a, b: _floor(a / b), ast.Mod: lambda a, b: a - b * _floor(a / b)}

CORPUS = "give a .jsonl file (a field text a line), or a .txt or .md file or a folder of them, in UTF-8"
NOTHING = "No passage matches this query; try other words."
ENDING = re.compile(r"(?<=\w{3})(?:ies|es|s|ed|ing|ly|e|y)$")
PIECE = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})\S){{1,20}}")


def search(*, corpus: str, k: int = 3, budget: int = 200, tokenizer=None) -> Callable:
    """Return the tool `search` over a corpus in English or Chinese: BM25, with an index that is kept on disk.

    Args:
        corpus: path of a .jsonl file (text, and perhaps id and title, a line), or of a .txt or .md file or a folder of
            them (paragraphs). Passages without an id get their number from 1 on.
        k: passages in a result, by falling score.
        budget: tokens of a result (words without a tokenizer); the rest is cut.
        tokenizer: that of the model.
    """
    for name, value in {"k": k, "budget": budget}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"search: {name} is {value!r} and must be an integer from 1 up")
    passages = _read_corpus(Path(corpus).expanduser())
    index = _index([text for _, text in passages])

    def search(query: str) -> str:
        """Look up passages about a query.

        Args:
            query: A few words, or a question.
        """
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"search: query is {str(query)[:50]!r} and must be a text of a few words")
        scores = index.get_scores_from_ids(index.get_tokens_ids(_terms(query, 200)))
        best = (-scores).argsort(kind="stable")[:k]
        results = [f"[{passages[row][0]}] {passages[row][1]}" for row in best if scores[row] > 0]
        return _cut("\n\n".join(results), budget, tokenizer) or NOTHING

    return search


def _terms(text: str, limit: int | None = None) -> list[str]:
    """Return words without stop words and endings, and pairs of Chinese characters, so that 北京 finds 北京大学."""
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    terms = []
    for word in words(text)[:limit]:
        if CHINESE.search(word) and len(word) > 1:
            terms += [word[start : start + 2] for start in range(len(word) - 1)]
        elif word not in STOPWORDS_EN_PLUS:
            terms.append(ENDING.sub("", word))
    return terms


def _cut(text: str, budget: int, tokenizer) -> str:
    text = text[: 32 * budget]  # so many tokens never hold more, and a long passage is not tokenized whole
    if tokenizer is None:
        ends = [match.end() for match in PIECE.finditer(text)]
    else:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoding["offset_mapping"]]
    if len(ends) <= budget:
        return text
    beginning = text[: ends[max(budget - 3, 0)]].rstrip()  # 2 tokens are left for " …"
    return re.sub(r"\n\n\[[^\]\n]*\]?$", "", beginning) + " …"  # an id alone is no passage


def _read_corpus(path: Path) -> list[tuple[str, str]]:
    """Return (id, text) of the passages in their order, each on one line, so that only an id begins a line with [."""
    passages = []
    for place, row in _read_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
            raise ValueError(f"search: corpus {place}: no text; give each passage a field text that is not empty")
        text = f"{row['title']}: {row['text']}" if row.get("title") else row["text"]
        own_id = row.get("id")
        label = str(len(passages) + 1 if own_id in (None, "") else own_id)
        passages.append((label, " ".join(text.split()).encode(errors="replace").decode()))
    if not passages:
        raise ValueError(f"search: corpus {path} holds no passage; {CORPUS}")
    label, count = Counter(label for label, _ in passages).most_common(1)[0]
    if count > 1:
        raise ValueError(f"search: corpus {path}: {count} passages are called [{label}]; give each its own id or none")
    return passages


def _read_rows(path: Path) -> list[tuple[str, dict]]:
    """Return (place, row) of each passage."""
    if not path.exists():
        raise ValueError(f"search: corpus {path.absolute()} is not there; {CORPUS}")
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    rows, place = [], ""
    for file in files:
        try:
            place = str(file)
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix in (".txt", ".md"):
                rows += [(place, {"text": part}) for part in re.split(r"\n\s*\n", text) if part.strip()]
            elif file.suffix == ".jsonl":
                for number, line in enumerate(text.split("\n"), 1):
                    place = f"{file}, line {number}"
                    if line.strip():
                        rows.append((place, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"search: corpus {place}: {type(error).__name__}: {error}; {CORPUS}") from error
    return rows


def _index(texts: list[str]):
    """Return the BM25 index of the passages, from the cache where it is there."""
    import bm25s

    version = [bm25s.__version__, inspect.getsource(_terms), inspect.getsource(words), ENDING.pattern]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo-search"
    folder = cache / hashlib.sha256(json.dumps([version, texts]).encode()).hexdigest()
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError):  # not there, or damaged
        return bm25s.BM25.load(folder, allow_pickle=False)
    index = bm25s.BM25()
    index.index([_terms(text) or [""] for text in texts], show_progress=len(texts) > 100_000)
    with contextlib.suppress(OSError):  # another process was first, or the cache cannot be written
        cache.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            index.save(Path(temporary) / "index", allow_pickle=False, show_progress=False)
            (Path(temporary) / "index").rename(folder)
    return index
