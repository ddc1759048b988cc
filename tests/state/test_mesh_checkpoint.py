"""Checkpoints of states that are spread over a mesh: from any to any, each rank reading its own, written once."""

from __future__ import annotations

import collections
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fstep
from fstep import Copied, Key, Mesh, MeshError, Shard
from fstep.state import checkpoint, files, manifest
from fstep.state.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fstep.tree import tree_leaves, tree_map, tree_paths
from tests.state.trees import LAYOUTS, Layout, Run, assert_same_bits, on_rank, run, zero_by_hand

TARGETS = ["one", "tp3", "pp4", "pp2 tp2", "interleaved", "zero 4 with an empty rank", "real zero 3", "pp2 dp2 tp2 zero"]
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even these tensors have several blocks, and several files."""
    monkeypatch.setattr(files, "_BAND_BYTES", 48)
    monkeypatch.setattr(files, "_STRIP_BYTES", 4)
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 700)


def save(layout: Layout, whole: Run, folder: Path, **options: Any) -> list[Path]:
    return fstep.simulate(
        lambda mesh: save_checkpoint(folder, layout.of(whole, mesh), mesh=mesh, step=1, **options), **layout.sizes
    )


def meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to("meta"), tree)


def load(layout: Layout, whole: Run, folder: Path) -> None:
    """Load on a mesh, and compare with what its ranks would hold of ``whole``."""

    def rank(mesh: Mesh) -> None:
        want = layout.of(whole, mesh)
        got = load_checkpoint(folder, meta(want), mesh=mesh)
        assert_same_bits(got, want)
        # The nodes are those of like.
        assert fstep.places(got) == fstep.places(want)

    fstep.simulate(rank, **layout.sizes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout, bool], Path]:
    folder = tmp_path_factory.mktemp("saved")

    def get(layout: Layout, tied: bool) -> Path:
        here = folder / f"{layout.name} {tied}"
        if not here.exists():
            save(layout, run(3, tied=tied), here)
        return here

    return get


@pytest.mark.parametrize("source", LAYOUTS, ids=lambda layout: layout.name)
def test_from_any_mesh_to_any(source: Layout, saved: Callable[[Layout, bool], Path]) -> None:
    for target in TARGETS:
        load(BY_NAME[target], run(3, tied=True), saved(source, True))


@pytest.mark.parametrize("source", ["one", "interleaved", "pp2 dp2 tp2 zero"])
def test_a_head_of_its_own(source: str, saved: Callable[[Layout, bool], Path]) -> None:
    for target in ("pp2 tp2", "one", "zero 2"):
        load(BY_NAME[target], run(3), saved(BY_NAME[source], False))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_element_is_written_once_and_the_ranks_share_the_work(
    layout: Layout, saved: Callable[[Layout, bool], Path]
) -> None:
    whole = run(3, tied=True)
    want = {path: x.numel() for path, x in zip(tree_paths(whole), tree_leaves(whole), strict=True)}
    found: collections.Counter[str] = collections.Counter()
    wrote: collections.Counter[str] = collections.Counter()
    for file in saved(layout, True).glob("*/*.safetensors"):
        with safe_open(file, "pt") as tensors:  # as anybody reads them
            for name in tensors.keys():  # noqa: SIM118
                found[name] += tensors.get_tensor(name).numel()
                wrote[file.name[7:17] if layout.sizes else ""] += tensors.get_tensor(name).nbytes
    assert found == want
    assert len(wrote) == torch.Size(layout.sizes.values()).numel(), "a rank wrote nothing"
    if layout.name in ("one", "tp2", "dp2", "pp4"):
        assert max(wrote.values()) < 1.3 * min(wrote.values()), wrote


def test_saving_and_loading_give_the_same_result_on_every_rank(tmp_path: Path) -> None:
    layout = BY_NAME["pp2 tp2"]
    assert save(layout, run(), tmp_path / "run") == [tmp_path / "run" / "step-00000001"] * 4
    assert sorted(os.listdir(tmp_path / "run")) == ["step-00000001"]
    names = {file.name for file in (tmp_path / "run" / "step-00000001").iterdir()} - {"manifest.json"}
    assert {name[:17] for name in names} == {f"tensors-rank{r:05d}" for r in range(4)}


def test_a_real_state_of_an_optimizer(tmp_path: Path) -> None:
    # One step of AdamW, so that no moment is zero; then pp 2 over tp 2 to ZeRO over dp 3.
    from tests.state.trees import params, zero

    start = fstep.init_state(params(1), fstep.adamw, key=Key.seed(5), trainable=lambda path: "norm" not in path)
    grads = tree_map(lambda p, m: None if m is None else p.square(), start.params, start.opt.mu)
    state = fstep.adamw.update(start, grads, lr=0.1)
    assert int(state.step) == 1

    def of(mesh: Mesh, **options: Any) -> Any:
        cut = lambda tree: on_rank(tree, mesh, **options)  # noqa: E731
        return replace(state, params=cut(state.params), opt=replace(state.opt, mu=cut(state.opt.mu), nu=cut(state.opt.nu)))

    fstep.simulate(lambda mesh: save_checkpoint(tmp_path, of(mesh), mesh=mesh, keep=1), pp=2, tp=2)

    def again(mesh: Mesh) -> None:
        want = of(mesh, zero=zero)
        assert_same_bits(load_checkpoint(tmp_path, want, mesh=mesh), want)

    fstep.simulate(again, dp=3)
    assert_same_bits(load_checkpoint(tmp_path, state), state)


# What is read ---------------------------------------------------------------------------------------------------------


class Reads:
    """Counts the bytes that are read of each file, headers apart."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.data = self.calls = 0
        read = os.preadv

        def spy(file: int, buffers: Any, offset: int) -> int:
            count = read(file, buffers, offset)
            raw = os.pread(file, 8, 0)
            if offset >= 8 + int.from_bytes(raw, "little"):
                self.data += count
                self.calls += 1
            return count

        patch.setattr(os, "preadv", spy)


