"""Policy losses against loops over tokens in plain numbers, the way others write them, and slopes by differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing

F64 = torch.float64
RATIOS = [0.1, 0.5, 0.79, 0.81, 0.95, 1.0, 1.19, 1.21, 1.27, 1.29, 2.9, 3.1, 20.0]
BOUNDS = [(0.2, 0.2, None), (0.2, 0.28, None), (0.2, 0.28, 3.0), (math.inf, 0.2, 1.5), (0.1, math.inf, None)]


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Every ratio with an advantage of each sign and none, uneven weights, and garbage where nothing counts."""
    log_ratio = torch.tensor(RATIOS * 3, dtype=F64).log()
    n = len(RATIOS)
    advantages = torch.tensor([0.7] * n + [-1.3] * n + [0.0] * n, dtype=F64)
    weights = torch.linspace(0.5, 2, 3 * n, dtype=F64)
    weights[[4, n + 4, 2 * n + 4]] = 0
    log_ratio[[4, n + 4, 2 * n + 4]] = torch.tensor([-math.inf, math.nan, math.inf], dtype=F64)
    advantages[[4, n + 4]] = torch.tensor([math.nan, math.inf], dtype=F64)
    return log_ratio.requires_grad_(), advantages, weights


def objective(x: float, a: float, low: float, high: float, dual: float | None) -> float:
    r = math.exp(x)
    least = min(r * a, min(max(r, 1 - low), 1 + high) * a)
    return max(least, dual * a) if dual is not None and a < 0 else least


@pytest.mark.parametrize(("low", "high", "dual"), BOUNDS)
def test_clipped_by_loops(low: float, high: float, dual: float | None) -> None:
    log_ratio, advantages, weights = rows()
    importance = torch.linspace(0.3, 1.7, len(weights), dtype=F64).masked_fill(weights == 0, math.nan)
    loss, _ = fstep.testing.assert_pure(
        fstep.clipped_loss, log_ratio, advantages, weights, low=low, high=high, dual=dual, importance=importance
    )
    num, slopes, h = 0.0, [], 1e-6
    for x, a, w, c in zip(*(v.tolist() for v in (log_ratio, advantages, weights, importance)), strict=True):
        if w == 0:
            slopes.append(0.0)
            continue
        num -= w * c * objective(x, a, low, high, dual)
        above, below = (objective(x + s * h, a, low, high, dual) for s in (1, -1))
        slopes.append(-w * c * (above - below) / (2 * h))
    assert loss.num.item() == pytest.approx(num, rel=1e-13) and loss.den.item() == pytest.approx(float(weights.sum()))
    (g,) = torch.autograd.grad(loss.num, log_ratio)
    fstep.testing.assert_trees_close(g, torch.tensor(slopes, dtype=F64), rtol=1e-8)
    assert (g[torch.tensor(slopes) == 0] == 0).all()  # exactly


def test_clipped_by_hand() -> None:
    # A > 0 at ratio 2: clipped at 1.28. A < 0 at ratio 0.5: clipped at 0.8. A < 0 at ratio 5: clipped at 3.
    log_ratio = torch.tensor([2.0, 0.5, 5.0, 1.1, 1.1], dtype=F64).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -2.0, 3.0, -3.0], dtype=F64)
    loss, metrics = fstep.clipped_loss(log_ratio, advantages, torch.ones(5, dtype=F64), low=0.2, high=0.28, dual=3.0)
    assert loss.num.item() == pytest.approx(-(1.28 - 0.8 - 6 + 3.3 - 3.3), rel=1e-14)
    (g,) = torch.autograd.grad(loss.num, log_ratio)
    assert g.tolist() == pytest.approx([0, 0, 0, -3.3, 3.3], rel=1e-14)
    found = {name: ratio.mean().item() for name, ratio in metrics.items()}
    kl = sum(r - 1 - math.log(r) for r in (2.0, 0.5, 5.0, 1.1, 1.1)) / 5
    want = {"ratio": 9.7 / 5, "clip_low": 0.2, "clip_high": 0.2, "clip_dual": 0.2, "kl_old": kl}
    assert found == pytest.approx(want, rel=1e-13)
    assert not any(r.num.requires_grad or r.den.requires_grad for r in metrics.values())


