"""Every method of packed_attention beside a naive loop over documents, heads and tokens in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fstep.grad.autodiff import value_and_grad, vjp
from fstep.ops import attention
from fstep.ops.attention import packed_attention

METHODS = ["flash", "documents", "math"]
ROWS = {
    "mixed": [5, 1, 9, 3],  # a document of one token
    "one": [7],
    "singles": [1, 1, 1],
    "empty-between": [4, 0, 3],
    "long": [40, 70],  # longer than a block of the fused kernel
}


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int, scale: float | None) -> Tensor:
    """One query at a time, with plain arithmetic."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    rows, start = [], 0
    for n in lengths:
        for i in range(n):
            first = max(0, i - window + 1) if window else 0
            seen = slice(start + first, start + i + 1)
            heads = []
            for h in range(q.shape[1]):
                scores = (k[seen, h // group] * q[start + i, h]).sum(-1) * scale
                p = scores.exp() / scores.exp().sum()
                heads.append((p[:, None] * v[seen, h // group]).sum(0))
            rows.append(torch.stack(heads))
        start += n
    return torch.stack(rows)


def inputs(lengths: list[int], heads: int = 4, kv_heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64):
    T = sum(lengths)
    q, g = (torch.randn(T, heads, dim, dtype=torch.float64).to(dtype) for _ in range(2))
    k, v = (torch.randn(T, kv_heads, dim, dtype=torch.float64).to(dtype) for _ in range(2))
    return q, k, v, g


def pulled(f: Callable, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("row", ROWS)
def test_equals_the_naive_loop(row: str, window: int, kv_heads: int, method: str) -> None:
    lengths = ROWS[row]
    q, k, v, g = inputs(lengths, kv_heads=kv_heads)
    cu, scale = boundaries(lengths), 0.7 if window == 3 else None
    expected = pulled(lambda q, k, v: naive(q, k, v, lengths, window, scale), q, k, v, g)
    got = pulled(
        lambda q, k, v: packed_attention(q, k, v, cu, max_seqlen=max(lengths), window=window, scale=scale, method=method),
        *(q, k, v, g),
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [1, 3, 20])
def test_any_head_dim(dim: int, method: str) -> None:
    q, k, v, g = inputs([6, 2], dim=dim)
    expected = pulled(lambda q, k, v: naive(q, k, v, [6, 2], 0, None), q, k, v, g)
    got = pulled(lambda q, k, v: packed_attention(q, k, v, boundaries([6, 2]), max_seqlen=6, method=method), q, k, v, g)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_any_memory_layout(method: str, expanded: bool) -> None:
    """The fused kernel reads rows of a head as if they were contiguous; these are strided, expanded and transposed."""
    T, lengths = 6, [4, 2]
    q = torch.randn(T, 8, 2, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(8, 2, T, dtype=torch.float64).permute(2, 1, 0)
    v = torch.randn(T, 2, 1, dtype=torch.float64).expand(T, 2, 8)
    g = torch.randn(T, 8, 2, dtype=torch.float64).transpose(1, 2)
    if expanded:
        g = torch.ones(1, dtype=torch.float64).expand(T, 2, 8)  # what .sum() pulls back
    expected = pulled(lambda q, k, v: naive(q, k, v, lengths, 0, None), q, k, v, g)
    got = pulled(lambda q, k, v: packed_attention(q, k, v, boundaries(lengths), max_seqlen=4, method=method), q, k, v, g)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype: torch.dtype, method: str) -> None:
    lengths = [5, 1, 9]
    q, k, v, g = inputs(lengths, dtype=dtype)
    got = pulled(lambda q, k, v: packed_attention(q, k, v, boundaries(lengths), max_seqlen=9, method=method), q, k, v, g)
    assert [x.dtype for x in got] == [dtype] * 4
    wide = [x.double() for x in (q, k, v, g)]
    expected = pulled(lambda q, k, v: naive(q, k, v, lengths, 0, None), *wide)
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 2 * eps * b.norm()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_leaks_between_documents(method: str) -> None:
    lengths = [5, 1, 9]
    q, k, v, _ = inputs(lengths)
    own = slice(5, 6)

    def middle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = packed_attention(q, k, v, boundaries(lengths), max_seqlen=9, method=method)
        return y[own].square().sum()

    leaves = [x.requires_grad_() for x in (q, k, v)]
    for grad in torch.autograd.grad(middle(*leaves), leaves):
        outside = torch.cat([grad[:5], grad[6:]])
        assert torch.equal(outside, torch.zeros_like(outside))
    with torch.no_grad():
        before = middle(*leaves)
        moved = [torch.where(torch.arange(15)[:, None, None] == 5, x, 1e3) for x in leaves]
        assert torch.equal(middle(*moved), before)


@pytest.mark.parametrize("method", METHODS)
def test_padding_at_the_end_changes_nothing_before_it(method: str) -> None:
    """A padded row gives its padding to the last document: later places, which nobody sees."""
    q, k, v, g = inputs([4, 6])
    short = [x[:7] for x in (q, k, v, g)]
    expected = pulled(lambda q, k, v: naive(q, k, v, [4, 3], 0, None), *short)
    g = torch.where(torch.arange(10)[:, None, None] < 7, g, 0)  # weight 0 on the padding
    got = pulled(lambda q, k, v: packed_attention(q, k, v, boundaries([4, 6]), max_seqlen=6, method=method), q, k, v, g)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[:7], b, rtol=1e-12, atol=1e-12)


def test_auto_takes_the_fused_kernel_outside_and_math_inside_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs([3, 2])
    cu = boundaries([3, 2])

    def f(q: Tensor) -> Tensor:
        return packed_attention(q, k, v, cu, max_seqlen=3).square().sum()

    fused = f(q)
    expected = pulled(lambda q, k, v: naive(q, k, v, [3, 2], 0, None), q, k, v, 2 * naive(q, k, v, [3, 2], 0, None))
    torch.testing.assert_close(torch.func.grad(f)(q), expected[1], rtol=1e-12, atol=1e-12)
    qs = torch.stack([q, 2 * q])
    torch.testing.assert_close(torch.func.vmap(f)(qs), torch.stack([f(x) for x in qs]), rtol=1e-12, atol=1e-12)

    def gone(*_: object) -> None:
        raise AssertionError("not the fused kernel")

    monkeypatch.setattr(attention, "_attend_math", gone)
    monkeypatch.setattr(attention, "_attend_documents", gone)
    torch.testing.assert_close(f(q), fused, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="not the fused kernel"):
        torch.func.grad(f)(q)


def test_math_is_differentiated_twice_and_flash_says_that_it_is_not() -> None:
    q, k, v, _ = inputs([3, 2], dim=4)
    cu = boundaries([3, 2])

    def twice(method: str) -> tuple[Tensor, Tensor]:
        def norm(q: Tensor) -> Tensor:
            f = value_and_grad(lambda q: packed_attention(q, k, v, cu, max_seqlen=3, method=method).square().sum())
            return f(q)[1].square().sum()

        return value_and_grad(norm)(q)

    _, got = twice("math")
    expected = torch.func.grad(
        lambda q: torch.func.grad(lambda q: naive(q, k, v, [3, 2], 0, None).square().sum())(q).square().sum()
    )(q)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="packed_attention: method 'flash' can be differentiated once; pass method='"):
        twice("flash")
    with pytest.raises(ValueError, match=r"method 'flash' does not run inside torch\.func; pass 'auto' or 'math'"):
        torch.func.grad(lambda q: packed_attention(q, k, v, cu, max_seqlen=3, method="flash").sum())(q)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("window", [0, 2])
def test_opcheck(window: int) -> None:
    q, k, v, g = inputs([4, 1, 3], kv_heads=2, dtype=torch.float32)
    at = (boundaries([4, 1, 3]), boundaries([4, 1, 3]), 4, 4, window - 1, 0, 0.5, "auto")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention._attend, (*leaves, *at))
    out, lse = attention._attend(q, k, v, *at)
    torch.library.opcheck(attention._attend_backward, (g, q, k, v, out, lse, *at))


def test_logsumexp() -> None:
    q, k, v, _ = inputs([3, 2], heads=1, kv_heads=1)
    _, lse = attention._attend(q, k, v, boundaries([3, 2]), boundaries([3, 2]), 3, 3, -1, 0, 0.5, "auto")
    scores = (k[3:5, 0] * q[4, 0]).sum(-1) * 0.5
    torch.testing.assert_close(lse[0, 4], scores.exp().sum().log(), rtol=1e-12, atol=1e-12)


CPU = ("is_causal", "attn_mask", "scale")
CUDA = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "is_causal", "scale", "window_size_left", "window_size_right")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_scaled_dot_product_flash_attention_for_cpu", CPU),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", (*CPU, "logsumexp")),
        ("_flash_attention_forward", (*CUDA, "return_debug_mask", "softmax_logsumexp")),
        ("_flash_attention_backward", (*CUDA, "logsumexp", "rng_state", "unused")),
        ("_scaled_dot_product_cudnn_attention", ("compute_log_sumexp", "is_causal", "return_debug_mask", "scale")),
        (
            "_scaled_dot_product_cudnn_attention_backward",
            ("logsumexp", "philox_seed", "max_q", "max_k", "is_causal", "scale"),
        ),
    ],
)
def test_private_kernel_is_there(name: str, arguments: tuple[str, ...]) -> None:
    if not hasattr(torch.ops.aten, name):
        pytest.fail(f"this torch has no torch.ops.aten.{name}; find its successor for fstep/ops")
    schema = str(getattr(torch.ops.aten, name).default._schema)
    for argument in arguments:
        assert f" {argument}" in schema, f"the arguments of {name} have changed: {schema}"


