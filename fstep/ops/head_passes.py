"""What the head computes from logits besides products: a pass that reads a chunk of them, and one that differentiates.

    logits [n, vocab] ─┬─ summarize ────> largest logit, sum of exp, its moment, the label's logit: 4 numbers a row
                       └─ differentiate ─> d logits [n, vocab] = g (onehot - p) - h p (log p + entropy), over temperature

Here they are in torch's operations, for any device; on CUDA each is one kernel (`fstep.ops.head_cuda`) that goes through
memory once. Logits of half precision inputs are float32 there: rounded to bfloat16, a logit of 20 is off by up to 0.06, and
its probability by as many parts of 1.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from fstep.batch.packed import IGNORE
from fstep.mesh.axis import Axis
from fstep.mesh.collectives import pmax, psum
from fstep.trace import asked_while_tracing

ALONE = Axis("tp")


class Part(NamedTuple):
    """The rows of the head that this rank has: from ``start`` on, of ``vocab`` in all, the others over ``axis``."""

    start: int
    vocab: int
    axis: Axis

    @staticmethod
    def all_of(weight: Tensor) -> Part:
        """Say that this rank has the whole head."""
        # By a name of the module: torch 2.11 compiles no Axis that is made within, nor one that is a field's default.
        return Part(0, len(weight), ALONE)

    def find(self, labels: Tensor, rows: int) -> Tensor:
        """Return each label's place among the first ``rows`` rows, -1 where it is not there."""
        return torch.where((labels >= self.start) & (labels < self.start + rows), labels - self.start, -1)

    def join(self, top: Tensor, sums: Tensor, labels: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make log probability, entropy and logsumexp of what each rank's `summarize` found; 0 where there is no label."""
        if self.axis.size > 1:
            largest = pmax(top, axis=self.axis)
            lower = top - largest
            total, moment, label = sums
            moved = [total * lower.exp(), (moment + lower * total) * lower.exp(), label + torch.where(here >= 0, lower, 0)]
            top, sums = largest, psum(torch.stack(moved), axis=self.axis)
        return self._read(top, sums, labels)

    def _read(self, top: Tensor, sums: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, moment, label = sums
        log_total = total.log()
        # A label that no rank has (looked for on the CPU only, where looking costs nothing) must not pass for a small loss.
        logp = torch.where((labels >= 0) & (labels < self.vocab), label - log_total, torch.nan)
        counted = labels != IGNORE
        return torch.where(counted, logp, 0), torch.where(counted, log_total - moment / total, 0), top + log_total


def to_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Compute logits, float32 at least, in operations that can be differentiated."""
    logits = (hidden @ weight.to(hidden.dtype).T).to(widen(hidden))
    return logits if temperature == 1.0 else logits / temperature


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: Part, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return log probability and, if asked for, entropy, of all tokens at once, in operations that have derivatives."""
    hidden = hidden.masked_fill((labels == IGNORE)[:, None], 0)
    logits = to_logits(hidden, weight, temperature)
    z = logits - pmax(logits.detach().max(-1).values, axis=part.axis)[:, None]
    e = z.exp()
    # Without the moment, of which a logit of -inf makes NaN, where nobody asks for it.
    moment = (e * z).sum(-1) if entropy else torch.zeros_like(z[:, 0])
    sums = psum(torch.stack([e.sum(-1), moment, _label(z, part.find(labels, len(weight)))]), axis=part.axis)
    logp, ent, _ = part._read(z[:, 0], sums, labels)
    return logp, ent if entropy else None


def _label(z: Tensor, here: Tensor) -> Tensor:
    return torch.where(here >= 0, z.gather(-1, here.clamp(min=0)[:, None])[:, 0], 0)


# Sizes and products -----------------------------------------------------------------------------------------------------


def _sums_are_kept(x: Tensor) -> bool:
    """Say whether a product of half precision can leave in float32, in which it is summed anyway."""
    return x.is_cuda and torch.version.hip is None and x.dtype in (torch.bfloat16, torch.float16)


def widen(x: Tensor) -> torch.dtype:
    """Return the dtype of logits: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def sum_dtype(hidden: Tensor, weight: Tensor, addends: int) -> torch.dtype:
    """Return what the weight's gradient is added up in: float32 at least, unless there is nothing to add."""
    return hidden.dtype if addends == 1 and weight.dtype == hidden.dtype else widen(hidden)


def round_size(n: int) -> int:
    """Return a size that the tiles of products divide, if it is not small."""
    return max(1, n if n < 128 else n // 128 * 128)


def chunks(start: int, stop: int, step: int) -> list[slice]:
    """Cut a range; an empty one into one empty chunk, since products of no tokens are zeros."""
    return [slice(i, min(i + step, stop)) for i in range(start, max(stop, start + 1), step)]


def matrix(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory whose rows begin, on CUDA, at multiples of 32 bytes, which products and kernels are fast with."""
    return torch.empty(rows, columns + (-columns % 16 if like.is_cuda else 0), dtype=dtype, device=like.device)[:, :columns]


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return ``hidden @ weight.T``, float32 at least."""
    if _sums_are_kept(hidden):
        out = matrix(len(hidden), len(weight), hidden, torch.float32)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    return (hidden @ weight.T).to(widen(hidden))


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add ``a @ b`` to ``total``, of their dtype or float32; the first one is written, whatever is there."""
    if _sums_are_kept(a) and total.dtype == torch.float32:
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif total.is_cuda and total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    else:
        more = a.to(total.dtype) @ b.to(total.dtype)
        total.copy_(more) if first else total.add_(more)


# Passes ------------------------------------------------------------------------------------------------------------------


@asked_while_tracing
def has_triton() -> bool:
    """Say whether torch came with the compiler for kernels."""
    return importlib.util.find_spec("triton") is not None


def has_kernels(logits: Tensor) -> bool:
    """Say whether these logits go through the kernels of `fstep.ops.head_cuda`."""
    return logits.is_cuda and logits.dtype == torch.float32 and has_triton()


def summarize(logits: Tensor, here: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit m [n] and, with z = logits / temperature - m, three more numbers [3, n].

    They are ``sum(exp(z))``, ``sum(exp(z) z)`` (0 without ``entropy``) and the label's z, 0 where ``here`` is -1.
    """
    if has_kernels(logits):
        from fstep.ops import head_cuda

        return head_cuda.summarize(logits, here, temperature, entropy)
    z = logits if temperature == 1.0 else logits / temperature
    top = z.max(-1).values
    # Where all ids of a rank are ruled out, by logits of -inf, there is nothing to take off.
    z = z - top.masked_fill(top == -torch.inf, 0)[:, None]
    e = z.exp()
    moment = (e * z).sum(-1) if entropy else torch.zeros_like(top)
    return top, torch.stack([e.sum(-1), moment, _label(z, here)])


def differentiate(
    logits: Tensor, here: Tensor, lse: Tensor, g: Tensor, h: Tensor | None, entropy: Tensor | None, temperature: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the products to ``out``, given ``g`` of log probability and ``h`` of ``entropy``, [n] each.

    A row whose g and h are 0 is 0, whatever its logits are. ``logits`` are used up.
    """
    if has_kernels(logits):
        from fstep.ops import head_cuda

        head_cuda.differentiate(logits, here, lse, g, h, entropy, temperature, out)
        return
    logp = (logits if temperature == 1.0 else logits.div_(temperature)).sub_(lse[:, None])
    if h is None or entropy is None:
        d = logp.exp_().mul_(-g[:, None])
        dead = g == 0
    else:
        # d logp / d logits = onehot - p; d entropy / d logits = -p (log p + entropy)
        d = -logp.exp() * (g[:, None] + h[:, None] * (logp + entropy[:, None]))
        dead = (g == 0) & (h == 0)
    d.scatter_add_(-1, here.clamp(min=0)[:, None], torch.where(here >= 0, g, 0)[:, None])
    if temperature != 1.0:
        d /= temperature
    out.copy_(d.masked_fill_(dead[:, None], 0))


def counted(labels: Tensor, weights: Tensor) -> Tensor:
    """Return labels with none where the weight is 0."""
    return torch.where(weights != 0, labels, IGNORE)


def without(hidden: Tensor, g: Tensor, h: Tensor | None = None) -> Tensor:
    """Return hidden states with zeros where nothing is asked for: 0 times what is there would be NaN if it is infinite."""
    return hidden.masked_fill((g == 0 if h is None else (g == 0) & (h == 0))[:, None], 0)


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply by a number on the device, which is 1 more often than not; then a kernel leaves the memory alone."""
    if x.is_cuda and has_triton():
        from fstep.ops import head_cuda

        head_cuda.scale_(x, factor)
    else:
        x.mul_(factor)
