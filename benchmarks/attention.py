"""Attention over packed documents: packed_attention beside varlen_attn, FlexAttention, cuDNN and FlashAttention 4.

    8 x 2048   ####|####|####|####|...       documents of one length: a batch as it lies
    11 mixed   ##############|########|...   from 84 to 6000 tokens
    Zipf       ##########|#|##|#|####|...    many short ones and few long ones

    python benchmarks/attention.py [--json PATH]     one GPU
    python benchmarks/attention.py --check           in float64 on the CPU: equal to plain arithmetic, and nothing is timed

Before a side is timed its output and gradients are compared: with plain arithmetic in float64 on a short row, and with those
of varlen_attn on the row itself. A side that is not installed or fails is left out, and says so.
"""

from __future__ import annotations

import argparse
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Step, in_turns, keep, machine, on_gpu, table
from torch import Tensor
from torch.nn import functional as F

import fstep

HEAD_DIM = 128
MIXED = (6000, 3500, 2400, 1500, 1100, 700, 500, 300, 200, 100, 84)
BOUND = 1e-2  # of the relative error in bfloat16; a wrong mask, scale or head is off by more than 0.1


@dataclass(frozen=True)
class Row:
    """Documents end to end, and the heads over them."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8

    @property
    def flop(self) -> float:
        """Operations of a causal forward; a backward has 2.5 times as many."""
        return sum(2.0 * n * (n + 1) for n in self.lengths) * self.heads * HEAD_DIM

    def boundaries(self, device: str) -> Tensor:
        """Return where the documents start and end."""
        return F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(device, torch.int32)

    def tensors(self, device: str, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> list[Tensor]:
        """Return q, k, v and a gradient of the output."""
        g = torch.Generator(device).manual_seed(0)
        shapes = [(sum(self.lengths), n, head_dim) for n in (self.heads, self.kv_heads, self.kv_heads, self.heads)]
        return [torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(dtype) for shape in shapes]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Side = Callable[[Row, Tensor], Attend]  # a row and its boundaries on the device


def zipf(total: int, longest: int) -> tuple[int, ...]:
    """Return document lengths that add up to ``total``, length n being 1/n times as frequent."""
    weights, g = 1 / torch.arange(1, longest + 1).double(), torch.Generator().manual_seed(0)
    found: list[int] = []
    while sum(found) < total:
        found.append(1 + int(torch.multinomial(weights, 1, generator=g)))
    return tuple(n for n in (*found[:-1], found[-1] - sum(found) + total) if n)


def rows() -> Iterator[Row]:
    """Yield what is measured."""
    yield Row("8 x 2048", (2048,) * 8)
    yield Row("11 mixed", MIXED)
    yield Row("1 x 16384", (16384,))
    yield Row("Zipf", zipf(16384, 4096))
    yield Row("one long, many short", (4096, *[96] * 128))
    yield Row("32 x 512", (512,) * 32)
    yield Row("128 x 128", (128,) * 128)
    yield Row("4 x 2048", (2048,) * 4)
    yield Row("1 x 8192", (8192,))
    yield Row("8 x 2048, 16 heads", (2048,) * 8, heads=16)
    yield Row("11 mixed, 16 heads", MIXED, heads=16)


def ours(method: str) -> Side:
    """Return a method of packed_attention."""

    def side(row: Row, cu: Tensor) -> Attend:
        longest = max(row.lengths)
        return lambda q, k, v: fstep.packed_attention(q, k, v, cu, max_seqlen=longest, method=method)

    return side


def varlen(row: Row, cu: Tensor) -> Attend:
    """torch's varlen_attn, with grouped heads as they are."""
    from torch.nn.attention.varlen import varlen_attn

    takes_flag, longest = "enable_gqa" in inspect.signature(varlen_attn).parameters, max(row.lengths)
    more: dict[str, Any] = {"enable_gqa": True} if takes_flag else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **more)
        assert isinstance(out, Tensor)
        return out

    return attend


def flex(row: Row, cu: Tensor) -> Attend:
    """FlexAttention, compiled, with a block mask that is made once and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = sum(row.lengths)
    document = torch.searchsorted(cu, torch.arange(tokens, device=cu.device), right=True)
    mask = create_block_mask(
        lambda _b, _h, q, k: (q >= k) & (document[q] == document[k]), None, None, tokens, tokens, device=str(cu.device)
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)

    return attend


def batch(row: Row, cu: Tensor) -> Attend:
    """SDPA with cuDNN on a batch of documents of one length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    documents = len(row.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(documents, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)

    return attend


def fa4(row: Row, cu: Tensor) -> Attend:
    """FlashAttention 4 by its public function."""
    from flash_attn.cute import flash_attn_varlen_func

    longest = max(row.lengths)
    lengths = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, causal=True, **lengths)[0]