@pytest.mark.parametrize("window", [0, 2])
def test_documents_in_a_graph_that_serves_all_rows(window: int) -> None:
    """As a compiled block in float32 or float64 on a GPU needs it, where no kernel is fused."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(packed_attention, backend=count, fullgraph=True, dynamic=True)
    for lengths in ([5, 9, 3], [6, 2, 9]):
        xs, cu = inputs(lengths), boundaries(lengths)
        how = {"max_seqlen": 9, "window": window, "method": "documents"}
        got = pulled(lambda q, k, v, cu=cu, how=how: compiled(q, k, v, cu, **how), *xs)
        want = pulled(lambda q, k, v, cu=cu, how=how: packed_attention(q, k, v, cu, **how), *xs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


def test_inputs_are_not_changed() -> None:
    q, k, v, g = inputs([3, 2])
    cu = boundaries([3, 2])
    before = [x.clone() for x in (q, k, v, g, cu)]
    for method in METHODS:
        _, pull = vjp(lambda q, k, v, m=method: packed_attention(q, k, v, cu, max_seqlen=3, method=m), q, k, v)
        pull(g)
    for x, old in zip((q, k, v, g, cu), before, strict=True):
        assert x._version == 0 and torch.equal(x, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(method="fast"),
            "packed_attention: method 'fast' is unknown; pass one of auto, flash, dense, fa4, documents, math",
        ),
        (dict(k=torch.zeros(5, 3, 8), v=torch.zeros(5, 3, 8)), "3 key heads do not divide 4 query heads"),
        (dict(window=-1), "window is -1; pass 0 for no window"),
        (dict(k=torch.zeros(4, 2, 8), v=torch.zeros(4, 2, 8)), r"k \(4, 2, 8\) and v \(4, 2, 8\) do not fit"),
        (dict(v=torch.zeros(5, 4, 8)), r"v \(5, 4, 8\) do not fit"),
        (dict(q=torch.zeros(5, 32)), r"q \(5, 32\), .* do not fit; they are \[T, heads, head_dim\]"),
        (dict(cu=torch.tensor([0, 3])), r"cu_seqlens are \[0, 3\] for 5 tokens; .* pass packed.cu_seqlens_padded"),
        (dict(cu=torch.tensor([1, 5])), r"cu_seqlens are \[1, 5\] for 5 tokens"),
        (dict(cu=torch.tensor([0, 4, 3, 5])), r"cu_seqlens are \[0, 4, 3, 5\] for 5 tokens"),
        (dict(cu=torch.tensor([], dtype=torch.int32)), r"cu_seqlens are \[\] for 5 tokens"),
        (dict(max_seqlen=2), "max_seqlen is 2 and a document has 3 places; pass packed.max_seqlen"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_input(change: dict, message: str, method: str) -> None:
    given = dict(q=torch.zeros(5, 4, 8), k=torch.zeros(5, 2, 8), v=torch.zeros(5, 2, 8), cu=boundaries([3, 2]))
    given |= dict(max_seqlen=3, method=method) | change
    with pytest.raises(ValueError, match=message):
        packed_attention(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("cu"), **given)
