"""What every transport has to do: a table of the functions with an oracle each, and checks that any mesh can run.

An oracle is plain arithmetic on the list of all ranks' inputs; it never sees an axis. For gradients there is the law

    pair(out, f(x), y) == pair(in, x, fT(y))

where y is any gradient of the output. A pairing adds <a_r, b_r> over the ranks, unless the value is replicated *and* its
gradient is: n equal copies of one vector are one vector, and it is counted once. That is why psum's transpose is the
identity here, and would be psum again if the copies were counted n times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fstep
from fstep import Axis, Mesh

SHAPE = (12, 2, 24)  # 12 divides by 2, 3 and 4


@dataclass(frozen=True)
class Case:
    name: str
    f: Callable[[Tensor, Axis], Tensor]
    oracle: Callable[[list[Tensor]], list[Tensor]]
    replicated_in: bool = False  # one vector, the same on all ranks, and so is its gradient
    replicated_out: bool = False
    partial_out: bool = False  # addends of one vector, whose gradient is the same on all ranks
    min_size: int = 1


def add(xs: list[Tensor]) -> Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = total + x  # in the order of ranks: the same bits
    return total


def swap(xs: list[Tensor], split: int, concat: int) -> list[Tensor]:
    n = len(xs)
    return [torch.cat([x.chunk(n, split)[r] for x in xs], concat) for r in range(n)]


CASES = [
    Case("psum", lambda x, a: fstep.psum(x, axis=a), lambda xs: [add(xs)] * len(xs), replicated_out=True),
    Case("pvary", lambda x, a: fstep.pvary(x, axis=a), lambda xs: xs, replicated_in=True),
    Case(
        "as_partial",
        lambda x, a: fstep.as_partial(x, axis=a),
        lambda xs: [xs[0], *(torch.zeros_like(x) for x in xs[1:])],
        replicated_in=True,
        partial_out=True,
    ),
    *(
        Case(
            f"all_gather dim={dim} grad={grad}",
            lambda x, a, dim=dim, grad=grad: fstep.all_gather(x, axis=a, dim=dim, grad=grad),
            lambda xs, dim=dim: [torch.cat(xs, dim)] * len(xs),
            replicated_out=grad == "slice",
        )
        for dim in (0, 1, -1)
        for grad in ("sum", "slice")
    ),
    *(
        Case(
            f"reduce_scatter dim={dim}",
            lambda x, a, dim=dim: fstep.reduce_scatter(x, axis=a, dim=dim),
            lambda xs, dim=dim: list(add(xs).chunk(len(xs), dim)),
        )
        for dim in (0, -1)
    ),
    *(
        Case(
            f"take_shard dim={dim}",
            lambda x, a, dim=dim: fstep.take_shard(x, axis=a, dim=dim),
            lambda xs, dim=dim: list(xs[0].chunk(len(xs), dim)),
            replicated_in=True,
        )
        for dim in (0, -1)
    ),
    *(
        Case(
            f"all_to_all {split} {concat}",
            lambda x, a, s=split, c=concat: fstep.all_to_all(x, axis=a, split_dim=s, concat_dim=c),
            lambda xs, s=split, c=concat: swap(xs, s, c),
        )
        for split, concat in ((0, 1), (2, 0), (0, -1), (0, 0))
    ),
    *(
        Case(
            f"ppermute {shift}",
            lambda x, a, shift=shift: fstep.ppermute(x, shift, axis=a),
            lambda xs, shift=shift: [xs[(r - shift) % len(xs)] for r in range(len(xs))],
        )
        for shift in (1, -1, 2)
    ),
    Case(
        "ppermute by a cycle of the first three",  # not its own inverse; a rank left alone where there are four
        lambda x, a: fstep.ppermute(x, [1, 2, 0, *range(3, a.size)], axis=a),
        lambda xs: [xs[2], xs[0], xs[1], *xs[3:]],
        min_size=3,
    ),
    *(
        Case(
            f"broadcast from {'last' if last else 'first'} grad={grad}",
            lambda x, a, last=last, grad=grad: fstep.broadcast(x, axis=a, src=(a.size - 1) * last, grad=grad),
            lambda xs, last=last: [xs[-last]] * len(xs),
            replicated_out=grad == "slice",
        )
        for last in (0, 1)
        for grad in ("sum", "slice")
    ),
]


def rand(*seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(sum(s * 1000**i for i, s in enumerate(seed)))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def inputs(case: Case, size: int) -> list[Tensor]:
    return [rand(0 if case.replicated_in else r) for r in range(size)]


def cotangents(case: Case, outs: list[Tensor]) -> list[Tensor]:
    alike = case.replicated_out or case.partial_out
    return [rand(0 if alike else r, 7, shape=tuple(out.shape)) for r, out in enumerate(outs)]


def pair(replicated: bool, xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    if replicated:
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(x, xs[0]) and torch.equal(y, ys[0]), "replicated means the same bits on every rank"
        xs, ys = xs[:1], ys[:1]
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


def value_and_transpose(case: Case, axis: Axis) -> tuple[Tensor, Tensor]:
    """Run on one rank: its output, and its gradient for the cotangent of the law."""
    x = inputs(case, axis.size)[axis.rank].requires_grad_()
    out = case.f(x, axis)
    y = cotangents(case, case.oracle(inputs(case, axis.size)))[axis.rank]
    (gradient,) = torch.autograd.grad(out, x, y)
    return out.detach(), gradient


def check_law(case: Case, results: list[tuple[Tensor, Tensor]]) -> None:
    xs = inputs(case, len(results))
    want = case.oracle(xs)
    for (out, _), expected in zip(results, want, strict=True):
        assert torch.equal(out, expected)
    left = pair(case.replicated_out, want, cotangents(case, want))
    right = pair(case.replicated_in, xs, [gradient for _, gradient in results])
    torch.testing.assert_close(right, left, rtol=1e-12, atol=0)


# Checks: functions of a mesh with pp 2 and tp 2 that assert, on every rank, in threads and in processes alike. ----------


def check_dtypes(mesh: Mesh) -> None:
    r = mesh.tp.rank
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.int32):
        x = torch.tensor([1, 2, 3], dtype=dtype) * (r + 1)
        got = fstep.psum(x, axis=mesh.tp)
        assert got.dtype == dtype and got.tolist() == [3, 6, 9]
        assert fstep.pmax(x, axis=mesh.tp).tolist() == [2, 4, 6]
        assert fstep.reduce_scatter(torch.tensor([1, 2], dtype=dtype), axis=mesh.tp).tolist() == [2 * (r + 1)]
    for dtype in (torch.bool, torch.bfloat16, torch.complex64, torch.uint8, torch.float8_e4m3fn):
        x = torch.tensor([[r, 1], [1, r]]).to(dtype)
        both = torch.tensor([[0, 1], [1, 0], [1, 1], [1, 1]]).to(dtype)
        got = fstep.all_gather(x, axis=mesh.tp, grad="slice")
        assert got.dtype == dtype and torch.equal(got.view(torch.uint8), both.view(torch.uint8))
        assert torch.equal(fstep.ppermute(x, 1, axis=mesh.tp).view(torch.uint8), both.view(2, 2, 2)[1 - r].view(torch.uint8))
        from_1 = fstep.broadcast(x, axis=mesh.tp, src=1, grad="slice")
        assert torch.equal(from_1.view(torch.uint8), both[2:].view(torch.uint8))
        swapped = fstep.all_to_all(x, axis=mesh.tp, split_dim=0, concat_dim=0)
        assert torch.equal(swapped.view(torch.uint8), both.view(2, 2, 2)[:, r].contiguous().view(torch.uint8))


def check_sixteen_bits_round_once(mesh: Mesh) -> None:
    # 256 + 1 is 256 in bfloat16: added one by one nothing would ever arrive, added in float32 half of it does.
    axis = mesh.over("pp", "tp")
    x = torch.tensor(256.0 if axis.rank == 0 else 1.0, dtype=torch.bfloat16)
    assert float(fstep.psum(x, axis=axis)) == 260.0  # 259, to the nearest multiple of 2, ties to even: 260


def check_shapes(mesh: Mesh) -> None:
    r = mesh.tp.rank
    for shape in ((), (1,), (0,), (3, 0, 2), (5, 1)):
        x = torch.full(shape, r + 1.0)
        assert torch.equal(fstep.psum(x, axis=mesh.tp), torch.full(shape, 3.0))
        assert torch.equal(fstep.ppermute(x, 1, axis=mesh.tp), torch.full(shape, 2.0 - r))
        assert torch.equal(fstep.broadcast(x, axis=mesh.tp, src=1, grad="slice"), torch.full(shape, 2.0))
        if shape:
            both = torch.cat([torch.full(shape, 1.0), torch.full(shape, 2.0)])
            assert torch.equal(fstep.all_gather(x, axis=mesh.tp, grad="slice"), both)
    strided = torch.arange(24.0).view(4, 6).T[::2] + r
    assert not strided.is_contiguous()
    assert torch.equal(fstep.psum(strided, axis=mesh.tp), 2 * torch.arange(24.0).view(4, 6).T[::2] + 1)
    assert torch.equal(
        fstep.all_to_all(strided, axis=mesh.tp, split_dim=1, concat_dim=0),
        torch.cat([(torch.arange(24.0).view(4, 6).T[::2] + q)[:, 2 * r : 2 * r + 2] for q in (0, 1)]),
    )


def check_messages(mesh: Mesh) -> None:
    talk, other = mesh.pp.transport, 1 - mesh.pp.rank
    assert talk is not None
    # Both send first, twice on one channel and once on the other, and receive in another order than was sent.
    a, b, c = (torch.arange(n, dtype=torch.float64) + mesh.pp.rank for n in (3, 0, 5))
    sent = [talk.send(a, other, channel="forward"), talk.send(b, other, channel="forward")]
    sent += [
        talk.send(c, other, channel="backward"),
        talk.send_note({"shape": (5, mesh.pp.rank)}, other, channel="backward"),
    ]
    first = talk.recv(other, (3,), torch.float64, channel="forward")
    third = talk.recv(other, (5,), torch.float64, channel="backward")
    assert torch.equal(third.wait(), torch.arange(5, dtype=torch.float64) + other)
    assert talk.recv_note(other, channel="backward").wait() == {"shape": (5, other)}
    # A note is read while tensors that were sent ahead of it are still on their way.
    sent += [talk.send(c, other, channel="backward"), talk.send_note(other, other, channel="backward")]
    fifth, note = talk.recv(other, (5,), torch.float64, channel="backward"), talk.recv_note(other, channel="backward")
    assert note.wait() == mesh.pp.rank
    assert torch.equal(fifth.wait(), torch.arange(5, dtype=torch.float64) + other)
    assert torch.equal(first.wait(), torch.arange(3, dtype=torch.float64) + other)
    assert talk.recv(other, (0,), torch.float64, channel="forward").wait().shape == (0,)
    for pending in sent:
        pending.wait()


def check_messages_of_any_dtype_and_stride(mesh: Mesh) -> None:
    talk, other = mesh.pp.transport, 1 - mesh.pp.rank
    assert talk is not None
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        x = torch.arange(12).view(3, 4).T.to(dtype)
        sent = talk.send(x, other, channel="forward")
        assert torch.equal(talk.recv(other, (4, 3), dtype, channel="forward").wait(), x)
        sent.wait()


def check_received_memory_is_ones_own(mesh: Mesh) -> None:
    talk, other = mesh.pp.transport, 1 - mesh.pp.rank
    assert talk is not None
    x = torch.ones(3)
    sent = talk.send(x, other, channel="forward")
    got = talk.recv(other, (3,), torch.float32, channel="forward").wait()
    sent.wait()
    for y in (
        got,
        fstep.psum(x, axis=mesh.tp),
        fstep.all_gather(x, axis=mesh.tp, grad="sum"),
        fstep.broadcast(x, axis=mesh.tp, src=0, grad="sum"),
        fstep.ppermute(x, 1, axis=mesh.tp),
        fstep.ppermute(x, 0, axis=mesh.tp),
        fstep.take_shard(torch.ones(4), axis=mesh.tp),
    ):
        before = y.clone()
        fstep.psum(torch.zeros(1), axis=mesh.over("pp", "tp"))  # everybody reads, then everybody writes
        y += 1 + mesh.rank
        fstep.psum(torch.zeros(1), axis=mesh.over("pp", "tp"))
        assert torch.equal(y, before + 1 + mesh.rank)
    assert (x == 1).all() and (got == 2 + mesh.rank).all()


def check_started_early(mesh: Mesh) -> None:
    """Several calls under way at once, waited for in another order."""
    talk = mesh.tp.transport
    assert talk is not None
    a = talk.all_gather(torch.tensor([mesh.tp.rank]), action="first")
    b = talk.all_reduce(torch.tensor([mesh.tp.rank]), action="second")
    assert b.wait().tolist() == [1]
    assert a.wait().tolist() == [[0], [1]]


def check_over_several_axes(mesh: Mesh) -> None:
    both = mesh.over("tp", "pp")
    assert (both.name, both.size, both.rank, both.ranks) == ("pp+tp", 4, mesh.rank, (0, 1, 2, 3))
    assert mesh.over("pp", "tp").transport is not None
    numbers = fstep.all_gather(torch.tensor([mesh.rank]), axis=both, grad="slice")
    assert numbers.tolist() == [0, 1, 2, 3]
    assert int(fstep.psum(torch.tensor(mesh.rank), axis=both)) == 6
    assert int(fstep.psum(torch.tensor(mesh.rank), axis=mesh.pp)) == 2 * mesh.tp.rank + 2
    assert int(fstep.psum(torch.tensor(mesh.rank), axis=mesh.tp)) == 4 * mesh.pp.rank + 1


def check_trees_and_higher_derivatives(mesh: Mesh) -> None:
    tree = {"a": torch.tensor(1.0 + mesh.tp.rank), "none": None, "r": fstep.Ratio(torch.tensor(2.0), torch.tensor(3.0))}
    got = fstep.psum(tree, axis=mesh.tp)
    assert got["none"] is None and float(got["a"]) == 3.0 and float(got["r"].den) == 6.0
    # The sum over the ranks of (r+1) w^3 is 3 w^3: derivatives 9 w^2, then 18 w, at w = 2, on both ranks.
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = fstep.psum((mesh.tp.rank + 1) * fstep.pvary(w, axis=mesh.tp) ** 3, axis=mesh.tp)
    (first,) = torch.autograd.grad(loss, w, create_graph=True)
    (second,) = torch.autograd.grad(first, w)
    assert [float(x.detach()) for x in (loss, first, second)] == [24.0, 36.0, 36.0]


CHECKS: list[Callable[[Mesh], Any]] = [
    check_dtypes,
    check_sixteen_bits_round_once,
    check_shapes,
    check_messages,
    check_messages_of_any_dtype_and_stride,
    check_received_memory_is_ones_own,
    check_started_early,
    check_over_several_axes,
    check_trees_and_higher_derivatives,
]
