"""Decoding with a cache: keys and values of all tokens so far, so that a new token costs one token's work.

    prefill   a packed row of prompts, ragged     attention within the row; rotated keys and values go to the cache
    step      one token a document                its key and value go to its place, and its query sees the row up to it

    cache of a layer   [documents, capacity, kv_heads, head_dim]     k k k . . . . .     a document of 3 tokens
    keys, and values                                                 k k k k k . . .     one of 5: the next goes to place 5

The layer is the one that trains, `fstep_models.dense_block.block`; only what its queries see is different.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fstep
from fstep import Mesh, Packed
from fstep_models.config import ConfigError
from fstep_models.dense_block import block
from fstep_models.dense_parts import check_row

if TYPE_CHECKING:
    from fstep_models.dense import Dense

Params = dict[Any, Any]

# Places that a cache grows by: copying it each time is a hundredth of reading it for each token.
BLOCK = 128


@fstep.pytree
class Cache:
    """What `Dense.decode` remembers: keys and values by layer, [documents, capacity, kv_heads, head_dim] each.

    ``lengths`` are the documents' so far; ``longest`` is the largest, or more, which the host knows without asking the
    device.
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    lengths: Tensor
    longest: int = fstep.static()


@torch.no_grad()
def decode(model: Any, params: Params, cache: Cache | None, mb: Packed) -> tuple[Tensor, Cache]:
    """Compute the logits after each document's last token, [documents, vocab], and remember keys and values."""
    _check(model, params, cache, mb)
    x = fstep.embed(mb.tokens, params["embed"])
    x = x if model.dtype is None else x.to(model.dtype)
    cos, sin = fstep.rope_tables(model.config.rope, mb.positions, lengths=mb.positions, dtype=x.dtype)
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    if cache is None:
        lengths, longest, attend = mb.cu_seqlens.diff(), mb.max_seqlen, _prefill(model, mb, layers)
    else:
        lengths, longest = cache.lengths + 1, cache.longest + 1
        attend = _step(mb.positions, longest, cache.layers, layers)
    for i in sorted(params["layers"]):
        window = model.config.windows[i]
        see = partial(attend, i, window)
        x = block(params["layers"][i], x, cos, sin, mb.cu_seqlens_padded, mb.max_seqlen, window, model, Mesh(), attend=see)
    last = mb.cu_seqlens_padded[:-1] + mb.cu_seqlens.diff() - 1
    return model.logits(params, x[last.long()]), Cache(layers, lengths, longest)


def _prefill(model: Dense, mb: Packed, layers: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Attend within the row, and put keys and values into ``layers``."""
    cu, starts = mb.cu_seqlens_padded, mb.cu_seqlens_padded.long()
    documents, tokens = len(cu) - 1, len(mb.tokens)
    document = torch.repeat_interleave(starts.diff(), output_size=tokens)
    place = torch.arange(tokens, device=cu.device) - starts[document]
    shape = documents, (mb.max_seqlen // BLOCK + 1) * BLOCK

    def keep(x: Tensor) -> Tensor:
        # Zeros: what is not seen has weight 0, and 0 times what happens to be in memory may be NaN.
        return x.new_zeros(*shape, *x.shape[1:]).index_put_((document, place), x)

    def attend(i: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers[i] = keep(k), keep(v)
        return fstep.packed_attention(q, k, v, cu, max_seqlen=mb.max_seqlen, window=window, method=model.attention)

    return attend


def _step(
    positions: Tensor, longest: int, old: dict[int, tuple[Tensor, Tensor]], new: dict[int, tuple[Tensor, Tensor]]
) -> Callable[..., Tensor]:
    """Put one key and one value a document to its place, and attend to the document up to there."""
    row, place = torch.arange(len(positions), device=positions.device), torch.arange(longest, device=positions.device)
    back = positions[:, None] - place

    def attend(i: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = old.pop(i)  # donated: a layer that grows stands beside itself alone, not beside a whole second cache
        if longest > kept[0].shape[1]:
            kept = F.pad(kept[0], (0, 0, 0, 0, 0, BLOCK)), F.pad(kept[1], (0, 0, 0, 0, 0, BLOCK))
        new[i] = kept
        keys, values = (
            x.index_put_((row, positions), y)[:, :longest].transpose(1, 2) for x, y in zip(kept, (k, v), strict=True)
        )
        seen = (back >= 0) & (back < window) if window else back >= 0
        # The queries that share a key head stand where several tokens' would: no key is repeated.
        shared = q.view(len(q), k.shape[1], -1, q.shape[2])
        return F.scaled_dot_product_attention(shared, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)

    return attend


def _check(model: Dense, params: Params, cache: Cache | None, mb: Packed) -> None:
    """Refuse what has no answer; of the params once, in the call that has no cache."""
    check_row("decode", mb, Mesh())
    if cache is not None:
        rows = next((len(k) for k, _ in cache.layers.values()), -1)
        if rows < 0:
            raise ValueError("Dense.decode: the cache was used up by an earlier call; pass the one that this call returned")
        if not len(mb.tokens) == len(mb.cu_seqlens) - 1 == rows:
            raise ValueError(
                f"Dense.decode: {len(mb.tokens)} tokens in {len(mb.cu_seqlens) - 1} documents, and the cache has {rows}; "
                "pass one token a document, or all of them without a cache"
            )
        # To look on a GPU would be to wait for it.
        if mb.positions.device.type == "cpu" and mb.positions.ne(cache.lengths).any():
            raise ValueError(
                f"Dense.decode: the next tokens stand at positions {mb.positions[:6].tolist()}, and their documents have "
                f"{cache.lengths[:6].tolist()} tokens so far; a token's position is the number of those before it"
            )
        return
    if model.config.rope.kind == "dynamic":
        raise ConfigError(
            "Dense.decode: rope kind 'dynamic' turns all keys of a document anew with each token that makes it longer, "
            "which a cache of keys cannot; generate with an engine, or train with another kind"
        )
    where = "" if isinstance(params, dict) else "Stages"
    for place in fstep.places(params):
        if place.axes or place.flat is not None or place.copies is not None:
            where = where or repr(place.path)
    missing = sorted(set(fstep.tree_paths(model.spec())) - set(fstep.tree_paths(params)))
    if where or missing:
        raise ValueError(
            f"Dense.decode: params are a part of the model ({where or f'they have no {missing[0]!r}'}); generation needs "
            "all of them on this rank: model.whole(params, mesh=mesh)"
        )