@pytest.mark.parametrize(("x", "a", "bounds"), [(0.3, 1.5, "high"), (-0.3, -1.5, "low"), (0.9, -1.5, "dual")])
def test_on_a_bound_the_gradient_is_still_there(x: float, a: float, bounds: str) -> None:
    r = torch.tensor(x, dtype=F64).exp().item()
    on = {"high": {"high": r - 1}, "low": {"low": 1 - r}, "dual": {"dual": r}}[bounds]
    off = {"high": {"high": r - 1.01}, "low": {"low": 0.99 - r}, "dual": {"dual": r - 0.01}}[bounds]
    assert 1 + on.get("high", r - 1) == r == 1 - on.get("low", 1 - r)  # exactly on it
    slopes = []
    for options in (on, off):
        log_ratio = torch.tensor([x], dtype=F64, requires_grad=True)
        loss, _ = fstep.clipped_loss(log_ratio, torch.tensor([a], dtype=F64), torch.ones(1), **options)
        slopes += torch.autograd.grad(loss.num, log_ratio)[0].tolist()
    assert slopes == [-a * r, 0]


def test_infinite_ratios_that_are_clipped_have_gradient_0_and_not_nan() -> None:
    x = torch.tensor([200.0, 200.0, 200.0, -math.inf, -math.inf], requires_grad=True)  # exp(200) is inf in float32
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    loss, _ = fstep.clipped_loss(x, advantages, torch.ones(5), dual=3.0)
    assert loss.num.item() == pytest.approx(-1.2 + 3 + 0 - 0 + 0.8, rel=1e-6)
    assert torch.autograd.grad(loss.num, x)[0].tolist() == [0, 0, 0, 0, 0]
    left_out = torch.tensor([200.0], requires_grad=True)
    loss, _ = fstep.clipped_loss(left_out, torch.tensor([-1.0]), torch.ones(1), importance=torch.zeros(1))
    assert loss.num == 0 and torch.autograd.grad(loss.num, left_out)[0] == 0
    impossible = torch.tensor([-math.inf, -1.0], requires_grad=True)
    for a, c in ((torch.tensor([0.0, 1.0]), None), (torch.ones(2), torch.tensor([0.0, 1.0]))):
        for loss in (
            fstep.reinforce_loss(impossible, a, torch.ones(2), importance=c),
            fstep.cispo_loss(impossible, torch.zeros(2), a, torch.ones(2), importance=c)[0],
        ):
            assert loss.num == 1 and torch.autograd.grad(loss.num, impossible)[0].tolist() == [0, -1]
    # What counts and is not clipped shows.
    assert fstep.clipped_loss(x[1:2], advantages[1:2], torch.ones(1))[0].num == math.inf
    assert fstep.clipped_loss(torch.tensor([math.nan]), torch.ones(1), torch.ones(1))[0].num.isnan()


def test_cispo_by_loops() -> None:
    log_ratio, advantages, weights = rows()
    logprobs = torch.linspace(-4, -0.1, len(weights), dtype=F64).masked_fill(weights == 0, -math.inf).requires_grad_()
    both = log_ratio.detach() + 0 * logprobs  # as in use, the ratio is made of the log probabilities
    loss, metrics = fstep.cispo_loss(logprobs, both, advantages, weights, low=0.3, high=0.25)
    num, slopes, cut, total = 0.0, [], 0.0, 0.0
    for x, a, w, p in zip(*(v.tolist() for v in (log_ratio, advantages, weights, logprobs)), strict=True):
        slopes.append(-w * min(max(math.exp(x), 0.7), 1.25) * a if w else 0.0)
        num += slopes[-1] * p if w else 0.0
        total += w
        cut += w * (math.exp(x) > 1.25) if w else 0.0
    assert loss.num.item() == pytest.approx(num, rel=1e-13)
    (g,) = torch.autograd.grad(loss.num, logprobs)
    fstep.testing.assert_trees_close(g, torch.tensor(slopes, dtype=F64), rtol=1e-14)
    assert metrics["clip_high"].mean().item() == pytest.approx(cut / total)
    # no lower bound by default
    low = fstep.cispo_loss(torch.tensor([-1.0]), torch.tensor([0.01]).log(), torch.ones(1), torch.ones(1))[0]
    assert low.num.item() == pytest.approx(0.01)


