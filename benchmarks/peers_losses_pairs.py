"""TRL's losses of whole answers beside fstep's, for peers_losses.py, called as peers_losses_trl.py says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from peers_losses import F64, LENGTH, ROWS, Case, Found, slope
from peers_losses_trl import Comparison, trainer
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

import fstep

LESS = 0.1  # taken from each log probability of ORPO, so that no answer is certain


def answers(logp: Tensor) -> Callable[..., Any]:
    """Return a model whose fused head says what the log probabilities are, [documents, tokens]."""
    nothing = torch.zeros_like(logp)
    return lambda **_: SimpleNamespace(log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def paired(case: Case) -> tuple[Tensor, Tensor, fstep.Docs]:
    """Return which rows are chosen and rejected, pairs of rows 0 and 6, 1 and 7, ..., and documents that know it."""
    half = ROWS // 2
    flags = [i < half for i in range(ROWS)]
    docs = fstep.make_docs(
        [[0] * LENGTH] * ROWS, weights=list(case.mask), per_document={"pair": [*range(half), *range(half)], "chosen": flags}
    )
    some = case.mask.sum(1) > 0
    there = (some[:half] & some[half:]).nonzero().flatten()
    return there, there + half, docs


def sums_of(case: Case, x: Tensor, ref: bool) -> tuple[fstep.Ratio, fstep.Pairs]:
    """Return our sums over documents, and pairs, from a packed row."""
    _, _, docs = paired(case)
    fields = {"logp": x, "ref": case.flat("ref")}
    row = fstep.pack_thd(fstep.Docs(**{**vars(docs), "targets": fields}))
    values = row.targets["logp"] - row.targets["ref"] if ref else row.targets["logp"]
    pairs = fstep.find_pairs(row.per_document["pair"], row.per_document["chosen"])
    return fstep.cp_sequence_sums(values, row, axis=fstep.Mesh().cp), pairs


def preference(f: Callable[[fstep.Ratio, fstep.Pairs], Any], ref: bool, less: float = 0.0) -> Callable[[Case], Found]:
    """Return our side of a preference loss."""
    return lambda case: slope(lambda x: f(*sums_of(case, x - less, ref)), case.flat("logp"))


def dpo(kind: str, beta: float) -> Callable[[Case], Found]:
    """Return DPOTrainer's loss, of the pairs of which both have tokens."""

    def theirs(case: Case) -> Found:
        rows = torch.cat(paired(case)[:2])
        ref = (case.ref * case.mask)[rows].sum(1).chunk(2)
        shifted = torch.cat([torch.zeros(len(rows), 1, dtype=F64), case.mask[rows]], 1)  # the first token has no score
        batch = {"completion_mask": shifted, "input_ids": shifted.long(), "attention_mask": shifted}
        batch |= {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
        it = trainer(
            beta=beta, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
            loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
        )  # fmt: skip
        return slope(lambda x: DPOTrainer._compute_loss(it, answers((x * case.mask)[rows]), batch, False), case.logp)

    return theirs


def of_means(method: Callable[..., Any], mean: bool, ref: bool, **options: Any) -> Callable[[Case], Found]:
    """Return the loss of a trainer that has a method for it, of log probabilities of answers."""

    def theirs(case: Case) -> Found:
        def loss(x: Tensor) -> Any:
            sums = ((x - (case.ref if ref else 0)) * case.mask).sum(1) / (case.mask.sum(1).clamp(min=1) if mean else 1)
            chosen, rejected = (sums[rows] for rows in paired(case)[:2])
            found = method(trainer(**options), chosen, rejected)[0].mean()
            return found if method is CPOTrainer.cpo_loss else -chosen.mean() - found

        return slope(lambda x: loss(x - LESS if method is not CPOTrainer.cpo_loss else x), case.logp)

    return theirs


def kto(case: Case) -> Found:
    """Return KTOTrainer's loss of the answers that have tokens."""
    rows = (case.mask.sum(1) > 0).nonzero().flatten()
    padded = torch.cat([torch.zeros(len(rows), 1, dtype=F64), case.mask[rows]], 1)
    batch = {"label": rows < ROWS // 2, "completion_mask": padded, "input_ids": padded.long(), "attention_mask": padded}
    batch |= {"ref_logps": (case.ref * case.mask)[rows].sum(1), "ref_KL_logps": torch.zeros(3, dtype=F64)}
    moved = torch.tensor([0.5, -0.2, 0.9], dtype=F64)  # of answers to other prompts
    it = trainer(
        calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=0.3, desirable_weight=1.2,
        undesirable_weight=0.7, _compute_kl_logps=lambda *_: moved,
    )  # fmt: skip
    return slope(lambda x: KTOTrainer._compute_loss(it, answers((x * case.mask)[rows]), batch, False), case.logp)


def our_kto(case: Case) -> Found:
    """Return our loss, with the baseline from the same three answers."""
    chosen = paired(case)[2].per_document["chosen"]
    kl = fstep.kto_kl(fstep.Ratio(torch.tensor([0.5, -0.2, 0.9], dtype=F64), torch.ones(3, dtype=F64))).mean()

    def loss(x: Tensor) -> Any:
        return fstep.kto_loss(sums_of(case, x, True)[0], chosen, beta=0.3, kl=kl, desirable=1.2, undesirable=0.7)

    return slope(loss, case.flat("logp"))


def reward(case: Case) -> Found:
    """Return RewardTrainer's loss of the last values, with margins and centred."""
    margin = case.returns[: ROWS // 2, 2]
    it = trainer(args=SimpleNamespace(center_rewards_coefficient=0.05))
    batch = {"margin": margin, "attention_mask": case.mask}

    def model(x: Tensor) -> Callable[..., Any]:
        return lambda **_: SimpleNamespace(logits=x[:, -1:])

    compute: Any = RewardTrainer.compute_loss
    return slope(lambda x: compute(it, model(x), batch), case.value)


def our_reward(case: Case) -> Found:
    """Return our loss of the same."""
    row = fstep.pack_thd(paired(case)[2])
    pairs = fstep.find_pairs(row.per_document["pair"], row.per_document["chosen"])
    margin = torch.cat([case.returns[: ROWS // 2, 2], torch.full((ROWS // 2,), torch.nan)])

    def loss(x: Tensor) -> Any:
        return fstep.bradley_terry_loss(
            fstep.cp_sequence_last(x, row, axis=fstep.Mesh().cp), pairs, margin=margin, center=0.05
        )

    return slope(loss, case.value.flatten())


def comparisons() -> Iterator[Comparison]:
    """Yield the losses of whole answers."""
    gone = "TRL counts pairs without tokens as log 2: it got none"
    yield (
        "dpo_loss", preference(lambda s, p: fstep.dpo_loss(s, p, beta=0.3), True), dpo("sigmoid", 0.3), {"note": gone},
    )  # fmt: skip
    yield (
        "dpo_loss, label_smoothing", preference(lambda s, p: fstep.dpo_loss(s, p, beta=0.3, label_smoothing=0.2), True),
        of_means(CPOTrainer.cpo_loss, False, True, alpha=0.0, beta=0.3, loss_type="sigmoid", label_smoothing=0.2),
        {"note": "of CPOTrainer, which got log ratios"},
    )  # fmt: skip
    yield (
        "ipo_loss, average", preference(lambda s, p: fstep.ipo_loss(s, p, beta=0.2, average=True), True), dpo("ipo", 0.2),
        {"note": "TRL's is the mean of an answer's tokens"},
    )  # fmt: skip
    yield (
        "ipo_loss", preference(lambda s, p: fstep.ipo_loss(s, p, beta=0.2), True),
        of_means(CPOTrainer.cpo_loss, False, True, alpha=0.0, beta=0.2, loss_type="ipo"), {"note": "of CPOTrainer"},
    )  # fmt: skip
    yield (
        "simpo_loss", preference(lambda s, p: fstep.simpo_loss(s, p, beta=2.0, margin=0.5), False),
        of_means(CPOTrainer.cpo_loss, True, False, alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.5,
                 label_smoothing=0.0), {},
    )  # fmt: skip
    yield (
        "orpo_loss", preference(lambda s, p: fstep.orpo_loss(s, p, beta=0.4), False, LESS),
        of_means(ORPOTrainer.odds_ratio_loss, True, False, beta=0.4),
        {"bound": 1e-6, "note": "TRL's odds are float32; of a certain answer its gradient is NaN, ours finite: none here"},
    )  # fmt: skip
    yield (
        "chosen_nll, pairs weighed by tokens",
        nll,
        dpo("sft", 0.3),
        {"note": "TRL's mean is over tokens, ours over answers: weighed"},
    )
    yield "kto_loss, kto_kl", our_kto, kto, {"note": "TRL's baseline is of a microbatch; both got one"}
    yield "bradley_terry_loss, margin, center", our_reward, reward, {}


def nll(case: Case) -> Found:
    """Return ours, with each pair weighed by the tokens of its chosen answer."""

    def loss(x: Tensor) -> fstep.Ratio:
        sums, pairs = sums_of(case, x, False)
        return fstep.chosen_nll(sums, fstep.Pairs(pairs.chosen, pairs.rejected, sums.den[pairs.chosen].detach()))

    return slope(loss, case.flat("logp"))
