"""Hugging Face folders and params on a mesh: slices read alone, files that do not depend on the mesh."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fstep
from fstep import Copied, HFTensor, Mesh, MeshError, Shard, Stages, Tied, WeightsError, load_hf, save_hf, stream_hf
from fstep.state import files, weights
from fstep.tree import tree_leaves, tree_map, tree_map_with_path, tree_paths
from tests.state.trees import LAYOUTS, Layout, assert_same_bits, on_rank, params

BY_NAME = {layout.name: layout for layout in LAYOUTS}
WITHOUT_ZERO = [layout for layout in LAYOUTS if layout.zero is None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BAND_BYTES", 48)
    monkeypatch.setattr(files, "_STRIP_BYTES", 4)


def spec_of(tree: Any) -> Any:
    """Name every leaf of whole params; not in the order of the leaves, and not as they are named."""
    return tree_map_with_path(lambda path, x: HFTensor(f"model.{path[::-1]}", tuple(x.shape)), tree)


def part_of_spec(tree: Any, layout: Layout, mesh: Mesh) -> Any:
    """Put the whole's names where a rank's params have tensors."""
    names = dict(zip(tree_paths(tree), tree_leaves(spec_of(tree)), strict=True))
    return tree_map_with_path(lambda path, _: names[path], on_rank(tree, mesh, stages=layout.stages))


def of(tree: Any, layout: Layout, mesh: Mesh) -> Any:
    return on_rank(tree, mesh, stages=layout.stages, zero=layout.zero)


def everything(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_files_are_the_same_from_every_mesh(tied: bool, tmp_path: Path) -> None:
    whole = params(tied=tied)
    options: dict[str, Any] = {"config": {"model_type": "mine"}, "dtype": torch.bfloat16, "max_shard_bytes": 200}
    save_hf(tmp_path / "one", whole, spec_of(whole), **options)
    want = everything(tmp_path / "one")
    assert len(want) > 4
    for layout in LAYOUTS:

        def rank(mesh: Mesh, layout: Layout = layout) -> Path:
            path = tmp_path / layout.name
            return save_hf(path, of(whole, layout, mesh), spec_of(whole), mesh=mesh, **options)

        assert set(fstep.simulate(rank, **layout.sizes)) == {tmp_path / layout.name}
        assert everything(tmp_path / layout.name) == want, layout.name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_stream_gives_every_rank_every_tensor_whole(layout: Layout) -> None:
    whole = params(tied=True)
    want = [(leaf.name, x) for leaf, x in zip(tree_leaves(spec_of(whole)), tree_leaves(whole), strict=True)]

    def rank(mesh: Mesh) -> None:
        mine = tree_map(lambda x: x.requires_grad_(), of(whole, layout, mesh))
        got = list(stream_hf(mine, spec_of(whole), mesh=mesh))
        assert [name for name, _ in got] == [name for name, _ in want]
        for (name, x), (_, y) in zip(got, want, strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype and not x.requires_grad, name

    fstep.simulate(rank, **layout.sizes)


def test_what_all_ranks_have_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = params()

    def rank(mesh: Mesh) -> list[bool]:
        got = dict(stream_hf(whole, spec_of(whole), mesh=mesh))
        return [x.data_ptr() == y.data_ptr() for x, y in zip(got.values(), tree_leaves(whole), strict=True)]

    assert all(all(same) for same in fstep.simulate(rank, dp=2, cp=2))


def test_empty_tensors_and_parts(tmp_path: Path) -> None:
    whole = {"a": torch.ones(1, 3), "b": torch.empty(0, 3), "n": torch.tensor(3)}
    save_hf(tmp_path / "one", whole, spec_of(whole))

    def rank(mesh: Mesh) -> None:
        mine = {k: Shard.cut(x, axis=mesh.tp, dim=0) if x.dim() else x for k, x in whole.items()}
        assert mine["a"].value.shape[0] == (mesh.tp.rank == 0)
        save_hf(tmp_path / "two", mine, spec_of(whole), mesh=mesh)
        spec = {
            k: replace(x, value=spec_of(whole)[k]) if isinstance(x, Shard) else spec_of(whole)[k] for k, x in mine.items()
        }
        assert_same_bits(load_hf(tmp_path / "one", spec), mine)
        fstep.save_checkpoint(tmp_path / "run", mine, mesh=mesh, step=0)
        assert_same_bits(fstep.load_checkpoint(tmp_path / "run", mine, mesh=mesh), mine)

    fstep.simulate(rank, tp=3)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert_same_bits(fstep.load_checkpoint(tmp_path / "run", whole), whole)


def test_params_of_all_ranks_that_do_not_fit_the_spec(tmp_path: Path) -> None:
    whole = params()
    spec = spec_of(whole)
    layout = BY_NAME["pp2"]
    no_norm = lambda mesh: {k: v for k, v in of(whole, layout, mesh).items() if k != "norm"}  # noqa: E731
    extra = lambda mesh: of(whole, layout, mesh) | ({"more": torch.ones(1)} if mesh.rank else {})  # noqa: E731
    reshaped = lambda mesh: of(whole, layout, mesh) | ({"norm": torch.ones(5)} if mesh.rank else {})  # noqa: E731
    own_spec = lambda mesh: part_of_spec(whole, layout, mesh)  # noqa: E731
    for make, make_spec, message in [
        (no_norm, lambda mesh: spec, r"params have no leaf 'norm', which spec has; make spec with"),
        (extra, lambda mesh: spec, r"spec has no leaf 'more', which params have; make spec"),
        (
            reshaped,
            lambda mesh: spec,
            r"leaf 'norm' has the shape \(5,\), spec says \(4,\) for 'model.mron'.* \(on rank 1\)",
        ),
        (lambda mesh: of(whole, layout, mesh), own_spec, r"rank 1 has another spec than rank 0; pass the spec of the whole"),
    ]:
        for f in (stream_hf, lambda p, s, mesh: save_hf(tmp_path / "out", p, s, mesh=mesh)):

            def rank(mesh: Mesh, f: Any = f, make: Any = make, make_spec: Any = make_spec) -> str:
                with pytest.raises(WeightsError) as caught:
                    f(make(mesh), make_spec(mesh), mesh=mesh)
                return str(caught.value)

            first, second = fstep.simulate(rank, pp=2)
            assert first == second and re.search(message, first), first
    with pytest.raises(
        WeightsError, match=r"params have no leaf 'head', 'layers.0.b'.*; pass mesh= if other ranks have the rest"
    ):
        stream_hf({"embed": whole["embed"]}, spec)
    assert os.listdir(tmp_path) == []


def test_a_writer_that_fails_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = params()
    save_hf(tmp_path / "m", whole, spec_of(whole))
    before = everything(tmp_path / "m")

    def full(*args: Any) -> None:
        next(iter(args[2]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_safetensors", full)

    def rank(mesh: Mesh) -> str:
        with pytest.raises(WeightsError) as caught:
            save_hf(tmp_path / "m", of(whole, BY_NAME["pp2 tp2"], mesh), spec_of(whole), mesh=mesh)
        return str(caught.value)

    assert set(fstep.simulate(rank, pp=2, tp=2)) == {"save_hf: OSError: [Errno 28] No space left on device (on rank 0)"}
    assert everything(tmp_path / "m") == before and os.listdir(tmp_path) == ["m"]


def test_leaving_a_stream_early_is_told(tmp_path: Path) -> None:
    whole = params()

    def rank(mesh: Mesh) -> None:
        stream = stream_hf(of(whole, BY_NAME["tp2"], mesh), spec_of(whole), mesh=mesh)
        list(stream) if mesh.rank else next(stream)

    with pytest.raises(MeshError, match=r"rank 1 \(tp 1\) is in stream_hf over .*, waiting for rank 0"):
        fstep.simulate(rank, tp=2)


# Reading --------------------------------------------------------------------------------------------------------------


def foreign(folder: Path) -> Path:
    """Write the same model as others do: without checksums."""
    tensors = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    other = folder.with_name("foreign")
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    return other


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "of others"])
def test_every_rank_of_any_mesh_reads_its_part(ours: bool, tmp_path: Path) -> None:
    whole = params(tied=True)
    spec = spec_of(whole)
    folder = save_hf(tmp_path / "m", whole, spec, max_shard_bytes=400)
    folder = folder if ours else foreign(folder)
    for layout in WITHOUT_ZERO:

        def rank(mesh: Mesh, layout: Layout = layout) -> None:
            want = on_rank(whole, mesh, stages=layout.stages)
            got = load_hf(folder, part_of_spec(whole, layout, mesh), whole=spec, tied={"lm_head": "embed"})
            assert_same_bits(got, want)
            assert fstep.places(got) == fstep.places(want)

        fstep.simulate(rank, **layout.sizes)


def test_a_slice_is_read_alone_and_its_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(8 * 12, dtype=torch.int32).reshape(8, 12)
    name = HFTensor("x", (8, 12))
    path = save_hf(tmp_path / "m", {"x": x}, {"x": name}) / "model.safetensors"
    count = 0
    read = os.preadv

    def spy(file: int, buffers: Any, offset: int) -> int:
        nonlocal count
        got = read(file, buffers, offset)
        count += got if offset >= path.stat().st_size - x.nbytes else 0
        return got

    monkeypatch.setattr(os, "preadv", spy)
    for dim in (0, 1):
        spec = {"x": fstep.simulate(lambda mesh, dim=dim: replace(Shard.cut(x, axis=mesh.tp, dim=dim), value=name), tp=2)[1]}
        count = 0
        assert torch.equal(load_hf(path.parent, spec)["x"].value, x.chunk(2, dim)[1])
        assert count == x.nbytes // 2
        good = path.read_bytes()
        data = len(good) - x.nbytes
        for at in range(data, len(good)):
            row, column = divmod((at - data) // 4, 12)
            bad = bytearray(good)
            bad[at] ^= 64
            path.write_bytes(bad)
            if row >= 4 if dim == 0 else column >= 6:
                with pytest.raises(WeightsError, match=r"damaged .* the checksum of tensor 'x' does not match"):
                    load_hf(path.parent, spec)
            else:
                load_hf(path.parent, spec)
        path.write_bytes(good)


def test_whole_says_what_may_be_on_disk_and_what_must(tmp_path: Path) -> None:
    whole = {"a": torch.ones(2), "b": torch.zeros(2)}
    spec = spec_of(whole)
    folder = save_hf(tmp_path / "m", whole, spec)
    assert load_hf(folder, {"a": spec["a"]}, whole=spec)["a"].tolist() == [1, 1]
    with pytest.raises(WeightsError, match=r"has 1 tensors that spec lacks: 'model.b'; .*whole= \(or strict=False\)"):
        load_hf(folder, {"a": spec["a"]})
    more = spec | {"c": HFTensor("model.c", (1,))}
    with pytest.raises(WeightsError, match=r"lacks 1 of 3 tensors: 'model.c'"):
        load_hf(folder, {"a": spec["a"]}, whole=more)
    with pytest.raises(WeightsError, match=r"spec has 'a', and whole has not; make both with the same config"):
        load_hf(folder, {"a": spec["a"]}, whole={"b": spec["b"]})


def test_a_tie_is_compared_where_it_is_read(tmp_path: Path) -> None:
    embed = torch.arange(8.0).reshape(4, 2)
    other = embed.clone()
    other[3, 1] = -1
    save_file({"e": embed, "lm_head": other}, tmp_path / "model.safetensors")
    name = HFTensor("e", (4, 2))
    whole = {"embed": name, "head": Tied("embed")}

    def rank(mesh: Mesh) -> Any:
        spec = {"embed": replace(Shard.cut(embed, axis=mesh.tp, dim=0), value=name), "head": Tied("embed")}
        return load_hf(tmp_path, spec, whole=whole, tied={"lm_head": "embed"})["embed"].value.tolist()

    with pytest.raises(WeightsError, match=r"spec ties 'lm_head' to 'e', .* with different values") as caught:
        fstep.simulate(rank, tp=2)
    assert caught.value.__notes__ == ["raised by rank 1 (tp 1) of simulate"]  # rank 0's half is the same
    # A stage that has neither looks at neither.
    save_file({"e": embed, "lm_head": other, "n": torch.ones(1)}, tmp_path / "model.safetensors")
    norm = {"norm": HFTensor("n", (1,))}
    assert load_hf(tmp_path, norm, whole=whole | norm, tied={"lm_head": "embed"})["norm"].tolist() == [1]


BAD_NODES: list[Callable[[Mesh], Any]] = [
    lambda mesh: Shard(HFTensor("x", (4, 2)), mesh.tp, 0, (0, 2), 3),
    lambda mesh: Shard(HFTensor("x", (2, 2)), mesh.tp, 0, (0, 2), 4),  # the part's shape, not the whole's
    lambda mesh: Shard(HFTensor("x", (4, 2)), mesh.tp, 1, (0, 3), 3),
]


@pytest.mark.parametrize("make", BAD_NODES)
def test_a_spec_whose_nodes_do_not_fit(make: Callable[[Mesh], Any], tmp_path: Path) -> None:
    save_file({"x": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"spec has 'x' .* inside nodes that take .*; give HFTensor the shape of the whole"
    ):
        load_hf(tmp_path, {"x": make(Mesh())})


def test_nodes_stay_around_what_was_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4, 2)}, tmp_path / "model.safetensors")

    def rank(mesh: Mesh) -> None:
        name = HFTensor("x", (4, 2))
        cut = Shard(name, mesh.tp, 1, (mesh.tp.rank, mesh.tp.rank + 1), 2)
        got = load_hf(tmp_path, Stages({2: {"x": Copied(cut, mesh.pp, (0, 1))}}), dtype=torch.float64)
        assert isinstance(got, Stages) and isinstance(got.parts[2]["x"], Copied)
        inner = got.parts[2]["x"].value
        assert isinstance(inner, Shard) and inner.dim == 1 and inner.value.dtype == torch.float64
        assert inner.value.shape == (4, 1) and inner.value.is_contiguous()

    fstep.simulate(rank, pp=2, tp=2)
