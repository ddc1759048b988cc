"""Distillation over ranks beside the same on one: heads cut by vocabulary, rows cut over dp and cp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Mesh, Ratio, Shard
from tests.loss.test_distill import DIM, OTHER, VOCAB, K, T, between, chunk, every_kind, grads_of, inputs, top_of
from tests.ops.test_tensor import randn, share, together

__all__ = ["chunk"]  # a fixture


@every_kind
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("top", [False, True])
def test_over_tensor_parallel_ranks(kind: Any, size: int, top: bool, chunk: int) -> None:
    h, w, th, tw, weights = inputs()
    options = {"temperature": 0.7, **kind}
    ids, lt = top_of(th, tw, K, 0.7)

    def f(mesh: Mesh) -> Any:
        def of(h: Tensor, w: Any, x: Tensor) -> Ratio:
            if top:
                return fstep.tp_topk_distill_loss(h, w, ids, lt, x, axis=mesh.tp, **options)
            teacher = share(th, mesh), Shard.cut(tw, axis=mesh.tp, dim=0)
            return fstep.tp_distill_loss(h, w, *teacher, x, axis=mesh.tp, **options)

        ratio, grads = grads_of(of, share(h, mesh), Shard.cut(w, axis=mesh.tp, dim=0), weights)
        return ratio, grads[0], fstep.bare(grads[1]), grads[2]

    got = fstep.simulate(f, tp=size)
    if top:
        want = grads_of(lambda h, w, x: fstep.topk_distill_loss(h, w, ids, lt, x, **options), h, w, weights)
    else:
        want = grads_of(lambda h, w, x: fstep.distill_loss(h, w, th, tw, x, **options), h, w, weights)
    assert all(torch.equal(r[0].num, got[0][0].num) and torch.equal(r[3], got[0][3]) for r in got)
    whole = got[0][0], (together([r[1] for r in got], T), torch.cat([r[2] for r in got]), got[0][3])
    fstep.testing.assert_trees_close(whole, want, rtol=1e-12)


@every_kind
@pytest.mark.parametrize("top", [False, True])
def test_differentiated_twice_over_ranks(kind: Any, top: bool) -> None:
    h, w, th, tw, weights = inputs(6)
    ids, lt = top_of(th, tw, K, 1.0)

    def f(mesh: Mesh) -> Any:
        hidden, weight = share(h, mesh).requires_grad_(), Shard.cut(w, axis=mesh.tp, dim=0)
        rows = fstep.bare(weight).requires_grad_()
        if top:
            loss = fstep.tp_topk_distill_loss(hidden, weight, ids, lt, weights, axis=mesh.tp, **kind)
        else:
            teacher = share(th, mesh), Shard.cut(tw, axis=mesh.tp, dim=0)
            loss = fstep.tp_distill_loss(hidden, weight, *teacher, weights, axis=mesh.tp, **kind)
        (d,) = torch.autograd.grad(loss.num, rows, create_graph=True)
        return torch.autograd.grad(fstep.psum(d.square().sum(), axis=mesh.tp), rows)[0]

    one, two = (torch.cat(fstep.simulate(f, tp=size)) for size in (1, 2))
    fstep.testing.assert_trees_close(two, one, rtol=1e-10)


@pytest.mark.parametrize("sizes", [{}, {"dp": 2}, {"cp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_packed_on_a_mesh(sizes: dict[str, int]) -> None:
    g = torch.Generator().manual_seed(3)
    docs = fstep.make_docs([torch.randint(0, VOCAB, (n,), generator=g) for n in (5, 2, 9, 4, 1)])
    student = {"embed": randn(5, VOCAB, DIM), "head": randn(6, VOCAB, DIM)}
    teacher = {"embed": randn(7, VOCAB, OTHER), "head": randn(8, VOCAB, OTHER)}

    def step(mesh: Mesh, num: int) -> Any:
        multiple = 2 * mesh.cp.size
        parts = fstep.split_microbatches(docs, num=num, axis=mesh.dp)
        batch = [fstep.cp_shard(fstep.pack_thd(p, multiple_of=multiple), axis=mesh.cp) for p in parts]

        def loss_fn(params: Any, x: Tensor, mb: fstep.Packed) -> Ratio:
            with torch.no_grad():
                th = fstep.embed(mb.tokens, teacher["embed"])
            return fstep.distill_loss(x, params["head"], th, teacher["head"], mb.weights, temperature=2.0, divergence="js")

        loss, grads = fstep.pp_forward_backward(lambda p, x, mb: fstep.embed(mb.tokens, p["embed"]), loss_fn, student, batch)
        return fstep.finalize_grads(grads, loss, mesh=mesh)

    def whole(p: Any) -> Tensor:
        s, t = (x["embed"][docs.tokens] @ x["head"].T / 2.0 for x in (p, teacher))
        inside = torch.tensor([docs.weights[i + 1] != 0 for i in range(20)] + [False])  # predicts a token of its document
        return between(s[inside].log_softmax(-1), t[inside].log_softmax(-1), "js").mean()

    value, want = fstep.value_and_grad(whole)(student)
    for num in (1, 3):
        for grads, metrics in fstep.simulate(lambda m, num=num: step(m, num), **sizes):
            assert metrics["loss"].item() == pytest.approx(value.item(), rel=1e-12)
            fstep.testing.assert_trees_close(grads, want, rtol=1e-12)


def test_both_are_cut_alike() -> None:
    h, w, th, tw, x = inputs(6)

    def f(mesh: Mesh) -> Any:
        part = Shard.cut(w, axis=mesh.tp, dim=0)
        spans = [(0, 3), (3, VOCAB)]
        a, b = spans[mesh.tp.rank]
        other = Shard(tw[a:b], mesh.tp, 0, (a, b), VOCAB)
        return fstep.tp_distill_loss(share(h, mesh), part, share(th, mesh), other, x, axis=mesh.tp)

    with pytest.raises(ValueError, match=r"tp_distill_loss: this rank has ids .* of teacher_weight; cut both alike"):
        fstep.simulate(f, tp=2)
