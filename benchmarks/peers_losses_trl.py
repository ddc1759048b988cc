"""TRL's functions beside fstep's, for peers_losses.py: (name, ours, TRL's, what to say of it) of each.

The losses of its trainers are methods. They are called on an object that has the options which the method reads, and a
model that returns the log probabilities of the case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from peers_losses import F64, LENGTH, ROWS, VOCAB, Case, Found, slope
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

import fstep

Comparison = tuple[str, Callable[[Case], Found], Callable[[Case], Found], dict[str, Any]]
Loss = Callable[[Case, Tensor, Tensor, Tensor], Any]
COUNTED = "TRL counts answers without tokens too: accounted for"


def trainer(**options: Any) -> SimpleNamespace:
    """Return what a method of a trainer takes for itself, on one process."""

    def same(x: Any, **_: Any) -> Any:
        return x

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=same, gather_for_metrics=same, reduce=same, unwrap_model=same
    )
    base = {"accelerator": accelerator, "model": torch.nn.Identity().eval(), "aux_loss_enabled": False, "_tp_size": 1}
    return SimpleNamespace(**base, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, **options)


# Policy -----------------------------------------------------------------------------------------------------------------
def grpo(kind: str, *, level: str = "token", **options: Any) -> Callable[[Case], Found]:
    """Return GRPOTrainer's loss of this kind."""
    given: dict[str, Any] = {
        "beta": 0.0,
        "low": 0.5,
        "high": 1.0,
        "delta": None,
        "entropy": 0.0,
        "unbiased": False,
    } | options

    def theirs(case: Case) -> Found:
        args = SimpleNamespace(delta=given["delta"], use_bias_correction_kl=given["unbiased"], steps_per_generation=1)
        advantages = fstep.group_advantages(case.rewards, case.groups) if level == "sequence" else case.advantages
        batch = {name: torch.zeros(ROWS, LENGTH, dtype=torch.int64) for name in ("prompt_ids", "completion_ids")}
        batch |= {"prompt_mask": batch["prompt_ids"], "completion_mask": case.mask, "advantages": advantages}
        batch |= {"old_per_token_logps": case.old, "ref_per_token_logps": case.ref, "num_items_in_batch": case.mask.sum()}
        it = trainer(
            beta=given["beta"], epsilon_low=given["low"], epsilon_high=given["high"], loss_type=kind, args=args,
            use_vllm=False, importance_sampling_level=level, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            max_completion_length=LENGTH, current_gradient_accumulation_steps=1, entropy_coef=given["entropy"],
            use_adaptive_entropy=False, _entropy_bonus_enabled=given["entropy"] != 0,
        )  # fmt: skip

        def loss(x: Tensor) -> Tensor:
            it._get_per_token_logps_and_entropies = lambda *_, **__: (x, 2 * x + case.entropy, None)
            found: Tensor = GRPOTrainer._compute_loss(it, None, batch)
            return found * (ROWS / case.lively if kind in ("grpo", "dr_grpo") else 1)

        return slope(loss, case.logp)

    return theirs


def ours(f: Loss) -> Callable[[Case], Found]:
    """Return our side of a policy loss: f(case, log probabilities, log ratio, advantages)."""
    return lambda case: slope(lambda x: f(case, x, x - case.flat("old"), case.flat("advantages")), case.flat("logp"))


def plus(c: Case, loss: Any, weights: Tensor, *, kl: Any = None, entropy: Tensor | None = None) -> fstep.Ratio:
    """Add 0.04 of a KL and -0.02 of an entropy to a loss."""
    total = loss[0].num
    total = total if kl is None else total + 0.04 * kl.num
    total = total if entropy is None else total - 0.02 * fstep.weigh(entropy, weights).num
    return fstep.Ratio(total, loss[0].den)


