"""Distillation, from top to bottom, on a laptop: a small student learns what a larger teacher thinks of each next token.

    python examples/distill.py                                              a student with the teacher's distributions
    python examples/distill.py --seeds 0 1 2 --picture docs/pictures/distill.svg      the curves in the documentation
    python examples/distill.py --divergence js --top-k 8                    reverse or js; only the teacher's likeliest ids
    torchrun --nproc-per-node 4 examples/distill.py --pp 2 --tp 2           the same run on 4 ranks: --pp, --cp, --tp

The teacher has read thousands of sentences that were drawn by chance (sft.py's step). The student has a few dozen: the same
student, trained on them alone as long, learns them by heart, and what else might have been said it cannot know. The teacher
tells, at each token. The run writes metrics.jsonl and curves.png, and prints what each of the three says.

The teacher is a pipeline as the student is, with params of its own. It runs first; its last hidden states (tokens x dim), or
with --top-k ids and log probabilities (tokens x k), go to all stages, and stay cut over cp and tp as the tokens are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tiny
import torch
from curves import Row
from sft import microbatches, tiny_model
from tinydata import END, VOCAB, decode, encode, sentences

import fstep
from fstep_models.dense import Dense

TEACHER = Dense(replace(tiny_model(), layers=2, windows=(0, 0)))
STUDENT = Dense(replace(tiny_model(), dim=48, ffn=128, layers=2, windows=(0, 0)))


def distill_step(
    state: fstep.TrainState, docs: fstep.Docs, teacher_params: Any, *, teacher: Dense, student: Dense, mesh: fstep.Mesh,
    device: torch.device, lr: Any, divergence: Any = "forward", top_k: int = 0,
) -> tuple[fstep.TrainState, dict[str, torch.Tensor]]:  # fmt: skip
    """Take one step towards the teacher's distributions over the whole vocabulary, or over its ``top_k`` and the rest."""
    batch = microbatches(docs, mesh=mesh, max_tokens=4096, device=device)
    how: dict[str, Any] = {"axis": mesh.tp, "divergence": divergence}

    def tell(params: Any, x: torch.Tensor, mb: fstep.Packed) -> Any:
        said = teacher.head(params, x, mesh=mesh)
        return fstep.tp_token_top_logprobs(*said, top_k, axis=mesh.tp, tokens=len(mb.tokens)) if top_k else x

    def loss_fn(params: Any, x: torch.Tensor, pair: tuple[fstep.Packed, Any]) -> fstep.Ratio:
        (mb, told), mine = pair, student.head(params, x, mesh=mesh)
        if top_k:
            logprobs, ids = told
            return fstep.tp_topk_distill_loss(*mine, ids, logprobs, mb.weights, **how)
        return fstep.tp_distill_loss(*mine, *teacher.head(teacher_params, told, mesh=mesh), mb.weights, **how)

    told = fstep.pp_forward(teacher.stage(mesh), tell, teacher_params, batch, axis=mesh.pp)
    stage, pairs = student.stage(mesh), list(zip(batch, told, strict=True))
    loss, grads = fstep.pp_forward_backward(lambda p, x, mb: stage(p, x, mb[0]), loss_fn, state.params, pairs, axis=mesh.pp)
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0)
    return fstep.adamw.update(state, grads, lr=lr, skip=metrics["nonfinite"]), metrics


def agreement(params: Any, teacher_params: Any, docs: fstep.Docs, at: tiny.Place) -> float:
    """Return how often the student's likeliest next token is the teacher's."""
    row = fstep.to_device(fstep.pack_thd(docs, multiple_of=2 * at.mesh.cp.size), at.device)
    shard = fstep.cp_shard(row, axis=at.mesh.cp)
    (mine,) = STUDENT.score(params, [shard], mesh=at.mesh, top=1)
    (theirs,) = TEACHER.score(teacher_params, [shard], mesh=at.mesh, top=1)
    same = torch.eq(mine.top_ids, theirs.top_ids)  # type: ignore[arg-type]  # they were asked for
    return float(same[row.weights > 0].float().mean())