def plain(row: Row, cu: Tensor) -> Attend:
    """Attend by plain arithmetic, a document at a time."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, out = row.heads // row.kv_heads, []
        for a, b, c in zip(*(torch.split(x, list(row.lengths)) for x in (q, k, v)), strict=True):
            b, c = b.repeat_interleave(group, 1), c.repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", a, b) * q.shape[2] ** -0.5
            seen = torch.ones_like(scores[0], dtype=torch.bool).tril()
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), c))
        return torch.cat(out)

    return attend


def pulled(attend: Attend, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attend(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each tensor."""
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True)]


def against_plain(row: Row, side: Side, device: str, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> list[float]:
    """Return a side's errors against plain arithmetic in float64 on the same numbers."""
    cu, xs = row.boundaries(device), row.tensors(device, dtype, head_dim)
    q, k, v, g = (x.double() for x in xs)
    return errors(pulled(side(row, cu), *xs), pulled(plain(row, cu), q, k, v, g))


def short(row: Row) -> Row:
    """Return a row of the same kind with few tokens: of one length, or of several."""
    return replace(row, lengths=(512,) * 4 if len(set(row.lengths)) == 1 else (1000, 513, 300, 235), heads=8, kv_heads=2)


def sides_of(row: Row) -> dict[str, Side]:
    """Return what is compared on a row; the first is what the others are compared with."""
    even = len(set(row.lengths)) == 1
    sides: dict[str, Side] = {"varlen_attn": varlen, "fstep": ours("auto")}
    if even:
        sides |= {"fstep, dense": ours("dense"), "SDPA, cuDNN, batch": batch}
    sides |= {"flash-attn-4": fa4}
    if sum(row.lengths) == 16384 and row.heads == 32 and max(row.lengths) > 512:  # each shape is compiled for seconds
        sides |= {"FlexAttention, compiled": flex}
    return sides


def ready(row: Row) -> dict[str, tuple[Side, list[float]]]:
    """Return the sides that run, and their errors; say of the others why they do not."""
    cu, xs = row.boundaries("cuda"), row.tensors("cuda", torch.bfloat16)
    want = pulled(varlen(row, cu), *xs)
    found = {}
    for name, side in sides_of(row).items():
        try:
            small = against_plain(short(row), side, "cuda", torch.bfloat16)
            here = errors(pulled(side(row, cu), *xs), want)
            if (worst := max(*small, *here)) > BOUND:
                raise AssertionError(f"is off by {worst:.1e}: {small} against float64, {here} against varlen_attn")
            found[name] = side, small
        except Exception as error:
            lines = traceback.format_exc().strip().splitlines()
            print(f"left out: {name} on {row.name}: {type(error).__name__}: {' / '.join(lines[-3:])[:400]}", flush=True)
    return found


def measure(row: Row, path: Path | None) -> None:
    """Check, time and print one row."""
    cu, xs = row.boundaries("cuda"), row.tensors("cuda", torch.bfloat16)
    sides = ready(row)

    def forward(side: Side) -> Step:
        attend = side(row, cu)
        return torch.no_grad()(lambda: attend(*xs[:3]))

    def both(side: Side) -> Step:
        return partial(pulled, side(row, cu), *xs)

    for what, build, work in (("forward", forward, 1.0), ("forward and backward", both, 3.5)):
        steps = {name: partial(build, side) for name, (side, _) in sides.items()}
        found = in_turns(steps, steps=20, warmup=2, repeat=3)
        notes = [dict(zip(("out", "dq", "dk", "dv"), (f"{e:.1e}" for e in sides[t.name][1]), strict=True)) for t in found]
        found = [replace(t, notes=n) for t, n in zip(found, notes, strict=True)]
        print(f"\n{row.name}, {row.heads} query and {row.kv_heads} key heads, {what}\n", flush=True)
        print(table(found, work=work * row.flop / 1e12, unit="TFLOP/s"), flush=True)
        keep(path, f"attention, {row.name}, {what}", found, flop=work * row.flop)


def check() -> None:
    """Compare every method that runs here with plain arithmetic."""
    cases = [
        Row("even", (12,) * 3, 4, 2),
        Row("one", (9,), 4, 1),
        Row("mixed", (5, 1, 17), 4, 4),
        Row("zipf", zipf(60, 20), 6, 2),
    ]
    for row in cases:
        for method in ("auto", "flash", "documents", *(["dense"] if len(set(row.lengths)) == 1 else [])):
            found = against_plain(row, ours(method), "cpu", torch.float64, head_dim=8)
            assert max(found) < 1e-12, (row, method, found)
            print(f"{row.name:6} {method:10} out, dq, dk, dv are off by {' '.join(f'{e:.1e}' for e in found)}")


def main() -> None:
    """Run the whole comparison, or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", help="names of rows")
    args = parser.parse_args()
    if args.check or not on_gpu():
        check()
        return
    print(machine(), flush=True)
    for row in rows():
        if args.only is None or row.name in args.only:
            measure(row, args.json)


if __name__ == "__main__":
    main()
