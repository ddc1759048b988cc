"""Data the examples make themselves: questions with one right answer, and a tokenizer that is just bytes."""

from __future__ import annotations

import random
from itertools import pairwise

END = 256  # after the 256 bytes: the end of a document
VOCAB = 264  # a multiple of 8 with room for a few more

_CYCLES = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": "January February March April May June July August September October November December".split(),
    "letter": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "planet": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
}


def questions() -> list[tuple[str, str]]:
    """Return (question, answer) pairs: what comes after or before a day, month, letter, planet or number."""
    pairs = []
    for kind, items in {**_CYCLES, "number": [str(n) for n in range(1, 60)]}.items():
        for before, after in pairwise(items):
            pairs.append((f"Which {kind} comes after {before}? ", f"{after}."))
            pairs.append((f"Which {kind} comes before {after}? ", f"{before}."))
    return pairs


def encode(text: str) -> list[int]:
    """Return the bytes of ``text``."""
    return list(text.encode())


def decode(ids: list[int]) -> str:
    """Return the text of byte ids up to the end of the document."""
    ids = ids[: ids.index(END)] if END in ids else ids
    return "".join(chr(i) if i < 256 and chr(i).isprintable() else "·" for i in ids)


def documents() -> tuple[list[list[int]], list[list[float]]]:
    """Return token ids and weights: only the answers are to be learnt."""
    tokens, weights = [], []
    for question, answer in questions():
        q, a = encode(question), [*encode(answer), END]
        tokens.append(q + a)
        weights.append([0.0] * len(q) + [1.0] * len(a))
    return tokens, weights


def preferences() -> list[tuple[str, str, str]]:
    """Return (question, better answer, worse answer): a sentence to what comes after, a bare word to what comes before."""
    pairs = []
    for question, word in questions():
        sentence = f"The answer is {word}"
        pairs.append((question, sentence, word) if " after " in question else (question, word, sentence))
    return pairs


def sentences(count: int, *, seed: int) -> list[list[int]]:
    """Return token ids of sentences drawn by chance: who it is makes some doings likely, and what is done some places."""
    draw = random.Random(seed)
    who = "cat dog owl fox bee cow ant hen".split()
    does = "sleeps runs sings eats hides waits digs jumps".split()
    where = "in the garden,by the river,under a tree,behind the house,on the roof,near a wall".split(",")

    def pick(of: list[str], first: int) -> int:
        weights = [1 / (1 + (i - first) % len(of)) ** 1.5 for i in range(len(of))]
        return draw.choices(range(len(of)), weights)[0]

    found = []
    for _ in range(count):
        one = pick(who, 0)
        two = pick(does, 3 * one)
        found.append([*encode(f"A {who[one]} {does[two]} {where[pick(where, one + 2 * two)]}."), END])
    return found
