"""Draw one token from each row of logits, reproducibly: one uniform number a row, through the inverse of the CDF.

    probabilities       .5      .3    .2          top_k=2 or top_p=0.7:   .5     .3
    cumulative sum  0 ────── .5 ─── .8 ── 1                           0 ────── .5 ─── .8
    a number            ^ .4 draws 0    ^ .9 draws 2                     (0.9 of .8 is .72) ^ draws 1

What is cut off is never drawn, and neither is a token of probability 0. The log probability that comes with a token is that
of the whole distribution, before anything is cut off: a model's score of the same token is the same number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.tree import check_type

CHUNK = 1 << 25  # elements of float64 that are computed with at a time


def sample_tokens(
    logits: Tensor,
    uniform: Tensor | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return one token id a row and its log probability: [rows] both, of ``logits`` [rows, vocab].

    ``p = softmax(logits / temperature)``; the token drawn is the first whose cumulative probability exceeds ``uniform``
    [rows], numbers of [0, 1), e.g. ``key.uniform((rows,), dtype=torch.float64)``. So a row's token depends on its own
    logits and its own number alone, and so does the order of what is cut off:

    - ``top_k`` keeps the k likeliest tokens; of equally likely ones those of lower ids.
    - ``top_p`` keeps the fewest of the likeliest (of those that top_k left, made to sum to 1) whose probability reaches it.
      1 keeps all.
    - ``temperature=0`` takes the likeliest token, of several the first; ``uniform`` may be None.

    Log probabilities are of the whole distribution, whatever is kept: what `token_logprobs` returns at this temperature
    (for 0: at 1), float32 or wider. No gradient passes. A row that has no distribution (NaN, +inf, all -inf) gets a log
    probability that is not finite, and no error: to look would be to wait for the device.

    Raises ValueError for shapes that do not fit and options out of range, TypeError for what is no number.

    >>> import torch, fstep
    >>> logits, uniform = torch.tensor([0.5, 0.3, 0.2]).log().expand(3, 3), torch.tensor([0.4, 0.7, 0.9])
    >>> fstep.sample_tokens(logits, uniform)
    (tensor([0, 1, 2]), tensor([-0.6931, -1.2040, -1.6094]))
    >>> fstep.sample_tokens(logits, uniform, top_p=0.7)
    (tensor([0, 1, 1]), tensor([-0.6931, -1.2040, -1.2040]))
    >>> fstep.sample_tokens(logits, None, temperature=0)[0]
    tensor([0, 0, 0])
    """
    who = "sample_tokens"
    check_type(who, "logits", logits, Tensor, "a tensor [rows, vocab]")
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(f"{who}: logits are {logits.dtype} {tuple(logits.shape)}; pass floats [rows, vocab]")
    check_sampling(who, temperature, top_k, top_p)
    if temperature > 0:
        check_type(who, "uniform", uniform, Tensor, "numbers of [0, 1), one a row")
    if uniform is not None and (uniform.shape != logits.shape[:1] or not uniform.is_floating_point()):
        raise ValueError(
            f"{who}: uniform is {uniform.dtype} {tuple(uniform.shape)} for {len(logits)} rows; pass one of [0, 1) a row"
        )
    some = max(1, CHUNK // logits.shape[1])
    numbers = logits[:, 0] if uniform is None else uniform
    parts = zip(torch.split(logits.detach(), some), torch.split(numbers, some), strict=True)
    found = [_sample(x, u, temperature, top_k, top_p) for x, u in parts]
    ids, logprobs = (torch.cat(y) for y in zip(*found, strict=True))
    return ids, logprobs.to(torch.promote_types(logits.dtype, torch.float32))


def _sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    # In float64 the sum of a large vocabulary's probabilities is exact enough to be compared with a number.
    logits = logits.to(torch.float64)
    scaled = (logits - logits.amax(-1, keepdim=True)) / (temperature or 1)  # a tiny temperature would overflow
    ids = _draw(_keep(scaled.softmax(-1), top_k, top_p), uniform) if temperature else scaled.argmax(-1)
    return ids, scaled.gather(-1, ids[:, None])[:, 0] - scaled.logsumexp(-1)


def _keep(p: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set to 0 what is cut off."""
    vocab = p.shape[-1]
    few, mass = top_k or vocab, top_p or 1.0
    if few >= vocab and mass >= 1:
        return p
    ordered, at = p.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(vocab, device=p.device) >= few, 0)
    if mass < 1:
        up = ordered.cumsum(-1)
        # A token stays while those before it fall short of top_p: the one that reaches it is the last.
        before = torch.nn.functional.pad(up[:, :-1], (1, 0))
        ordered = ordered.masked_fill(before >= mass * up[:, -1:], 0)
    return torch.zeros_like(p).scatter(-1, at, ordered)


def _draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Return the first token whose cumulative probability exceeds its row's number, if there is any chance of it."""
    # A sum made in parallel may go back by a rounding: what has no probability must not be found there, nor the end missed.
    up = p.cumsum(-1).masked_fill(p == 0, 0)
    found = up > uniform.to(p.dtype)[:, None] * up.amax(-1, keepdim=True)
    return found.to(torch.uint8).argmax(-1)


def check_sampling(who: str, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse options of sampling that are out of range."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        optional = name == "top_p" and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{who}: {name} is a {type(value).__name__}; pass a number")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{who}: temperature is {temperature}; pass a positive number, or 0 for the likeliest token")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise TypeError(f"{who}: top_k is {top_k!r}; pass a whole number, or None for all tokens")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{who}: top_k is {top_k}; pass 1 or more, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{who}: top_p is {top_p}; pass a number above 0 and up to 1, or None for all tokens")
