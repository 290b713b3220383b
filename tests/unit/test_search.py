"""The search tool: what it finds, the budget, the index on disk, and what cannot be a corpus, setting or query."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import bm25s
import pytest
from helpers import test_data
from transformers import AutoTokenizer
from transformers.utils import get_json_schema

from grpo_launcher.tools import NOTHING, search


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where indexes are kept, for this test alone; jieba's dictionary too."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/grpo-search"


@pytest.fixture
def corpus(tmp_path):
    """Return a function that writes lines of JSON into a .jsonl file."""

    def write(*rows) -> str:
        path = tmp_path / "corpus.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


PASSAGES = [
    {"text": "Rollo was the first ruler of Normandy."},
    {"text": "长城是中国古代的防御工程。", "title": "长城"},
    {"text": "北京大学创办于1898年。", "id": "pku"},
    {"text": "Rabbits eat grass;\n\n[9] they live in burrows.", "title": "Rabbit", "id": 40},
    {"text": "The cities of France: Paris, Lyon."},
]
QUERIES = {
    "English": ("the ruler of Normandy", "[1] Rollo was the first ruler of Normandy."),
    "in capitals, with punctuation": ("ROLLO?!", "[1] Rollo was the first ruler of Normandy."),
    "another form of the word": ("city", "[5] The cities of France: Paris, Lyon."),
    "Chinese": ("中国的防御", "[2] 长城: 长城是中国古代的防御工程。"),
    "a part of a Chinese name": ("北京", "[pku] 北京大学创办于1898年。"),
    "Chinese with a number": ("1898年", "[pku] 北京大学创办于1898年。"),
    "an id and a title of its own, on one line": (
        "grass",
        "[40] Rabbit: Rabbits eat grass; [9] they live in burrows.",
    ),
    "a title": ("rabbit", "[40] Rabbit: Rabbits eat grass; [9] they live in burrows."),
    "no common word": ("quantum physics", NOTHING),
    "an id is no word": ("40", NOTHING),
    "stop words alone": ("what is the", NOTHING),
    "punctuation alone": ("???", NOTHING),
    "broken Unicode": ("Rollo \ud83d", "[1] Rollo was the first ruler of Normandy."),
    "its 200th word counts": ("x " * 199 + "Rollo", "[1] Rollo was the first ruler of Normandy."),
    "its 201st does not": ("x " * 200 + "Rollo", NOTHING),
}


@pytest.mark.parametrize(("query", "found"), QUERIES.values(), ids=QUERIES)
def test_what_a_query_finds(query, found, corpus):
    """The result as the model reads it."""
    assert search(corpus=corpus(*PASSAGES))(query) == found


def test_results_fall_in_score_and_ties_stand_in_order(corpus):
    """At most k of them."""
    path = corpus(*({"text": text} for text in ("owl and more", "owl owl", "cat", "owl and more")))
    assert search(corpus=path)("owl") == "[2] owl owl\n\n[1] owl and more\n\n[4] owl and more"
    assert search(corpus=path, k=2)("owl") == "[2] owl owl\n\n[1] owl and more"
    alike = search(corpus=corpus(*[{"text": "an owl"}, {"text": "a mouse"}] * 100), k=20)("owl")
    assert re.findall(r"\[(\d+)\]", alike) == [str(number) for number in range(1, 40, 2)]


def test_the_model_sees_only_the_query(corpus):
    """Settings are the recipe's."""
    schema = get_json_schema(search(corpus=corpus(*PASSAGES)))["function"]
    assert schema["name"] == "search" and schema["description"] == "Look up passages about a query."
    assert set(schema["parameters"]["properties"]) == {"query"} and schema["parameters"]["required"] == ["query"]


FOUND_BY = 0.94  # of SQuAD's answerable questions; the library's own tokenisation gives 0.91


def test_squad_questions_find_their_passages(corpus):
    """Among the first three of 120: more often than by the library's own tokenisation."""
    path = test_data("squad/squad_v2.json")
    parts = [
        part for article in json.loads(path.read_text(encoding="utf-8"))["data"] for part in article["paragraphs"]
    ]
    texts = list(dict.fromkeys(part["context"] for part in parts))
    asked = [
        (one["question"], texts.index(part["context"]))
        for part in parts
        for one in part["qas"]
        if not one["is_impossible"]
    ]
    tool = search(corpus=corpus(*({"text": text} for text in texts)), budget=100_000)
    hits = sum(re.search(rf"^\[{at + 1}\] ", tool(question), re.MULTILINE) is not None for question, at in asked)
    library = bm25s.BM25()
    library.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    theirs, _ = library.retrieve(
        bm25s.tokenize([question for question, _ in asked], show_progress=False), k=3, show_progress=False
    )
    library_hits = sum(at in found for (_, at), found in zip(asked, theirs, strict=True))
    assert hits / len(asked) >= FOUND_BY and hits >= library_hits, (hits, library_hits, len(asked))


