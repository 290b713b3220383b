"""Posts and summaries in the form of Reddit TL;DR, made from a grammar, so that a model can be taught without a network.

Every word that a post or a summary can hold comes from the lists below: `vocabulary()` is the yardstick for "still writes words".
"""

import functools
import random
import re

PEOPLE = {
    "roommate": ["she", "he", "they"],
    "sister": ["she"],
    "brother": ["he"],
    "boss": ["she", "he"],
    "neighbour": ["she", "he"],
    "cousin": ["she", "he"],
    "best friend": ["she", "he"],
    "girlfriend": ["she"],
    "boyfriend": ["he"],
    "landlord": ["she", "he"],
}
NAMES = {
    "she": ["Anna", "Carla", "Emma", "Grace", "Iris", "Karen", "Maria", "Olivia", "Rosa", "Tina"],
    "he": ["Ben", "David", "Frank", "Henry", "Jack", "Leo", "Nick", "Paul", "Simon", "Victor"],
    "they": ["Alex", "Charlie", "Jamie", "Jordan", "Kim", "Morgan", "Robin", "Sam", "Sasha", "Taylor"],
}
THINGS = ["bike", "guitar", "laptop", "sofa", "camera", "lamp", "coat", "kettle", "tent", "piano", "phone", "desk", "mirror", "carpet", "radio"]
PLACES = ["kitchen", "garden", "office", "garage", "library", "cafe", "school", "station", "gym", "park"]
TIMES = ["last week", "two months ago", "on Friday", "yesterday", "last summer", "three days ago", "in March", "this morning"]
DEEDS = {
    "borrowed": ("borrowed my {thing} without asking", "give it back"),
    "broke": ("broke my {thing} in the {place}", "pay for it"),
    "sold": ("sold my {thing} to a stranger", "share the money"),
    "lost": ("lost my {thing} at the {place}", "help me look for it"),
    "painted": ("painted my {thing} bright green", "clean it"),
    "hid": ("hid my {thing} in the {place}", "tell me where it is"),
}
FEELINGS = ["angry", "sad", "confused", "tired", "worried", "disappointed", "calm", "nervous"]
REACTIONS = [
    "I tried to talk about it but {they} only laughed",
    "I wrote a long message and got no answer",
    "I asked for help and {they} left the room",
    "I stayed quiet because I did not want a fight",
    "I told {them} that this was not fair",
]
EXCUSES = [
    "{they} said it was only a joke",
    "{they} said that I never use it anyway",
    "{they} said that friends share everything",
    "{they} said it was an accident",
    "{they} said that I should calm down",
]
OTHERS = [
    "My mother thinks that I should forgive {them}",
    "My friends say that I am too kind",
    "Everyone at the {place} knows about it now",
    "My father thinks that I should buy a new one",
    "Nobody at home wants to talk about it",
]
HISTORY = [
    "We have known each other for {n} years",
    "We have shared a flat for {n} months",
    "We used to cook dinner together every evening",
    "We have never had a fight before",
    "We work in the same {place} and meet every day",
]
PLANS = [
    "I want to move out before the winter",
    "I want to ask for the money one more time",
    "I want to stop lending my things to anyone",
    "I want to talk to a lawyer about it",
    "I want to keep the peace until the holidays",
]
QUESTIONS = [
    "How do I tell {them} that I need an apology?",
    "Should I wait or should I leave?",
    "Am I wrong to be so {feeling}?",
    "What would you do in my place?",
    "How can I make {them} {remedy}?",
]
FORUMS = ["relationships", "advice", "roommates", "family", "work"]
THEM = {"she": "her", "he": "him", "they": "them"}


def _sentence(text: str) -> str:
    """A sentence with a capital and a full stop; a question keeps its mark."""
    text = text[0].upper() + text[1:]
    return text if text.endswith("?") else text + "."


def posts(count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows {"prompt", "completion"} in the column form of the trl-lib/tldr dataset; one seed, one list.

    A summary repeats five to nine of the post's facts in other words: about 340 characters, so that a target of 200 leaves
    something to learn.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        who = rng.choice(list(PEOPLE))
        they = rng.choice(PEOPLE[who])
        deed, remedy = rng.choice(list(DEEDS.values()))
        facts = {
            "who": who,
            "name": rng.choice(NAMES[they]),
            "they": they,
            "them": THEM[they],
            "thing": rng.choice(THINGS),
            "place": rng.choice(PLACES),
            "time": rng.choice(TIMES),
            "feeling": rng.choice(FEELINGS),
            "remedy": remedy,
            "n": rng.choice(["two", "three", "four", "five", "six"]),
        }
        pick = {
            "did": deed,
            "excuse": rng.choice(EXCUSES),
            "reaction": rng.choice(REACTIONS),
            "other": rng.choice(OTHERS),
            "history": rng.choice(HISTORY),
            "plan": rng.choice(PLANS),
            "question": rng.choice(QUESTIONS),
        }
        pick = {key: value.format(**facts) for key, value in pick.items()}
        told = f"{facts['time']} my {who} {facts['name']} {pick['did']}"
        body = [
            told,
            *rng.sample([pick["history"], pick["excuse"], pick["reaction"], pick["other"]], 4),
            f"I am {facts['feeling']} about it",
            pick["plan"],
            pick["question"],
        ]
        summary = [f"my {who} {facts['name']} {pick['did']} {facts['time']}"]
        extra = [
            f"and {they} will not {remedy}",
            pick["excuse"],
            pick["reaction"],
            pick["history"],
            f"I am {facts['feeling']} and do not know what to do",
            pick["other"],
            pick["plan"],
        ]
        kept = sorted(rng.sample(range(len(extra)), rng.choice([4, 5, 6, 6, 7, 7, 7])))
        if 0 in kept:
            summary[0] += " " + extra[0]
        summary += [extra[i] for i in kept if i] + [pick["question"]] * rng.randint(0, 1)
        prompt = f"SUBREDDIT: r/{rng.choice(FORUMS)}\n\nTITLE: My {who} {pick['did']}\n\nPOST: {' '.join(map(_sentence, body))}\n\nTL;DR:"
        rows.append({"prompt": prompt, "completion": " " + " ".join(map(_sentence, summary))})
    return rows


def strange_post(rng: random.Random) -> str:
    """A post of 60 to 320 words in no order, half of them cut and joined from pieces of known ones.

    Most of a real post is such text to a model that was taught by `posts` alone, and it must not lose its language over it.
    """
    known = sorted(vocabulary())

    def word() -> str:
        first, second = rng.choices(known, k=2)
        return first if rng.random() < 0.5 else first[: rng.randint(1, 4)] + second[-rng.randint(1, 4) :]

    def sentence() -> str:
        return " ".join(word() for _ in range(rng.randint(4, 16))).capitalize() + rng.choice([".", ".", "?", "!", "...", f" {rng.randint(1, 999)}."])

    body = " ".join(sentence() for _ in range(rng.randint(6, 32)))
    return f"SUBREDDIT: r/{word()}\n\nTITLE: {sentence()}\n\nPOST: {body}"


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z]+", text.lower())


@functools.cache
def vocabulary() -> set[str]:
    """Every word that the generator can write."""
    return {word for row in posts(4000, seed=0) for text in row.values() for word in words(text)}
