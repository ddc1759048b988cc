"""Distillation beside torch's kl_div over the whole [tokens, vocab] in float64, and beside sums in plain Python."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode

import fstep
import fstep.testing
from fstep import Ratio
from fstep.ops import head
from tests.ops.test_tensor import randn

T, DIM, OTHER, VOCAB, K = 11, 5, 3, 13, 4
F64 = torch.float64
KINDS: list[dict[str, Any]] = [
    {"divergence": "forward"},
    {"divergence": "reverse"},
    {"divergence": "js"},
    {"divergence": "js", "beta": 0.1},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))


def inputs(tokens: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher of another width, and weights of which some are 0."""
    weights = randn(4, tokens).abs()
    weights[1::3] = 0
    return randn(0, tokens, DIM), randn(1, VOCAB, DIM), 2 * randn(2, tokens, OTHER), randn(3, VOCAB, OTHER), weights


def between(s: Tensor, t: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """Compare rows of log probabilities with torch's kl_div(log q, log p), which is KL(p | q)."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if divergence == "forward":
        return kl(t, s)
    if divergence == "reverse":
        return kl(s, t)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def oracle(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, weights: Tensor, temperature: float, kind: Any) -> Ratio:
    keep = weights != 0
    s, t = ((a[keep] @ b.T / temperature).log_softmax(-1) for a, b in ((h, w), (th, tw)))
    return Ratio(between(s, t, **kind) @ weights[keep], weights.sum())


def top_of(th: Tensor, tw: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (th @ tw.T / temperature).log_softmax(-1)
    ids = logp.topk(k).indices.flip(-1)  # in no particular order
    return ids, logp.gather(-1, ids)


def top_oracle(h: Tensor, w: Tensor, ids: Tensor, lt: Tensor, weights: Tensor, temperature: float, kind: Any) -> Ratio:
    """Put all other ids together by adding up probabilities."""
    keep = weights != 0
    ids, lt = ids[keep], lt[keep]
    p = (h[keep] @ w.T / temperature).softmax(-1)
    others = torch.ones_like(p).scatter(-1, ids, 0)
    s = torch.cat([p.gather(-1, ids), (p * others).sum(-1, keepdim=True)], -1)
    t = torch.cat([lt.exp(), 1 - lt.exp().sum(-1, keepdim=True)], -1)
    return Ratio(between(s.log(), t.log(), **kind) @ weights[keep], weights.sum())


def grads_of(f: Any, *variables: Tensor) -> Any:
    """Return the ratio, and the gradients of its sum (times a factor, that it is not lost)."""

    def scaled(*x: Tensor) -> tuple[Tensor, Ratio]:
        ratio = f(*x)
        return ratio.num * -0.3, ratio

    (_, ratio), grads = fstep.value_and_grad(scaled, tuple(range(len(variables))), has_aux=True)(*variables)
    return ratio, grads


@pytest.fixture(params=[1024, 4, 2], ids=lambda n: f"chunk{n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One chunk; groups of three of two tokens, the last one shorter; groups of three of one."""
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: request.param)
    return request.param


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
def test_equals_kl_div(kind: Any, temperature: float, chunk: int) -> None:
    h, w, th, tw, weights = inputs()
    got = grads_of(lambda h, w, x: fstep.distill_loss(h, w, th, tw, x, temperature=temperature, **kind), h, w, weights)
    want = grads_of(lambda h, w, x: oracle(h, w, th, tw, x, temperature, kind), h, w, weights)
    assert all(g.abs().max() > 1e-3 for g in want[1]) and want[0].num > 0.02
    # The oracle's weights have a gradient of their own where they are 0: none, which is dropped here as well.
    fstep.testing.assert_trees_close(got, want, rtol=1e-12)


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, K, VOCAB - 1])
def test_top_k_equals_kl_div_of_outcomes(kind: Any, temperature: float, k: int, chunk: int) -> None:
    h, w, th, tw, weights = inputs()
    top = top_of(th, tw, k, temperature)
    got = grads_of(lambda h, w, x: fstep.topk_distill_loss(h, w, *top, x, temperature=temperature, **kind), h, w, weights)
    want = grads_of(lambda h, w, x: top_oracle(h, w, *top, x, temperature, kind), h, w, weights)
    assert all(g.abs().max() > 1e-3 for g in want[1])
    fstep.testing.assert_trees_close(got, want, rtol=1e-11)


