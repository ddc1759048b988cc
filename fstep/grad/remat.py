"""Rematerialisation: keep less of the forward pass and compute it again in the backward pass.

none            keep every intermediate                         most memory, least compute
[aten.mm, ...]  keep the results of these operations only       in between
full            keep the inputs only                            least memory, one more forward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fstep.trace import in_transform
from fstep.tree import tree_leaves, tree_map

P = ParamSpec("P")
R = TypeVar("R")
Policy = str | Iterable[Any]

HERE = object()  # stands where a tensor was


class Rematerialised(torch.autograd.Function):
    """The identity. It marks in the graph what is computed again, once for every time that backward comes by."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Change nothing."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Pass the gradient on."""
        return g


def mark(out: Any) -> Any:
    """Mark a result's tensors."""

    def one(x: Any) -> Any:
        return Rematerialised.apply(x) if isinstance(x, Tensor) and x.requires_grad else x  # type: ignore[no-untyped-call]

    return tree_map(one, out)


def remat(f: Callable[P, R], policy: Policy = "full") -> Callable[P, R]:
    """Return ``f`` computed again in the backward pass instead of remembered; values and gradients are the same bits.

    ``policy`` is ``"none"`` (remember everything: f itself), ``"full"`` (remember only the arguments), or an iterable of
    operations such as ``[torch.ops.aten.mm.default]``, whose results are kept while the rest is computed again. Inside a
    torch.func transform, where torch cannot rematerialise, f runs as it is. Wrap a block first and compile the result. What
    f draws, it draws from a `Key`: torch's own generator would have gone on by the second time.

    Raises ValueError for any other word, TypeError for what is not an operation.

    >>> import torch, fstep
    >>> block = fstep.remat(lambda x: x.sin().cos())
    >>> fstep.value_and_grad(lambda x: block(x).sum())(torch.tensor([0.5]))
    (tensor(0.8873), tensor([-0.4048]))
    """
    if isinstance(policy, str):
        if policy == "none":
            return f
        if policy != "full":
            raise ValueError(f"remat: policy {policy!r} is unknown; pass 'none', 'full' or a list of operations to keep")
        wrap: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    else:
        try:
            kept = list(policy)
            # torch's check of each, now and not in the first forward
            create_selective_checkpoint_contexts(kept)  # type: ignore[no-untyped-call]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"remat: policy {policy!r} is no list of operations; pass 'none', 'full' or e.g. "
                f"[torch.ops.aten.mm.default] ({error})"
            ) from error
        wrap = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, kept),
        )

    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        if in_transform():
            return f(*args, **kwargs)
        if torch.compiler.is_compiling():
            traced: R = wrap(f, *args, **kwargs)
            return traced
        # Tensors given one by one are kept as saved-tensor hooks around this call decide. In a dict of params they would be
        # held on to until the backward pass, gathered ones (fold_layers) too.
        leaves = tree_leaves((args, kwargs))
        shape = tree_map(lambda x: HERE if isinstance(x, Tensor) else x, (args, kwargs))

        def run(*tensors: Tensor) -> R:
            rest = iter(tensors)
            again_args, again_kwargs = tree_map(lambda x: next(rest) if x is HERE else x, shape)
            return f(*again_args, **again_kwargs)

        out: R = mark(wrap(run, *(x for x in leaves if isinstance(x, Tensor))))
        return out

    return again