def part(tree: Any, make: Callable[[Mesh], Any], rank: int, **sizes: int) -> Any:
    """Return a rank's tree, to load without a mesh: reading needs nobody else."""
    return meta(fstep.simulate(make, **sizes)[rank])


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_slice_is_read_alone(dim: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(8 * 16 * 8, dtype=torch.float32).reshape(8, 16, 8)
    save_checkpoint(tmp_path, {"x": x}, step=0)
    reads = Reads(monkeypatch)
    for rank in range(ranks):
        like = part(x, lambda mesh: {"x": Shard.cut(x, axis=mesh.tp, dim=dim)}, rank, tp=ranks)
        reads.data = 0
        got = load_checkpoint(tmp_path, like)["x"].value
        assert torch.equal(got, x.chunk(ranks, dim)[rank])
        # Rows of 32 bytes: bands are of one row, in strips of 4 bytes or more.
        assert reads.data == x.nbytes // ranks


def test_a_flat_range_is_read_alone_up_to_a_block_at_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(8 * 160.0).reshape(80, 16)
    save_checkpoint(tmp_path, {"layers": {0: {"x": x}}}, step=0)
    reads = Reads(monkeypatch)
    for rank, (start, stop) in enumerate(itertools.pairwise((0, 0.3, 0.3, 0.71, 1))):
        like = part(x, lambda mesh: zero_by_hand(0.3, 0.3, 0.71)({"layers": {0: {"x": x}}}, mesh), rank, dp=4)
        reads.data = 0
        (got,) = tree_leaves(load_checkpoint(tmp_path, like))
        want = x.reshape(-1)[int(x.numel() * start) : int(x.numel() * stop)]
        assert torch.equal(got, want)
        assert want.nbytes <= reads.data <= want.nbytes + (2 * 64 if want.nbytes else 0)


def test_large_tensors_with_the_blocks_that_users_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = {"q": torch.randn(1024, 1024), "o": torch.randn(1024, 1024)}
    save_checkpoint(tmp_path, x, step=0)
    reads = Reads(monkeypatch)
    like = part(
        x, lambda mesh: {"q": Shard.cut(x["q"], axis=mesh.tp, dim=0), "o": Shard.cut(x["o"], axis=mesh.tp, dim=1)}, 1, tp=4
    )
    got = load_checkpoint(tmp_path, like)
    assert torch.equal(got["q"].value, x["q"][256:512]) and torch.equal(got["o"].value, x["o"][:, 256:512])
    assert reads.data == 2 * 1024 * 256 * 4
    reads.calls = reads.data = 0
    assert all(torch.equal(got, x[name]) for name, got in load_checkpoint(tmp_path, x).items())
    assert (reads.calls, reads.data) == (32, 2 * 1024 * 1024 * 4)  # a call for every 256 KiB


def test_files_of_other_parts_are_not_even_opened(tmp_path: Path) -> None:
    layout, whole = BY_NAME["pp2 tp2"], run(1)
    (path, *_) = save(layout, whole, tmp_path)
    for rank in (1, 2, 3):
        for file in path.glob(f"*rank{rank:05d}*"):
            file.unlink()
    mine = part(None, lambda mesh: layout.of(whole, mesh).params, 0, pp=2, tp=2)
    got = load_checkpoint_part(tmp_path, {"params": mine})
    assert_same_bits(got["params"]["layers"], fstep.simulate(lambda m: layout.of(whole, m).params, pp=2, tp=2)[0]["layers"])


def load_checkpoint_part(folder: Path, like: Any) -> Any:
    """Load as a rank whose mates hold the rest."""
    from fstep.state.manifest import read_manifest
    from fstep.state.offers import offers
    from fstep.state.reading import read_leaves

    wanted = offers("test", "like", like, error=CheckpointError)
    targets = {path: (offer.part, torch.device("cpu")) for path, offer in wanted.items()}
    found = read_leaves(folder / "step-00000001", read_manifest(folder / "step-00000001"), targets, workers=1)
    return fstep.tree_replace_leaves(like, found)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_every_flipped_byte_of_a_slice_is_an_error_and_others_do_no_harm(dim: int, tmp_path: Path) -> None:
    x = torch.arange(6 * 24, dtype=torch.int32).reshape(6, 24) + 1_000_000
    path = save_checkpoint(tmp_path, {"x": x}, step=0) / "tensors-00000.safetensors"
    like = part(x, lambda mesh: {"x": Shard.cut(x, axis=mesh.tp, dim=dim)}, 0, tp=2)
    want = x.chunk(2, dim)[0]
    good = path.read_bytes()
    data = len(good) - x.nbytes
    caught = 0
    for at in range(data, len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        row, column = divmod((at - data) // 4, 24)
        needed = row < 3 if dim == 0 else column < 12
        try:
            got = load_checkpoint(tmp_path, like)["x"].value
        except CheckpointError as error:
            assert re.search(r"tensors-00000.safetensors is damaged: the checksum of tensor 'x' does not match", str(error))
            caught += 1
        else:
            assert not needed, (row, column)
            assert torch.equal(got, want)
    assert caught == want.nbytes


def test_damage_in_one_ranks_part_is_raised_on_all(tmp_path: Path) -> None:
    layout, whole = BY_NAME["tp2"], run(1)
    (path, _) = save(layout, whole, tmp_path)
    file = sorted(path.glob("tensors-rank00001*"))[0]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)

    def rank(mesh: Mesh) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path, layout.of(whole, mesh), mesh=mesh)
        return str(caught.value)

    first, second = fstep.simulate(rank, tp=2)
    assert first == second and re.search(r"rank00001-\d+.safetensors is damaged: the checksum of tensor .* \(on rank", first)


@pytest.mark.parametrize("change", [lambda parts: parts[:1], lambda parts: parts + parts[:1]], ids=["missing", "double"])
def test_a_manifest_that_has_a_part_too_few_or_too_many(change: Callable[[Any], Any], tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    cut = lambda mesh: {"x": Shard.cut(x, axis=mesh.tp, dim=0)}  # noqa: E731
    (path, _) = fstep.simulate(lambda mesh: save_checkpoint(tmp_path, cut(mesh), mesh=mesh, step=0), tp=2)
    written = manifest.read_manifest(path)
    (leaf,) = written.leaves.values()
    manifest.write_manifest(path, replace(written, leaves={"x": replace(leaf, parts=change(leaf.parts))}))
    with pytest.raises(CheckpointError, match=r"its files have (12|36) of the 24 elements wanted of 'x'"):
        load_checkpoint(tmp_path, {"x": x})


# What does not fit together -------------------------------------------------------------------------------------------


def messages(f: Callable[[Mesh], Any], error: type[Exception] = CheckpointError, **sizes: int) -> str:
    """Return the message that every rank raises."""

    def rank(mesh: Mesh) -> str:
        with pytest.raises(error) as caught:
            f(mesh)
        return str(caught.value)

    first, *rest = fstep.simulate(rank, **sizes)
    assert all(message == first for message in rest), (first, rest)
    return first


def test_an_error_on_one_rank_is_everybodys_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, whole = BY_NAME["pp2 tp2"], run(1)
    save(layout, whole, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    write = files.write_safetensors

    def full(path: Path, *args: Any) -> Any:
        if "rank00002" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *args)

    monkeypatch.setattr(files, "write_safetensors", full)
    message = messages(lambda mesh: save_checkpoint(tmp_path, layout.of(whole, mesh), mesh=mesh, step=1), **layout.sizes)
    assert message == "save_checkpoint: OSError: [Errno 28] No space left on device (on rank 2)"
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    load(layout, whole, tmp_path)

    bad = lambda mesh: {"x": torch.zeros(1, dtype=torch.complex128 if mesh.rank == 3 else torch.float32)}  # noqa: E731
    message = messages(lambda mesh: save_checkpoint(tmp_path, bad(mesh), mesh=mesh, step=2), **layout.sizes)
    assert re.match(r"save_checkpoint: leaf 'x' is a torch.complex128 tensor .* \(on rank 3\)$", message)
    assert sorted(tmp_path.rglob("*")) == before


X = torch.arange(12.0).reshape(4, 3)
MISFITS: list[tuple[Callable[[Mesh], Any], str]] = [
    (lambda m: {"x": X[m.tp.rank :]}, r"leaf 'x' is torch.float32 \(4, 3\) on rank 0, and torch.float32 \(3, 3\) on rank 1"),
    (lambda m: {"x": X.double() if m.tp.rank else X}, r"is torch.float32 \(4, 3\) on rank 0, and torch.float64 \(4, 3\)"),
    (
        lambda m: {"x": Shard(X[:2], m.tp, 0, (0, 2), 4)},
        r"the ranks do not hold leaf 'x' \(4, 3\) once: 6 of 12 elements are missing",
    ),
    (
        lambda m: {"x": Shard(X[m.tp.rank : m.tp.rank + 3], m.tp, 0, (m.tp.rank, m.tp.rank + 3), 4)},
        r"do not hold leaf 'x' .* once: boxes .* overlap",
    ),
    (
        lambda m: tree_map(lambda x: torch.cat([x, x]), {"x": Shard.cut(X, axis=m.tp, dim=0)}),
        r"state has a tensor \(4, 3\) at 'x', inside nodes that say it is \(2, 3\) of \(4, 3\); .* \(on rank 0\)",
    ),
]


@pytest.mark.parametrize(("make", "message"), MISFITS)
def test_ranks_that_hold_too_much_or_too_little(make: Callable[[Mesh], Any], message: str, tmp_path: Path) -> None:
    said = messages(lambda mesh: save_checkpoint(tmp_path / "run", make(mesh), mesh=mesh, step=0), tp=2)
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_what_is_no_mesh(tmp_path: Path) -> None:
    axis: Any = fstep.Axis("tp")
    for f in (
        lambda: save_checkpoint(tmp_path, {"x": X}, mesh=axis, step=0),
        lambda: load_checkpoint(tmp_path, {"x": X}, mesh=axis),
        lambda: fstep.save_hf(tmp_path, {}, {}, mesh=axis),
        lambda: fstep.stream_hf({}, {}, mesh=axis),
    ):
        with pytest.raises(
            TypeError, match=r"(save|load)_checkpoint|(save|stream)_hf: mesh is a Axis; pass Mesh\(\), or the"
        ):
            f()


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"dp": 2}, {"tp": 2}], ids=str)
def test_a_mesh_that_was_forgotten_is_everybodys_error(sizes: dict[str, int], tmp_path: Path) -> None:
    """Each rank would write its own part, over those of the others. On a pipeline no tensor tells that it is a part."""
    cut = {"tp": lambda m: Shard.cut(X, axis=m.tp, dim=0)}.get(next(iter(sizes)), lambda m: X + m.pp.rank)
    spec = {"x": fstep.HFTensor("x", (4, 3))}
    saves: list[tuple[type[Exception], Callable[[Mesh], Any]]] = [
        (CheckpointError, lambda m: save_checkpoint(tmp_path / "run", {"x": cut(m)}, step=0)),
        (fstep.WeightsError, lambda m: fstep.save_hf(tmp_path / "model", {"x": cut(m)}, spec)),
    ]
    for error, save_it in saves:

        def on(mesh: Mesh, error: type[Exception] = error, save_it: Callable[[Mesh], Any] = save_it) -> str:
            with pytest.raises(error) as caught:
                save_it(mesh)
            return str(caught.value)

        first, second = fstep.simulate(on, **sizes)
        assert first == second
        assert re.fullmatch(
            r"save_(checkpoint|hf): mesh is not given, and the program runs on 2 ranks; call it on all of them with "
            r"mesh=mesh \(or, for what this rank has and nothing else, with mesh=Mesh\(\)\)",
            first,
        )
    assert not list(tmp_path.iterdir())


