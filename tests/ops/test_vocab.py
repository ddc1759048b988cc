"""tp_token_logprob_sum beside token_logprob_sum of the whole, on 1 to 4 ranks with uneven parts of the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Mesh, Shard
from fstep.ops import head
from tests.ops.test_head_sum import oracle
from tests.ops.test_tensor import DIM, F64, VOCAB, close, labels_of, randn, share, together

sizes = pytest.mark.parametrize("size", [1, 2, 3, 4])


def inputs(tokens: int = 11, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = 3 * randn(2, tokens)
    weights[1::3] = 0
    return randn(0, tokens, DIM, dtype=dtype), randn(1, VOCAB, DIM, dtype=dtype), labels_of(tokens), weights


@pytest.fixture(params=[1024, 2, 1], ids=lambda n: f"chunk{n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: request.param)
    return request.param


def on_ranks(size: int, given: tuple[Tensor, ...], loss: Any) -> Any:
    """Run ``loss(sum)`` and its gradient on every rank, and put what they got together."""
    hidden, weight, labels, weights = given

    def f(mesh: Mesh) -> Any:
        def of(h: Tensor, w: Any, s: Tensor) -> Tensor:
            return loss(lambda **options: fstep.tp_token_logprob_sum(h, w, labels, s, axis=mesh.tp, **options))

        part = Shard.cut(weight, axis=mesh.tp, dim=0)
        value, grads = fstep.value_and_grad(of, (0, 1, 2))(share(hidden, mesh), part, weights)
        return value, grads[0], fstep.bare(grads[1]), grads[2]

    got = fstep.simulate(f, tp=size)
    for value, _, _, d_weights in got:
        assert torch.equal(value, got[0][0]) and torch.equal(d_weights, got[0][3]), "the same bits on every rank"
    whole = together([r[1] for r in got], len(labels)), torch.cat([r[2] for r in got]), got[0][3]
    return got[0][0], whole


@sizes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_whole(temperature: float, size: int, chunk: int) -> None:
    given = inputs()
    got = on_ranks(size, given, lambda f: -0.5 * f(temperature=temperature))
    want = fstep.value_and_grad(lambda *x: -0.5 * oracle(*x, temperature), (0, 1, 3))(*given)
    close(got, want)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_few_tokens(tokens: int) -> None:
    given = inputs(tokens)
    close(on_ranks(4, given, lambda f: f()), fstep.value_and_grad(oracle, (0, 1, 3))(*given))


def test_nothing_to_learn() -> None:
    hidden, weight, labels, weights = inputs()
    value, grads = on_ranks(3, (hidden, weight, labels, 0 * weights), lambda f: f())
    assert value == 0 and not any(g.any() for g in grads)


def test_large_logits_are_no_obstacle() -> None:
    hidden, labels, weights = torch.ones(3, 1, dtype=F64), torch.tensor([3, 0, 5]), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    weight = torch.tensor([0.0, 1.0, -2.0, 1e3, 0.5, -1e3], dtype=F64)[:, None] + 1e4
    value, grads = on_ranks(3, (hidden, weight, labels, weights), lambda f: f())
    assert value == pytest.approx(-1e3 * 2 - 2e3 * 3) and all(g.isfinite().all() for g in grads)
    close(grads[1], fstep.value_and_grad(oracle, 1)(hidden, weight, labels, weights)[1], 1e-10)


def test_pulled_back_twice(chunk: int) -> None:
    hidden, weight, labels, weights = inputs()
    _, want = fstep.value_and_grad(oracle, (0, 1, 3))(hidden, weight, labels, weights)

    def f(mesh: Mesh) -> Any:
        part = Shard.cut(weight, axis=mesh.tp, dim=0)
        _, pull = fstep.vjp(
            lambda h, w, s: fstep.tp_token_logprob_sum(h, w, labels, s, axis=mesh.tp), share(hidden, mesh), part, weights
        )
        found = []
        for factor in (1.0, -2.0):
            grads = pull(torch.tensor(factor, dtype=F64))
            found.append([g.clone() for g in fstep.tree_leaves(fstep.bare(grads))])
            for g in fstep.tree_leaves(grads):
                g.add_(100)
        return found

    got = fstep.simulate(f, tp=2)
    for k, factor in enumerate((1.0, -2.0)):
        parts = [r[k] for r in got]
        close(together([p[0] for p in parts], 11), want[0] * factor)
        close(torch.cat([p[1] for p in parts]), want[1] * factor)
        close(parts[0][2], want[2] * factor)


def test_chunks_are_those_of_the_largest_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every rank, since ranks exchange after each, and as large as a part of the vocabulary allows."""
    asked: list[int] = []
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: asked.append(vocab) or 4)
    on_ranks(3, inputs(), lambda f: f())
    assert set(asked) == {5}


