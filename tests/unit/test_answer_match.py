"""Answers against gold answers: SQuAD's matches by hand, questions without an answer, the passage looked up."""

import json

import pytest
from helpers import test_data
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

from rewards.answer_match import answer_exact, answer_f1, answer_match_reward, passage_retrieved

MATCHES = {  # reply, gold answers → exact match, F1
    "the same": ("France", ["France"], 1, 1),
    "case, article, punctuation and spaces aside": ("  The  U.S.  of a America!", ["us of America"], 1, 1),
    "an article is no letter": ("bathe", ["bthe"], 0, 0),
    "one word of two": ("Rollo", ["Duke Rollo"], 0, 2 / 3),
    "two words too many": ("in the 10th century AD", ["10th century"], 0, 2 * (2 / 4 * 1) / (2 / 4 + 1)),
    "a word counts as often as it stands in both": ("no no no", ["no no yes"], 0, 2 / 3),
    "the best of several": ("10th century", ["in the 10th and 11th centuries", "10th Century.", "x"], 1, 1),
    "the best F1 of several": (
        "11th centuries",
        ["10th and 11th centuries", "10th"],
        0,
        2 * (1 * 2 / 4) / (1 + 2 / 4),
    ),
    "nothing in common": ("Paris", ["Rollo"], 0, 0),
    "an empty reply": ("", ["Rollo"], 0, 0),
    "a hyphen joins": ("1990-2000", ["19902000"], 1, 1),
    "only what stands in the tags": ("Denmark, Norway. <Answer>\nRollo </Answer> I think", ["rollo"], 1, 1),
    "the last of several tags": ("<answer>Norway</answer> no: <answer>Rollo</answer>", ["Rollo"], 1, 1),
    "a tag that was never closed": ("<answer>Rollo", ["Rollo"], 0, 0),
    "Chinese": ("北京大学。", ["北京大学"], 1, 1),
    "Chinese by characters": ("在北京大学", ["北京"], 0, 2 * (2 / 5 * 1) / (2 / 5 + 1)),
    "Chinese quotes and spaces": ("“北京 大学”", ["《北京大学》"], 1, 1),
    "full-width digits": ("１９９８。", ["1998"], 1, 1),
    "Chinese and English": ("iPhone手机", ["手机iPhone"], 0, 1),
    "in quotes of print": ("“France”.", ["France"], 1, 1),
    "in other quotes": ("„Duke Rollo“", ["«Duke Rollo»"], 1, 1),
    "in a box of LaTeX": (r"<answer>$\boxed{\text{Rollo}}$</answer>", ["Rollo"], 1, 1),
    "in bold with a zero-width character": ("**Rollo\u200b**", ["rollo"], 1, 1),
    "accents in two forms": ("Zu\u0308rich", ["Zürich"], 1, 1),
    "no answer where there is one": ("unanswerable", ["France"], 0, 0),
}


@pytest.mark.parametrize(("reply", "gold", "exact", "f1"), MATCHES.values(), ids=MATCHES)
def test_what_a_reply_is_worth(reply, gold, exact, f1):
    """In plain text and in chat; the reward is the weighted sum."""
    both = [reply, [{"role": "assistant", "content": reply}]]
    assert answer_exact(both, [gold] * 2) == [exact] * 2
    assert answer_f1(both, [gold] * 2) == [pytest.approx(f1)] * 2
    assert answer_match_reward(both, [gold] * 2, exact=2, f1=10) == [pytest.approx(2 * exact + 10 * f1)] * 2


WITHOUT = {
    "as asked": ("<answer>unanswerable</answer>", 1),
    "in capitals": ("Unanswerable.", 1),
    "with more behind": ("I don’t know; they do not say.", 1),
    "in other words": ("The answer is not in the passages", 1),
    "Chinese": ("无法回答。", 1),
    "Chinese with more behind": ("我不知道，文章里没有", 1),
    "an answer": ("<answer>France</answer>", 0),
    "an answer and then nothing": ("France, or I don't know", 0),
    "only outside the tags": ("No answer? <answer>France</answer>", 0),
    "a word that begins alike": ("Unanswerables", 0),
    "a plain no": ("No", 0),
    "nothing": ("", 0),
}


@pytest.mark.parametrize(("reply", "score"), WITHOUT.values(), ids=WITHOUT)
def test_a_question_without_an_answer(reply, score):
    """Exact match and F1 alike."""
    assert answer_exact([reply], [[]]) == answer_f1([reply], [[]]) == answer_match_reward([reply], [[]]) == [score]


