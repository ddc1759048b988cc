"""cp_shard: on one rank the row is the shard."""

from __future__ import annotations

import pytest

from fstep.batch.make import make_docs
from fstep.batch.pack import pack_thd
from fstep.mesh.axis import Axis, Mesh
from fstep.ops.context import cp_shard


def test_one_rank_holds_the_row() -> None:
    packed = pack_thd(make_docs([[1, 2, 3], [4]]), multiple_of=2 * Mesh().cp.size)
    assert cp_shard(packed, axis=Mesh().cp) is packed


def test_more_ranks_are_refused_by_name() -> None:
    packed = pack_thd(make_docs([[1, 2, 3]]))
    with pytest.raises(NotImplementedError, match="cp_shard: axis 'cp' has size 2, and this release runs in one process"):
        cp_shard(packed, axis=Axis("cp", size=2))


def test_documents_that_are_not_packed_are_refused() -> None:
    with pytest.raises(TypeError, match="cp_shard: got a Docs; pass what pack_thd returns"):
        cp_shard(make_docs([[1, 2]]), axis=Mesh().cp)