def test_second_derivatives() -> None:
    hidden, weight, labels, weights = inputs(6)

    def norm(f: Any, *x: Any) -> Tensor:
        gh, gw = fstep.value_and_grad(f, (0, 1))(*x)[1]
        return gh.square().sum(), fstep.bare(gw).square().sum()

    def on(mesh: Mesh) -> Any:
        def of(h: Tensor, w: Any) -> Tensor:
            f = lambda h, w: fstep.tp_token_logprob_sum(h, w, labels, weights, axis=mesh.tp)  # noqa: E731
            return fstep.psum(sum(norm(f, h, w)), axis=mesh.tp)

        part = Shard.cut(weight, axis=mesh.tp, dim=0)
        value, grads = fstep.value_and_grad(of, (0, 1))(share(hidden, mesh), part)
        return value, grads[0], fstep.bare(grads[1])

    got = fstep.simulate(on, tp=2)
    want = fstep.value_and_grad(lambda h, w: sum(norm(lambda h, w: oracle(h, w, labels, weights), h, w)), (0, 1))(
        hidden, weight
    )
    close(got[0][0], want[0])
    close(together([r[1] for r in got], 6), want[1][0])
    close(torch.cat([r[2] for r in got]), want[1][1])


def test_a_wider_weight() -> None:
    hidden, weight, labels, weights = inputs(8, torch.float32)

    def f(mesh: Mesh) -> Any:
        part = Shard.cut(weight, axis=mesh.tp, dim=0)
        args = share(hidden, mesh).bfloat16(), part
        g = lambda h, w: fstep.tp_token_logprob_sum(h, w, labels, weights, axis=mesh.tp)  # noqa: E731
        gh, gw = fstep.value_and_grad(g, (0, 1))(*args)[1]
        return gh, fstep.bare(gw)

    got = fstep.simulate(f, tp=2)
    assert {r[0].dtype for r in got} == {torch.bfloat16} and {r[1].dtype for r in got} == {torch.float32}
    want = fstep.value_and_grad(lambda w: oracle(hidden.double(), w, labels, weights))(weight.double())[1]
    assert (torch.cat([r[1] for r in got]) - want).norm() < 4 * torch.finfo(torch.bfloat16).eps * want.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.tensor([4, 0])), "label 4 at place 0 is not in the vocabulary of 4"),
        (
            dict(weights=torch.ones(3)),
            r"hidden \(1, 2\) and weights \(3,\) do not fit; they are a shard \[tokens / 2, dim\]",
        ),
        (dict(labels=torch.tensor([[0, 1]])), r"and labels \(1, 2\) do not fit"),
        (dict(hidden=torch.ones(1, 3)), "hidden is "),
        (dict(hidden=torch.ones(2, 2)), "tp_gather: x has 2 rows"),
        (dict(temperature=-1), "temperature is -1; pass a positive number"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    def f(mesh: Mesh) -> str:
        given: dict[str, Any] = dict(hidden=torch.ones(1, 2), labels=torch.tensor([0, 1]), weights=torch.ones(2))
        weight = Shard.cut(torch.ones(4, 2), axis=mesh.tp, dim=0)
        with pytest.raises(ValueError, match=message) as error:
            fstep.tp_token_logprob_sum(**given | {"weight": weight, "axis": mesh.tp} | change)
        return str(error.value).split(":")[0]

    assert set(fstep.simulate(f, tp=2)) <= {"tp_token_logprob_sum", "tp_gather"}


def test_a_weight_that_is_not_cut() -> None:
    def f(mesh: Mesh) -> None:
        with pytest.raises(ValueError, match="tp_token_logprob_sum: weight is not cut"):
            fstep.tp_token_logprob_sum(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([0]), torch.ones(1), axis=mesh.tp)

    fstep.simulate(f, tp=2)
