"""Checkpoints: exact, whole or absent, and never silently wrong."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep.key import Key
from fstep.ratio import Ratio
from fstep.state import checkpoint, files, manifest
from fstep.state.checkpoint import CheckpointError, latest_step, load_checkpoint, save_checkpoint
from fstep.tree import Tied, tree_leaves, tree_map, tree_paths
from tests.state.trees import Run, assert_same_bits, bits


def awkward_tree() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    nan = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000], dtype=torch.int32).view(torch.float32)
    return {
        "bf16": torch.randn(7, 3).bfloat16(),
        "half": torch.randn(3).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "step": torch.tensor(17),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "empty_bf16": torch.empty(0, dtype=torch.bfloat16),
        "nan_payloads": nan,
        "transposed": base.view(4, 6).t(),
        "every_second": base[::2],
        "expanded": torch.tensor([1.5]).expand(4),
        "view_a": base[:12],
        "view_b": base[6:18],
        "same_again": base,
        "grad": torch.randn(2, requires_grad=True),
        "nested": {0: (base[0], [base[1], None]), 1: None},
        "key": Key.seed(3),
        "loss": Ratio(torch.tensor(1.0), torch.tensor(2.0)),
        "head": Tied("embed"),
        "größe .x\n": torch.ones(1),
    }


def test_round_trip_keeps_every_bit_and_the_structure(tmp_path: Path) -> None:
    tree = awkward_tree()
    versions = [x._version for x in tree_leaves(tree)]
    path = save_checkpoint(tmp_path, tree, step=3)
    assert path == tmp_path / "step-00000003"
    loaded = load_checkpoint(tmp_path, tree)
    assert_same_bits(loaded, tree)
    assert loaded["nested"][0][1][1] is None and loaded["nested"][1] is None
    assert loaded["head"] == Tied("embed") and type(loaded["key"]) is Key
    assert versions == [x._version for x in tree_leaves(tree)], "saving changed its argument"
    assert not any(x.requires_grad for x in tree_leaves(loaded))
    storages = [x.untyped_storage().data_ptr() for x in tree_leaves(loaded) if x.numel()]
    assert len(set(storages)) == len(storages), "loaded leaves share memory"


def test_files_can_be_read_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tree = {k: v for k, v in awkward_tree().items() if isinstance(v, Tensor)}
    path = save_checkpoint(tmp_path, tree, step=0)
    read = load_file(path / "tensors-00000.safetensors")
    assert sorted(read) == sorted(tree)
    for name, x in read.items():
        assert bits(x) == bits(tree[name].resolve_conj()), name


def entries_of(file: Path) -> dict[str, files.Entry]:
    raw = file.read_bytes()
    entries = files.parse_header(raw[: 8 + int.from_bytes(raw[:8], "little")])
    assert entries is not None
    return entries


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    tree = {"a": torch.tensor(True), "b": torch.zeros(3, dtype=torch.float64), "c": torch.ones(1).half(), "d": torch.ones(1)}
    path = save_checkpoint(tmp_path, tree, step=0)
    for name, entry in entries_of(path / "tensors-00000.safetensors").items():
        assert entry.offset % tree[name].itemsize == 0, name


def test_large_states_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 100)
    monkeypatch.setattr(files, "_BAND_BYTES", 7)
    tree = {f"x{i}": torch.randn(5, dtype=torch.float64) for i in range(5)} | {"big": torch.randn(1000)}
    path = save_checkpoint(tmp_path, tree, step=0)
    assert len(list(path.glob("*.safetensors"))) == 4  # big | x0 x1 | x2 x3 | x4
    assert_same_bits(load_checkpoint(tmp_path, tree), tree)


def test_a_tree_without_tensors_round_trips(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": None}, step=0)
    assert load_checkpoint(tmp_path, {"a": None}) == {"a": None}


def test_like_gives_only_structure_and_device(tmp_path: Path) -> None:
    tree = {"a": torch.randn(3), "b": torch.tensor(2)}
    save_checkpoint(tmp_path, tree, step=0)
    meta = tree_map(lambda x: x.to("meta"), tree)
    assert_same_bits(load_checkpoint(tmp_path, meta), tree)
    assert {x.device.type for x in tree_leaves(load_checkpoint(tmp_path, meta))} == {"cpu"}
    assert {x.device.type for x in tree_leaves(load_checkpoint(tmp_path, tree, device="meta"))} == {"meta"}


def test_a_save_waits_for_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for the CPU runs: that the right devices are waited for.
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    checkpoint._wait_for_devices(
        {"a": torch.zeros(1), "b": torch.zeros(1, device="meta"), "c": torch.ones(1, device="meta")}
    )
    assert waited == [torch.device("meta")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_round_trip_of_a_gpu_state_whose_last_kernels_still_run(tmp_path: Path) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.ones(4096, 4096, device="cuda")
        for _ in range(50):
            x = x @ (torch.eye(4096, device="cuda") * 2)
        save_checkpoint(tmp_path, {"x": x, "b": torch.tensor(1, device="cuda")}, step=0)
    loaded = load_checkpoint(tmp_path, {"x": x, "b": torch.tensor(0, device="meta")})
    assert loaded["x"].device == x.device and loaded["b"].device.type == "cpu"
    assert (loaded["x"] == 2.0**50).all() and int(loaded["b"]) == 1


# Exact resume ---------------------------------------------------------------------------------------------------------


def toy_start() -> Run:
    params = {"w": Key.seed(1).normal((4, 3)), "b": torch.zeros(3), "frozen": Key.seed(2).normal((2,)).bfloat16()}
    momentum = {"w": torch.zeros(4, 3), "b": torch.zeros(3), "frozen": None}
    return Run(params, momentum, torch.tensor(0), Key.seed(7))


def toy_step(run: Run) -> Run:
    rows = run.key.fold_in(run.step).permutation(64)[:8]
    x = Key.seed(11).normal((64, 4))[rows]
    y = Key.seed(12).normal((64, 3))[rows]
    leaves = {name: run.params[name].detach().requires_grad_() for name in ("w", "b")}
    loss = ((x @ leaves["w"] + leaves["b"] - y) ** 2).sum()
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    momentum = {k: None if m is None else 0.9 * m + grads[k] for k, m in run.momentum.items()}
    params = {k: p if momentum[k] is None else p - 0.01 * momentum[k] for k, p in run.params.items()}
    return Run(params, momentum, run.step + 1, run.key)


def test_a_run_stopped_after_any_step_and_resumed_ends_on_the_same_bits(tmp_path: Path) -> None:
    steps = 8
    run = toy_start()
    for _ in range(steps):
        run = toy_step(run)
    for stop in range(steps + 1):
        part = toy_start()
        for _ in range(stop):
            part = toy_step(part)
        save_checkpoint(tmp_path / str(stop), part)
        resumed = load_checkpoint(tmp_path / str(stop), toy_start())
        assert int(resumed.step) == stop
        while int(resumed.step) < steps:
            resumed = toy_step(resumed)
        assert_same_bits(resumed, run)


# Which checkpoint -----------------------------------------------------------------------------------------------------


def state_of(step: int) -> Run:
    return Run({"w": torch.full((50,), float(step))}, None, torch.tensor(step), Key.seed(step))


def test_latest_and_chosen_steps(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    for step in (9, 10, 100_000_000):
        save_checkpoint(tmp_path, state_of(step))
    assert latest_step(tmp_path) == 100_000_000
    assert_same_bits(load_checkpoint(tmp_path, state_of(0)), state_of(100_000_000))
    assert_same_bits(load_checkpoint(tmp_path, state_of(0), step=9), state_of(9))


def test_keep_deletes_the_oldest_and_never_the_one_just_written(tmp_path: Path) -> None:
    for step in range(5):
        save_checkpoint(tmp_path, state_of(step), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    save_checkpoint(tmp_path, state_of(1), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000004"]
    save_checkpoint(tmp_path, state_of(2), keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"w": torch.zeros(2)}, step=1)
    save_checkpoint(tmp_path, {"v": torch.ones(3)}, step=1)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path, {"v": torch.zeros(3)})["v"].tolist() == [1, 1, 1]


def test_what_killed_runs_left_is_ignored_and_then_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(1))
    for name in (".tmp-new-step-00000009", ".tmp-old-step-00000008", ".tmp-old-step-00000007.replaced"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / "step-00000005").mkdir()  # say, a copy that was cut short
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / "notes.txt").write_text("step-00000099")
    assert latest_step(tmp_path) == 1
    assert_same_bits(load_checkpoint(tmp_path, state_of(0)), state_of(1))
    save_checkpoint(tmp_path, state_of(2))
    assert sorted(os.listdir(tmp_path)) == [".tmp-mine", "notes.txt", "step-00000001", "step-00000002", "step-00000005"]
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of step 5 .*steps \[1, 2\].*without their manifest.json, step-00000005"
    ):
        load_checkpoint(tmp_path, state_of(0), step=5)


def test_a_replaced_checkpoint_counts_until_its_successor_is_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(4))
    os.rename(tmp_path / "step-00000004", tmp_path / "step-00000004.replaced")
    assert latest_step(tmp_path) == 4
    assert_same_bits(load_checkpoint(tmp_path, state_of(0), step=4), state_of(4))
    save_checkpoint(tmp_path, state_of(5))
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000005"]
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-00000004.replaced")
    assert_same_bits(load_checkpoint(tmp_path, state_of(0), step=4), state_of(4))
    save_checkpoint(tmp_path, state_of(6))
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000005", "step-00000006"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state_of(1))
    before = sorted(tmp_path.rglob("*"))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, Run({"w": torch.ones(1)}, None, torch.tensor(1), Key.seed(0)))
    assert sorted(tmp_path.rglob("*")) == before
    assert_same_bits(load_checkpoint(tmp_path, state_of(0)), state_of(1))


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(handle: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def spy_rename(a: Any, b: Any) -> None:
        events.append(("rename", Path(b).name))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    save_checkpoint(tmp_path / "run", state_of(1))
    new = ".tmp-new-step-00000001"
    assert events == [
        ("sync", tmp_path.name),  # the entry of run/
        ("sync", "manifest.json"),
        ("sync", "tensors-00000.safetensors"),
        ("sync", new),
        ("rename", "step-00000001"),
        ("sync", "run"),
    ]


# Kills ----------------------------------------------------------------------------------------------------------------

KILLS = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from fstep.state import checkpoint
    from fstep.state.checkpoint import latest_step, load_checkpoint, save_checkpoint
    checkpoint._GROUP_BYTES = 4000  # several files

    def tree(step, version):
        x = torch.full((500,), float(version))
        return {"v": torch.tensor(version), "w": torch.full((3000,), float(step)), "x": x}

    def check(folder, at_least):
        last = latest_step(folder)
        assert last is not None and last >= at_least, (last, at_least, os.listdir(folder))
        names = [n for n in os.listdir(folder) if n.startswith("step-")]
        for step in {int(n[5:13]) for n in names}:      # all that looks like a checkpoint is one
            got = load_checkpoint(folder, tree(0, 0), step=step)
            assert torch.equal(got["w"], tree(step, 0)["w"]), step
            assert (got["x"] == got["v"]).all(), step
        return last

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def child(run):
        pid = os.fork()
        if pid == 0:
            run()
            os._exit(0)
        return pid
"""


