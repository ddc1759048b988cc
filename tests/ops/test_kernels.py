"""The kernels of attention: which is taken when, the batch of equal documents, and that all fit each other."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fstep
from fstep import Mesh, packed_attention
from fstep.ops import attention, dense, fa4, flash, kernels
from fstep.ops.rows import Rows, even
from tests.ops.test_attention import boundaries, inputs, naive, pulled

EVEN = [[6, 6, 6], [7], [1, 1, 1], [40, 40]]


def equal(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", EVEN, ids=str)
def test_a_batch_equals_the_naive_loop(lengths: list[int], kv_heads: int, window: int) -> None:
    q, k, v, g = inputs(lengths, kv_heads=kv_heads)
    scale = 0.7 if kv_heads == 2 else None
    options = dict(max_seqlen=lengths[0], window=window, scale=scale, method="dense")
    expected = pulled(lambda q, k, v: naive(q, k, v, lengths, 0, scale), q, k, v, g)
    equal(pulled(lambda q, k, v: packed_attention(q, k, v, boundaries(lengths), **options), q, k, v, g), expected)


def test_a_batch_of_any_memory_layout() -> None:
    T, lengths = 6, [3, 3]
    q = torch.randn(T, 8, 2, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(8, 2, T, dtype=torch.float64).permute(2, 1, 0)
    v = torch.randn(T, 2, 1, dtype=torch.float64).expand(T, 2, 8)
    g = torch.ones(1, dtype=torch.float64).expand(T, 2, 8)
    expected = pulled(lambda q, k, v: naive(q, k, v, lengths, 0, None), q, k, v, g)
    f = lambda q, k, v: packed_attention(q, k, v, boundaries(lengths), max_seqlen=3, method="dense")  # noqa: E731
    equal(pulled(f, q, k, v, g), expected)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [5, 3, 4]], ids=str)
def test_compiled_and_rematerialised(lengths: list[int]) -> None:
    q, k, v, g = inputs(lengths)
    cu = boundaries(lengths)
    f = lambda q, k, v: 2 * packed_attention(q, k, v, cu, max_seqlen=max(lengths)).tanh()  # noqa: E731
    expected = pulled(lambda q, k, v: 2 * naive(q, k, v, lengths, 0, None).tanh(), q, k, v, g)
    for policy in ("none", "full", [torch.ops.fstep.attend.default]):
        run = fstep.remat(f, policy)
        equal(pulled(run, q, k, v, g), expected)
        torch._dynamo.reset()
        equal(pulled(torch.compile(run, backend="aot_eager", fullgraph=True), q, k, v, g), expected)
    torch._dynamo.reset()


def test_one_graph_for_even_and_uneven_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter, taken = CompileCounter(), []
    for name in ("flash", "dense"):
        module = {"flash": flash, "dense": dense}[name]
        spy = functools.partial(lambda name, f, *a: (taken.append(name), f(*a))[1], name, module.forward)
        monkeypatch.setattr(module, "forward", spy)
    compiled = torch.compile(packed_attention, backend=counter, fullgraph=True)
    for lengths in ([5, 7], [4, 4, 4], [3, 4, 5], [6, 6], [2, 10], [12]):
        q, k, v, _ = inputs(lengths)
        got = compiled(q, k, v, boundaries(lengths), max_seqlen=max(lengths))
        equal([got], [naive(q, k, v, lengths, 0, None)])
    assert taken == ["flash", "dense"] * 3
    assert counter.frame_count <= 2  # the first, and one with symbolic sizes
    torch._dynamo.reset()


def rows(lengths: list[int], longest: int | None = None, window: int = 0) -> Rows:
    cu, longest = boundaries(lengths), longest or max(lengths)
    return Rows(cu, cu, longest, longest, window - 1, 0)


@pytest.mark.parametrize(
    ("of", "kernel"),
    [
        (rows([4, 4, 4]), "dense"),
        (rows([12]), "dense"),
        (rows([4, 4, 4], window=4), "dense"),  # the whole document
        (rows([4, 4, 4], window=3), "flash"),
        (rows([4, 4, 4], window=1), "flash"),
        (rows([4, 4, 4], longest=5), "flash"),  # an upper bound may be larger
        (rows([4, 3, 5]), "flash"),
        (rows([6, 6, 0], longest=6), "flash"),
    ],
)
def test_what_is_taken_on_the_cpu(of: Rows, kernel: str) -> None:
    assert kernels.choose(torch.zeros(12, 4, 8), torch.zeros(12, 2, 8), of) == kernel


def test_even_compares_queries_and_keys_each_with_their_own() -> None:
    of_q, of_k = boundaries([4, 4]), boundaries([2, 2])
    q, k = torch.zeros(8, 1, 1), torch.zeros(4, 1, 1)
    assert even(q, k, Rows(of_q, of_k, 4, 2))
    assert not even(q, k, Rows(of_q, of_k, 4, 3)) and not even(q, k, Rows(of_q, of_k, 5, 2))
    assert not even(q[:0], k[:0], Rows(of_q[:1], of_k[:1], 0, 0))


def test_a_batch_is_not_causal_where_keys_are_more_than_queries() -> None:
    """The kernels of a batch let query i see keys up to i; here the last query stands at the last key."""
    (q, k, v, g), at = sample([4, 4], [6, 6], (-1, 0))
    assert kernels.choose(q, k, at) == "flash"
    (out, lse), want = kernels.run("auto", q, k, v, at, 0.3), kernels.run("documents", q, k, v, at, 0.3)
    equal((out, lse), want)
    equal(*(kernels.pull(n, g, q, k, v, out, lse, at, 0.3) for n in ("auto", "documents")))


def test_without_a_fused_kernel_auto_goes_through_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_fused", lambda q: False)
    monkeypatch.setattr(attention, "_attend_math", None)
    monkeypatch.setattr(attention, "_attend", None)
    q, k, v, _ = inputs([3, 2])
    equal([packed_attention(q, k, v, boundaries([3, 2]), max_seqlen=3)], [naive(q, k, v, [3, 2], 0, None)])


@contextmanager
def nondeterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def taken_on_a_gpu(lengths: tuple[int, int], documents: int, dtype: torch.dtype, dim: int, window: int = 0) -> str:
    """Documents of `lengths`: how long each is, and how long max_seqlen says that one may be."""
    with FakeTensorMode():
        q = torch.empty(documents * lengths[0], 4, dim, dtype=dtype, device="cuda")
        cu = torch.empty(documents + 1, dtype=torch.int32, device="cuda")
        return kernels.choose(q, q, Rows(cu, cu, lengths[1], lengths[1], window - 1, 0))


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("case", "with_fa4", "without", "on_ampere"),
    [
        (((2048, 2048), 8, BF16, 128), "fa4", "dense", "flash"),
        (((16384, 16384), 1, torch.float16, 64), "fa4", "dense", "flash"),
        (((512, 512), 32, BF16, 128), "dense", "dense", "flash"),
        (((640, 640), 32, BF16, 128), "fa4", "dense", "flash"),
        (((128, 128), 128, BF16, 128), "dense", "dense", "flash"),
        (((500, 500), 32, BF16, 128), "fa4", "flash", "flash"),  # no multiple of 128: cuDNN would plan each length anew
        (((500, 4096), 32, BF16, 128), "fa4", "flash", "flash"),
        (((60, 128), 128, BF16, 128), "flash", "flash", "flash"),  # nothing longer than a tile
        (((60, 129), 128, BF16, 128), "fa4", "flash", "flash"),
        (((2048, 2048), 8, BF16, 128, 100), "fa4", "flash", "flash"),
        (((2048, 2048), 8, BF16, 256), "flash", "flash", "flash"),
        (((2048, 2048), 8, BF16, 100), "flash", "flash", "flash"),
        (((2048, 2048), 8, BF16, 264), "documents", "documents", "documents"),
        (((2048, 2048), 8, FP32, 128), "documents", "documents", "documents"),
    ],
)
def test_what_is_taken_on_a_gpu(
    case: Any, with_fa4: str, without: str, on_ampere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    there = True
    monkeypatch.setattr(fa4, "is_there", lambda: there)
    assert taken_on_a_gpu(*case) == ("documents" if without == "documents" else "flash")  # deterministic, as tests are
    with nondeterministic():
        assert taken_on_a_gpu(*case) == with_fa4
        there = False
        assert taken_on_a_gpu(*case) == without
        there, capability = True, (8, 0)
        assert taken_on_a_gpu(*case) == on_ampere


def test_a_package_that_cannot_be_imported_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise AttributeError("another version of something")

    monkeypatch.setattr(fa4, "package", broken)
    fa4.is_there.cache_clear()
    assert not fa4.is_there()
    fa4.is_there.cache_clear()


class Package:
    """What flash-attn-4 says of its two functions, in plain operations: None is without end, and rows end together."""

    def seen(self, n: int, m: int, causal: bool, left: int | None, right: int | None) -> Tensor:
        assert not (causal and (left is not None or right is not None)), "causal is one way to say it, a window another"
        back = torch.arange(m - n, m)[:, None] - torch.arange(m)
        after = 0 if causal else right
        return (back <= (math.inf if left is None else left)) & (-back <= (math.inf if after is None else after))

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float, causal: bool, left: Any, right: Any) -> Tensor:
        s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * softmax_scale
        return s.masked_fill(~self.seen(len(q), len(k), causal, left, right), -math.inf)

    def each(self, options: dict) -> Iterator[tuple[slice, slice]]:
        cu_q, cu_k = options["cu_seqlens_q"], options["cu_seqlens_k"]
        assert options["max_seqlen_q"] == max(cu_q.diff()) and options["max_seqlen_k"] == max(cu_k.diff())
        for i in range(len(cu_q) - 1):
            yield slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])

    def _flash_attn_fwd(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **o: Any) -> tuple[Any, ...]:
        assert return_lse
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for a, b in self.each(o):
            s = self.scores(q[a], k[b], o["softmax_scale"], o["causal"], o["window_size_left"], o["window_size_right"])
            lse[:, a] = s.logsumexp(-1)
            out[a] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[b].repeat_interleave(q.shape[1] // v.shape[1], 1))
        return out, lse, None, None, None

    def _flash_attn_bwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, deterministic: bool, **o: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert deterministic  # as tests are
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():  # dq = sum of ds k with ds = p (dp - <dout, out>): of these keys, given out and lse of all
            total = q.new_zeros(())
            for a, b in self.each(o):
                s = self.scores(q[a], k[b], o["softmax_scale"], o["causal"], o["window_size_left"], o["window_size_right"])
                p = (s - lse[:, a, None]).exp()
                y = torch.einsum("hqk,khd->qhd", p, v[b].repeat_interleave(q.shape[1] // v.shape[1], 1))
                total = total + (dout[a] * y).sum() - ((dout[a] * out[a]).sum(-1).t()[..., None] * p).sum()
        return torch.autograd.grad(total, (q, k, v))


REACHES = [(-1, 0), (2, 0), (-1, -1), (1, -1), (0, 0)]


def sample(lengths_q: list[int], lengths_k: list[int], reach: tuple[int, int]) -> tuple[list[Tensor], Rows]:
    T, S = sum(lengths_q), sum(lengths_k)
    xs = [torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((T, 4), (S, 2), (S, 2), (T, 4))]
    return xs, Rows(boundaries(lengths_q), boundaries(lengths_k), max(lengths_q), max(lengths_k), *reach)


@pytest.mark.parametrize("reach", REACHES)
def test_fa4_is_told_the_rows_in_its_words(reach: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "package", Package)
    (q, k, v, g), at = sample([5, 3, 1], [6, 3, 4], reach)
    out, lse = kernels.run("documents", q, k, v, at, 0.3)
    equal(fa4.forward(q, k, v, at, 0.3), (out, lse))
    equal(fa4.backward(g, q, k, v, out, lse, at, 0.3), kernels.pull("documents", g, q, k, v, out, lse, at, 0.3))


@pytest.mark.parametrize("one", ["flash", "dense", "documents"])
@pytest.mark.parametrize("other", ["flash", "dense", "documents"])
def test_every_backward_fits_every_forward(one: str, other: str) -> None:
    (q, k, v, g), at = sample([4, 4], [4, 4], (-1, 0))
    want = pulled(lambda q, k, v: naive(q, k, v, [4, 4], 0, 0.3), q, k, v, g)
    out, lse = kernels.run(one, q, k, v, at, 0.3)
    equal([out, *kernels.pull(other, g, q, k, v, out, lse, at, 0.3)], want)


@pytest.mark.parametrize("keys", [2, 4, 7])
def test_a_batch_in_part(keys: int) -> None:
    """As a ring needs it: some of the keys, all seen, and the logsumexp of all; other numbers of queries and keys."""
    (q, k, v, g), at = sample([4, 4, 4], [keys] * 3, (-1, -1))
    (more, *_), _ = sample([4, 4, 4], [1], (-1, -1))
    (out, lse), (out_here, lse_here) = (kernels.run(n, q, k, v, at, 0.3) for n in ("documents", "dense"))
    equal((out_here, lse_here), (out, lse))
    out, lse = more, lse + torch.rand_like(lse)  # of all keys, whatever the others are
    equal(*(kernels.pull(n, g, q, k, v, out, lse, at, 0.3) for n in ("dense", "documents")))


@pytest.mark.parametrize("size", [2, 3])
def test_a_ring_over_documents_of_one_length_uses_batches(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = fstep.pack_thd(fstep.make_docs([torch.arange(4 * size)] * 2))
    q, k, v, g = inputs([4 * size] * 2)
    whole = pulled(lambda q, k, v: naive(q, k, v, [4 * size] * 2, 0, None), q, k, v, g)
    monkeypatch.setattr(flash, "_cpu_forward", None)
    monkeypatch.setattr(flash, "_cpu_backward", None)

    def f(mesh: Mesh) -> list[Tensor]:
        part = fstep.cp_shard(packed, axis=mesh.cp)
        at = fstep.cp_shard(fstep.pack_thd(fstep.make_docs([torch.arange(4 * size), torch.arange(4 * size, 8 * size)])),
                            axis=mesh.cp).tokens  # fmt: skip
        attend = lambda q, k, v: fstep.cp_attention(  # noqa: E731
            q, k, v, part.cu_seqlens_padded, axis=mesh.cp, max_seqlen=part.max_seqlen, method="ring"
        )
        got = pulled(attend, *(x[at] for x in (q, k, v, g)))
        return [fstep.cp_unshard(x, part, axis=mesh.cp, grad="slice") for x in got]

    for got in fstep.simulate(f, cp=size):
        equal(got, whole)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kernel", ["auto", "flash", "dense"])
def test_opcheck(kernel: str) -> None:
    q, k, v, g = inputs([4, 4], dtype=torch.float32)
    at = (boundaries([4, 4]), boundaries([4, 4]), 4, 4, -1, 0, 0.5, kernel)
    torch.library.opcheck(attention._attend, (*(x.clone().requires_grad_() for x in (q, k, v)), *at))
    out, lse = attention._attend(q, k, v, *at)
    torch.library.opcheck(attention._attend_backward, (g, q, k, v, out, lse, *at))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="dense", max_seqlen=5), "'dense' takes documents of one length, and 3 of 5 places are not 12; pass"),
        (dict(method="dense", lengths=[5, 3, 4]), "'dense' takes documents of one length, and 3 of 5 places are not 12"),
        (dict(method="dense", window=3), "'dense' has no window, and this one is of 3 places; pass method='auto'"),
        (dict(method="fa4"), "packed_attention: method 'fa4' runs on Hopper and Blackwell; pass method='auto'"),
        (dict(method="auto", max_seqlen=3), "max_seqlen is 3 and a document has 4 places"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    given = dict(method="auto", lengths=[4, 4, 4], window=0) | change
    q, k, v, _ = inputs([12])
    options = dict(max_seqlen=given.get("max_seqlen", max(given["lengths"])), window=given["window"], method=given["method"])
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, boundaries(given["lengths"]), **options)


def test_a_compiled_batch_sees_documents_that_are_not_even() -> None:
    """Compiled, nobody has looked at the boundaries before: 3 documents of at most 4 places cannot be [5, 3, 4]."""
    torch._dynamo.reset()
    q, k, v, _ = inputs([12])
    compiled = torch.compile(packed_attention, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"max_seqlen is 4 and a document has 5 places; pass packed\.max_seqlen"):
        compiled(q, k, v, boundaries([5, 3, 4]), max_seqlen=4)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", kernels.FUSED)
def test_no_fused_kernel_runs_inside_torch_func(method: str) -> None:
    q, k, v, _ = inputs([2, 2])

    def f(q: Tensor, method: str) -> Tensor:
        return packed_attention(q, k, v, boundaries([2, 2]), max_seqlen=2, method=method).square().sum()

    with pytest.raises(ValueError, match=rf"method '{method}' does not run inside torch\.func; pass 'auto' or 'math'"):
        torch.func.grad(f)(q, method)
    auto = functools.partial(f, method="auto")
    equal([torch.func.vmap(auto)(torch.stack([q, 2 * q]))], [torch.stack([auto(q), auto(2 * q)])])


def test_what_fa4_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(dtype: torch.dtype, dim: int) -> str | None:
        return fa4.why_not(SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(4, 2, dim)))  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fa4, "is_there", lambda: True)
    assert ask(BF16, 128) is None
    assert "not torch.float32" in str(ask(FP32, 128)) and "not 136" in str(ask(BF16, 136)) and "not 60" in str(ask(BF16, 60))
    monkeypatch.setattr(fa4, "is_there", lambda: False)
    assert "pip install flash-attn-4" in str(ask(BF16, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert "Hopper and Blackwell" in str(ask(BF16, 128))
