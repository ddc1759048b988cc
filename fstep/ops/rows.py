"""Where the documents of queries and keys are in their rows, and what each query sees.

Queries and keys are rows of the same documents, of different lengths perhaps: `cu_q` says where a document's queries are,
`cu_k` where its keys. The last query stands at the last key, and a reach ``(left, right)`` says how far a query sees from
where it stands; -1 is without end.

    3 queries, 5 keys      (-1, -1)      (-1, 0)       (1, 0)        every key, causal, a window of 2
                           x x x x x     x x x . .     . x x . .
                           x x x x x     x x x x .     . . x x .
                           x x x x x     x x x x x     . . . x x
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the documents' queries and keys are, the most that one document has of each, and the reach."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    left: int = -1
    right: int = -1


def boundaries(cu: Tensor, tokens: int, function: str = "packed_attention") -> list[tuple[int, int]]:
    """Read boundaries on the host, and check that they cover the row."""
    at = cu.tolist()
    if at[:1] != [0] or at[-1] != tokens or at != sorted(at):
        raise ValueError(
            f"{function}: cu_seqlens are {at if len(at) < 6 else [*at[:2], '...', *at[-2:]]} for {tokens} tokens; "
            "they rise from 0 to the number of tokens: pass packed.cu_seqlens_padded"
        )
    return list(itertools.pairwise(at))


def pairs(q: Tensor, k: Tensor, rows: Rows) -> list[tuple[slice, slice]]:
    """Return the rows of queries and of keys of each document that has queries."""
    of_q, of_k = boundaries(rows.cu_q, len(q)), boundaries(rows.cu_k, len(k))
    return [(slice(*a), slice(*b)) for a, b in zip(of_q, of_k, strict=True) if a[1] > a[0]]


def even(q: Tensor, k: Tensor, rows: Rows) -> bool:
    """Say whether every document has max_q queries and max_k keys, without looking at the device.

    D documents of at most n places fill a row of D * n places only if each has n.
    """
    documents = len(rows.cu_q) - 1
    return len(q) > 0 and len(q) == documents * rows.max_q and len(k) == documents * rows.max_k


def whole_reach(rows: Rows) -> bool:
    """Say whether every query sees all keys, or all up to its own where there are as many: no window cuts anything off."""
    right = rows.right < 0 or (rows.right == 0 and rows.max_q == rows.max_k)
    return right and (rows.left < 0 or rows.left >= rows.max_k - 1)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Give every query head its own copy of the key head that it shares."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def lay_rows(x: Tensor) -> Tensor:
    """Lay the elements of each head side by side: the CUDA kernels insist on it, the CPU's takes it for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def reach_mask(n: int, m: int, rows: Rows, device: torch.device) -> Tensor | None:
    """Return which of m keys each of n queries sees, [n, m]; None if all."""
    left, right = rows.left, rows.right
    if (left < 0 or left >= m - 1) and (right < 0 or right >= n - 1):
        return None
    back = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    seen = torch.ones(n, m, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= back <= left
    if right >= 0:
        seen &= back >= -right
    return seen