@every_kind
def test_all_ids_are_the_whole(kind: Any) -> None:
    h, w, th, tw, weights = inputs()
    top = top_of(th, tw, VOCAB, 0.7)
    got = grads_of(lambda h, w: fstep.topk_distill_loss(h, w, *top, weights, temperature=0.7, **kind), h, w)
    want = grads_of(lambda h, w: fstep.distill_loss(h, w, th, tw, weights, temperature=0.7, **kind), h, w)
    fstep.testing.assert_trees_close(got, want, rtol=1e-12)
    h, w, th, tw, weights = (x.float() for x in (h, w, th, tw, weights))
    low = fstep.topk_distill_loss(h, w, *top_of(th, tw, VOCAB, 0.7), weights, temperature=0.7, **kind)
    assert low.num.item() == pytest.approx(want[0].num.item(), rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_top_k_is_a_lower_bound(divergence: Any) -> None:
    h, w, th, tw, weights = inputs()
    values = [
        fstep.topk_distill_loss(h, w, *top_of(th, tw, k, 1.0), weights, divergence=divergence).mean()
        for k in range(1, VOCAB + 1)
    ]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values)) and values[0] < values[-1] - 0.01


def test_by_plain_python() -> None:
    # One token, three ids, at temperature 2: KL(t | s) and what d logits are, by hand.
    z, zt = [0.3, -1.0, 2.0], [1.0, 0.0, -0.5]
    s, t = ([math.exp(x / 2) / sum(math.exp(y / 2) for y in row) for x in row] for row in (z, zt))
    one = torch.ones(1, 1, dtype=F64)
    student, teacher = (torch.tensor(x, dtype=F64)[:, None] for x in (z, zt))
    loss, (g,) = grads_of(lambda w: fstep.distill_loss(one, w, one, teacher, one[0], temperature=2), student)
    assert loss.num.item() == pytest.approx(sum(b * math.log(b / a) for a, b in zip(s, t, strict=True)), rel=1e-14)
    assert g[:, 0].tolist() == pytest.approx([-0.3 * (a - b) / 2 for a, b in zip(s, t, strict=True)], rel=1e-13)


@every_kind
def test_agreement_is_zero_and_flat(kind: Any) -> None:
    h, w, _, _, weights = inputs()
    loss, grads = grads_of(lambda h, w: fstep.distill_loss(h, w, h.clone(), w.clone(), weights, **kind), h, w)
    assert loss.num.abs() < 1e-14 and all(g.abs().max() < 1e-14 for g in grads)


@every_kind
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_tokens_do_no_harm(kind: Any, junk: float, chunk: int) -> None:
    h, w, th, tw, weights = inputs()
    bad_h, bad_th = (x.masked_fill((weights == 0)[:, None], junk) for x in (h, th))
    got = grads_of(lambda h, w: fstep.distill_loss(h, w, bad_th, tw, weights, **kind), bad_h, w)
    want = grads_of(lambda h, w: fstep.distill_loss(h, w, th, tw, weights, **kind), h, w)
    fstep.testing.assert_trees_close(got, want, rtol=0)
    ids, lt = top_of(th, tw, K, 1.0)
    bad_ids, bad_lt = ids.masked_fill((weights == 0)[:, None], -100), lt.masked_fill((weights == 0)[:, None], junk)
    got = grads_of(lambda h, w: fstep.topk_distill_loss(h, w, bad_ids, bad_lt, weights, **kind), bad_h, w)
    want = grads_of(lambda h, w: fstep.topk_distill_loss(h, w, ids, lt, weights, **kind), h, w)
    fstep.testing.assert_trees_close(got, want, rtol=0)


