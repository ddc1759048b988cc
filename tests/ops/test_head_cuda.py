"""The head's Triton kernels beside the same passes in torch's operations: on a GPU, or interpreted on the CPU.

For the latter Triton has to be installed, and for Triton 3.6 a NumPy older than 2.4:
TRITON_INTERPRET=1 python -m pytest tests/ops/test_head_cuda.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="needs Triton, which comes with torch for GPUs")
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)

import fstep  # noqa: E402
from fstep.ops import head, head_cuda, head_passes  # noqa: E402
from tests.ops.test_head import oracle as logprob_oracle  # noqa: E402
from tests.ops.test_head_sum import oracle  # noqa: E402

# The interpreter's own: it computes with NumPy.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{x}") for x in ("Conversion of an array:DeprecationWarning", ":RuntimeWarning")
]
DEVICE = "cuda" if GPU else "cpu"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks, the last one shorter."""
    monkeypatch.setattr(head_cuda, "BLOCK", 32)


def rows_of(columns: int, n: int = 7, size: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits, float32 and not contiguous, and the places of their labels, some of them elsewhere."""
    logits = (torch.randn(n, columns + 3) * size).to(DEVICE)[:, :columns]
    here = torch.randint(0, columns, (n,), device=DEVICE)
    here[::3] = -1
    here[-1] = columns - 1
    return logits, here


def exact(logits: Tensor, here: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """The pass in torch's operations, in float64."""
    return head_passes.summarize(logits.double(), here, temperature, entropy)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
def test_summarize(temperature: float, entropy: bool, columns: int) -> None:
    logits, here = rows_of(columns)
    logits[2] *= 1e4  # far apart: everything but the largest underflows
    logits[3] += 1e4
    before = logits.clone()
    top, sums = head_cuda.summarize(logits, here, temperature, entropy)
    want_top, want = exact(logits, here, temperature, entropy)
    torch.testing.assert_close(top.double(), want_top, rtol=2 * EPS, atol=0)
    rest = [i for i in range(7) if i not in (2, 3)]
    torch.testing.assert_close(sums.double()[:, rest], want[:, rest], rtol=40 * EPS, atol=40 * EPS)
    # Of large logits float32 has fewer digits left behind the point: as many less as they are large.
    torch.testing.assert_close(sums.double(), want, rtol=1e-2, atol=float(logits.abs().max()) / temperature * EPS)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("entropy", [False, True])
def test_ids_that_are_ruled_out(entropy: bool) -> None:
    """Logits of -inf: some of a row, a whole block, all; the same NaN as in torch's operations, and no other."""
    logits, here = rows_of(100, n=5)
    logits[0, 3] = logits[1, :64] = logits[2] = -torch.inf
    logits[3, 40] = torch.nan
    here[:] = torch.tensor([3, 2, -1, 5, 6])
    got, want = (
        head_cuda.summarize(logits, here, 1.0, entropy),
        head_passes.summarize(logits.cpu(), here.cpu(), 1.0, entropy),
    )
    assert torch.equal(got[0].cpu()[:3], want[0][:3]) and got[1][0, 3].isnan()
    used = [0, 1, 2] if entropy else [0, 2]
    a, b = got[1].cpu()[used][:, [0, 1, 2, 4]], want[1][used][:, [0, 1, 2, 4]]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_differentiate(dtype: torch.dtype, temperature: float, entropy: bool, columns: int) -> None:
    logits, here = rows_of(columns)
    lse = (logits.double() / temperature).logsumexp(-1).float()
    g, h, ent = torch.randn(3, 7, device=DEVICE)
    g[1] = h[1] = 0  # dropped
    logits[1, 0] = lse[1] = torch.nan
    g[2], h[4] = 0, 0
    options = (h, ent) if entropy else (None, None)
    wide = [None if x is None else x.double() for x in options]
    want = torch.empty(7, columns, dtype=torch.float64, device=DEVICE)
    head_passes.differentiate(logits.double(), here, lse.double(), g.double(), *wide, temperature, want)
    out = torch.full((7, columns + 5), 9.0, dtype=dtype, device=DEVICE)
    head_cuda.differentiate(logits, here, lse, g, *options, temperature, out[:, :columns])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out[:, :columns].double(), want, rtol=max(eps, 100 * EPS), atol=100 * EPS)
    assert (out[:, columns:] == 9).all() and not out[1, :columns].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0])