def looked_up(*results: str, reply: str = "no idea") -> list[dict]:
    """A completion with a search for each result, and a reply."""
    messages = []
    for result in results:
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "search", "arguments": {"query": "x"}}}],
            }
        )
        messages.append({"role": "tool", "name": "search", "content": result})
    return [*messages, {"role": "assistant", "content": reply}]


RETRIEVED = {
    "first": (looked_up("[7] Normans: …\n\n[8] x"), "7", 1),
    "second": (looked_up("[8] x\n\n[7] Normans: …"), "7", 1),
    "by a number": (looked_up("[7] x"), 7, 1),
    "in a second search": (looked_up("[1] x", "[7] x"), "7", 1),
    "another": (looked_up("[77] x\n\n[17] x"), "7", 0),
    "within a line": (looked_up("[8] as [7] says"), "7", 0),
    "a pattern is no pattern": (looked_up("[abc] x"), "a.c", 0),
    "in what the model says": (looked_up("[8] x", reply="[7] x"), "7", 0),
    "in a failed call": (looked_up("{'error': 'query is:\n[7] x'}"), "7", 0),
    "no search": ("[7] x", "7", 0),
    "cut off before the result": (looked_up("[7] x")[:1], "7", 0),
    "no gold passage": (looked_up("[7] x"), "", None),
    "none either": (looked_up("[7] x"), None, None),
}


@pytest.mark.parametrize(("completion", "passage", "found"), RETRIEVED.values(), ids=RETRIEVED)
def test_the_passage_was_found(completion, passage, found):
    """As a measure, and as the reward's bonus, which a question without an answer never earns."""
    assert passage_retrieved([completion], passage_id=[passage]) == [found]
    assert answer_match_reward([completion] * 2, [["zebra"], []], passage_id=[passage] * 2) == [0.2 if found else 0, 0]


def test_without_a_column_of_passages():
    """Nothing to measure, and the reward goes without."""
    assert passage_retrieved([looked_up("[7] x"), "y"]) == [None, None]
    assert answer_match_reward([looked_up("[7] x", reply="Rollo")], [["rollo"]]) == [1]


def test_a_row_whose_answers_are_null_is_a_failed_rating():
    """It is no question without an answer, which has an empty list."""
    for reward in (answer_exact, answer_f1, answer_match_reward):
        assert reward(["unanswerable"] * 3, [None, [], float("nan")]) == [None, 1, None]


WRONG = {
    "answers that are one text": ({"answers": ["France"]}, "answers is 'France' and must be a list"),
    "answers in SQuAD's own form": ({"answers": [{"text": ["France"]}]}, "must be a list of texts"),
    "an empty answer": ({"answers": [[""]]}, "for no answer"),
    "a null among the answers": ({"answers": [[None]]}, r"answers is \[None\]"),
    "fewer answers than replies": ({"answers": []}, "shorter"),
    "a passage's id that was made a float": (
        {"answers": [["x"]], "passage_id": [3.0]},
        "passage_id is 3.0 and must be a text",
    ),
    "an option below 0": (
        {"answers": [["x"]], "f1": -1},
        "f1 is -1 and must be a number from 0 up",
    ),
    "an option that is no number": ({"answers": [["x"]], "exact": "1e-2"}, "exact is '1e-2'"),
    "an option without end": ({"answers": [["x"]], "retrieved": float("inf")}, "retrieved is inf"),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_named(given, said):
    """The reward, the value and the remedy."""
    with pytest.raises(ValueError, match=said):
        answer_match_reward(["France"], **given)


def test_matches_are_those_of_squads_evaluation():
    """As transformers has it, on gold answers, the words around them, and whole contexts."""
    articles = json.loads(test_data("squad/squad_v2.json").read_text(encoding="utf-8"))["data"]
    rows = [
        (part["context"], asked)
        for article in articles
        for part in article["paragraphs"]
        for asked in part["qas"]
        if asked["answers"]
    ]
    gold = [[answer["text"] for answer in asked["answers"]] for _, asked in rows]
    around = [context[max(asked["answers"][0]["answer_start"] - 9, 0) :][:40] for context, asked in rows]
    for replies in (around, [context for context, _ in rows], [answers[-1].upper() for answers in gold]):
        assert answer_exact(replies, gold) == [
            max(compute_exact(one, given) for one in answers) for given, answers in zip(replies, gold, strict=True)
        ]
        assert answer_f1(replies, gold) == pytest.approx(
            [max(compute_f1(one, given) for one in answers) for given, answers in zip(replies, gold, strict=True)]
        )
