"""verl's functions beside fstep's, for peers_losses.py: (name, ours, verl's, what to say of it) of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peers_losses import LENGTH, Case, Found, slope
from torch import Tensor
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig

import fstep

Comparison = tuple[str, Callable[[Case], Found], Callable[[Case], Found], dict[str, Any]]
LEAST = 1e-8  # verl adds it to the tokens of an answer


def policy(name: str, mode: str, *, high: float = 0.28, **more: Any) -> Callable[[Case], Found]:
    """Return verl's policy loss of this name, aggregated in this mode."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=more.pop("low", 0.5),
        clip_ratio_high=high,
        **more,
    )
    config.global_batch_info["loss_scale_factor"] = LENGTH
    f = core_algos.get_policy_loss_fn(name)

    def theirs(case: Case) -> Found:
        is_weights = factors(case)[0].view_as(case.mask) if name == "vanilla" and mode == "token-mean" else None
        return slope(lambda x: f(case.old, x, case.advantages, case.mask, mode, config, is_weights)[0], case.logp)

    return theirs


def factors(case: Case) -> tuple[Tensor, Any]:
    """Return our factors for tokens of another generator, as a constant of both sides."""
    d = (case.old - case.generator).flatten()
    return fstep.importance_weights(d, case.docs.weights, low=0.6, high=1.5, outside="zero")


def ours(f: Callable[[Case, Tensor, Tensor, Tensor], Any]) -> Callable[[Case], Found]:
    """Return our side of a policy loss: f(case, log probabilities, log ratio, advantages)."""

    def found(case: Case) -> Found:
        def loss(x: Tensor) -> Any:
            return f(case, x, x - case.flat("old"), case.flat("advantages"))

        return slope(loss, case.flat("logp"))

    def shaped(case: Case) -> Found:
        value, d = found(case)
        return value, None if d is None else d.view_as(case.mask)

    return shaped


def added(case: Case) -> Tensor:
    """Return weights of a mean over answers as verl takes it, over n + 1e-8 tokens."""
    n = case.mask.sum(1, keepdim=True)
    return (case.mask / (n + LEAST)).flatten()


def constant(f: Callable[[Case], Tensor]) -> Callable[[Case], Found]:
    """Return what has no gradient."""
    return lambda case: (f(case), None)


def kl(estimator: str, gradient: str | None = None) -> tuple[Callable[[Case], Found], Callable[[Case], Found]]:
    """Return both sides of an estimator; with ``gradient`` the value of one and the gradient of another."""

    def mine(case: Case) -> Found:
        def f(x: Tensor, name: str) -> Any:
            cap = 10.0 if name == "k3" else None
            return fstep.kl_loss(x, case.flat("ref"), case.docs.weights, estimator=name, cap=cap)  # type: ignore[arg-type]

        value, d = slope(lambda x: f(x, estimator), case.flat("logp"))
        return value, d if gradient is None else slope(lambda x: f(x, gradient), case.flat("logp"))[1]

    def theirs(case: Case) -> Found:
        name = estimator if gradient is None else f"{estimator}+"

        def f(x: Tensor) -> Tensor:
            return core_algos.agg_loss(core_algos.kl_penalty(x, case.ref, name), case.mask, "token-mean")

        return slope(f, case.logp)

    return mine, theirs


def outcome(name: str) -> Callable[[Case], Tensor]:
    """Return verl's advantages of whole answers, one an answer."""

    def theirs(case: Case) -> Tensor:
        scores, every = torch.zeros_like(case.mask), torch.ones_like(case.mask)
        scores[:, -1] = case.rewards
        f, options = getattr(core_algos, f"compute_{name.removesuffix(', unscaled')}_outcome_advantage"), {}
        if name.endswith("unscaled"):
            options = {"norm_adv_by_std_in_grpo": False}
        return f(scores, every, case.groups.numpy(), **options)[0][:, 0]

    return theirs


def unbiased(case: Case, x: Tensor) -> Tensor:
    """Whiten with the variance over n - 1, as verl does, from ours over n."""
    n = float(case.mask.sum())
    return fstep.whiten(x, case.docs.weights, eps=1e-8 * (n - 1) / n) * ((n - 1) / n) ** 0.5


def gae(case: Case) -> tuple[Tensor, Tensor]:
    """Return our advantages and returns."""
    return fstep.gae(case.flat("reward"), case.flat("value"), case.docs, gamma=0.9, lam=0.8)


def reinforce_pp(case: Case) -> Tensor:
    """Return our advantages of REINFORCE++."""
    returns = fstep.gae(case.flat("reward"), torch.zeros(case.mask.numel(), dtype=case.mask.dtype), case.docs, gamma=0.9)[1]
    return unbiased(case, returns)


def value(case: Case) -> Found:
    """Return our clipped value loss."""
    old, goal = case.flat("old_value"), case.flat("returns")
    return slope(lambda x: fstep.value_loss(x, goal, case.docs.weights, old_values=old, clip=0.3), case.flat("value"))


