"""Context parallelism: one row of packed documents spread over the ranks of an axis.

On an axis of size 1 the row stays whole. Steps are written with `cp_shard` in place, so that a larger mesh changes the
mesh and nothing else.
"""

from __future__ import annotations

from fstep.batch.packed import Packed
from fstep.mesh.axis import Axis, require_single


def cp_shard(packed: Packed, *, axis: Axis) -> Packed:
    """Return this rank's part of a packed row. Input: replicated over ``axis``; output: a shard of it.

    >>> import fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[1, 2, 3]]))
    >>> fstep.cp_shard(packed, axis=fstep.Mesh().cp) is packed
    True
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"cp_shard: got a {type(packed).__name__}; pass what pack_thd returns")
    require_single("cp_shard", axis)
    return packed