def test_one_rank_alone_may_save_what_it_has(tmp_path: Path) -> None:
    def on(mesh: Mesh) -> None:
        state = {"x": X + mesh.rank}
        save_checkpoint(tmp_path / f"run{mesh.rank}", state, mesh=Mesh(), step=0)
        fstep.save_hf(tmp_path / f"model{mesh.rank}", state, {"x": fstep.HFTensor("x", (4, 3))}, mesh=Mesh())

    fstep.simulate(on, dp=2)
    for rank in range(2):
        assert torch.equal(load_checkpoint(tmp_path / f"run{rank}", {"x": X})["x"], X + rank)
        assert torch.equal(fstep.load_hf(tmp_path / f"model{rank}", {"x": fstep.HFTensor("x", (4, 3))})["x"], X + rank)
    # A simulation of one rank, and what comes after a simulation, are programs of one rank.
    fstep.simulate(lambda mesh: save_checkpoint(tmp_path / "one", {"x": X}, step=0))
    save_checkpoint(tmp_path / "one", {"x": X}, step=1)


def test_ranks_at_different_steps(tmp_path: Path) -> None:
    said = messages(lambda mesh: save_checkpoint(tmp_path, {"x": X}, mesh=mesh, step=mesh.rank), dp=2)
    assert said == "save_checkpoint: the ranks save steps [0, 1]; call it on all ranks after the same step"