def test_reinforce_is_the_policy_gradient() -> None:
    # Three actions: the mean over what the policy draws of the loss's gradient is that of minus the expected reward.
    z = torch.tensor([0.3, -0.4, 1.1], dtype=F64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    p = z.detach().softmax(0)
    loss = fstep.reinforce_loss(z.log_softmax(0), reward, p)  # weights: how often each is drawn
    (g,) = torch.autograd.grad(loss.num, z)
    (expected,) = torch.autograd.grad(-(z.softmax(0) * reward).sum(), z)
    fstep.testing.assert_trees_close(g, expected, rtol=1e-14)
    # and so is that of the surrogate, drawn from another policy
    q = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    loss, _ = fstep.clipped_loss(z.log_softmax(0) - q.log(), reward, q, low=math.inf, high=math.inf)
    fstep.testing.assert_trees_close(torch.autograd.grad(loss.num, z)[0], expected, rtol=1e-14)
    # and of REINFORCE with the ratio as its factor
    factor, _ = fstep.importance_weights(z.log_softmax(0) - q.log(), q, high=math.inf)
    loss = fstep.reinforce_loss(z.log_softmax(0), reward, q, importance=factor)
    fstep.testing.assert_trees_close(torch.autograd.grad(loss.num, z)[0], expected, rtol=1e-14)


def test_on_policy_all_of_them_have_one_gradient() -> None:
    logprobs = torch.linspace(-3, -0.2, 6, dtype=F64).requires_grad_()
    advantages, weights = torch.tensor([1.0, -1, 0.5, 0, 2, -3], dtype=F64), torch.tensor([1.0, 1, 0, 1, 2, 1], dtype=F64)
    ratio = logprobs - logprobs.detach()
    loss, metrics = fstep.clipped_loss(ratio, advantages, weights, dual=3.0)
    losses = [loss, fstep.cispo_loss(logprobs, ratio, advantages, weights)[0]]
    losses.append(fstep.reinforce_loss(logprobs, advantages, weights))
    for each in losses:
        assert torch.autograd.grad(each.num, logprobs, retain_graph=True)[0].tolist() == (-weights * advantages).tolist()
    assert {name: r.mean().item() for name, r in metrics.items()} == {
        "ratio": 1, "clip_low": 0, "clip_high": 0, "clip_dual": 0, "kl_old": 0,
    }  # fmt: skip


def test_advantages_and_importance_are_constants() -> None:
    x, a, c, p = (torch.tensor([v], dtype=F64, requires_grad=True) for v in (0.1, 1.5, 0.7, -2.0))
    one = torch.ones(1, dtype=F64)
    for num in (
        fstep.clipped_loss(x, a, one, importance=c)[0].num,
        fstep.cispo_loss(p, x, a, one, importance=c)[0].num,
        fstep.reinforce_loss(p, a, one, importance=c).num,
    ):
        assert all(g is None for g in torch.autograd.grad(num, (a, c), allow_unused=True))
    assert torch.autograd.grad(fstep.cispo_loss(p, x, a, one)[0].num, x, allow_unused=True)[0] is None


LOSSES: dict[str, Callable[..., fstep.Ratio]] = {
    "clipped": lambda x, w, **k: fstep.clipped_loss(x, x.detach() + 2, w, **k)[0],
    "cispo": lambda x, w, **k: fstep.cispo_loss(x, x, x.detach() + 2, w, **k)[0],
    "reinforce": lambda x, w, **k: fstep.reinforce_loss(x, x.detach() + 2, w, **k),
    "kl": lambda x, w, **k: fstep.kl_loss(x, x.detach() - 1, w, **k),
    "value": lambda x, w, **k: fstep.value_loss(x, x.detach() + 2, w, **k)[0],
    "weigh": lambda x, w, **k: fstep.weigh(x, w, **k),
}


@pytest.mark.parametrize("f", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("garbage", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_that_counts_is_a_loss_of_0(f: Callable[..., fstep.Ratio], garbage: float, n: int) -> None:
    x = torch.full((n,), garbage, requires_grad=True)
    loss = f(x, torch.zeros(n))
    assert (loss.num.item(), loss.den.item(), loss.mean().item()) == (0, 0, 0)
    assert torch.autograd.grad(loss.num, x)[0].tolist() == [0] * n


@pytest.mark.parametrize("f", LOSSES.values(), ids=LOSSES)
def test_counts_are_what_the_loss_is_divided_by(f: Callable[..., fstep.Ratio]) -> None:
    x, weights, counts = torch.tensor([-0.1, 0.2]), torch.tensor([1.0, 3.0]), torch.tensor([5.0, 0.5])
    plain, other = f(x, weights), f(x, weights, counts=counts)
    assert plain.den == 4 and other.den == 5.5 and torch.equal(plain.num, other.num)
    with pytest.raises(ValueError, match=r"counts has shape \(1,\), weights \(2,\); give one number a token"):
        f(x, weights, counts=counts[:1])


@pytest.mark.parametrize("f", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_sums_are_kept_in_float32_at_least(f: Callable[..., fstep.Ratio], dtype: torch.dtype) -> None:
    n = 2001
    loss = f(torch.full((n,), -0.125, dtype=dtype), torch.ones(n, dtype=torch.bool))
    wide = torch.promote_types(dtype, torch.float32)
    one = f(torch.tensor([-0.125], dtype=dtype), torch.ones(1))
    assert loss.num.dtype == loss.den.dtype == wide and loss.den == n
    assert loss.mean().item() == pytest.approx(one.num.item(), rel=1e-5)


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"clipped_loss: advantages has shape \(3,\), weights \(2,\); give one number"):
        fstep.clipped_loss(x, torch.zeros(3), x)
    with pytest.raises(ValueError, match="clipped_loss: dual is 1; pass a ratio > 1"):
        fstep.clipped_loss(x, x, x, dual=1)
    with pytest.raises(ValueError, match=r"clipped_loss: low is -0.2 and high is 0.2; pass numbers >= 0"):
        fstep.clipped_loss(x, x, x, low=-0.2)
    with pytest.raises(ValueError, match="cispo_loss: low is inf and high is -1; pass numbers >= 0"):
        fstep.cispo_loss(x, x, x, x, high=-1)


def test_a_target_that_is_missing_is_no_factor_of_one() -> None:
    """``mb.targets.get("a wrong name")`` is None: only what may be left out may be."""
    x, w, missing = torch.full((3,), -0.5), torch.ones(3), {}.get("old")
    calls = {
        "clipped_loss: log_ratio": lambda: fstep.clipped_loss(missing, x, w),
        "clipped_loss: advantages": lambda: fstep.clipped_loss(x, missing, w),
        "reinforce_loss: advantages": lambda: fstep.reinforce_loss(x, missing, w),
        "cispo_loss: log_ratio": lambda: fstep.cispo_loss(x, missing, x, w),
        "kl_loss: ref_logprobs": lambda: fstep.kl_loss(x, missing, w),
        "value_loss: returns": lambda: fstep.value_loss(x, missing, w),
        "weigh: values": lambda: fstep.weigh(missing, w),
        "whiten: values": lambda: fstep.whiten(missing, w),
        "importance_weights: log_ratio": lambda: fstep.importance_weights(missing, w),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} is a NoneType; pass a tensor"):
            call()
    assert fstep.reinforce_loss(x, x, w, importance=None).num == fstep.reinforce_loss(x, x, w).num