def train(a: Any, seed: int, at: tiny.Place, log: Callable[[Row], None]) -> None:
    """Train a teacher, a student that it teaches and one that has labels alone; say what came of it."""
    key, lesson = fstep.Key.seed(seed), dict[str, Any](lr=0.0, teacher=TEACHER, student=STUDENT, **vars(at))
    texts = [sentences(count, seed=3 * seed + i) for i, count in enumerate((4096, a.sentences, 256))]
    texts[2] = [ids for i, ids in enumerate(texts[2]) if ids not in texts[1] + texts[2][:i]][:64]  # held out, and each once
    many, few, unseen = (fstep.make_docs(ids, vocab_size=VOCAB) for ids in texts)
    first = TEACHER.init(key.fold_in(0), mesh=at.mesh, device=at.device)
    teacher = tiny.learn(
        TEACHER, first, many, steps=a.teacher_steps, peak=5e-3, key=key.fold_in(1), at=at, what=f"seed {seed}: the teacher"
    )
    first, same = STUDENT.init(key.fold_in(2), mesh=at.mesh, device=at.device), key.fold_in(3)
    ends = {}

    def look(method: str, step: int, params: Any, **more: float) -> None:
        if step % 10 == 0 or step == a.steps:  # a step is a function: drop its new state, and it is an evaluation
            _, metrics = distill_step(fstep.init_state(params, fstep.adamw), unseen, teacher, **lesson)
            ends[method] = float(metrics["loss"]), agreement(params, teacher, unseen, at)
            more |= {"held-out KL": ends[method][0], "held-out agreement": ends[method][1]}
        log({"method": method, "step": step, **more})

    alone = tiny.learn(
        STUDENT, first, few, steps=a.steps, peak=a.lr, key=same, at=at, what=f"seed {seed}: labels alone",
        each=lambda step, params: look("labels alone", step, params),
    )  # fmt: skip
    state, more = fstep.init_state(first, fstep.adamw, key=same), dict[str, float]()
    with at.bar(a.steps, f"seed {seed}: distilled") as bar:
        for step in range(a.steps):
            look("distilled", step, state.params, **more)
            rows, position = fstep.draw_documents(state.data, num=64, of=len(few.lengths), key=state.key)
            lr = fstep.warmup_cosine(step, peak=a.lr, warmup=min(10, a.steps), total=a.steps, floor=a.lr / 10)
            state, metrics = distill_step(
                replace(state, data=position), fstep.select_documents(few, rows), teacher,
                **{**lesson, "lr": lr, "divergence": a.divergence, "top_k": a.top_k},
            )  # fmt: skip
            more = {name: float(value) for name, value in metrics.items()}
            bar.set_postfix_str(f"{a.divergence} {more['loss']:.3f}, held-out KL {ends['distilled'][0]:.3f}")
            bar.update()
    look("distilled", a.steps, state.params, **more)

    prompts = fstep.to_device(fstep.make_docs([encode(f"A {who} ") for who in ("cat", "owl", "bee")]), at.device)
    for name, model, params in (
        ("teacher", TEACHER, teacher), ("distilled", STUDENT, state.params), ("labels alone", STUDENT, alone),
    ):  # fmt: skip
        whole = model.whole(params, mesh=at.mesh)
        found = fstep.generate(model.decode, whole, prompts, key, most=32, temperature=0, stop=[END])
        at.say(f"{name:13}" + " ".join(decode(ids.tolist()) for ids in torch.split(found.tokens, found.lengths.tolist())))
    for method, (kl, agreed) in ends.items():
        at.say(f"{method}: held-out KL to the teacher {kl:.3f}, agreement {agreed:.3f}")


def top_k(text: str) -> int:
    """Take a number of ids from the command line."""
    if not 0 <= (number := int(text)) <= VOCAB:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 (all) to the {VOCAB} ids there are")
    return number


def main() -> None:
    """Read the command line, and train."""
    p = tiny.parser(__doc__, out="runs/distill")
    p.add_argument("--divergence", choices=["forward", "reverse", "js"], default="forward", help="from which side to learn")
    p.add_argument("--top-k", type=top_k, default=0, help="how many of the teacher's likeliest ids; 0: all")
    p.add_argument("--sentences", type=tiny.count, default=48, help="how many the student has")
    p.add_argument("--teacher-steps", type=tiny.count, default=200, help="updates of the teacher")
    p.add_argument("--steps", type=tiny.count, default=200, help="updates of each student")
    p.add_argument("--lr", type=tiny.positive, default=5e-3, help="peak learning rate of the students")
    tiny.run(p, train, [TEACHER, STUDENT], ["held-out KL", "held-out agreement"], "Distillation", ["held-out KL"])


if __name__ == "__main__":
    main()
