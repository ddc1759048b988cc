"""The kernels of attention on a GPU, beside plain operations in float64: skipped where there is none."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep.ops import dense, fa4, kernels
from tests.ops.test_attention import boundaries, inputs, pulled
from tests.ops.test_kernels import nondeterministic

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # What flash-attn-4's compiler says when it first compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
EVEN, UNEVEN = [256] * 3, [1, 330, 128, 7, 200]


@pytest.fixture(autouse=True)
def as_in_training() -> Iterator[None]:
    with nondeterministic():
        yield


def needs(kernel: str) -> None:
    why = {"dense": dense, "fa4": fa4}[kernel].why_not(torch.zeros(1, 1, 64, device="cuda", dtype=torch.bfloat16))
    if why is not None:
        pytest.skip(f"{kernel} {why}")


def on_gpu(lengths: list[int], xs: Any, method: str, window: int = 0, wrap: Any = lambda f: f) -> list[Tensor]:
    cu = boundaries(lengths).cuda()

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fstep.packed_attention(q, k, v, cu, max_seqlen=max(lengths), window=window, method=method)

    return pulled(wrap(f), *(x.cuda() for x in xs))


def near(got: list[Tensor], want: list[Tensor]) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == torch.bfloat16
        # A gradient may be nothing but rounding: a document of one token sees itself, whatever the query.
        assert (a.double().cpu() - b).norm() < 1e-2 * b.norm() + 1e-4 * b.numel() ** 0.5, name


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("kernel", "lengths", "window"),
    [
        ("dense", EVEN, 0),
        ("dense", [509], 0),
        ("fa4", EVEN, 0),
        ("fa4", UNEVEN, 0),
        ("fa4", UNEVEN, 100),
        ("fa4", UNEVEN, 1),
    ],
)
def test_equals_float64(kernel: str, lengths: list[int], window: int, dim: int, heads: tuple[int, int]) -> None:
    needs(kernel)
    xs = inputs(lengths, *heads, dim, dtype=torch.bfloat16)
    cu, wide = boundaries(lengths), [x.double() for x in xs]
    options: dict[str, Any] = dict(max_seqlen=max(lengths), window=window, method="math")
    want = pulled(lambda q, k, v: fstep.packed_attention(q, k, v, cu, **options), *wide)
    near(on_gpu(lengths, xs, kernel, window), want)


@pytest.mark.parametrize(("kernel", "lengths"), [("dense", EVEN), ("fa4", UNEVEN)])
def test_compiled_and_rematerialised(kernel: str, lengths: list[int]) -> None:
    needs(kernel)
    xs = inputs(lengths, dim=64, dtype=torch.bfloat16)
    want = [x.double().cpu() for x in on_gpu(lengths, xs, kernel)]
    near(on_gpu(lengths, xs, kernel, wrap=fstep.remat), want)
    torch._dynamo.reset()
    near(on_gpu(lengths, xs, kernel, wrap=functools.partial(torch.compile, fullgraph=True)), want)


@pytest.mark.parametrize(("kernel", "lengths"), [("dense", EVEN), ("fa4", UNEVEN), ("flash", [60] * 4)])
def test_auto_takes_it_and_waits_for_nothing(kernel: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel != "flash":
        needs(kernel)
    xs = [x.cuda() for x in inputs(lengths, dim=64, dtype=torch.bfloat16)]
    cu, taken = boundaries(lengths).cuda(), []
    choose = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *a: (taken.append(choose(*a)), taken[-1])[1])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fstep.packed_attention(q, k, v, cu, max_seqlen=max(lengths))

    pulled(attend, *xs)  # the first call plans or compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        pulled(attend, *xs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert taken == [kernel] * 4


@pytest.mark.parametrize("kernel", ["dense", "fa4"])
@pytest.mark.parametrize("size", [2, 3])
def test_ring(size: int, kernel: str) -> None:
    needs(kernel)
    lengths = [128 * size] * 2 if kernel == "dense" else [2 * size, 64 * size, 20 * size]
    packed = fstep.pack_thd(fstep.make_docs([torch.zeros(n, dtype=torch.int64) for n in lengths]), multiple_of=2 * size)
    packed = fstep.to_device(packed, "cuda")
    xs = inputs(lengths, 4, 2, 64, dtype=torch.bfloat16)
    cu = boundaries(lengths)
    want = pulled(
        lambda q, k, v: fstep.packed_attention(q, k, v, cu, max_seqlen=max(lengths), method="math"),
        *(x.double() for x in xs),
    )
    numbered = fstep.pack_thd(fstep.make_docs(torch.arange(sum(lengths)).split(lengths)), multiple_of=2 * size)

    def f(mesh: fstep.Mesh) -> list[Tensor]:
        part, at = fstep.cp_shard(packed, axis=mesh.cp), fstep.cp_shard(numbered, axis=mesh.cp).tokens
        options = dict(axis=mesh.cp, max_seqlen=part.max_seqlen, method="ring", kernel=kernel)
        attend = lambda q, k, v: fstep.cp_attention(q, k, v, part.cu_seqlens_padded, **options)  # noqa: E731
        got = pulled(attend, *(x[at].cuda() for x in xs))
        return [fstep.cp_unshard(x, part, axis=mesh.cp, grad="slice") for x in got]

    for got in fstep.simulate(f, cp=size):
        near(got, want)


@pytest.mark.parametrize("kernel", ["auto", "fa4"])
def test_deterministic_if_asked_for(kernel: str) -> None:
    if kernel == "fa4":
        needs(kernel)
    torch.use_deterministic_algorithms(True)
    xs = inputs(UNEVEN, 4, 2, 64, dtype=torch.bfloat16)
    first = on_gpu(UNEVEN, xs, kernel)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(on_gpu(UNEVEN, xs, kernel), first, strict=True))


def test_flash_is_torchs_varlen_attention() -> None:
    from torch.nn.attention.varlen import varlen_attn

    torch.use_deterministic_algorithms(True)
    q, k, v, g = (x.cuda() for x in inputs(UNEVEN, 4, 4, 64, dtype=torch.bfloat16))
    cu = boundaries(UNEVEN).cuda()
    want = pulled(lambda q, k, v: varlen_attn(q, k, v, cu, cu, 330, 330, window_size=(-1, 0)), q, k, v, g)
    got = on_gpu(UNEVEN, (q, k, v, g), "flash")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
