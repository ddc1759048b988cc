"""What a model thinks of the tokens of a row: log probabilities, entropy, the likeliest tokens. Small, so it can be sent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fstep
from fstep import Mesh, Packed


@fstep.pytree
class Scores:
    """What `Dense.score` says of a row: at each place the log probability of its label, the next token; 0 without a label.

    ``entropy`` [T] is that of each distribution, ``top_logprobs`` and ``top_ids`` [T, k] its likeliest tokens, the first
    the likeliest; None if not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None


def read(hidden: Tensor, weight: Any, mb: Packed, mesh: Mesh, *, temperature: float, entropy: bool, top: int) -> Scores:
    """Compute the scores of this rank's tokens, and gather those of the row over ``mesh.cp``."""
    axis, labels = mesh.tp, mb.labels
    found: Any = fstep.tp_token_logprobs(  # type: ignore[call-overload]
        hidden, weight, labels, axis=axis, temperature=temperature, entropy=entropy
    )
    best: Any = (None, None)
    if top:
        best = fstep.tp_token_top_logprobs(hidden, weight, top, axis=axis, tokens=len(labels), temperature=temperature)
    mine = Scores(*(found if entropy else (found, None)), *best)
    return mine if mesh.cp.size == 1 else fstep.cp_unshard(mine, mb, axis=mesh.cp, grad="slice")
