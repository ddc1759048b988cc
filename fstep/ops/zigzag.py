"""Which places of a row a rank holds: of every document a chunk from the front and one from the back.

    2 ranks, one document of 8 places      chunk   0    1    2    3
                                           rank    0    1    1    0

A causal query sees what is before it, so that the last chunk of four costs seven times the first. Chunk r together with
chunk 2C-1-r costs the same for every r: no rank waits for another. A rank lays its two chunks of a document end to end,
and its documents likewise.

Everything here is computed on the device, from boundaries that are the same on all ranks: those of a rank's own row, which
are those of the whole row divided by the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """Repeat each value as often as its count says; ``total`` is their sum, which the host would have to wait for."""
    return torch.repeat_interleave(values, counts, output_size=total)


def places(cu: Tensor, tokens: int, rank: int, size: int) -> Tensor:
    """Return the place in the whole row of each of a rank's ``tokens`` places; ``cu`` are the rank's boundaries."""
    lengths = cu.diff()
    start, chunk = spread(cu[:-1], lengths, tokens), spread(lengths // 2, lengths, tokens)
    within = torch.arange(tokens, device=cu.device) - start
    # The second chunk lies behind the first here, and behind 2C-1-r others in the document.
    skipped = torch.where(within < chunk, rank, 2 * size - 2 - rank)
    return size * start + within + skipped * chunk


def order(cu: Tensor, tokens: int, size: int) -> Tensor:
    """Return for each place of the whole row where it is among the ranks' rows, laid end to end: ``whole = rows[order]``."""
    at = torch.cat([places(cu, tokens, rank, size) for rank in range(size)])
    return torch.empty_like(at).index_copy_(0, at, torch.arange(len(at), device=at.device))


def halves(cu: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the places, in a rank's own row, of the first chunks of all documents, and of the second ones."""
    chunks = cu.diff() // 2
    first = torch.arange(tokens // 2, device=cu.device) + spread(cu[:-1] // 2, chunks, tokens // 2)
    return first, first + spread(chunks, chunks, tokens // 2)


def prefixes(cu: Tensor, tokens: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Return for each chunk of a rank, in its own order, the places in the whole row from its document's start to its end.

    They are laid end to end; the second result says where each chunk's begin.
    """
    chunks = cu.diff() // 2
    lengths = torch.stack([(rank + 1) * chunks, (2 * size - rank) * chunks], dim=1).flatten()
    ends = lengths.cumsum(0)
    total = (2 * size + 1) * (tokens // 2)  # r+1 chunks and 2C-r chunks: the same on every rank
    shift = size * cu[:-1].repeat_interleave(2) - (ends - lengths)
    return torch.arange(total, device=cu.device) + spread(shift, lengths, total), torch.nn.functional.pad(ends, (1, 0))