@pytest.fixture(scope="module")
def qwen():
    """A tokenizer as models have it."""
    return AutoTokenizer.from_pretrained(test_data("qwen2.5_tokenizer"))


LONG = {
    "English": "Rollo " + "went on to rule the land " * 40,
    "Chinese": "长城" + "是中国古代的防御工程，" * 60,
    "no break": "Rollo " + "ab1" * 3000,
    "broken Unicode": "Rollo " + "\ud800 " * 300,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("budget", [8, 20, 60, 200])
def test_the_budget_holds_in_tokens(budget, text, corpus, qwen):
    """By the model's own tokenizer; what can be used is used, and the beginning shows."""
    path = corpus(*({"text": text, "id": f"p{number}"} for number in range(4)))
    found = search(corpus=path, budget=budget, tokenizer=qwen)("Rollo 长城")
    assert budget - 20 < len(qwen.tokenize(found)) <= budget
    assert found.startswith(f"[p0] {text[:1]}") and found.endswith(" …")


def test_whole_passages_first_and_the_last_one_cut(corpus):
    """Counted in words without a tokenizer, the id too; no id stands without text."""
    path = corpus(*({"text": f"owl {letter} two three four"} for letter in "uvw"))
    found = {budget: search(corpus=path, budget=budget)("owl") for budget in (4, 8, 15, 18)}
    whole = [f"[{number}] owl {letter} two three four" for number, letter in enumerate("uvw", 1)]
    assert found[4] == "[1] owl …" and found[8] == f"{whole[0]} …"
    assert found[15] == f"{whole[0]}\n\n{whole[1]} …" and found[18] == "\n\n".join(whole)


def test_a_very_long_passage_is_not_tokenized_whole(corpus, qwen):
    """A file without a blank line is one passage."""
    lengths = []

    def tokenizer(text, **options):
        lengths.append(len(text))
        return qwen(text, **options)

    found = search(corpus=corpus({"text": "owl " * 100_000}), budget=10, tokenizer=tokenizer)("owl")
    assert found.startswith("[1] owl owl") and max(lengths) < 1000


def test_folders_and_single_files(tmp_path):
    """Paragraphs of .txt and .md, in the order of their names, also from Windows; other files do not count."""
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffOwls\r\nfly.\r\n \r\n\r\nOwls eat.\r\n".encode())
    (folder / "b" / "c.md").write_text("# Owls")
    (folder / "b" / "d.csv").write_bytes(b"owls \xff")
    assert search(corpus=str(folder))("owl").split("\n\n") == ["[3] # Owls", "[1] Owls fly.", "[2] Owls eat."]
    assert search(corpus=str(folder / "b" / "c.md"))("owl") == "[1] # Owls"


@pytest.mark.filterwarnings("error")
def test_a_corpus_of_stop_words_finds_nothing(corpus):
    """An index without a term is no fault."""
    assert search(corpus=corpus({"text": "the"}))("the owl") == NOTHING


def state(folder) -> dict:
    """Every file below a folder, with its time and content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_index_is_built_once_for_a_corpus(corpus, cache, monkeypatch):
    """And anew for another; no file of it is a pickle."""
    tool, before = search(corpus=corpus(*PASSAGES)), state(cache)
    assert len(list(cache.iterdir())) == 1 and not any(
        b"pickle" in name.encode() or name.endswith(".pkl") for name in before
    )
    with monkeypatch.context() as patched:
        patched.setattr(bm25s.BM25, "index", None)  # building would fail
        again = search(corpus=corpus(*PASSAGES), k=1, budget=20)
    assert state(cache) == before and again("Rollo") == tool("Rollo")
    assert search(corpus=corpus(*PASSAGES[1:]))("Rollo") == NOTHING and len(list(cache.iterdir())) == 2


DAMAGE = {
    "a file is gone": ("vocab.index.json", lambda path: path.unlink()),
    "a file is empty": ("data.csc.index.npy", lambda path: path.write_bytes(b"")),
    "no JSON": ("params.index.json", lambda path: path.write_text("{")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_built_anew(name, damage, corpus, cache):
    """And put in its place."""
    path = corpus(*PASSAGES)
    found, before = search(corpus=path)("Rollo"), state(cache)
    damage(next(cache.glob(f"*/{name}")))
    assert search(corpus=path)("Rollo") == found
    after = state(cache)
    assert after.keys() == before.keys()
    assert search(corpus=path)("Rollo") == found and state(cache) == after


def test_several_may_build_at_once(corpus, cache):
    """As ranks do: all find the same, and one index stays, nothing half done."""
    path = corpus(*({"text": f"owl {number} " + "word " * 50} for number in range(500)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: search(corpus=path, k=1)("owl 17"), range(4)))
    assert {text[:11] for text in found} == {"[18] owl 17"}
    assert len(list(cache.iterdir())) == 1 and len(state(cache)) == 5


def test_a_cache_that_cannot_be_written_is_gone_without(corpus, cache):
    """As in a container with a read-only home."""
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert search(corpus=corpus(*PASSAGES))("Rollo").startswith("[1]")


WRONG = {  # file, content → what the error says, the remedy behind it
    "no such corpus": (None, None, r"nowhere\.jsonl is not there; give a \.jsonl file"),
    "an empty file": ("c.jsonl", b"\n", r"c\.jsonl holds no passage; give a \.jsonl file"),
    "a kind of file that is none": ("c.csv", b"a,b", r"c\.csv holds no passage; give a \.jsonl file"),
    "an empty folder": ("c/d.bin", b"", r"c holds no passage; give a \.jsonl file .* a folder of them"),
    "another encoding": ("c.jsonl", b'{"text": "caf\xe9"}', r"c\.jsonl: UnicodeDecodeError: .*position 13.*in UTF-8"),
    "another encoding in a folder": (
        "c/d.txt",
        "\ufeffcafé".encode("utf-16"),
        r"d\.txt: UnicodeDecodeError: .*position 0.*in UTF-8",
    ),
    "a line without text": (
        "c.jsonl",
        b'{"text": "x"}\n\n{"title": "x"}',
        r"c\.jsonl, line 3: no text; give each passage a field text",
    ),
    "a line whose text is none": ("c.jsonl", b'{"text": 3}', r"c\.jsonl, line 1: no text"),
    "a line whose text is empty": ("c.jsonl", b'{"text": " "}', r"c\.jsonl, line 1: no text"),
    "a line that is a list": ("c.jsonl", b'["x"]', r"c\.jsonl, line 1: no text"),
    "a line that is no JSON": (
        "c.jsonl",
        b'{"text": "x"}\n{"text"',
        r"c\.jsonl, line 2: JSONDecodeError",
    ),
    "an id twice": (
        "c.jsonl",
        b'{"text": "x", "id": 2}\n{"text": "y"}',
        r"c\.jsonl: 2 passages are called \[2\]; give each its own id",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), WRONG.values(), ids=WRONG)
def test_a_corpus_that_cannot_be_used_is_named(name, content, said, tmp_path):
    """The file, what is wrong, and what to do."""
    path = tmp_path / (name or "nowhere.jsonl")
    if name:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        search(corpus=str(path.parent if "/" in (name or "") else path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"budget": -1}, "budget is -1"),
        ({"k": "3"}, "k is '3'"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"k": True}, "k is True"),
    ],
    ids=["no passage", "below nothing", "text", "half a token", "a truth"],
)
def test_a_setting_that_cannot_be_used_is_named(settings, said, corpus):
    """Before the corpus is read."""
    with pytest.raises(ValueError, match=f"{said} and must be an integer from 1 up"):
        search(corpus="nowhere", **settings)


@pytest.mark.parametrize(
    "query",
    ["", " \n", None, 5, ["Rollo"], {"query": "Rollo"}],
    ids=["empty", "spaces", "none", "number", "list", "object"],
)
def test_a_query_that_is_no_text_is_named(query, corpus):
    """Models pass such; TRL gives them the message."""
    with pytest.raises(ValueError, match=r"search: query is .* and must be a text of a few words"):
        search(corpus=corpus(*PASSAGES))(query)