@every_kind
@pytest.mark.parametrize("tokens", [0, T])
def test_nothing_to_learn_is_zero(kind: Any, tokens: int) -> None:
    h, w, th, tw, weights = inputs(tokens)
    for f in (
        lambda h, w: fstep.distill_loss(h, w, th, tw, 0 * weights, **kind),
        lambda h, w: fstep.topk_distill_loss(h, w, *top_of(th, tw, K, 1.0), 0 * weights, **kind),
    ):
        loss, grads = grads_of(f, h, w)
        assert loss.num == loss.den == 0 and not any(g.any() for g in grads)


@every_kind
def test_parts_add_up(kind: Any) -> None:
    h, w, th, tw, weights = inputs()

    def parts(h: Tensor, w: Tensor) -> Ratio:
        found = [
            fstep.distill_loss(h[a:b], w, th[a:b], tw, weights[a:b], temperature=0.7, **kind)
            for a, b in ((0, 1), (1, 2), (2, 8), (8, 8), (8, 11))
        ]
        return sum(found[1:], found[0])

    whole = grads_of(lambda h, w: fstep.distill_loss(h, w, th, tw, weights, temperature=0.7, **kind), h, w)
    fstep.testing.assert_trees_close(grads_of(parts, h, w), whole, rtol=1e-12)


@pytest.mark.parametrize("variable", [0, 1, 2])
def test_one_variable_at_a_time(variable: int) -> None:
    h, w, th, tw, weights = inputs()

    def f(x: Tensor) -> Ratio:
        given = [x if i == variable else y for i, y in enumerate((h, w, weights))]
        return fstep.distill_loss(given[0], given[1], th, tw, given[2])

    want = grads_of(lambda h, w, x: oracle(h, w, th, tw, x, 1.0, KINDS[0]), h, w, weights)[1][variable]
    fstep.testing.assert_trees_close(grads_of(f, (h, w, weights)[variable])[1][0], want, rtol=1e-12)


@every_kind
def test_pulled_back_twice_and_differentiated_twice(kind: Any) -> None:
    h, w, th, tw, weights = inputs()
    top = top_of(th, tw, K, 0.7)
    for f, g in (
        (
            lambda h, w: fstep.distill_loss(h, w, th, tw, weights, temperature=0.7, **kind).num,
            lambda h, w: oracle(h, w, th, tw, weights, 0.7, kind).num,
        ),
        (
            lambda h, w: fstep.topk_distill_loss(h, w, *top, weights, temperature=0.7, **kind).num,
            lambda h, w: top_oracle(h, w, *top, weights, 0.7, kind).num,
        ),
    ):
        _, pull = fstep.vjp(f, h, w)
        first, second = pull(torch.tensor(-3.0, dtype=F64)), pull(torch.tensor(2.0, dtype=F64))
        fstep.testing.assert_trees_close([x / -3 for x in first], [x / 2 for x in second], rtol=1e-12)

        def slope(f: Any, h: Tensor, w: Tensor) -> Tensor:
            h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
            a, b = torch.autograd.grad(f(h, w), (h, w), create_graph=True)
            return torch.stack([x.norm() for x in torch.autograd.grad(a.square().sum() + b.sin().sum(), (h, w))])

        fstep.testing.assert_trees_close(slope(f, h, w), slope(g, h, w), rtol=1e-9)


def test_the_teacher_has_no_gradient() -> None:
    h, w, th, tw, weights = inputs()
    th.requires_grad_(), tw.requires_grad_(), h.requires_grad_()
    loss = fstep.distill_loss(h, w, th, tw, weights)
    assert torch.autograd.grad(loss.num, (th, tw, h), allow_unused=True)[:2] == (None, None)
    h, w, th, tw, weights = inputs()
    found = torch.func.grad(lambda th, tw: fstep.distill_loss(h, w, th, tw, weights).num, (0, 1))(th, tw)
    assert not any(g.any() for g in found)


@pytest.mark.parametrize("f", [fstep.distill_loss, fstep.topk_distill_loss])
def test_pure(f: Any) -> None:
    h, w, th, tw, weights = inputs()
    fstep.testing.assert_pure(f, h, w, *((th, tw) if f is fstep.distill_loss else top_of(th, tw, K, 1.0)), weights)


