"""Small pieces every decoder shares: embedding, RMS norm, linear map, rotation.

They compute in the wider of float32 and the input's dtype where that matters, and return the input's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fstep.ops.factors import Factored
from fstep.trace import in_transform


def check_ids(function: str, what: str, ids: Tensor, vocab: int, *, ignore: int | None = None) -> None:
    """Raise ValueError for an id outside the vocabulary, on the CPU, where looking costs nothing.

    On a GPU looking would wait for the device; documents are checked before they get there, by
    ``make_docs(..., vocab_size=...)``.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or in_transform():
        return
    bad = (ids >= vocab) | (ids < 0)
    if ignore is not None:
        bad &= ids != ignore
    if bad.any():
        raise ValueError(
            f"{function}: {what} {int(ids[bad][0])} at place {int(bad.nonzero()[0, 0])} is not in the vocabulary of "
            f"{vocab}; ids come from the tokenizer that the model was made for"
        )


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Look up the rows of ``weight`` [vocab, dim] for ``tokens`` [T].

    Raises ValueError, on the CPU, for an id outside the vocabulary.

    >>> import torch, fstep
    >>> fstep.embed(torch.tensor([1, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[3., 4.],
            [1., 2.]])
    """
    check_ids("embed", "token", tokens, len(weight))
    return F.embedding(tokens, weight)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Divide by the root mean square of the last dimension: ``weight * x / sqrt(mean(x**2) + eps)``.

    >>> import torch, fstep
    >>> fstep.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 10.0]), eps=0.0)
    tensor([ 0.8485, 11.3137])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """Map the last dimension: ``x @ weight.T + bias`` with a weight of shape [out, in], or what `split_weights` makes of it.

    >>> import torch, fstep
    >>> fstep.linear(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]))
    tensor([11.])
    """
    if isinstance(weight, Factored):
        return weight.linear(x, bias)
    return F.linear(x, weight, bias)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the pairs (d, d + D/2) of each head by the angles whose cosines and sines are given, [T, D/2] each.

    >>> import torch, fstep
    >>> quarter = (torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    >>> fstep.rotate(torch.tensor([[[1.0, 0.0]]]), *quarter)
    tensor([[[0., 1.]]])
    """
    a, b = x_THD.chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