def comparisons() -> Iterator[Comparison]:
    """Yield every comparison."""
    yield (
        "clipped_loss: asymmetric, dual, importance", ours(lambda c, x, r, a: fstep.clipped_loss(
            r, a, c.docs.weights, low=0.5, high=1.0, dual=3.0, importance=factors(c)[0])),
        policy("vanilla", "token-mean", high=1.0, clip_ratio_c=3.0),
        {"note": "verl clamps the log ratio to 20; exactly on `dual` its gradient is half of ours"},
    )  # fmt: skip
    yield (
        "clipped_loss, mean of answers (GRPO)",
        ours(lambda c, x, r, a: fstep.clipped_loss(r, a, added(c), low=0.5, dual=3.0, high=1.0, counts=c.each)),
        policy("vanilla", "seq-mean-token-mean", high=1.0), {"note": "verl divides by n + 1e-8: ours got such weights"},
    )  # fmt: skip
    yield (
        "clipped_loss, constant length (Dr. GRPO)",
        ours(lambda c, x, r, a: fstep.clipped_loss(
            r, a, c.docs.weights, low=0.5, high=1.0, dual=3.0, counts=LENGTH * c.each)),
        policy("vanilla", "seq-mean-token-sum-norm", high=1.0), {},
    )  # fmt: skip
    yield (
        "clipped_loss of cp_sequence_log_ratio (GSPO)",
        ours(lambda c, x, r, a: fstep.clipped_loss(
            fstep.cp_sequence_log_ratio(r, c.docs), fstep.spread_documents(one_each(c), c.docs), added(c), low=0.2, high=0.3,
            counts=c.each)),
        lambda case: slope(lambda x: policy_of_sequences(case, x), case.logp),
        {"note": "over n + 1e-8 again; verl clamps the log ratio to 10; both got one advantage an answer"},
    )  # fmt: skip
    yield (
        "cispo_loss", ours(lambda c, x, r, a: fstep.cispo_loss(x, r, a, c.docs.weights, low=0.5, high=1.0)),
        policy("cispo", "token-mean", high=1.0), {"note": "verl has a lower bound too: ours got it"},
    )  # fmt: skip
    yield (
        "reinforce_loss", ours(lambda c, x, r, a: fstep.reinforce_loss(x, a, c.docs.weights, counts=c.each)),
        policy("gpg", "seq-mean-token-sum"), {},
    )  # fmt: skip
    for name in ("k1", "k2", "k3"):
        note = "verl caps k3 at 10: ours got cap=10" if name == "k3" else ""
        yield (f"kl_loss {name}", *kl(name), {"note": note})
    yield ("kl_loss k3, gradient of k2", *kl("k3", "k2"), {"note": "verl's k3+: ours are two calls"})
    for how, threshold, sequence, options in (
        ("truncated tokens", 1.5, False, {"high": 1.5}),
        ("IcePop", "0.6_1.5", False, {"low": 0.6, "high": 1.5, "outside": "zero"}),
        ("truncated answers", 1.5, True, {"high": 1.5}),
    ):
        level = "sequence" if sequence else "token"

        def mine(case: Case, sequence: bool = sequence, options: Any = options) -> Tensor:
            d = case.flat("old") - case.flat("generator")
            d = fstep.cp_sequence_log_ratio(d, case.docs, mean=False) if sequence else d
            return fstep.importance_weights(d, case.docs.weights, **options)[0] * case.mask.flatten()

        def theirs(case: Case, level: str = level, threshold: Any = threshold) -> Tensor:
            f = rollout_corr_helper.compute_rollout_correction_weights
            return f(case.old - case.generator, case.mask, rollout_is=level, rollout_is_threshold=threshold)[0]

        note = "where nothing counts ours is 1 and verl's 0: compared elsewhere"
        yield (f"importance_weights, {how}", constant(mine), constant(theirs), {"note": note})
    for name, baseline, scale in (("grpo", "mean", "group"), ("grpo, unscaled", "mean", None), ("rloo", "others", None)):

        def advantages(case: Case, baseline: Any = baseline, scale: Any = scale) -> Tensor:
            return fstep.group_advantages(case.rewards, case.groups, baseline=baseline, scale=scale)

        note = "of an only answer verl's advantage is its reward, ours 0: no such group here"
        yield (f"group_advantages ({name})", constant(advantages), constant(outcome(name)), {"note": note})
    yield (
        "gae, whiten (PPO)", constant(lambda c: unbiased(c, gae(c)[0])),
        constant(lambda c: core_algos.compute_gae_advantage_return(c.reward, c.value, c.mask, 0.9, 0.8)[0] * c.mask),
        {"note": "verl's variance is over n - 1: accounted for; its n is n + 1e-8: the bound", "bound": 1e-9},
    )  # fmt: skip
    yield (
        "gae, returns", constant(lambda c: gae(c)[1]),
        constant(lambda c: core_algos.compute_gae_advantage_return(c.reward, c.value, c.mask, 0.9, 0.8)[1] * c.mask), {},
    )  # fmt: skip
    config = type("Config", (), {"gamma": 0.9})
    yield (
        "gae, whiten (REINFORCE++)", constant(reinforce_pp),
        constant(lambda c: core_algos.compute_reinforce_plus_plus_outcome_advantage(c.reward, c.mask, config=config)[0]),
        {"note": "variance over n - 1, and n + 1e-8, again", "bound": 1e-9},
    )  # fmt: skip
    yield (
        "value_loss, clipped", value,
        lambda c: slope(lambda x: core_algos.compute_value_loss(x, c.returns, c.old_value, c.mask, 0.3)[0], c.value), {},
    )  # fmt: skip


def one_each(case: Case) -> Tensor:
    """Return an advantage for each answer."""
    return fstep.group_advantages(case.rewards, case.groups)


def policy_of_sequences(case: Case, x: Tensor) -> Any:
    """Return verl's GSPO, with one advantage an answer."""
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.3
    )
    a = one_each(case)[:, None].expand_as(x)
    return core_algos.compute_policy_loss_gspo(case.old, x, a, case.mask, "seq-mean-token-mean", config)[0]