def test_names_that_no_rank_asks_for(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": X, "b": X, "c": X}, step=0)
    has = [{"a": X}, {"c": X}]
    said = messages(lambda mesh: load_checkpoint(tmp_path, has[mesh.pp.rank], mesh=mesh), pp=2)
    assert re.search(r"load_checkpoint: the checkpoint has 'b', like has nothing there .* saved it$", said)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint has 'b', 'c', like .* pass mesh= if other ranks have the rest"
    ):
        load_checkpoint(tmp_path, has[0])
    has = [{"a": X, "b": X}, {"c": X, "d": X}]
    said = messages(lambda mesh: load_checkpoint(tmp_path, has[mesh.pp.rank], mesh=mesh), pp=2)
    assert re.search(r"like has 'd', the checkpoint has nothing there .* \(on rank 1\)$", said)
    shape = lambda mesh: {"a": X, "b": Shard.cut(torch.ones(6, 3), axis=mesh.tp, dim=0), "c": X}  # noqa: E731
    said = messages(lambda mesh: load_checkpoint(tmp_path, shape(mesh), mesh=mesh), tp=2)
    assert re.search(r"leaf 'b' is torch.float32 \(4, 3\) in .*, and torch.float32 \(6, 3\) in like; make like", said)


def test_a_rank_that_does_not_come_is_no_silent_hang(tmp_path: Path) -> None:
    def rank(mesh: Mesh) -> None:
        if mesh.rank == 0:
            save_checkpoint(tmp_path, {"x": X}, mesh=mesh, step=0)

    with pytest.raises(MeshError, match=r"no rank can go on\n  rank 0 \(dp 0\) is in recv over .*waiting for rank 1"):
        fstep.simulate(rank, dp=2)
    assert os.listdir(tmp_path) == []