def policies() -> Iterator[Comparison]:
    """Yield the losses of reinforcement learning."""
    bounds: Any = {"low": 0.5, "high": 1.0}

    def loss_grpo(c: Case, x: Tensor, r: Tensor, a: Tensor) -> Any:
        return plus(c, fstep.clipped_loss(r, a, c.each, **bounds), c.each, kl=fstep.kl_loss(x, c.flat("ref"), c.each))

    def loss_gspo(c: Case, x: Tensor, r: Tensor, a: Tensor) -> Any:
        a = fstep.spread_documents(fstep.group_advantages(c.rewards, c.groups), c.docs)
        return fstep.clipped_loss(fstep.cp_sequence_log_ratio(r, c.docs), a, c.each, low=0.2, high=0.3)

    def loss_dapo(c: Case, x: Tensor, r: Tensor, a: Tensor) -> Any:
        w = c.docs.weights
        kl = fstep.kl_loss(x, c.flat("ref"), w, log_ratio=r, bound=None)
        loss = fstep.clipped_loss(r, a, w, dual=3.0, **bounds)
        return plus(c, loss, w, kl=kl, entropy=2 * x + c.flat("entropy"))

    def loss_dr(c: Case, x: Tensor, r: Tensor, a: Tensor) -> Any:
        return fstep.clipped_loss(r, a, c.docs.weights, counts=LENGTH * c.each, **bounds)

    yield "clipped_loss + k3, mean of answers (GRPO)", ours(loss_grpo), grpo("grpo", beta=0.04), {"note": COUNTED}
    yield "clipped_loss, constant length (Dr. GRPO)", ours(loss_dr), grpo("dr_grpo"), {"note": COUNTED}
    yield (
        "clipped_loss + unbiased k3 - entropy, dual (DAPO)", ours(loss_dapo),
        grpo("dapo", beta=0.04, delta=3.0, entropy=0.02, unbiased=True), {"note": "no bound on k3: ours got bound=None"},
    )  # fmt: skip
    yield (
        "clipped_loss of cp_sequence_log_ratio (GSPO)", ours(loss_gspo),
        grpo("grpo", level="sequence", low=0.2, high=0.3), {"note": COUNTED},
    )  # fmt: skip
    yield (
        "cispo_loss", ours(lambda c, x, r, a: fstep.cispo_loss(x, r, a, c.docs.weights, high=1.0)),
        grpo("cispo", high=2.0), {"note": "TRL's epsilon_high is the ratio itself, ours what is above 1"},
    )  # fmt: skip


# Distillation -----------------------------------------------------------------------------------------------------------
def heads(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states and heads of a student and of a wider teacher."""
    g = torch.Generator().manual_seed(int(case.groups[0]) + 50)
    one, two = (torch.randn(VOCAB, n, generator=g, dtype=F64) for n in (4, 6))
    h, th = (torch.randn(ROWS, LENGTH, n, generator=g, dtype=F64) for n in (4, 6))
    return h, th, one, two


def distillations() -> Iterator[Comparison]:
    """Yield the divergences over a vocabulary."""
    for kind, beta in (("forward", 0.0), ("reverse", 1.0), ("js", 0.3)):
        for top in (False, True):

            def mine(case: Case, kind: Any = kind, beta: float = beta, top: bool = top) -> Found:
                h, th, w, tw = heads(case)
                masked = (case.mask == 0)[..., None]
                h, th = (x.masked_fill(masked, torch.nan).flatten(0, 1) for x in (h, th))
                options: Any = {"divergence": kind, "beta": beta or 0.5, "temperature": 0.7}

                def loss(h: Tensor) -> fstep.Ratio:
                    if not top:
                        return fstep.distill_loss(h, w, th, tw, case.docs.weights, **options)
                    best = (th @ tw.T / 0.7).log_softmax(-1).topk(VOCAB)
                    return fstep.topk_distill_loss(h, w, best.indices, best.values, case.docs.weights, **options)

                return slope(loss, h)

            def theirs(case: Case, beta: float = beta) -> Found:
                h, th, w, tw = heads(case)
                labels = torch.where(case.mask != 0, 1, -100)
                f = GKDTrainer.generalized_jsd_loss
                return slope(lambda h: f(h @ w.T, th @ tw.T, labels=labels, beta=beta, temperature=0.7), h)

            name = "topk_distill_loss, k = vocab" if top else "distill_loss"
            yield f"{name}, {kind}", mine, theirs, {"note": f"TRL's beta is {beta:g}"}


def comparisons() -> Iterator[Comparison]:
    """Yield every comparison."""
    yield from policies()
    yield from distillations()