def run_script(body: str, *args: str) -> None:
    code = textwrap.dedent(KILLS) + textwrap.dedent(body)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kills_at_random_moments_lose_no_complete_checkpoint(tmp_path: Path) -> None:
    run_script(
        """
        folder, rng, last, killed = sys.argv[1], random.Random(0), 0, 0
        save_checkpoint(folder, tree(0, 0), step=0)
        for i in range(12):
            read, write = os.pipe()
            def work():
                for step in range(last, last + 10_000):
                    for version in (0, 1):              # the second replaces the first
                        save_checkpoint(folder, tree(step, version), step=step, keep=2)
                    os.write(write, step.to_bytes(4, "big"))
            pid = child(work)
            os.close(write)
            done = int.from_bytes(os.read(read, 4), "big")   # it is under way
            time.sleep(rng.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
            while chunk := os.read(read, 4):
                done = int.from_bytes(chunk, "big")
            os.close(read)
            last = check(folder, done)
        assert killed == 12
        save_checkpoint(folder, tree(last, 0), step=last)
        assert not [n for n in os.listdir(folder) if not n.startswith("step-")], os.listdir(folder)
        """,
        str(tmp_path / "run"),
    )


def test_a_kill_before_or_after_any_change_of_the_disk_loses_no_complete_checkpoint(tmp_path: Path) -> None:
    # Every call through which a save changes folders is a moment to die at; files themselves are written before them.
    run_script(
        """
        import shutil
        import os as real
        def at(moment):
            count = 0
            def wrap(f):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == moment: die()
                    out = f(*args, **kwargs)
                    count += 1
                    if count == moment: die()
                    return out
                return call
            for name in ("rename", "mkdir", "unlink", "rmdir", "fsync"):
                setattr(os, name, wrap(getattr(os, name)))
            Path.write_bytes = wrap(Path.write_bytes)

        base, moment, finished = Path(sys.argv[1]), 0, False
        while not finished:
            moment += 1
            folder = base / str(moment)
            save_checkpoint(folder, tree(1, 0), step=1)
            def work():
                at(moment)
                save_checkpoint(folder, tree(1, 1), step=1)
                save_checkpoint(folder, tree(2, 0), step=2, keep=1)
            pid = child(work)
            finished = os.waitpid(pid, 0)[1] == 0
            check(folder, 1)
            save_checkpoint(folder, tree(1, 2), step=1)   # the next save works and tidies up
            assert not [n for n in os.listdir(folder) if len(n) != 13], os.listdir(folder)
            check(folder, 1)
            shutil.rmtree(folder)
        assert moment > 40, moment
        """,
        str(tmp_path),
    )


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Run]:
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 40)
    run = Run(
        {"a": torch.randn(8), "b": torch.randn(5).bfloat16()},
        {"flag": torch.tensor(True)},
        torch.tensor(2),
        Key.seed(1),
    )
    return save_checkpoint(tmp_path, run), run


