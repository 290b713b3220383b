"""Look up passages of a corpus by BM25, in English and Chinese; the index is kept on disk, the result cut to a number of tokens."""

import bisect
import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import bm25s
from bm25s.stopwords import STOPWORDS_EN_PLUS

from grpo_launcher.messages import CHINESE, words

FORMS = "a .jsonl file (a field text a line), a .json file in SQuAD's form, or a .txt or .md file or a folder of them (paragraphs)"
NOTHING = "No passage matches this query; try other words."
ENDING = re.compile(r"(?<=\w{3})(?:ies|es|s|ed|ing|ly|e|y)$")
BREAK = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})\S){{1,20}}")


class SearchError(ValueError):
    """A corpus, setting or query that cannot be used: says which, what is wrong and what to do."""


def search(*, corpus: str, k: int = 3, budget: int = 200, tokenizer=None) -> Callable:
    """The tool search(query): up to `k` passages of the corpus by falling score, cut to `budget` tokens of `tokenizer` (without one: words) in all.

    corpus: as FORMS says, in UTF-8; SQuAD's contexts count once each. Passages without an id get their number from 1 on. However small the
    budget, the first words of the best passage show. Raises SearchError for a corpus or setting at once, for a query that is no text when called.
    """
    for name, value in {"k": k, "budget": budget}.items():
        if type(value) is not int or value < 1:
            raise SearchError(f"search: {name} is {value!r}, and has to be a whole number from 1 up")
    passages = _read(Path(corpus).expanduser())
    index = _index([body for _, body in passages])

    def count(text: str) -> int:
        return len(tokenizer.tokenize(text) if tokenizer else words(text))

    def search(query: str) -> str:
        """Look up passages about a query.

        Args:
            query: A few words, or a question.

        """
        if not isinstance(query, str) or not query.strip():
            raise SearchError(f"search: query is {str(query)[:50]!r}, and has to be a text of a few words")
        scores = index.get_scores_from_ids(index.get_tokens_ids(_terms(words(query)[:200])))
        best = (-scores).argsort(kind="stable")[:k]
        return _fit([passages[at] for at in best if scores[at] > 0], count, budget) or NOTHING

    return search


def _terms(listed: list[str]) -> list[str]:
    """What the index knows of words: no stop words, no endings; longer Chinese words in pairs of characters, so that 北京 finds 北京大学."""
    terms = []
    for word in listed:
        pairs = [word[at : at + 2] for at in range(len(word) - 1)] if CHINESE.search(word) else []
        terms += pairs or ([] if word in STOPWORDS_EN_PLUS else [ENDING.sub("", word)])
    return terms


def _fit(passages: list[tuple[str, str]], count: Callable, budget: int) -> str:
    shown = ""
    for label, body in passages:
        start, longest = f"{shown}\n\n{label}".lstrip(), 32 * budget  # characters that so many tokens can hold: a longer text is not counted whole
        if len(body) <= longest and count(start + body) <= budget:
            shown = start + body
            continue
        ends = [match.end() for match in BREAK.finditer(body[:longest])]
        fitting = bisect.bisect_right(ends, budget, key=lambda end: count(f"{start}{body[:end]} …"))
        return f"{start}{body[: ends[max(fitting - 1, 0)]]} …" if fitting or not shown else shown
    return shown


def _read(path: Path) -> list[tuple[str, str]]:
    """The passages in their order, each as "[id] " and "title: text" without line breaks, so that only a label begins a line with [id]."""
    passages = []
    for where, row in _rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
            raise SearchError(f"search: corpus {where}: no text; give each passage a field text that is not empty")
        own, title = row.get("id"), row.get("title")
        body = " ".join((f"{title}: {row['text']}" if title else row["text"]).split())
        passages.append((f"[{len(passages) + 1 if own in (None, '') else own}] ", body.encode(errors="replace").decode()))
    if not passages:
        raise SearchError(f"search: corpus {path} holds no passage; give {FORMS}")
    label, times = Counter(label for label, _ in passages).most_common(1)[0]
    if times > 1:
        raise SearchError(f"search: corpus {path}: {times} passages are called {label.strip()}; give each its own id, or none of them one")
    return passages


def _rows(path: Path) -> list[tuple[str, dict]]:
    """Where each passage stands, and what stands there."""
    if not path.exists():
        raise SearchError(f"search: corpus {path} is not there, seen from {Path.cwd()}; give {FORMS}")
    if path.suffix == ".jsonl":
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(_decoded(path).split("\n"), 1) if line.strip())
        return [(where, _parsed(line, where)) for where, line in lines]
    if path.suffix == ".json":
        whole = _parsed(_decoded(path), str(path))
        try:
            found = [(part["context"], article.get("title")) for article in whole["data"] for part in article["paragraphs"]]
            titles = dict(reversed(found))  # where a context stands twice its first title counts
        except (KeyError, TypeError, AttributeError) as error:
            raise SearchError(f"search: corpus {path} is not in SQuAD's form, data → paragraphs → context ({error!r}); give {FORMS}") from None
        return [(str(path), {"text": text, "title": str(titles[text] or "").replace("_", " ")}) for text in dict(found)]
    files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.suffix in (".txt", ".md"))
    return [(str(file), {"text": part}) for file in files for part in re.split(r"\n\s*\n", _decoded(file)) if part.strip()]


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise SearchError(f"search: corpus {where} is not JSON: {error}; mend it, or give {FORMS}") from None


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SearchError(f"search: corpus {file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _index(bodies: list[str]) -> bm25s.BM25:
    """The index of the passages, from the cache where it is whole there."""
    made_by = [bm25s.__version__, Path(__file__).read_text(encoding="utf-8"), inspect.getsource(words)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo-search"
    folder = cache / hashlib.sha256(json.dumps([made_by, bodies]).encode()).hexdigest()
    with contextlib.suppress(OSError):
        if (folder / "seal").read_bytes() == _seal(folder):
            return bm25s.BM25.load(folder, allow_pickle=False)
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or not there
    index, numbers, started = bm25s.BM25(), {"": 0}, time.monotonic()  # terms numbered as they come: whoever builds it, the files are the same
    told = bm25s.tqdm(bodies, "Indexing passages", delay=2, leave=False)
    listed = [[numbers.setdefault(term, len(numbers)) for term in _terms(words(body))] or [0] for body in told]
    index.index((listed, numbers), show_progress=time.monotonic() - started > 2)
    with contextlib.suppress(OSError):  # another process was first, or the cache cannot be written
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            made = Path(temporary) / "index"
            index.save(made, allow_pickle=False, show_progress=False)
            (made / "seal").write_bytes(_seal(made))
            made.rename(folder)
    return index


def _seal(folder: Path) -> bytes:
    files = sorted(folder.glob("*.index.*"))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).digest()
