"""Data the examples make themselves: questions with one right answer, and a tokenizer that is just bytes."""

from __future__ import annotations

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
    text = bytes(i for i in ids if i < 256).decode("latin-1")
    return "".join(c if c.isprintable() else "·" for c in text)


def documents() -> tuple[list[list[int]], list[list[float]]]:
    """Return token ids and weights: only the answers are to be learnt."""
    tokens, weights = [], []
    for question, answer in questions():
        q, a = encode(question), [*encode(answer), END]
        tokens.append(q + a)
        weights.append([0.0] * len(q) + [1.0] * len(a))
    return tokens, weights