def test_every_flipped_bit_is_an_error_that_names_file_and_tensor(saved: tuple[Path, Run]) -> None:
    path, run = saved
    names = sorted(p.name for p in path.iterdir())
    assert names == ["manifest.json", "tensors-00000.safetensors", "tensors-00001.safetensors"]
    held = {name: entries_of(path / name) if "tensors" in name else {} for name in names}
    rng = random.Random(0)
    tried = set()
    for name in names:
        file = path / name
        good = file.read_bytes()
        # Every bit of the first bytes and of the last (data, or the manifest's checksum); a sample of those between.
        size = 8 * len(good)
        for place in {*range(200), *rng.sample(range(size), 500), *range(size - 400, size)}:
            byte = place // 8
            bad = bytearray(good)
            bad[byte] ^= 1 << place % 8
            file.write_bytes(bad)
            within = [p for p, e in held[name].items() if 0 <= byte - e.offset < e.nbytes]
            tried.update(within)
            part = f"tensor '{re.escape(within[0])}'" if within else "checksum"
            with pytest.raises(CheckpointError, match=f"{re.escape(str(file))} is damaged: .*{part}"):
                load_checkpoint(path.parent, run)
        file.write_bytes(good)
    assert tried == set(tree_paths(run))
    assert_same_bits(load_checkpoint(path.parent, run), run)


