"""torch.distributed.pipelining beside pp_forward_backward: the same stages on the same ranks, the same microbatches.

The peer needs microbatches of one shape, so each is a few documents of one length: rows there, a packed row here.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from peers_model import Llama, Named, Row, compare, fill, grads_of, measure, named, nll
from torch import Tensor
from torch.distributed import pipelining
from torch.func import functional_call

import fstep
from fstep_models.dense import Config, Dense

PAIRS = {
    "ScheduleGPipe": "gpipe",
    "Schedule1F1B": "1f1b",
    "ScheduleInterleaved1F1B": "interleaved",
    "ScheduleInterleavedZeroBubble": "interleaved_zero_bubble",
    "ScheduleZBVZeroBubble": "zbv",
    "ScheduleDualPipeV": "dualpipev",
}
SINGLE = ("gpipe", "1f1b")
Step = Callable[[], tuple[Tensor, Named]]


def stage_params(params: Any, schedule: str, mesh: fstep.Mesh) -> dict[int, Any]:
    """Return this rank's params of each of its stages."""
    return dict(params.parts) if isinstance(params, fstep.Stages) else {mesh.pp.rank: params}


def batch_of(config: Config, rows: int, length: int, device: str) -> Tensor:
    """Draw documents of one length."""
    return (fstep.Key.seed(3).uniform((rows, length)) * config.vocab).long().to(device)


def labels_of(tokens: Tensor) -> Tensor:
    """Return the next token of every place, none for the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the labels' negative log likelihoods, at least in float32."""
    return nll(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, (labels >= 0).float())


def dense(model: Dense, params: Any, schedule: str, microbatches: list[Tensor], mesh: fstep.Mesh) -> Step:
    """Return a step of fstep with the functions of `Dense`."""
    packed = [fstep.pack_thd(fstep.make_docs(list(mb.cpu()))) for mb in microbatches]
    batch = [fstep.to_device(mb, str(microbatches[0].device)) for mb in packed]

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(p, x, mb, mesh=mesh), mb.weights)

    def step() -> tuple[Tensor, Named]:
        how: dict[str, Any] = {"axis": mesh.pp, "schedule": schedule}
        loss, grads = fstep.pp_forward_backward(model.stage(mesh), loss_fn, params, batch, **how)
        return loss.num, named(grads)  # type: ignore[union-attr]

    return step


