"""Direct Preference Optimization, from top to bottom, on a laptop.

    python examples/dpo.py                                               a tiny model learns which of two answers is better
    python examples/dpo.py --seeds 0 1 2 --picture docs/pictures/dpo.svg         the curves in the documentation
    torchrun --nproc-per-node 4 examples/dpo.py --pp 2 --cp 2            the same run on 4 ranks: --pp, --cp, --tp

First the model learns to answer questions with a bare word or with a sentence, one as likely as the other (sft.py's step).
Then pairs say that what comes after is to be told in a sentence, and what comes before in a word. A quarter of the questions
is in no pair: there, the rule is all that can have been learnt. The run writes metrics.jsonl and curves.png, and prints
answers to such questions from before and after. With --nll 0 the rule is learnt as well, and right answers are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tiny
import torch
from curves import Row
from sft import tiny_model
from tinydata import END, VOCAB, decode, encode, preferences

import fstep
from fstep_models.dense import Dense

MODEL = Dense(replace(tiny_model(), dim=64, ffn=168, layers=2, windows=(0, 0)))


def dpo_step(
    state: fstep.TrainState, docs: fstep.Docs, reference: Any, *, model: Dense, mesh: fstep.Mesh, device: torch.device,
    lr: Any, beta: float, alpha: float,
) -> tuple[fstep.TrainState, dict[str, torch.Tensor]]:  # fmt: skip
    """Take one step on pairs of answers. ``reference`` are params like those of the state, and stay as they are."""
    multiple, together = 2 * mesh.cp.size, docs.per_document["pair"]
    parts = fstep.split_microbatches(docs, max_tokens=2048, multiple_of=multiple, axis=mesh.dp, together=together)
    rows = [fstep.to_device(fstep.pack_thd(part, multiple_of=multiple), device) for part in parts]
    scores = model.score(reference, [fstep.cp_shard(row, axis=mesh.cp) for row in rows], mesh=mesh)
    rows = [fstep.with_targets(row, reference=s.logprobs) for row, s in zip(rows, scores, strict=True)]

    def loss_fn(params: Any, x: torch.Tensor, mb: fstep.Packed) -> Any:
        logp = model.logprobs(params, x, mb, mesh=mesh)
        pairs = fstep.find_pairs(mb.per_document["pair"], mb.per_document["chosen"])
        ratios = fstep.cp_sequence_sums(logp - mb.targets["reference"], mb, axis=mesh.cp)
        dpo, metrics = fstep.dpo_loss(ratios, pairs, beta=beta)
        nll = fstep.chosen_nll(fstep.cp_sequence_sums(logp, mb, axis=mesh.cp), pairs)
        loss = fstep.Ratio(dpo.num + alpha * nll.num, dpo.den)
        return fstep.as_partial((loss, {**metrics, "chosen_nll": nll.detach()}), axis=mesh.cp)

    batch = [fstep.cp_shard(row, axis=mesh.cp) for row in rows]
    loss, grads = fstep.pp_forward_backward(model.stage(mesh), loss_fn, state.params, batch, axis=mesh.pp)
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0)
    return fstep.adamw.update(state, grads, lr=lr, skip=metrics["nonfinite"]), metrics


def make_pairs() -> fstep.Docs:
    """Return two documents for each question, the one with the better answer first; only answers carry weight."""
    tokens, weights = [], []
    for question, *answers in preferences():
        for answer in answers:
            q, a = encode(question), [*encode(answer), END]
            tokens.append(q + a)
            weights.append([0.0] * len(q) + [1.0] * len(a))
    number = torch.arange(len(tokens))
    per_document = {"pair": number // 2, "chosen": number % 2 == 0}
    return fstep.make_docs(tokens, weights=weights, per_document=per_document, vocab_size=VOCAB)


def select_pairs(docs: fstep.Docs, pairs: torch.Tensor) -> fstep.Docs:
    """Return both documents of each pair, numbered anew: a pair drawn twice is two pairs."""
    found = fstep.select_documents(docs, (2 * pairs[:, None] + torch.arange(2)).flatten())
    return replace(found, per_document={**found.per_document, "pair": torch.arange(2 * len(pairs)) // 2})


def train(a: Any, seed: int, at: tiny.Place, log: Callable[[Row], None]) -> None:
    """Train one model, and say what came of it."""
    key, docs, where = fstep.Key.seed(seed), make_pairs(), {"model": MODEL, "mesh": at.mesh, "device": at.device}
    number = torch.arange(len(preferences()))
    held_out, pairs = number[number // 2 % 4 == 0], number[number // 2 % 4 != 0]

    def answers(params: Any) -> list[str]:
        prompts, whole = fstep.make_docs([encode(preferences()[n][0]) for n in held_out]), MODEL.whole(params, mesh=at.mesh)
        prompts = fstep.to_device(prompts, at.device)
        found = fstep.generate(MODEL.decode, whole, prompts, key, most=32, temperature=0, stop=[END])
        texts, weights = (torch.split(x, found.lengths.tolist()) for x in (found.tokens, found.weights))
        return [decode(ids[w > 0].tolist()) for ids, w in zip(texts, weights, strict=True)]

    params = MODEL.init(key.fold_in(0), mesh=at.mesh, device=at.device)
    reference = tiny.learn(
        MODEL, params, docs, steps=a.sft_steps, peak=6e-3, key=key.fold_in(1), at=at, what=f"seed {seed}: answers"
    )
    state = fstep.init_state(reference, fstep.adamw, key=key.fold_in(2))
    fixed = {**where, "beta": a.beta, "alpha": a.nll}
    accuracies = []
    with at.bar(a.steps, f"seed {seed}: preferences") as bar:
        for step in range(a.steps + 1):
            row: dict[str, Any] = {"method": "dpo", "step": step}
            if step % 5 == 0 or step == a.steps:  # a step is a function: drop its new state, and it is an evaluation
                _, metrics = dpo_step(state, select_pairs(docs, held_out), reference, lr=0.0, **fixed)
                row |= {f"held-out {name}": float(value) for name, value in metrics.items()}
                accuracies.append(row["held-out accuracy"])
            if step < a.steps:
                drawn, position = fstep.draw_documents(state.data, num=a.batch, of=len(pairs), key=state.key)
                batch = select_pairs(docs, pairs[drawn])
                lr = fstep.warmup_cosine(step, peak=a.lr, warmup=min(10, a.steps), total=a.steps, floor=a.lr / 10)
                state, metrics = dpo_step(replace(state, data=position), batch, reference, lr=lr, **fixed)
                row |= {name: float(value) for name, value in metrics.items()}
                bar.set_postfix_str(f"loss {row['loss']:.3f}, held-out accuracy {accuracies[-1]:.2f}")
                bar.update()
            log(row)

    at.say(f"held-out accuracy: {accuracies[0]:.3f} -> {accuracies[-1]:.3f}")
    found = [(preferences()[n], b, c) for n, b, c in zip(held_out, answers(reference), answers(state.params), strict=True)]
    for (question, *_), before, after in found[::11]:
        at.say(f"{question}\n    before: {before}\n    after:  {after}")
    for i, when in ((1, "before"), (2, "after")):
        preferred = sum(row[i] == row[0][1] for row in found)
        right = sum(row[i] in row[0][1:] for row in found)
        at.say(f"{when}: of {len(found)} held-out questions {right} answered rightly, {preferred} so and as preferred")


def main() -> None:
    """Read the command line, and train."""
    p = tiny.parser(__doc__, out="runs/dpo")
    p.add_argument("--sft-steps", type=tiny.count, default=400, help="updates that teach the answers")
    p.add_argument("--steps", type=tiny.count, default=100, help="updates from preferences")
    p.add_argument("--batch", type=tiny.count, default=32, help="pairs an update")
    p.add_argument("--lr", type=tiny.positive, default=5e-4, help="peak learning rate of the preferences")
    p.add_argument("--beta", type=tiny.positive, default=0.1, help="how dear it is to leave the reference")
    p.add_argument("--nll", type=tiny.not_negative, default=10.0, help="weight of the likelihood of chosen answers")
    tiny.run(p, train, [MODEL], ["loss", "held-out accuracy", "held-out reward_margin", "held-out chosen_nll"], "DPO")


if __name__ == "__main__":
    main()
