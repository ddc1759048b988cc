"""cp_attention beyond its results: what a way of talking costs, what is kept, and which is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Mesh
from fstep.ops import context, kernels, zigzag
from tests.ops.test_ring import LENGTHS, check, own_places, row, run, sharded, tensors, whole


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, [7], [], [20, 1]])
def test_prefixes(lengths: list[int], size: int) -> None:
    """Each chunk's document from its start on, found among the ranks' rows by plain lists."""
    packed = row(size, lengths)
    cu, tokens = packed.cu_seqlens_padded, len(packed.tokens) // size
    ranks = [own_places(packed, rank, size).tolist() for rank in range(size)]
    where = {place: rank * tokens + i for rank, places in enumerate(ranks) for i, place in enumerate(places)}
    for rank in range(size):
        want, begins = [], [0]
        for start, length in zip(cu.tolist(), cu.diff().tolist(), strict=False):
            for chunk in (rank, 2 * size - 1 - rank):
                end = start + (chunk + 1) * length // (2 * size)
                want += [where[place] for place in range(start, end)]
                begins.append(len(want))
        at, cu_k = zigzag.prefixes(cu // size, tokens, rank, size)
        assert at.tolist() == want and cu_k.tolist() == begins


def test_which_is_taken() -> None:
    """Heads where they divide and rows are long; gathered keys of at most four times a rank's queries; else a ring."""

    def found(tokens: int) -> list[str]:
        cases = [(4, 32, 8), (8, 32, 8), (16, 32, 8), (16, 32, 16), (2, 8, 8), (4, 8, 8), (3, 8, 8), (64, 32, 1), (3, 4, 1)]
        return [context.choose(size, tokens, heads, kv, 0, "auto") for size, heads, kv in cases]

    short = "allgather allgather ring ulysses allgather ulysses ring allgather allgather"
    assert found(16383) == short.split()  # 8 heads of keys do not divide by 16
    assert found(16384) == ["ulysses", "ulysses", "ring", "ulysses", "ulysses", *short.split()[5:]]
    assert context.choose(3, 99, 8, 8, 5, "auto") == context.choose(3, 99, 8, 8, 0, "math") == "allgather"
    assert torch.func.grad(lambda x: x * (context.choose(4, 16384, 32, 8, 0, "auto") == "allgather"))(torch.ones(())) == 1


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 1, 2), (4, 4, 4), (3, 3, 4)])
def test_auto_is_one_of_them(heads: int, kv_heads: int, size: int) -> None:
    packed = row(size)
    xs = tensors(len(packed.tokens), heads, kv_heads, dim=4)
    for window in (0, 5):
        method = context.choose(size, len(packed.tokens) // size, heads, kv_heads, window, "auto")
        for a, b in zip(
            sharded(packed, xs, size, window=window), sharded(packed, xs, size, window=window, method=method), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("method", "calls"), [("allgather", 1), ("ulysses", 1), ("ring", 3)])
def test_calls_of_the_kernel_do_not_grow_with_the_number_of_documents(
    method: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fstep.ops import attention

    packed, size = row(3, [5, 1, 9] * 20), 3
    counts = {"run": 0, "pull": 0}

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def f(*args: Any) -> Any:
            counts[name] += 1
            return real(*args)

        return f

    for name in counts:
        f = counted(name, getattr(kernels, name))
        monkeypatch.setattr(attention, name, f)
        monkeypatch.setattr(kernels, name, f)
    xs = tensors(len(packed.tokens), 3, 3, dim=4)
    got = sharded(packed, xs, size, method=method)
    assert counts == {"run": calls * size, "pull": calls * size}
    check(got, whole(packed, xs))


@pytest.mark.parametrize("method", ["allgather", "ring", "ulysses"])
def test_what_is_kept_is_a_ranks_own(method: str) -> None:
    """Queries, keys, values, the output and a logsumexp; of gathered keys only where they are."""
    size, packed = 4, row(4, [64])
    tokens = len(packed.tokens) // size
    xs = [x[:tokens] for x in tensors(len(packed.tokens), 8, 4, dim=16)]

    def f(mesh: Mesh) -> int:
        kept: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.data_ptr()] = x
            return x

        leaves = [x.clone().requires_grad_() for x in xs[:3]]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(packed, mesh, *leaves, method=method)
        return sum(x.numel() for x in kept.values() if x.is_floating_point())

    own = tokens * (2 * 8 * 16 + 2 * 4 * 16 + 8)
    assert fstep.simulate(f, cp=size) == [own] * size


def test_addends_of_gradients_are_added_in_float32() -> None:
    """Eight ranks add to a key's gradient; each rounds its own, and the sum is rounded once more."""
    packed = row(8, [200, 30, 90])
    xs = [x.bfloat16() for x in tensors(len(packed.tokens), 2, 1)]
    want, alone = whole(packed, [x.double() for x in xs]), whole(packed, xs, method="flash")
    for a, b, c in list(zip(sharded(packed, xs, 8, method="allgather"), alone, want, strict=True))[2:]:
        assert (a.double() - c).norm() < 1.25 * (b.double() - c).norm()


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("size", [2, 3])
def test_scores_that_overflow_an_exponential(size: int, method: str) -> None:
    packed = row(size)
    q, k, v, g = tensors(len(packed.tokens), 6, 2)
    xs = [q * 60, k * 60, v, g]  # scores of thousands; exp(710) is infinite
    assert float((xs[0] @ xs[1][:, :1].transpose(1, 2)).abs().max()) > 5000
    check(sharded(packed, xs, size, method=method), whole(packed, xs), tolerance=1e-9)
