"""What the tests of this room share: random documents, a batch class with media, and a comparison of every field."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import fstep

IGNORE = -100


@fstep.pytree
class Media(fstep.Docs):
    """A batch of a user's own: documents hold media items, and each item is cut into patches."""

    items: torch.Tensor = fstep.cut("document", counts="item")
    sizes: torch.Tensor = fstep.cut("item", counts="patch")
    captions: dict[str, torch.Tensor] = fstep.cut("item")
    patches: torch.Tensor = fstep.cut("patch")
    width: int = fstep.static(default=2)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, low: int, high: int, n: int) -> list[int]:
    return torch.randint(low, high + 1, (n,), generator=generator(seed)).tolist()


def random_docs(seed: int, lengths: list[int] | None = None) -> fstep.Docs:
    """Make documents whose every value is different, with float64, integer, bool and multi-dimensional fields."""
    g = generator(seed)
    if lengths is None:
        lengths = draw(seed, 1, 9, int(torch.randint(1, 8, (), generator=g)))
    if not lengths:
        return fstep.make_docs([])
    weights = [torch.rand(n, generator=g, dtype=torch.float64) * (torch.rand(n, generator=g) < 0.7) for n in lengths]
    return fstep.make_docs(
        [torch.randint(1, 1000, (n,), generator=g) for n in lengths],
        weights=weights,
        targets={
            "advantage": [torch.randn(n, generator=g, dtype=torch.float64) for n in lengths],
            "top": [torch.randn(n, 3, generator=g) for n in lengths],
            "right": [torch.rand(n, generator=g) < 0.5 for n in lengths],
        },
        inputs={"segment": [torch.randint(0, 5, (n,), generator=g, dtype=torch.int32) for n in lengths]},
        per_document={"reward": torch.randn(len(lengths), generator=g), "mark": torch.randn(len(lengths), 2, generator=g)},
        shared={"note": "text", "table": torch.arange(4)},
    )


def random_media(seed: int) -> Media:
    docs, g = random_docs(seed), generator(seed + 1000)
    items = torch.randint(0, 3, (len(docs.lengths),), generator=g)
    sizes = torch.randint(0, 4, (int(items.sum()),), generator=g)
    return Media(
        **vars(docs),
        items=items,
        sizes=sizes,
        captions={"ids": torch.randn(len(sizes), 2, generator=g)},
        patches=torch.randn(int(sizes.sum()), 5, generator=g),
        width=4,
    )


def assert_same(actual: Any, expected: Any) -> None:
    """Two batches are one: type, fields, dtypes and every bit."""
    assert type(actual) is type(expected)
    for field in dataclasses.fields(expected):
        a, e = getattr(actual, field.name), getattr(expected, field.name)
        assert fstep.tree_paths(a) == fstep.tree_paths(e), field.name
        for x, y in zip(fstep.tree_leaves(a), fstep.tree_leaves(e), strict=True):
            if isinstance(y, torch.Tensor):
                assert x.dtype == y.dtype and torch.equal(x, y), (field.name, x, y)
            else:
                assert x == y, field.name


def per_document(batch: fstep.Docs) -> list[dict[str, Any]]:
    """Take a batch apart into plain lists, one dict a document, with Python's own slices."""
    out, start = [], 0
    for i, n in enumerate(batch.lengths.tolist()):
        at = slice(start, start + n)
        start += n
        out.append(
            {
                "index": int(batch.index[i]),
                "tokens": batch.tokens.tolist()[at],
                "weights": batch.weights.tolist()[at],
                **{f"targets.{k}": v.tolist()[at] for k, v in batch.targets.items()},
                **{f"inputs.{k}": v.tolist()[at] for k, v in batch.inputs.items()},
                **{f"per_document.{k}": v.tolist()[i] for k, v in batch.per_document.items()},
            }
        )
    return out
