"""Where a parameter lives: nodes that add nothing to a path, and what `places` reads off them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.utils._pytree as torch_pytree

import fstep
from fstep import Copied, Mesh, Shard, Stages, bare, places


def params(mesh: Mesh) -> dict:
    embed = Shard.cut(torch.arange(10.0).reshape(5, 2), axis=mesh.tp, dim=0)
    return {
        "embed": Copied(embed, mesh.pp, ranks=(0, 1)) if mesh.pp.size > 1 else embed,
        "parts": Stages({3: {"layers": {3: {"o": Shard.cut(torch.ones(2, 4), axis=mesh.tp, dim=-1)}}},
                         0: {"layers": {0: {"norm": torch.ones(2)}}}}),
    }  # fmt: skip


def test_nodes_leave_no_trace_in_paths() -> None:
    tree = fstep.simulate(params, pp=2, tp=2)[2]
    assert fstep.tree_paths(tree) == ["embed", "parts.layers.0.norm", "parts.layers.3.o"]
    assert [p.path for p in places(tree)] == fstep.tree_paths(tree)


def test_places_say_which_elements_a_rank_holds() -> None:
    whole = torch.arange(10.0).reshape(5, 2)
    seen = torch.zeros(5, 2)
    for mesh_rank, tree in enumerate(fstep.simulate(params, pp=2, tp=2)):
        embed, norm, o = places(tree)
        ((a, b), (c, d)) = embed.box
        assert torch.equal(bare(tree)["embed"], whole[a:b, c:d])
        assert embed.shape == (5, 2) and [x.name for x in embed.axes] == ["tp"]
        assert (norm.shape, norm.box, norm.axes, norm.counts) == ((2,), ((0, 2),), (), True)
        assert o.shape == (2, 4) and o.box[1] in ((0, 2), (2, 4))
        assert embed.counts == (mesh_rank < 2)  # ranks 0 and 1 are the first stage
        seen[a:b, c:d] += embed.counts
    assert torch.equal(seen, torch.ones(5, 2))


def test_places_of_a_tree_without_values() -> None:
    tree = fstep.simulate(params, tp=2)[1]
    grads = fstep.tree_map(lambda x: x * 2, tree)
    assert places(grads) == places(tree)
    frozen = fstep.tree_map_with_path(lambda path, x: None if path == "embed" else x, tree)
    assert [p.path for p in places(frozen)] == fstep.tree_paths(frozen) == ["parts.layers.0.norm", "parts.layers.3.o"]


def test_stages_keep_their_order_and_number() -> None:
    tree = params(Mesh())["parts"]
    assert list(fstep.tree_map(lambda x: x, tree).parts) == [0, 3]
    with pytest.raises(ValueError, match=r"Stages: stage 1 has 'embed'.*Tied\('embed'\)"):
        Stages({0: {"embed": torch.ones(1)}, 1: {"embed": torch.ones(1)}})


def test_a_cut_of_one_rank_is_the_whole() -> None:
    whole = torch.ones(3, 2)
    assert Shard.cut(whole, axis=Mesh().tp, dim=0) is whole
    with pytest.raises(ValueError, match=r"Shard.cut: there is no dim 2 in shape \(3, 2\)"):
        Shard.cut(whole, axis=Mesh().tp, dim=2)


def test_torch_knows_the_nodes() -> None:
    tree = fstep.simulate(params, tp=2)[0]
    leaves, spec = torch_pytree.tree_flatten(tree)
    assert len(leaves) == 3
    assert places(torch_pytree.tree_unflatten(leaves, spec)) == places(tree)


@pytest.mark.parametrize("length", [0, 1, 3, 8, 9])
def test_even_spans_cover_everything_once(length: int) -> None:
    spans = fstep.simulate(lambda mesh: fstep.mesh.place.even_span(length, mesh.tp), tp=4)
    assert [i for a, b in spans for i in range(a, b)] == list(range(length))
    sizes = [b - a for a, b in spans]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: Shard(torch.ones(2, 3), m.tp, 0, (0, 3), 4),
            r"Shard: the value has 2 elements along dim 0, and span \(0, 3\)",
        ),
        (lambda m: Shard(torch.ones(2), m.tp, 1, (0, 2), 4), r"Shard: .* along dim 1, of a value of shape"),
        (lambda m: Shard(torch.ones(2), m.tp, 0, (3, 5), 4), r"Shard: elements \(3, 5\) of 4"),
        (lambda m: Copied(torch.ones(2), m.tp, (1,)), r"Copied: ranks are \(1,\), on rank 0 of axis 'tp' of size 2"),
        (lambda m: Copied(torch.ones(2), m.tp, (0, 0)), "Copied: ranks are"),
        (lambda m: Stages([1, 2]), "Stages: parts is list; pass a dict"),
        (lambda m: Stages({}), "Stages: parts is dict; pass a dict"),
    ],
)
def test_nodes_that_cannot_be(make: Callable[[Mesh], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fstep.simulate(make, tp=2)
