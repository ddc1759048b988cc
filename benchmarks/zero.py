"""Parameters cut over the ranks: fold_layers beside FSDP2 (fully_shard), the same functions, weights and batch, in one run.

    torchrun --nproc-per-node 4 benchmarks/zero.py                    Llama-8B shapes, bfloat16 compute, float32 pieces
    torchrun --nproc-per-node 2 benchmarks/zero.py --check            small, float32, gloo: losses and gradients compared

The module that FSDP2 wraps calls the block and the head of `fstep_models.dense` on its own parameters, so the two differ in
how parameters come and gradients go, and in nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fstep
from fstep_models.dense import Config, Dense

LLAMA_8B = Config(
    family="llama", vocab=128256, dim=4096, ffn=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
    rope=fstep.Rope(theta=500000.0, dim=128), windows=(0,) * 32,
)  # fmt: skip
SMALL = dataclasses.replace(
    LLAMA_8B, vocab=131, dim=48, ffn=80, layers=4, heads=4, kv_heads=2, head_dim=12,
    rope=fstep.Rope(theta=10000.0, dim=12), windows=(0,) * 4,
)  # fmt: skip
Step = Callable[[], Tensor]


class Layer(nn.Module):
    """The parameters of one layer, and how the stage calls it."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Call ``run`` with parameters that are whole now."""
        return run(dict(self.named_parameters(recurse=False)))


class Decoder(nn.Module):
    """A module with the parameters of a `Dense`, which computes what that computes."""

    embed: Tensor
    norm: Tensor
    head: Tensor

    def __init__(self, model: Dense, params: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        for name in ("embed", "norm", "head"):
            self.register_parameter(name, nn.Parameter(params[name]))
        self.layers = nn.ModuleList(Layer(params["layers"][i]) for i in range(model.config.layers))

    def forward(self, batch: fstep.Packed) -> Tensor:
        """Return the summed loss of a batch."""
        m = self.model
        x = fstep.embed(batch.tokens, self.embed)
        cos, sin = m._tables(batch, x.dtype)
        for i, layer in enumerate(self.layers):
            rest = (cos, sin, batch.cu_seqlens_padded, batch.max_seqlen, m.config.windows[i], m, fstep.Mesh())
            x = layer(lambda p, x=x, rest=rest: m._block(p, x, *rest))
        logp = m.logprobs({"norm": self.norm, "head": self.head}, x, batch)
        return fstep.sft_loss(logp, batch.weights).num


def make_batch(a: argparse.Namespace, config: Config, rank: int, device: str) -> fstep.Packed:
    """Draw this rank's documents, as many tokens on every rank."""
    key = fstep.Key.seed(1).fold_in(rank)
    lengths = [a.doc] * (a.tokens // a.doc)
    tokens = [(key.fold_in(i).uniform((n,)) * config.vocab).long() for i, n in enumerate(lengths)]
    return fstep.to_device(fstep.pack_thd(fstep.make_docs(tokens)), device)


def ours(a: argparse.Namespace, model: Dense, params: Any, batch: fstep.Packed, mesh: fstep.Mesh) -> tuple[Step, Any]:
    """Return a step that updates its state in place, and a function of the last step's loss and gradients."""
    low = None if a.check else torch.bfloat16
    cut = fstep.shard_params(params, mesh.dp, dtype=low, reduce_dtype=getattr(torch, a.reduce))
    kept: dict[str, Any] = {"state": fstep.init_state(cut, fstep.adamw)}

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(p, x, mb), mb.weights)

    def step() -> Tensor:
        state = kept.pop("state")
        loss, grads = fstep.pp_forward_backward(model.stage(), loss_fn, state.params, [batch])
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0, donate=True)
        if a.check:
            kept["grads"] = grads
        kept["state"] = fstep.adamw.update(state, grads, lr=a.lr, donate=True)
        return metrics["loss"]

    return step, lambda: fstep.unshard_params(kept["grads"])