def test_copies_are_written_from_one_stage_and_read_by_both(tmp_path: Path) -> None:
    make = lambda mesh: {"embed": Copied(X, mesh.pp, (0, 1))}  # noqa: E731
    (path, _) = fstep.simulate(lambda mesh: save_checkpoint(tmp_path, make(mesh), mesh=mesh, step=0), pp=2)
    assert len(list(path.glob("*.safetensors"))) == 1
    assert_same_bits(load_checkpoint(tmp_path, {"embed": X}), {"embed": X})


# The first version of the format --------------------------------------------------------------------------------------


def write_version_1(folder: Path, tree: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint as the first version did: one file for each leaf, one checksum for each tensor."""
    folder.mkdir(parents=True)
    leaves, records = {}, {}
    for i, (path, x) in enumerate(tree.items()):
        file, crc = f"tensors-{i:05d}.safetensors", f"{zlib.crc32(x.numpy().tobytes()):08x}"
        save_file({path: x}, folder / file, metadata={"format": "pt", "fstep.crc32": json.dumps({path: crc})})
        raw = (folder / file).read_bytes()
        size = len(raw) - x.nbytes
        records[file] = {"size": len(raw), "header_size": size, "header_crc32": f"{zlib.crc32(raw[:size]):08x}"}
        dtype = {torch.float32: "F32", torch.int64: "I64"}[x.dtype]
        leaves[path] = {"file": file, "offset": size, "dtype": dtype, "shape": list(x.shape), "crc32": crc}
    manifest = {"format": "fstep checkpoint", "version": 1, "step": 1, "files": records, "leaves": leaves}
    text = json.dumps(manifest, indent=1).encode().removesuffix(b"\n}")
    (folder / "manifest.json").write_bytes(text + b',\n "crc32": "' + f"{zlib.crc32(text):08x}".encode() + b'"\n}\n')


def test_version_1_loads_whole_and_by_parts(tmp_path: Path) -> None:
    tree = {"x": torch.randn(6, 4), "n": torch.tensor(7), "empty": torch.empty(0, 3)}
    write_version_1(tmp_path / "step-00000001", tree)
    assert_same_bits(load_checkpoint(tmp_path, tree), tree)

    def rank(mesh: Mesh) -> None:
        like = {**tree, "x": Shard.cut(tree["x"], axis=mesh.tp, dim=1)}
        assert_same_bits(load_checkpoint(tmp_path, meta(like), mesh=mesh), like)

    fstep.simulate(rank, tp=2)
    file = tmp_path / "step-00000001" / "tensors-00000.safetensors"
    good = file.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"tensors-00000.safetensors is damaged"):
            load_checkpoint(tmp_path, tree)