def lifted(config: Config, params: Any, schedule: str, microbatches: list[Tensor], mesh: fstep.Mesh) -> Step:
    """Return a step of fstep that runs the peer's module, so that the pipeline is all that differs."""
    parts = stage_params(params, schedule, mesh)
    tables = {s: {f"{path}.weight": x for path, x in named(p).items()} for s, p in parts.items()}
    # A stage is told by its parameters' names, which differ from stage to stage.
    modules = {frozenset(tables[s]): fill(config, p, p["layers"]).to("meta") for s, p in parts.items()}

    def stage_fn(p: dict[str, Tensor], x: Tensor | None, mb: Tensor) -> Tensor:
        y: Tensor = functional_call(modules[frozenset(p)], p, (mb if x is None else x,))
        return y

    def loss_fn(p: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
        labels = labels_of(mb)
        return fstep.Ratio(summed(x, labels), (labels >= 0).sum())

    tree = fstep.Stages(tables) if len(tables) > 1 else next(iter(tables.values()))

    def step() -> tuple[Tensor, Named]:
        loss, grads = fstep.pp_forward_backward(stage_fn, loss_fn, tree, microbatches, axis=mesh.pp, schedule=schedule)
        return loss.num, {k.removesuffix(".weight"): g for k, g in named(grads).items()}  # type: ignore[union-attr]

    return step


def torchs(
    config: Config, params: Any, name: str, tokens: Tensor, number: int, mesh: fstep.Mesh, group: Any = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = summed,
) -> Step:  # fmt: skip
    """Return a step of torch.distributed.pipelining."""
    ours = PAIRS[name]
    count = mesh.pp.size * (1 if ours in SINGLE else 2)
    modules: dict[int, Llama] = {s: fill(config, p, p["layers"]) for s, p in stage_params(params, ours, mesh).items()}
    stages = [pipelining.PipelineStage(m, s, count, tokens.device, group=group) for s, m in sorted(modules.items())]
    make: Any = getattr(pipelining, name)
    schedule = make(stages[0] if ours in SINGLE else stages, number, loss_fn=loss_fn, scale_grads=False)
    labels = labels_of(tokens)
    # Otherwise it lays the logits of all microbatches end to end, which nobody here reads.
    rest: dict[str, Any] = {"return_outputs": False} if "return_outputs" in signature(schedule.step).parameters else {}

    def step() -> tuple[Tensor, Named]:
        for module in modules.values():
            module.zero_grad()
        losses: list[Tensor] = []
        schedule.step(
            *((tokens,) if 0 in modules else ()), target=labels if count - 1 in modules else None, losses=losses, **rest
        )
        grads = {k.removesuffix(".weight"): p.grad for m in modules.values() for k, p in m.named_parameters()}
        total = torch.stack(losses).sum().detach() if losses else tokens.new_zeros((), dtype=torch.float64)
        return total, grads  # type: ignore[return-value]

    return step


def everywhere(loss: Tensor) -> Tensor:
    """Give every rank the loss that one has."""
    loss = loss.to(torch.float64)
    dist.all_reduce(loss)
    return loss


def pipelines(mesh: fstep.Mesh, config: Config, device: str, rows: int = 2, length: int = 12) -> list[Row]:
    """Compare every schedule that both have, with `Dense` and with the peer's own module in our pipeline."""
    out = []
    number = 2 * mesh.pp.size
    tokens = batch_of(config, number * rows, length, device)
    microbatches = list(tokens.chunk(number))
    model = Dense(config)
    for name, ours in PAIRS.items():
        if not hasattr(pipelining, name):
            out.append(Row("pipeline", name, note=f"torch {torch.__version__} has none"))
            continue
        params = model.init(fstep.Key.seed(0), mesh=mesh, schedule=ours, dtype=torch.float64, device=device)
        loss, grads = torchs(config, params, name, tokens, number, mesh)()
        theirs = (everywhere(loss), grads)
        for note, step in (
            ("our Dense", dense(model, params, ours, microbatches, mesh)),
            ("the same module in both", lifted(config, params, ours, microbatches, mesh)),
        ):
            out.append(compare(f"pipeline, {mesh.pp.size} ranks", name, step(), theirs, note))
    return out


def uneven(mesh: fstep.Mesh, config: Config, device: str, length: int = 12) -> list[Row]:
    """Give both a batch whose rows the microbatches do not divide: the first gets two rows, the others one.

    The peer through gloo, in a group of its own, which ends when somebody has waited too long for what never comes.
    """
    part, name = f"pipeline, {mesh.pp.size} ranks, uneven", "Schedule1F1B"
    number = 2 * mesh.pp.size
    tokens = batch_of(config, number + 1, length, "cpu")
    model = Dense(config)
    module = fill(config, model.init(fstep.Key.seed(0), dtype=torch.float64))
    loss = summed(module(tokens), labels_of(tokens))
    loss.backward()  # type: ignore[no-untyped-call]
    params = model.init(fstep.Key.seed(0), mesh=mesh, schedule="1f1b", dtype=torch.float64, device=device)
    wanted = grads_of(module)
    alone = (loss, {path: wanted[path] for path in named(params)})
    ours = dense(model, params, "1f1b", list(tokens.to(device).tensor_split(number)), mesh)()
    rows = [compare(part, "one process", ours, alone, "our Dense")]

    received: list[int] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        received.append(len(logits))
        return summed(logits, labels)

    group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=5))
    said = ""
    try:
        theirs = torchs(config, fstep.to_device(params, "cpu"), name, tokens, number, mesh, group, watched)()
    except Exception as error:  # whatever it is, the table shows it
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        theirs = (torch.tensor(torch.nan), dict(alone[1]))
    heard: list[Any] = [None] * mesh.pp.size
    dist.all_gather_object(heard, (said, received, float(theirs[0])))
    if any(text for text, _, _ in heard):
        # The others only wait for the last rank, which has something to say.
        shapes = ", ".join(map(str, heard[-1][1]))
        note = f"keeps the first shape: of microbatches of 2, 1, 1, ... rows its last stage gets {shapes}; {heard[-1][0]}"
        rows.append(Row(part, name, note=note))
    else:
        rows.append(compare(part, name, (sum(x for _, _, x in heard), theirs[1]), alone, "the peer, and one process"))
        rows[-1].equal = False
    return rows


def times(mesh: fstep.Mesh, config: Config, device: str, *, microbatches: int, length: int, steps: int, dtype: Any) -> None:
    """Print what a step costs, each in turn in this run."""
    say: Any = print if mesh.rank == 0 else lambda *_, **__: None
    tokens = batch_of(config, microbatches, length, device)
    parts, model = list(tokens.chunk(microbatches)), Dense(config)
    say(f"\n{microbatches} microbatches of {length} tokens, {config.layers} layers of {config.dim}, {dtype}\n")
    say("| schedule | torch | fstep, the same module | fstep, our Dense |\n|---|---|---|---|")
    for name, ours in PAIRS.items():
        if not hasattr(pipelining, name):
            continue
        cells = []
        for make in (
            lambda p, name=name: torchs(config, p, name, tokens, microbatches, mesh),
            lambda p, ours=ours: lifted(config, p, ours, parts, mesh),
            lambda p, ours=ours: dense(model, p, ours, parts, mesh),
        ):
            params = model.init(fstep.Key.seed(0), mesh=mesh, schedule=ours, dtype=dtype, device=device)
            step: Step = make(params)  # type: ignore[no-untyped-call]
            del params
            seconds, peak = measure(step, steps, device)
            cells.append(f"{seconds * 1e3:.1f} ms" + (f", {peak:.2f} GiB" if device == "cuda" else ""))
            del step
            if device == "cuda":
                torch.cuda.empty_cache()
        say(f"| {name} | {' | '.join(cells)} |", flush=True)