def fsdp2(a: argparse.Namespace, model: Dense, params: Any, batch: fstep.Packed, mesh: fstep.Mesh) -> tuple[Step, Any]:
    """Return the same of FSDP2: torch.optim.AdamW, clip_grad_norm_."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module = Decoder(model, params)
    low = None if a.check else torch.bfloat16
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu" if a.check else "cuda", (mesh.size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=getattr(torch, a.reduce), cast_forward_inputs=False),
    }
    for layer in module.layers:
        fully_shard(layer, **options)
    fully_shard(module, **options)
    betas, eps = fstep.adamw.betas, fstep.adamw.eps
    opt = torch.optim.AdamW(module.parameters(), lr=a.lr, betas=betas, eps=eps, weight_decay=0.0, fused=not a.check)
    weight = batch.weights.sum()  # the same on every rank; gradients are averaged over them
    grads: dict[str, Tensor] = {}

    def step() -> Tensor:
        loss = module(batch) / weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        if a.check:
            for name, p in module.named_parameters():
                grad: Any = p.grad
                grads[name] = grad.full_tensor().clone()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step, lambda: dict(grads)


def measure(name: str, make: Callable[[], tuple[Step, Any]], a: argparse.Namespace, mesh: fstep.Mesh) -> str:
    """Return a row of the table: median time, rate, peak memory of rank 0."""
    config = dataclasses.replace(LLAMA_8B, layers=a.layers, vocab=a.vocab)
    step, _ = make()
    losses = [float(step()) for _ in range(3)]
    gc.collect()
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(a.steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    block = config.dim * config.head_dim * 2 * (config.heads + config.kv_heads) + 3 * config.dim * config.ffn
    heads = config.heads * config.head_dim
    flops = 6 * a.tokens * (config.layers * block + config.vocab * config.dim) + 6 * config.layers * a.tokens * a.doc * heads
    peak = torch.cuda.max_memory_allocated() / 2**30
    shown = (
        f"{median * 1e3:.0f} ms | {a.tokens / median:,.0f} | {flops / median / 1e12:.0f} | {peak:.1f} GiB | {losses[-1]:.4f}"
    )
    return f"| {name} | {shown} |"


def check(a: argparse.Namespace, mesh: fstep.Mesh) -> float:
    """Take three steps with both, and return the worst relative difference of a loss or a gradient leaf."""
    model = Dense(SMALL)
    batch = make_batch(a, SMALL, mesh.rank, "cpu")
    a_step, a_grads = ours(a, model, model.init(fstep.Key.seed(0)), batch, mesh)
    b_step, b_grads = fsdp2(a, model, model.init(fstep.Key.seed(0)), batch, mesh)
    worst = 0.0
    for number in range(3):
        mine = float(a_step())
        theirs = float(fstep.psum(b_step(), axis=mesh.dp)) / mesh.size
        rows = [("loss", abs(mine - theirs) / abs(theirs))]
        found, expected = a_grads(), b_grads()
        for path, g in zip(fstep.tree_paths(found), fstep.tree_leaves(found), strict=True):
            other = expected.pop(path)
            rows.append((path, float((g - other).norm() / other.norm())))
        if expected:
            raise SystemExit(f"FSDP2 has gradients that we have not: {sorted(expected)}")
        name, error = max(rows, key=lambda row: row[1])
        worst = max(worst, error)
        if mesh.rank == 0:
            print(f"step {number}: loss {mine:.6f}, FSDP2 {theirs:.6f}; of {len(rows)} the worst is {name}, {error:.1e}")
    return worst


def main() -> None:
    """Measure both and print the table, or compare them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--vocab", type=int, default=128256)
    p.add_argument("--tokens", type=int, default=8192, help="of each rank")
    p.add_argument("--doc", type=int, default=2048, help="tokens of a document")
    p.add_argument("--reduce", default="float32", choices=["float32", "bfloat16"], help="what gradients are summed in")
    p.add_argument("--remat", default="none", choices=["none", "full"])
    p.add_argument("--no-compile", action="store_true", help="run the block as it is, in both")
    p.add_argument("--only", choices=["fstep", "fsdp2"])
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--check", action="store_true", help="compare gradients on the CPU, small, float32")
    a = p.parse_args()
    if a.check:
        a.tokens, a.doc, a.lr = 96, 24, 1e-3
    with fstep.mesh_from_env(backend="gloo" if a.check else None) as mesh:
        if mesh.size == 1:
            raise SystemExit("run it under torchrun with 2 or more processes")
        if a.check:
            worst = check(a, mesh)
            if mesh.rank == 0:
                print(f"worst {worst:.1e}: {'equal' if worst < 1e-5 else 'DIFFERENT'}")
            raise SystemExit(worst >= 1e-5)
        config = dataclasses.replace(LLAMA_8B, layers=a.layers, vocab=a.vocab, windows=(0,) * a.layers)
        model = Dense(config, remat=a.remat, compile=not a.no_compile)
        batch = make_batch(a, config, mesh.rank, "cuda")
        if mesh.rank == 0:
            print(f"torch {torch.__version__}, {mesh.size} x {torch.cuda.get_device_name()}")
            print(
                f"{a.layers} layers, {a.tokens} tokens a rank in documents of {a.doc}, vocab {a.vocab}, sums in {a.reduce}"
            )
            print("| | time of a step | tokens/s/GPU | TFLOP/s/GPU | peak memory | loss |\n|---|---|---|---|---|---|")
        for name, build in (("fstep", ours), ("fsdp2", fsdp2)):
            if a.only in (None, name):
                make = lambda build=build: build(a, model, model.init(fstep.Key.seed(0), device="cuda"), batch, mesh)  # noqa: E731
                row = measure(name, make, a, mesh)
                if mesh.rank == 0:
                    print(row, flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                torch._dynamo.reset()


if __name__ == "__main__":
    main()