class Largest(TorchDispatchMode):
    """The most elements that any tensor has that comes out of an operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in fstep.tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("top", [False, True])
def test_never_all_tokens_at_once(top: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: 4)
    h, w, th, tw, weights = inputs(60)
    w, tw = w.repeat(10, 1), tw.repeat(10, 1)
    h.requires_grad_(), w.requires_grad_()
    with Largest() as seen:
        if top:
            ids = torch.arange(4 * 60).reshape(60, 4) % 130
            loss = fstep.topk_distill_loss(h, w, ids, torch.full((60, 4), -3.0, dtype=F64), weights)
        else:
            loss = fstep.distill_loss(h, w, th, tw, weights)
        torch.autograd.grad(loss.num, (h, w))
    # Three chunks of two tokens are held for the weight's gradient, which has 650 elements; 60 x 130 would be all of it.
    assert seen.elements <= 6 * 130


@every_kind
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_low_precision(kind: Any, low: torch.dtype) -> None:
    h, w, th, tw, weights = (x.to(low) for x in inputs())
    loss, grads = grads_of(lambda h, w: fstep.distill_loss(h, w, th, tw, weights, **kind), h, w)
    want, exact = grads_of(
        lambda h, w: oracle(h, w, th.double(), tw.double(), weights.double(), 1.0, kind), h.double(), w.double()
    )
    assert loss.num.dtype == loss.den.dtype == torch.float32 and {g.dtype for g in grads} == {low}
    assert loss.den.item() == pytest.approx(want.den.item(), rel=1e-6)
    if low == torch.float32:
        assert loss.num.item() == pytest.approx(want.num.item(), rel=1e-5)
        fstep.testing.assert_trees_close([g.double() for g in grads], list(exact), rtol=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_a_teacher_that_is_certain(divergence: Any) -> None:
    # In float32 its k probabilities add up to 1, and what it leaves is no longer known: nothing may be infinite.
    h, w, *_ = (x.float() for x in inputs())
    ids, lt = torch.zeros(T, 1, dtype=torch.int64), torch.zeros(T, 1)
    loss, grads = grads_of(lambda h, w: fstep.topk_distill_loss(h, w, ids, lt, torch.ones(T), divergence=divergence), h, w)
    assert loss.num.isfinite() and loss.num > 0 and all(g.isfinite().all() for g in grads)


# Bad input --------------------------------------------------------------------------------------------------------------


def calls() -> list[tuple[Any, str]]:
    h, w, th, tw, x = inputs()
    ids, lt = top_of(th, tw, K, 1.0)
    full, top = fstep.distill_loss, fstep.topk_distill_loss
    return [
        (lambda: full(h, w, th, tw, x, divergence="kl"), 'distill_loss: divergence is \'kl\'; pass "forward", "reverse" or'),
        (lambda: full(h, w, th, tw, x, divergence="js", beta=1.0), "distill_loss: beta is 1.0; pass a number between"),
        (lambda: full(h, w, th, tw, x, temperature=0), "distill_loss: temperature is 0; pass a positive number"),
        (lambda: full(h, w, th, tw, x[1:]), r"distill_loss: hidden \(11, 5\) and weights \(10,\) do not fit"),
        (
            lambda: full(h, w, th[1:], tw, x),
            r"distill_loss: teacher_hidden \(10, 3\) and teacher_weight \(13, 3\) are to be",
        ),
        (
            lambda: full(h, w, th, tw[1:], x),
            r"distill_loss: teacher_hidden \(11, 3\) and teacher_weight \(12, 3\) are to be",
        ),
        (lambda: full(h, w, th, w, x), "distill_loss, the teacher: hidden is "),
        (lambda: full(h, tw, th, tw, x), "distill_loss: hidden is "),
        (lambda: top(h, w, ids[1:], lt, x), r"topk_distill_loss: ids \(10, 4\) and teacher_logprobs \(11, 4\) are to be"),
        (lambda: top(h, w, ids[0], lt[0], x), "topk_distill_loss: ids "),
        (lambda: top(h, w, ids + VOCAB, lt, x), "topk_distill_loss: id .* is not in the vocabulary of 13"),
    ]


@pytest.mark.parametrize("number", range(11))
def test_bad_input_is_named(number: int) -> None:
    call, message = calls()[number]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
