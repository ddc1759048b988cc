"""Rematerialisation: keep less of the forward pass and compute it again in the backward pass.

none            keep every intermediate                         most memory, least compute
[aten.mm, ...]  keep the results of these operations only       in between
full            keep the inputs only                            least memory, one more forward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fstep.trace import in_transform

P = ParamSpec("P")
R = TypeVar("R")
Policy = str | Iterable[Any]


def remat(f: Callable[P, R], policy: Policy = "full") -> Callable[P, R]:
    """Return ``f`` computed again in the backward pass instead of remembered; values and gradients are the same bits.

    ``policy`` is ``"none"`` (remember everything: f itself), ``"full"`` (remember only the arguments), or an iterable of
    operations such as ``[torch.ops.aten.mm.default]``, whose results are kept while the rest is computed again. Inside a
    torch.func transform, where torch cannot rematerialise, f runs as it is. Wrap a block first and compile the result.

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
        wrap: Callable[..., Any] = partial(checkpoint, f, use_reentrant=False, preserve_rng_state=False)
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
            f,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, kept),
        )

    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        return f(*args, **kwargs) if in_transform() else wrap(*args, **kwargs)

    return again
