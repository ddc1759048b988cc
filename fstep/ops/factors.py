"""A weight's gradient left as its two factors, so that the product can wait: a backward pass in two halves, compiled too.

    y = h @ w.T      input half     g = dL/dy arrives;  dL/dh = g @ w             others wait for this
                     weight half    dL/dw = g.T @ h                               nobody does

torch.compile makes one node of a block, whose backward pass is all or nothing. So the products are taken out of it. Beside
each weight the block gets two stand-ins, shaped like y and h, whose "gradients" are g and h. Outside, one node makes the
stand-ins of all weights, and multiplies what comes back::

    w ── products ──► stand-ins ─►┐
    w, without gradient ─────────► block ──► y
    x ───────────────────────────►┘

The stand-ins take no memory, the block computes what it did, and the products are the same ones at another time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fstep.trace import in_transform
from fstep.tree import check_callable, check_type, tree_leaves, tree_paths, tree_replace_leaves

Through = Callable[[Callable[..., Any]], Callable[..., Any]]


class Factored:
    """Stands in a block's params for a weight whose gradient is left as factors; `linear` takes it, once."""

    def __init__(self, path: str, weight: Tensor, like_y: Tensor, like_h: Tensor) -> None:
        self.path, self.weight, self.like_y, self.like_h = path, weight, like_y, like_h
        self.used = False

    def linear(self, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute ``h @ weight.T + bias`` in the dtype of ``h``."""
        if self.used or h.shape != self.like_h.shape or h.dtype != self.like_h.dtype:
            shapes = (
                f"applied to {list(h.shape)} in {h.dtype}, where x has {list(self.like_h.shape[:-1])} in {self.like_h.dtype}"
            )
            what = "used twice" if self.used else shapes
            raise ValueError(f"split_weights: {self.path!r} is {what}; leave it out, with only=lambda path: ...")
        self.used = True
        return _linear(h, self.weight.to(h.dtype), bias, self.like_y, self.like_h)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, bias: Tensor | None, like_y: Tensor, like_h: Tensor) -> Tensor:
        y = F.linear(h, w, bias)
        ctx.save_for_backward(h.to(y.dtype), w.to(y.dtype))  # which autocast may have made another
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "split_weights: a gradient of gradients would miss the weights; differentiate the plain block"
            )
        h, w = ctx.saved_tensors
        d_bias = flat(g).sum(0) if ctx.needs_input_grad[2] else None
        return g @ w, None, d_bias, g, h.detach()  # a gradient, which has no graph of its own


def _linear(h: Tensor, w: Tensor, bias: Tensor | None, like_y: Tensor, like_h: Tensor) -> Tensor:
    y: Tensor = _Linear.apply(h, w, bias, like_y, like_h)  # type: ignore[no-untyped-call]
    return y


class Products(Function):
    """The stand-ins of a block's weights and, of what arrives for them, the weights' gradients."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Make two stand-ins for each weight, without memory: [..., out] and [..., in]."""
        ctx.dtypes = [w.dtype for w in weights]
        ctx.set_materialize_grads(False)
        nothing = weights[0].new_empty((), dtype=dtype)
        return tuple(nothing.expand(*shape, n) for w in weights for n in w.shape)

    @staticmethod
    def backward(ctx: Any, *factors: Tensor | None) -> Any:
        """Multiply."""
        pairs = zip(factors[::2], factors[1::2], ctx.dtypes, strict=True)
        return None, None, *(None if g is None or h is None else product(g, h, dtype) for g, h, dtype in pairs)


def flat(x: Tensor) -> Tensor:
    """Lay all rows below each other: [..., n] -> [rows, n]."""
    return x.reshape(-1, x.shape[-1])


def product(g: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``g.T @ h``, the gradient of a weight, [out, in]."""
    if dtype == torch.float32 != g.dtype and g.is_cuda:
        return torch.mm(flat(g).t(), flat(h), out_dtype=dtype)  # the sums are float32 anyway; not rounded in between
    return (flat(g).t() @ flat(h)).to(dtype)


def split_weights(
    block: Callable[..., Any], *, through: Through | None = None, only: Callable[[str], bool] | None = None
) -> Callable[..., Any]:
    """Return ``block(params, x, ...)`` with the gradients of its matrices left to be multiplied outside of it.

    ``through`` is what the block goes through, such as `torch.compile` or a `remat`. Then a schedule with halves of
    backward passes ("zbv", "interleaved_zero_bubble") can put the products off, which it cannot inside a compiled block.
    Values and gradients are those of ``through(block)``; the two factors of a product live until it is computed.

    Each matrix among the params is used by one `linear`, on rows like those of ``x`` [..., in], in its dtype; ``only(path)``
    refuses others, which are differentiated as usual, as is what is no matrix, or complex. Raises ValueError, when the block
    runs, for a `linear` of a matrix that is not like that; RuntimeError for gradients of gradients.

    >>> import torch, fstep
    >>> block = lambda p, x: x + fstep.linear(torch.tanh(fstep.linear(x, p["up"])), p["down"])
    >>> params = {"up": torch.ones(3, 2), "down": torch.ones(2, 3)}
    >>> split = fstep.split_weights(block, through=fstep.remat)  # or torch.compile, or first one and then the other
    >>> loss = lambda p, f: f(p, torch.ones(1, 2)).sum()
    >>> a, b = (fstep.value_and_grad(loss)(params, f)[1] for f in (block, split))
    >>> torch.equal(a["up"], b["up"]), torch.equal(a["down"], b["down"])
    (True, True)
    """
    check_callable("split_weights", "block", block)
    if through is not None:
        # Not as a decorator: it imports the compiler, which takes a second. What the compiler makes of the call is the same
        # as if it looked inside, where it would warn of its own ways with such functions.
        torch.compiler.allow_in_graph(_linear)  # type: ignore[no-untyped-call]

    def inside(params: Any, like: dict[str, tuple[Tensor, Tensor]], x: Any, *rest: Any, **named: Any) -> Any:
        paths, leaves = tree_paths(params), tree_leaves(params)
        found = [Factored(p, w, *like[p]) if p in like else w for p, w in zip(paths, leaves, strict=True)]
        return block(tree_replace_leaves(params, found), x, *rest, **named)

    run = inside if through is None else through(inside)

    def outside(params: Any, x: Any, *rest: Any, **named: Any) -> Any:
        check_type("split_weights", "x", x, Tensor, "a tensor as the block's second argument")
        if not x.is_floating_point():
            return run(params, {}, x, *rest, **named)  # stand-ins of its dtype could carry no gradient
        paths, leaves = tree_paths(params), tree_leaves(params)
        chosen = [
            at
            for at, (path, w) in enumerate(zip(paths, leaves, strict=True))
            if _wants_grad(w)
            and w.dim() == 2
            and w.is_floating_point()
            and x.is_floating_point()
            and (only is None or only(path))
        ]
        like: dict[str, tuple[Tensor, Tensor]] = {}
        if chosen:
            found = Products.apply(x.shape[:-1], x.dtype, *(leaves[at] for at in chosen))  # type: ignore[no-untyped-call]
            like = {paths[at]: pair for at, pair in zip(chosen, zip(found[::2], found[1::2], strict=True), strict=True)}
            for at in chosen:
                leaves[at] = leaves[at].detach()
        return run(tree_replace_leaves(params, leaves), like, x, *rest, **named)

    return outside


def _wants_grad(w: Any) -> bool:
    recorded = isinstance(w, Tensor) and w.requires_grad and torch.is_grad_enabled() and not in_transform()
    return recorded and w.is_floating_point()
