"""What only a GPU can show; skipped where there is none."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fstep
import fstep.testing
from fstep_models.dense import Config, Dense

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch says so when the first matrix product of a process happens to be in a backward pass.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]
ROPE = fstep.Rope(theta=10000.0, dim=64)
SMALL = Config(
    family="qwen3", vocab=512, dim=256, ffn=512, layers=4, heads=4, kv_heads=2, head_dim=64, rope=ROPE,
    windows=(0, 48, 0, 48), tied=True, qk_norm=True,
)  # fmt: skip


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Anything that waits for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def pack(seed: int = 0, documents: int = 9, length: int | None = None) -> fstep.Packed:
    key = fstep.Key.seed(seed)
    lengths = (key.uniform((documents,)) * 150 + 1).long().tolist()
    docs = [(key.fold_in(i).uniform((n,)) * 512).long() for i, n in enumerate(lengths)]
    return fstep.to_device(fstep.pack_thd(fstep.make_docs(docs), multiple_of=8, length=length), "cuda")


def gradients(model: Dense, params: dict, packed: fstep.Packed) -> tuple[fstep.Ratio, dict]:
    def loss_fn(p, x, mb):
        return fstep.sft_loss(model.logprobs(p, x, mb), mb.weights)

    return fstep.pp_forward_backward(model.stage(), loss_fn, params, [packed])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().cpu())


@pytest.mark.parametrize("window", [0, 5, 1000])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flash_attention_equals_float64(window: int, kv_heads: int) -> None:
    lengths = [1, 130, 64, 7, 200]
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), h, 64) for h in (4, kv_heads, kv_heads, 4)]
    q, k, v, out_grad = (torch.randn(s, generator=g).to(torch.bfloat16) for s in shapes)

    def run(method: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def f(q, k, v):
            boundaries = cu.to(q.device)
            return fstep.packed_attention(q, k, v, boundaries, max_seqlen=200, window=window, method=method)

        y, pull = fstep.vjp(f, *tensors[:3])
        return (y, *pull(tensors[3]))

    expected = run("math", *(x.double() for x in (q, k, v, out_grad)))
    for method in ("flash", "documents"):
        actual = run(method, *(x.cuda() for x in (q, k, v, out_grad)))
        assert all(x.dtype == torch.bfloat16 for x in actual)
        assert max(relative(a, b) for a, b in zip(actual, expected, strict=True)) < 1e-2, method


@pytest.mark.parametrize("window", [0, 2, 48, 100, 1000])
@pytest.mark.parametrize("size", [2, 3])
def test_attention_over_ranks_equals_float64(size: int, window: int) -> None:
    docs = fstep.make_docs([torch.zeros(n, dtype=torch.int64) for n in (1, 130, 64, 7, 200)])
    packed = fstep.to_device(fstep.pack_thd(docs, multiple_of=2 * size), "cuda")
    g = torch.Generator().manual_seed(0)
    shapes = [(len(packed.tokens), h, 64) for h in (6, 2, 2, 6)]
    xs = [torch.randn(s, generator=g).to("cuda", torch.bfloat16) for s in shapes]

    def whole(method: str, *xs: torch.Tensor) -> list[torch.Tensor]:
        options = dict(max_seqlen=packed.max_seqlen, window=window, method=method)
        y, pull = fstep.vjp(lambda *qkv: fstep.packed_attention(*qkv, packed.cu_seqlens_padded, **options), *xs[:3])
        return [y, *pull(xs[3])]

    exact, alone = whole("math", *(x.double() for x in xs)), whole("flash", *xs)

    def on_rank(mesh: fstep.Mesh, method: str, kernel: str, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        part = fstep.cp_shard(packed, axis=mesh.cp)
        numbered = replace(packed, tokens=torch.arange(len(packed.tokens), device="cuda"))
        at = fstep.cp_shard(numbered, axis=mesh.cp).tokens
        options = dict(axis=mesh.cp, max_seqlen=part.max_seqlen, window=window, method=method, kernel=kernel)
        y, pull = fstep.vjp(
            lambda *qkv: fstep.cp_attention(*qkv, part.cu_seqlens_padded, **options), *(x[at] for x in xs[:3])
        )
        return [fstep.cp_unshard(x, part, axis=mesh.cp, grad="slice") for x in (y, *pull(xs[3][at]))]

    for method in ("ring", "allgather", "ulysses"):
        for got in fstep.simulate(lambda mesh, m=method: on_rank(mesh, m, "auto", xs), cp=size):
            assert all(x.dtype == torch.bfloat16 for x in got)
            for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, alone, exact, strict=True):
                assert relative(a, c) < max(1e-2, 1.5 * relative(b, c)), (method, name)
        wide = [x.double() for x in xs]  # no fused kernel has float64
        for got in fstep.simulate(lambda mesh, m=method, w=wide: on_rank(mesh, m, "auto", w), cp=size):
            assert max(relative(a, c) for a, c in zip(got, exact, strict=True)) < 1e-12, method


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_attention_over_ranks_does_not_wait_for_the_device(method: str) -> None:
    packed = pack()
    x = torch.randn(len(packed.tokens) // 2, 4, 64, device="cuda", dtype=torch.bfloat16)

    parts = fstep.simulate(lambda mesh: fstep.cp_shard(packed, axis=mesh.cp), cp=2)

    def on_rank(mesh: fstep.Mesh) -> None:
        part = parts[mesh.cp.rank]
        options = dict(axis=mesh.cp, max_seqlen=part.max_seqlen, method=method)
        y, pull = fstep.vjp(lambda *qkv: fstep.cp_attention(*qkv, part.cu_seqlens_padded, **options), x, x, x)
        pull(y)

    fstep.simulate(on_rank, cp=2)
    torch.cuda.synchronize()
    with no_host_sync():
        fstep.simulate(on_rank, cp=2)


def test_float64_on_the_gpu_equals_the_cpu() -> None:
    model = Dense(SMALL)
    params, packed = model.init(fstep.Key.seed(0), dtype=torch.float64), pack()
    packed = fstep.cast(packed, torch.float64)
    loss, grads = gradients(model, fstep.to_device(params, "cuda"), packed)
    expected_loss, expected = gradients(model, params, fstep.to_device(packed, "cpu"))
    assert float(loss.num) == pytest.approx(float(expected_loss.num), rel=1e-12)
    fstep.testing.assert_trees_close(fstep.to_device(grads, "cpu"), expected, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"compile": True}, {"compile": True, "remat": "full"}])
def test_bfloat16_compute_stays_near_float64(options: dict) -> None:
    model = Dense(SMALL)
    params, packed = model.init(fstep.Key.seed(0), device="cuda"), pack()
    half = replace(model, dtype=torch.bfloat16, **options)
    loss, grads = gradients(half, params, packed)
    exact_loss, exact = gradients(model, fstep.cast(params, torch.float64), fstep.cast(packed, torch.float64))
    assert float(loss.num) == pytest.approx(float(exact_loss.num), rel=1e-3)
    for path, a, b in zip(fstep.tree_paths(grads), fstep.tree_leaves(grads), fstep.tree_leaves(exact), strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < 3e-2, path


@pytest.mark.parametrize("optimizer", [fstep.adamw, fstep.sgd, fstep.muon], ids=["adamw", "sgd", "muon"])
@pytest.mark.parametrize("donate", [False, True])
def test_updates_and_skips_without_waiting_for_the_device(optimizer, donate: bool) -> None:
    params = Dense(SMALL).init(fstep.Key.seed(0), device="cuda")
    state = fstep.init_state(params, optimizer)
    good = fstep.tree_map(lambda p: torch.ones_like(p), params)
    bad = {**good, "norm": torch.full_like(params["norm"], torch.nan)}
    loss = fstep.Ratio(torch.tensor(3.0, device="cuda"), torch.tensor(2.0, device="cuda"))
    for _ in range(2):  # the second time counters are where they stay
        torch.cuda.synchronize()
        with no_host_sync():
            grads, _ = fstep.finalize_grads(good, loss, mesh=fstep.Mesh(), max_norm=1.0)
            state = optimizer.update(state, grads, lr=1e-3, donate=donate)
        before = fstep.tree_map(torch.clone, (state.params, state.opt))
        torch.cuda.synchronize()
        with no_host_sync():
            grads, metrics = fstep.finalize_grads(bad, loss, mesh=fstep.Mesh(), max_norm=1.0)
            state = optimizer.update(state, grads, lr=1e-3, donate=donate)
        assert float(metrics["nonfinite"]) == 1.0
        same = fstep.tree_map(torch.equal, before, (state.params, state.opt))
        assert all(fstep.tree_leaves(same))
    assert (int(state.step), int(state.skipped)) == (4, 2)
    assert not torch.equal(state.params["embed"], params["embed"]) or donate


def test_a_donated_update_takes_no_second_state() -> None:
    w = torch.ones(64 << 20, device="cuda")
    state = fstep.init_state({"w": w}, fstep.adamw)
    grads = {"w": torch.full_like(w, 0.1)}
    del w
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    state = fstep.adamw.update(state, grads, lr=1e-3, donate=True)
    assert torch.cuda.max_memory_allocated() - held < 1 << 20


def test_a_head_holds_no_tokens_by_vocab_matrix() -> None:
    hidden = torch.randn(8192, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(131072, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 131072, (8192,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    fstep.value_and_grad(lambda h, w: fstep.token_logprobs(h, w, labels).sum(), argnums=(0, 1))(hidden, weight)
    # The matrix in float32 would be 4 GiB; chunks of at most 1/16 of it are what is there.
    assert torch.cuda.max_memory_allocated() - held < 1 << 30


def test_keys_draw_the_same_bits_on_the_gpu() -> None:
    key = fstep.Key.seed(7)
    assert torch.equal(key.bits((1000,), device="cuda").cpu(), key.bits((1000,)))
    assert torch.equal(key.uniform((1000,), device="cuda").cpu(), key.uniform((1000,)))
    assert torch.equal(key.permutation(1000, device="cuda").cpu(), key.permutation(1000))


def test_checkpoints_of_gpu_states(tmp_path: Path) -> None:
    state = fstep.init_state(Dense(SMALL).init(fstep.Key.seed(0), device="cuda"), fstep.adamw)
    fstep.save_checkpoint(tmp_path, state)
    again = fstep.load_checkpoint(tmp_path, state)
    assert all(
        a.device == b.device and torch.equal(a, b) for a, b in zip(*map(fstep.tree_leaves, (again, state)), strict=True)
    )


@pytest.mark.parametrize("extra", [[], ["--compile", "--remat", "full"]], ids=["plain", "compiled"])
def test_the_example_trains_on_the_gpu(extra: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "sft.py"
    done = subprocess.run(
        [sys.executable, script, "--steps", "150", "--out", tmp_path / "run", *extra],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after:   'Mars.'" in done.stdout
