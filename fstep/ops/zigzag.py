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
    return inverse(torch.cat([places(cu, tokens, rank, size) for rank in range(size)]))


def inverse(at: Tensor) -> Tensor:
    """Return the permutation that leads back."""
    return torch.empty_like(at).index_copy_(0, at, torch.arange(len(at), device=at.device))


def ranges(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Return the places from each start on, as many as its length says, laid end to end; ``total`` in all."""
    begins = lengths.cumsum(0) - lengths
    return torch.arange(total, device=starts.device) + spread(starts - begins, lengths, total)


def halves(cu: Tensor, tokens: int) -> tuple[Tensor | slice, Tensor | slice]:
    """Return the places, in a rank's own row, of the first chunks of all documents, and of the second ones.

    Slices if there is one document, so that nothing is copied.
    """
    half = tokens // 2
    if len(cu) == 2:
        return slice(half), slice(half, tokens)
    chunks = cu.diff() // 2
    return ranges(cu[:-1], chunks, half), ranges(cu[:-1] + chunks, chunks, half)


def prefixes(cu: Tensor, tokens: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Return for each chunk of a rank, in its own order, where its document is from the start to the chunk's end.

    That is among the ranks' rows, laid end to end. Prefixes are laid end to end too; the second result says where each
    begins.
    """
    chunks = cu.diff() // 2
    lengths = torch.stack([(rank + 1) * chunks, (2 * size - rank) * chunks], dim=1).flatten()
    ends = lengths.cumsum(0)
    total = (2 * size + 1) * (tokens // 2)  # r+1 chunks and 2C-r chunks: the same on every rank
    at = torch.arange(total, device=cu.device)
    known = torch.stack([cu[:-1].repeat_interleave(2), chunks.repeat_interleave(2), ends - lengths])
    start, chunk, begin = known[:, torch.searchsorted(ends, at, right=True)]
    number = (at - begin) // chunk
    later = (number >= size).to(number.dtype)  # 1 where a rank has it as its second chunk
    owner = number + later * (2 * size - 1 - 2 * number)
    where = owner * tokens + start + (at - begin) + (later - number) * chunk
    return where, torch.nn.functional.pad(ends, (1, 0))
