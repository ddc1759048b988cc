"""Group Relative Policy Optimization, from top to bottom, on a laptop.

    python examples/grpo.py                                              a tiny model learns to add from being checked
    python examples/grpo.py --seeds 0 1 2 --picture docs/pictures/grpo.svg       the curves in the documentation
    torchrun --nproc-per-node 4 examples/grpo.py --pp 2 --cp 2           the same run on 4 ranks: --pp, --cp, --tp

A few supervised steps teach what an answer looks like; one in six is right. From there on nobody shows the model an answer:
it draws several to each sum, each is checked (1 if it is the sum, else 0), and what is better than the others to the same
sum becomes likelier. A fifth of the sums is never asked. The run writes metrics.jsonl and curves.png, and prints answers.

On several ranks each puts the whole params together for the time of drawing, answers its share of the sums, and gets the
answers of all: one batch, which the step divides as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import tiny
import torch
from curves import Row
from sft import tiny_model
from tinydata import END, VOCAB, decode, encode

import fstep
from fstep_models.dense import Dense

MODEL = Dense(replace(tiny_model(), dim=64, ffn=168, layers=2, windows=(0, 0)))
SUMS = [(a, b) for a in range(10) for b in range(10)]


def grpo_step(
    state: fstep.TrainState, docs: fstep.Docs, *, model: Dense, mesh: fstep.Mesh, lr: Any, updates: int
) -> tuple[fstep.TrainState, list[dict[str, torch.Tensor]]]:
    """Learn from answers that the params of ``state`` have drawn, several to a prompt, and from their rewards."""
    advantage = fstep.group_advantages(docs.per_document["reward"], docs.per_document["prompt"])
    docs = fstep.with_targets(docs, advantage=fstep.spread_documents(advantage, docs), each=fstep.document_weights(docs))
    parts = fstep.split_microbatches(docs, max_tokens=4096, multiple_of=2 * mesh.cp.size, axis=mesh.dp)
    rows = [fstep.cp_shard(fstep.pack_thd(part, multiple_of=2 * mesh.cp.size), axis=mesh.cp) for part in parts]
    stage, score = model.stage(mesh), partial(model.logprobs, mesh=mesh)
    old = fstep.pp_forward(stage, score, state.params, rows, axis=mesh.pp)
    rows = [fstep.with_targets(row, old=logprobs) for row, logprobs in zip(rows, old, strict=True)]

    def loss_fn(params: Any, x: torch.Tensor, mb: fstep.Packed) -> Any:
        t, logprobs = mb.targets, score(params, x, mb)
        loss, metrics = fstep.clipped_loss(logprobs - t["old"], t["advantage"], t["each"])
        return loss, {**metrics, "kl_generator": fstep.kl_loss(t["generator"], t["old"], t["each"])}

    found = []
    for _ in range(updates):  # the first has a ratio of 1; from the second on it moves, and is clipped
        loss, grads = fstep.pp_forward_backward(stage, loss_fn, state.params, rows, axis=mesh.pp)
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0)
        state = fstep.adamw.update(state, grads, lr=lr, skip=metrics["nonfinite"])
        found.append(metrics)
    return state, found


def reward(answer: str) -> float:
    """Say whether a document such as "7+5=12" is right."""
    question, _, said = answer.partition("=")
    return float(said == str(sum(map(int, question.split("+")))))


def answer(params: Any, asked: torch.Tensor, key: fstep.Key, at: tiny.Place, **how: Any) -> tuple[fstep.Docs, list[str]]:
    """Ask for the sums of these numbers, check what comes, and return it with its reward; also as text."""
    everyone = at.mesh.over("pp", "dp", "cp", "tp")
    prompts = fstep.make_docs([encode("{}+{}=".format(*SUMS[n])) for n in asked], vocab_size=VOCAB)
    mine = fstep.to_device(fstep.divide_documents(prompts, axis=everyone), at.device)
    docs = fstep.generate(MODEL.decode, MODEL.whole(params, mesh=at.mesh), mine, key, most=4, stop=[END], **how)
    docs = fstep.gather_documents(docs, axis=everyone)
    texts = [decode(ids.tolist()) for ids in torch.split(docs.tokens, docs.lengths.tolist())]
    rewards = torch.tensor([reward(text) for text in texts], device=at.device)
    return replace(docs, per_document={**docs.per_document, "reward": rewards}), texts


def train(a: Any, seed: int, at: tiny.Place, log: Callable[[Row], None]) -> None:
    """Train one model, and say what came of it."""
    key, number, mesh = fstep.Key.seed(seed), torch.arange(len(SUMS)), at.mesh
    fifth = (number // 10 + 2 * number) % 5 == 0
    held_out, asked = number[fifth], number[~fifth]
    tokens = [(encode(f"{x}+{y}="), [*encode(str(x + y)), END]) for x, y in (SUMS[n] for n in asked)]
    weights = [[0.0] * len(q) + [1.0] * len(r) for q, r in tokens]
    shown = fstep.make_docs([q + r for q, r in tokens], weights=weights, vocab_size=VOCAB)
    params = MODEL.init(key.fold_in(0), mesh=mesh, device=at.device)
    first = tiny.learn(
        MODEL, params, shown, steps=a.sft_steps, peak=6e-3, key=key.fold_in(1), at=at, what=f"seed {seed}: answers"
    )
    state = fstep.init_state(first, fstep.adamw, key=key.fold_in(2))

    def right(params: Any) -> tuple[float, list[str]]:
        docs, texts = answer(params, held_out, key, at, temperature=0.0)
        return float(docs.per_document["reward"].mean()), texts

    accuracies, (_, before) = [], right(first)
    with at.bar(a.steps, f"seed {seed}: rewards") as bar:
        for step in range(a.steps + 1):
            row: dict[str, Any] = {"method": "grpo", "step": step}
            if step % 10 == 0 or step == a.steps:
                accuracies.append(right(state.params)[0])
                row["held-out accuracy"] = accuracies[-1]
            if step < a.steps:
                drawn, position = fstep.draw_documents(state.data, num=a.batch, of=len(asked), key=state.key)
                docs, _ = answer(state.params, asked[drawn], state.key.fold_in(step), at, samples=a.samples)
                state = replace(state, data=position)
                lr = fstep.warmup_cosine(step, peak=a.lr, warmup=min(5, a.steps), total=a.steps, floor=a.lr / 10)
                state, found = grpo_step(state, docs, model=MODEL, mesh=mesh, lr=lr, updates=a.updates)
                row |= {"reward": float(docs.per_document["reward"].mean())}
                row |= {name: float(value) for name, value in found[0].items()}
                row |= {f"last {name}": float(value) for name, value in found[-1].items()}
                bar.set_postfix_str(f"reward {row['reward']:.2f}, held-out accuracy {accuracies[-1]:.2f}")
                bar.update()
            log(row)

    last, after = right(state.params)
    at.say(f"held-out accuracy: {accuracies[0]:.2f} -> {last:.2f}")
    for was, now in list(zip(before, after, strict=True))[::4]:
        at.say(f"    before: {was:8} after: {now}")


def main() -> None:
    """Read the command line, and train."""
    p = tiny.parser(__doc__, out="runs/grpo")
    p.add_argument("--sft-steps", type=tiny.count, default=40, help="updates that teach what an answer looks like")
    p.add_argument("--steps", type=tiny.count, default=200, help="rounds of drawing and learning")
    p.add_argument("--batch", type=tiny.count, default=32, help="sums a round")
    p.add_argument("--samples", type=tiny.several, default=16, help="answers to each, 2 or more, which are compared")
    p.add_argument("--updates", type=tiny.count, default=2, help="updates from the answers of a round")
    p.add_argument("--lr", type=tiny.positive, default=1e-3, help="peak of the learning rate from rewards")
    tiny.run(p, train, [MODEL], ["reward", "held-out accuracy", "last kl_old", "kl_generator"], "GRPO")


if __name__ == "__main__":
    main()