def test_every_truncation_lengthening_and_missing_file_is_an_error(saved: tuple[Path, Run]) -> None:
    path, run = saved
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for bad in [good[:n] for n in range(0, len(good), 7)] + [good[:-1], good + b"\0", good + b"\n"]:
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=f"{re.escape(str(file))} is damaged"):
                load_checkpoint(path.parent, run)
        file.unlink()
        message = (
            "no checkpoint .*manifest.json, step-00000002"
            if file.suffix == ".json"
            else f"{re.escape(str(file))} is damaged"
        )
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path.parent, run)
        file.write_bytes(good)


def test_two_files_in_each_others_place_are_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state_of(step))
    name = "tensors-00000.safetensors"
    shutil.copy(tmp_path / "step-00000001" / name, tmp_path / "step-00000002" / name)
    with pytest.raises(CheckpointError, match=r"step-00000002/tensors-00000.safetensors is damaged"):
        load_checkpoint(tmp_path, state_of(0))


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "VERSION", 3)
        save_checkpoint(tmp_path, state_of(1))
    with pytest.raises(CheckpointError, match=r"version 3, this fstep reads 'fstep checkpoint' versions 1 to 2; load it"):
        load_checkpoint(tmp_path, state_of(1))


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"a": torch.zeros(2), "m": torch.zeros(2)},
            r"the checkpoint has 'b', like has nothing there .*make like with",
        ),
        ({"a": torch.zeros(2), "b": None, "m": torch.zeros(2)}, r"the checkpoint has 'b', like has nothing there"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(3), "m": torch.zeros(2), "f": torch.zeros(1)},
            r"like has 'f', the checkpoint has nothing there",
        ),
        (
            {"a": torch.zeros(2), "b": torch.zeros(1, 3), "m": torch.zeros(2)},
            r"leaf 'b' is torch.float32 \(3,\) in .*, and torch.float32 \(1, 3\) in like",
        ),
        (
            {"a": torch.zeros(2), "b": torch.zeros(3).bfloat16(), "m": torch.zeros(2)},
            r"leaf 'b' is torch.float32 \(3,\) in .*, and torch.bfloat16 \(3,\) in like; make like with the",
        ),
        ({"a": 1.0}, r"like has a float at 'a'; make it a tensor"),
    ],
)
def test_a_like_that_does_not_fit(tmp_path: Path, like: Any, message: str) -> None:
    # "f" is a frozen parameter's state: None when saved.
    save_checkpoint(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(3), "m": torch.zeros(2), "f": None}, step=0)
    with pytest.raises(CheckpointError, match="load_checkpoint: " + message):
        load_checkpoint(tmp_path, like)


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"a": torch.zeros(1)}, {}, r"dict has no .step to name the checkpoint by; pass step="),
        ({"a": torch.zeros(1)}, {"step": -1}, r"step=-1 is negative"),
        ({"a": torch.zeros(1)}, {"step": 1, "keep": 0}, r"keep=0 would delete what was just saved; pass 1 or"),
        ({"a": 3}, {"step": 1}, r"state has a int at 'a'; make it a tensor, or a static field"),
        ({"a": torch.zeros(1, device="meta")}, {"step": 1}, r"leaf 'a' is a torch.float32 tensor .*on meta"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, {"step": 1}, r"leaf 'a' is a torch.complex128 tensor"),
        ({"a": torch.zeros(2).to_sparse()}, {"step": 1}, r"leaf 'a' .*torch.sparse_coo"),
        ({"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, {"step": 1}, r"two leaves with the path 'a.b'"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, state: Any, options: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match="save_checkpoint: .*" + message):
        save_checkpoint(tmp_path / "run", state, **options)
    assert not (tmp_path / "run").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint, there is no folder .*nowhere; pass the folder given to"):
        load_checkpoint(tmp_path / "nowhere", {})
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*, which has none"):
        load_checkpoint(tmp_path, {})
    path = save_checkpoint(tmp_path, {"a": torch.zeros(1)}, step=1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*, which has those of steps \[1\]"):
        load_checkpoint(tmp_path, {}, step=7)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*step-00000001, which is one itself; pass its parent"):
        load_checkpoint(path, {})


def test_leaves_without_elements(tmp_path: Path) -> None:
    state = {"a": torch.zeros(4, 0), "b": torch.zeros(0, 3), "c": torch.zeros(2, 0, 3), "d": torch.ones(2)}
    save_checkpoint(tmp_path, state, step=0)
    back = load_checkpoint(tmp_path, fstep.tree_map(torch.empty_like, state))
    assert {n: tuple(x.shape) for n, x in back.items()} == {n: tuple(x.shape) for n, x in state.items()}
    assert torch.equal(back["d"], torch.ones(2))


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2}])
def test_plain_sgd_on_a_mesh(tmp_path: Path, sizes: dict[str, int]) -> None:
    """It has no buffers: nothing to cut, to save, or to gather."""

    def f(mesh: fstep.Mesh) -> Any:
        whole = {"w": torch.arange(8.0).view(4, 2), "frozen": torch.ones(3)}
        cut = {**whole, "w": fstep.Shard.cut(whole["w"], axis=mesh.tp, dim=0)}
        params = fstep.shard_params(whole, mesh.dp) if "dp" in sizes else cut
        state = fstep.init_state(params, fstep.sgd, trainable=lambda path: path == "w")
        grads = fstep.split_trainable(fstep.tree_map(torch.ones_like, params), lambda path: path == "w")[0]
        state = fstep.sgd.update(state, grads, lr=0.5, skip=torch.tensor(False))
        assert fstep.unshard_params(state.opt.momentum) is None
        save_checkpoint(tmp_path, state, step=1, mesh=mesh)
        back = load_checkpoint(tmp_path, fstep.init_state(params, fstep.sgd, trainable=lambda p: p == "w"), mesh=mesh)
        return [torch.equal(a, b) for a, b in zip(fstep.tree_leaves(back), fstep.tree_leaves(state), strict=True)]

    assert all(all(same) for same in fstep.simulate(f, **sizes))