def test_scale(factor: float, dtype: torch.dtype) -> None:
    x = torch.randn(7, 13, device=DEVICE).to(dtype)
    y = x.clone()
    head_cuda.scale_(y, torch.tensor(factor, device=DEVICE))
    assert torch.equal(y, (x.float() * factor).to(dtype))
    head_cuda.scale_(y[:0], torch.tensor(2.0, device=DEVICE))


@pytest.fixture(params=[1024, 2, 1], ids=lambda n: f"chunk{n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: request.param)
    monkeypatch.setattr(head_passes, "has_kernels", lambda logits: logits.dtype == torch.float32)
    return request.param


def inputs(dtype: torch.dtype, tokens: int = 11, dim: int = 8, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels, weights = torch.randint(0, vocab, (tokens,)), torch.rand(tokens) + 0.1
    labels[::4], weights[1::3] = -100, 0
    made = torch.randn(tokens, dim).to(dtype), torch.randn(vocab, dim).to(dtype), labels, weights
    return tuple(x.to(DEVICE) for x in made)  # type: ignore[return-value]


def errors(got: Any, want: Any) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum(dtype: torch.dtype, temperature: float, chunk: int) -> None:
    hidden, weight, labels, weights = inputs(dtype)

    def mine(h: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return -0.5 * fstep.token_logprob_sum(h, w, labels, s, temperature=temperature)

    value, grads = fstep.value_and_grad(mine, (0, 1, 2))(hidden, weight, weights)
    want, exact = fstep.value_and_grad(lambda h, w, s: -0.5 * oracle(h, w, labels, s, temperature), (0, 1, 2))(
        *(x.double() for x in (hidden, weight, weights))
    )
    bound = 4 * torch.finfo(dtype).eps + 100 * EPS
    assert max(errors((value, *grads), (want, *exact))) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_each(entropy: bool, dtype: torch.dtype, chunk: int) -> None:
    hidden, weight, labels, weights = inputs(dtype)

    def loss(f: Any) -> Any:
        def of(h: Tensor, w: Tensor) -> tuple[Tensor, Any]:
            logp, ent = f(h, w)
            more = (weights * ent).square().sum() if entropy else 0
            return (weights * logp).sum() + more, (logp, ent) if entropy else (logp,)

        return fstep.value_and_grad(of, (0, 1), has_aux=True)

    def mine(h: Tensor, w: Tensor) -> Any:
        out = fstep.token_logprobs(h, w, labels, temperature=0.7, entropy=entropy)
        return out if isinstance(out, tuple) else (out, None)

    (_, outs), grads = loss(mine)(hidden, weight)
    (_, want), exact = loss(lambda h, w: logprob_oracle(h, w, labels, 0.7))(hidden.double(), weight.double())
    bound = 4 * torch.finfo(dtype).eps + 100 * EPS
    assert max(errors((*outs, *grads), (*want, *exact))) < bound


gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@gpu
@pytest.mark.parametrize("vocab", [1000, 50257])
@pytest.mark.parametrize("wide", [False, True])
def test_logits_are_not_rounded(wide: bool, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a logit of 20 is off by up to 0.06, and so were the log probability."""
    monkeypatch.setattr(head_cuda, "BLOCK", 4096)
    hidden, weight, labels, weights = inputs(torch.bfloat16, tokens=4000, dim=64, vocab=vocab)
    weight = weight * 0.5
    logp = fstep.token_logprobs(hidden, weight, labels)
    exact = logprob_oracle(hidden.double(), weight.double(), labels, 1.0)[0]
    assert (logp - exact).abs().max() < 1e-4
    given = (hidden, weight.float() if wide else weight)
    _, grads = fstep.value_and_grad(lambda h, w: fstep.token_logprob_sum(h, w, labels, weights), (0, 1))(*given)
    _, want = fstep.value_and_grad(lambda h, w: oracle(h, w, labels, weights), (0, 1))(*(x.double() for x in given))
    assert grads[1].dtype == given[1].dtype and max(errors(grads, want)) < 3e-3


@gpu
def test_nothing_waits_for_the_device_and_memory_is_bounded() -> None:
    tokens, vocab, dim = 8192, 131072, 64
    hidden = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16)
    labels, weights = torch.randint(0, vocab, (tokens,), device="cuda"), torch.ones(tokens, device="cuda")
    f = fstep.value_and_grad(lambda h, w: -fstep.token_logprob_sum(h, w, labels, weights), (0, 1))
    f(hidden, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        f(hidden, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - held < 1.2 * (1 + head.HELD) * head.CHUNK_BYTES
