"""cp_attention: every way of talking beside packed_attention of the whole row, in float64, on axes of 2, 3 and 4 ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Mesh

METHODS = ["auto", "ring", "allgather", "ulysses"]
# Documents of one token, of fewer tokens than chunks, of one chunk's length and one more, a long one.
LENGTHS = [1, 30, 3, 8, 9, 1, 17]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def row(size: int, lengths: list[int] = LENGTHS, length: int | None = None) -> fstep.Packed:
    docs = fstep.make_docs([torch.arange(n) for n in lengths])
    return fstep.pack_thd(docs, multiple_of=2 * size, length=length)


def tensors(tokens: int, heads: int, kv_heads: int, dim: int = 8) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    return [rand(tokens, h, dim, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads, heads))]


def whole(packed: fstep.Packed, xs: list[Tensor], **options: object) -> list[Tensor]:
    """The output of the whole row and the gradients of q, k, v, by plain operations."""
    cu, options = packed.cu_seqlens_padded, {"method": "math", **options}
    f = lambda *qkv: fstep.packed_attention(*qkv, cu, max_seqlen=packed.max_seqlen, **options)  # noqa: E731
    y, pull = fstep.vjp(f, *xs[:3])
    return [y, *pull(xs[3])]


def sharded(packed: fstep.Packed, xs: list[Tensor], size: int, **options: object) -> list[Tensor]:
    """The same from `size` ranks, laid back in the order of the row."""

    def f(mesh: Mesh) -> tuple[Tensor, ...]:
        part = fstep.cp_shard(packed, axis=mesh.cp)
        at = own_places(packed, mesh.cp.rank, size)
        attend = lambda *qkv: fstep.cp_attention(  # noqa: E731
            *qkv, part.cu_seqlens_padded, axis=mesh.cp, max_seqlen=part.max_seqlen, **options
        )
        y, pull = fstep.vjp(attend, *(x[at] for x in xs[:3]))
        return (y, *pull(xs[3][at]))

    results = fstep.simulate(f, cp=size)
    at = torch.cat([own_places(packed, rank, size) for rank in range(size)])
    out = [torch.cat(list(x)) for x in zip(*results, strict=True)]
    return [torch.empty_like(x).index_copy(0, at, x) for x in out]


def own_places(packed: fstep.Packed, rank: int, size: int) -> Tensor:
    """By plain lists: chunks r and 2C-1-r of each document."""
    found: list[int] = []
    for a, b in itertools.pairwise(packed.cu_seqlens_padded.tolist()):
        chunk = (b - a) // (2 * size)
        for i in (rank, 2 * size - 1 - rank):
            found += range(a + i * chunk, a + (i + 1) * chunk)
    return torch.tensor(found)


def check(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b, name in zip(got, want, ("out", "dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [0, 1, 2, 3, 7, 11, 16, 29, 36, 40, 1000])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_equals_the_whole_row(size: int, window: int, method: str) -> None:
    packed = row(size)
    heads = {2: 4, 3: 6, 4: 4}[size]
    xs = tensors(len(packed.tokens), heads, 2)
    scale = 0.7 if window == 3 else None
    want = whole(packed, xs, window=window, scale=scale)
    check(sharded(packed, xs, size, window=window, scale=scale, method=method), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 2), (4, 1, 2), (4, 1, 4), (12, 4, 3), (8, 2, 4), (6, 6, 3)])
def test_grouped_heads(heads: int, kv_heads: int, size: int, method: str) -> None:
    packed = row(size)
    xs = tensors(len(packed.tokens), heads, kv_heads, dim=4)
    for window in (0, 5):
        check(sharded(packed, xs, size, window=window, method=method), whole(packed, xs, window=window))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("lengths", "length", "size"),
    [([1], None, 4), ([1, 1, 2], None, 3), ([5, 2], 48, 3), ([], None, 2), ([], 16, 4), ([4, 64], None, 4)],
    ids=["one-token", "few-tokens", "padded-row", "no-document", "only-padding", "long"],
)
def test_ranks_with_little_or_only_padding(lengths: list[int], length: int | None, size: int, method: str) -> None:
    packed = row(size, lengths, length)
    xs = tensors(len(packed.tokens), 12, 2)
    for window in (0, 3):
        check(sharded(packed, xs, size, window=window, method=method), whole(packed, xs, window=window))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", ["flash", "documents", "math"])
def test_every_kernel(kernel: str, method: str) -> None:
    if (method, kernel) == ("ring", "math"):
        return  # refused, see below
    packed = row(2)
    xs = tensors(len(packed.tokens), 4, 2)
    for window in (0, 6):
        check(sharded(packed, xs, 2, window=window, method=method, kernel=kernel), whole(packed, xs, window=window))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_and_its_precision(dtype: torch.dtype, method: str) -> None:
    """As near to float64 as packed_attention is with the same kernel in one process."""
    packed = row(3)
    xs = [x.to(dtype) for x in tensors(len(packed.tokens), 6, 2)]
    for window in (0, 7):
        want = whole(packed, [x.double() for x in xs], window=window)
        alone = whole(packed, xs, method="flash", window=window)
        got = sharded(packed, xs, 3, method=method, window=window)
        assert [x.dtype for x in got] == [dtype] * 4
        for a, b, c in zip(got, alone, want, strict=True):
            assert (a.double() - c).norm() < 1.5 * (b.double() - c).norm()


def test_what_is_added_up_over_a_ring_is_not_rounded_on_the_way() -> None:
    """Eight ranks add to a result, and to a gradient. In bfloat16 it would be half as bad again."""
    packed = row(8, [200, 30, 90])
    xs = [x.bfloat16() for x in tensors(len(packed.tokens), 2, 1)]
    want, alone = whole(packed, [x.double() for x in xs]), whole(packed, xs, method="flash")
    for a, b, c in zip(sharded(packed, xs, 8, method="ring"), alone, want, strict=True):
        assert (a.double() - c).norm() < 1.2 * (b.double() - c).norm()


@pytest.mark.parametrize("method", METHODS)
def test_transpose(method: str) -> None:
    """Linear in v: the sum over the ranks of <f(v), y> is that of <v, fT(y)>."""
    packed, size = row(3), 3
    q, k, v, y = tensors(len(packed.tokens), 6, 2)

    def f(mesh: Mesh) -> tuple[Tensor, Tensor]:
        part = fstep.cp_shard(packed, axis=mesh.cp)
        at, options = own_places(packed, mesh.cp.rank, size), dict(axis=mesh.cp, max_seqlen=part.max_seqlen, method=method)
        attend = lambda v: fstep.cp_attention(q[at], k[at], v, part.cu_seqlens_padded, **options)  # noqa: E731
        out, pull = fstep.vjp(attend, v[at])
        return (out * y[at]).sum(), (v[at] * pull(y[at])[0]).sum()

    left, right = (sum(x) for x in zip(*fstep.simulate(f, cp=size), strict=True))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
    assert abs(float(left)) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_is_packed_attention(method: str) -> None:
    packed = row(1)
    q, k, v, _ = tensors(len(packed.tokens), 4, 2)
    for kernel in ("auto", "math"):
        options = dict(max_seqlen=packed.max_seqlen, window=4, scale=0.3)
        got = fstep.cp_attention(q, k, v, packed.cu_seqlens_padded, axis=Mesh().cp, method=method, kernel=kernel, **options)
        assert torch.equal(got, fstep.packed_attention(q, k, v, packed.cu_seqlens_padded, method=kernel, **options))


def run(packed: fstep.Packed, mesh: Mesh, *qkv: Tensor, **options: object) -> Tensor:
    part = fstep.cp_shard(packed, axis=mesh.cp)
    return fstep.cp_attention(*qkv, part.cu_seqlens_padded, axis=mesh.cp, max_seqlen=part.max_seqlen, **options)


def test_a_ring_computes_only_what_is_seen_and_the_same_on_every_rank() -> None:
    size = 4  # one document of 64 places: chunks of 8
    scores: dict[int, list[int]] = {rank: [] for rank in range(size)}

    def count(mesh: Mesh, rows: fstep.ops.kernels.Rows) -> None:
        for n, m in zip(rows.cu_q.diff().tolist(), rows.cu_k.diff().tolist(), strict=True):
            scores[mesh.cp.rank].append(n * (n + 1) // 2 if rows.right == 0 else n * m)

    def f(mesh: Mesh, window: int) -> None:
        from fstep.ops import ring

        cu = torch.tensor([0, 16], dtype=torch.int32)
        for step in range(size):
            owner = (mesh.cp.rank - step) % size
            for part in ring.parts(ring.Ring(mesh.cp, cu, 16, 16, window, 1.0, "flash"), owner):
                count(mesh, part.rows)

    fstep.simulate(lambda mesh: f(mesh, 0), cp=size)
    assert scores == {rank: [16 * 17 // 2, 128, 128, 128] for rank in range(size)}  # in all, 64 * 65 / 2 a rank and 4
    assert sum(map(sum, scores.values())) == 64 * 65 // 2
    scores = {rank: [] for rank in range(size)}
    fstep.simulate(lambda mesh: f(mesh, 8), cp=size)
    # Each chunk sees itself and a part of the chunk before: 15 pairs of chunks of the 36 that a causal mask leaves.
    assert sum(map(len, scores.values())) == 15


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_next_keys_travel_while_the_present_ones_are_used(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fstep.mesh.threads import ThreadTransport
    from fstep.ops import kernels

    packed, log = row(size, [24]), []
    permute = ThreadTransport.permute

    class Logged:
        def __init__(self, pending: object) -> None:
            self.pending = pending

        def wait(self) -> Tensor:
            log.append("wait")
            return self.pending.wait()

    def start(self: ThreadTransport, *args: object, **kwargs: object) -> object:
        pending = permute(self, *args, **kwargs)
        if self.rank:
            return pending
        log.append("start")
        return Logged(pending)

    def compute(name: str, real: object) -> object:
        def f(kernel: str, *args: object) -> object:
            if kernel == "documents":  # rank 0, see below
                log.append(name)
            return real(kernel, *args)

        return f

    monkeypatch.setattr(ThreadTransport, "permute", start)
    monkeypatch.setattr(kernels, "run", compute("attend", kernels.run))
    monkeypatch.setattr(kernels, "pull", compute("pull", kernels.pull))

    def f(mesh: Mesh) -> None:
        x = rand(24 // size, 2, 4)
        kernel = "flash" if mesh.cp.rank else "documents"
        out, pull = fstep.vjp(lambda x: run(packed, mesh, x, x, x, method="ring", kernel=kernel), x)
        if mesh.cp.rank == 0:
            log.append("backward")
        pull(out)

    fstep.simulate(f, cp=size)
    forward = ["start", "attend", "wait"] * (size - 1) + ["attend"]
    # kv starts, gradients are computed, those of before have come, theirs start, kv has come; those of one's own stay
    steps = ["start", "pull", "wait"] + ["start", "pull", "start", "wait"] * (size > 2)
    steps += ["start", "pull", "wait", "start", "wait"] * (size - 3)
    backward = [*steps, "pull", "start", "wait"] if size == 2 else [*steps, "pull", "wait", "start", "wait"]
    assert log == [*forward, "backward", *backward]


@pytest.mark.parametrize("method", METHODS)
def test_any_memory_layout(method: str) -> None:
    size, packed = 2, row(2, [6, 3])
    xs = tensors(len(packed.tokens), 2, 2)
    xs[3] = torch.ones((), dtype=torch.float64).expand(xs[3].shape)  # what .sum() pulls back

    def f(mesh: Mesh) -> tuple[Tensor, ...]:
        at = own_places(packed, mesh.cp.rank, size)
        strided = [x[at].transpose(0, 2).contiguous().transpose(0, 2) for x in xs[:3]]
        assert not strided[0].is_contiguous()
        y, pull = fstep.vjp(lambda *qkv: run(packed, mesh, *qkv, method=method), *strided)
        return (y, *pull(xs[3][at]))

    at = torch.cat([own_places(packed, rank, size) for rank in range(size)])
    want = [x[at] for x in whole(packed, xs)]
    check([torch.cat(list(x)) for x in zip(*fstep.simulate(f, cp=size), strict=True)], want)


def test_differentiated_twice() -> None:
    """The gradient's square summed over the ranks, differentiated again; a ring says that it cannot."""
    packed, size = row(2, [5, 2]), 2
    xs = tensors(len(packed.tokens), 2, 1, dim=4)

    def second(attend: object, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def norm(q: Tensor) -> Tensor:
            return fstep.value_and_grad(lambda q: attend(q, k, v).square().sum())(q)[1].square().sum()

        return fstep.value_and_grad(norm)(x)[1]

    def f(mesh: Mesh, method: str, kernel: str) -> Tensor:
        at = own_places(packed, mesh.cp.rank, size)
        return second(lambda *qkv: run(packed, mesh, *qkv, method=method, kernel=kernel), *(x[at] for x in xs[:3]))

    cu = packed.cu_seqlens_padded
    want = second(lambda *qkv: fstep.packed_attention(*qkv, cu, max_seqlen=packed.max_seqlen, method="math"), *xs[:3])
    for method in ("allgather", "ulysses"):
        results = fstep.simulate(lambda mesh, method=method: f(mesh, method, "math"), cp=size)
        for rank, got in enumerate(results):
            torch.testing.assert_close(got, want[own_places(packed, rank, size)], rtol=1e-10, atol=1e-10)
    with pytest.raises(
        RuntimeError, match="cp_attention: method 'ring' can be differentiated once; pass method='allgather', "
    ):
        fstep.simulate(lambda mesh: f(mesh, "ring", "auto"), cp=size)


def test_under_torch_func() -> None:
    packed, size = row(2, [5, 2]), 2
    xs = tensors(len(packed.tokens), 2, 1, dim=4)
    want = whole(packed, xs)[1]

    def f(mesh: Mesh, method: str) -> Tensor:
        at = own_places(packed, mesh.cp.rank, size)
        q, k, v, g = (x[at] for x in xs)
        return torch.func.grad(lambda q: (run(packed, mesh, q, k, v, method=method) * g).sum())(q)

    for method in ("allgather", "ulysses"):
        for rank, got in enumerate(fstep.simulate(lambda mesh, method=method: f(mesh, method), cp=size)):
            torch.testing.assert_close(got, want[own_places(packed, rank, size)], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"method 'ring' does not run inside torch\.func; pass method='allgather'"):
        fstep.simulate(lambda mesh: f(mesh, "ring"), cp=size)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_under_compile() -> None:
    """The graph breaks there, unless that was forbidden."""
    packed = row(2, [5, 2])
    q, k, v, _ = tensors(len(packed.tokens), 2, 1)

    def f(mesh: Mesh, fullgraph: bool) -> None:
        at, part = own_places(packed, mesh.cp.rank, 2), fstep.cp_shard(packed, axis=mesh.cp)
        options = dict(axis=mesh.cp, max_seqlen=part.max_seqlen)
        attend = lambda q: fstep.cp_attention(2 * q, k[at], v[at], part.cu_seqlens_padded, **options) + 1  # noqa: E731
        compiled = torch.compile(attend, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(q[at]), attend(q[at]), rtol=1e-12, atol=1e-12)

    with pytest.raises(Exception, match="cp_attention: ranks do not talk inside a compiled graph"):
        fstep.simulate(lambda mesh: f(mesh, True), cp=2)
    torch.compiler.reset()
    if torch.__version__ < "2.12":
        pytest.skip("torch 2.11 holds a lock of the whole process while a broken graph runs; ranks that are threads wait")
    fstep.simulate(lambda mesh: f(mesh, False), cp=2)


@pytest.mark.parametrize("method", METHODS)
def test_without_gradients(method: str) -> None:
    """Under no_grad it does not matter to the others whether q requires a gradient on one rank; otherwise it is said."""
    packed = row(2, [5, 2])
    q = tensors(len(packed.tokens) // 2, 2, 2)[0]

    def f(mesh: Mesh, enabled: bool) -> Tensor:
        x = q.clone().requires_grad_(mesh.cp.rank == 0)
        with torch.set_grad_enabled(enabled):
            return run(packed, mesh, x, x, x, method=method)

    assert not any(y.requires_grad for y in fstep.simulate(lambda mesh: f(mesh, False), cp=2))
    with pytest.raises(fstep.MeshError, match=r"calls cp_attention with gradient .* and .* calls cp_attention"):
        fstep.simulate(lambda mesh: f(mesh, True), cp=2)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_changed(method: str) -> None:
    packed = row(2)
    xs = tensors(len(packed.tokens), 4, 2)
    part_cu = packed.cu_seqlens_padded // 2
    before = [x.clone() for x in (*xs, part_cu)]

    def f(mesh: Mesh) -> None:
        half = [x[: len(x) // 2] for x in xs]
        options = dict(axis=mesh.cp, max_seqlen=packed.max_seqlen // 2, method=method, window=9)
        _, pull = fstep.vjp(lambda *qkv: fstep.cp_attention(*qkv, part_cu, **options), *half[:3])
        pull(half[3])

    fstep.simulate(f, cp=2)
    for x, old in zip((*xs, part_cu), before, strict=True):
        assert x._version == 0 and torch.equal(x, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="mesh"), "cp_attention: method 'mesh' is unknown; pass one of auto, ring, allgather, ulysses"),
        (dict(kernel="fast"), "cp_attention: kernel 'fast' is unknown; pass one of auto, flash, dense"),
        (
            dict(method="ring", kernel="math"),
            "cp_attention: kernel 'math' is for being differentiated twice",
        ),
        (dict(window=-1), "cp_attention: window is -1; pass 0 for no window"),
        (dict(max_seqlen=3), "cp_attention: max_seqlen is 3 and a document has 4 places"),
        (dict(cu=torch.tensor([0, 4, 8])), r"cp_attention: cu_seqlens are \[0, 4, 8\] for 6 tokens"),
        (dict(cu=torch.tensor([0, 3, 6])), "cp_attention: a document has an odd number of places on this rank"),
        (dict(k=torch.zeros(6, 2, 8)), r"cp_attention: q \(6, 3, 8\), k \(6, 2, 8\) and v \(6, 3, 8\) do not fit"),
        (dict(method="ulysses"), "cp_attention: 3 heads do not divide over axis 'cp' of size 2, as method 'ulysses' needs"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    x = torch.zeros(6, 3, 8)
    given = dict(q=x, k=x, v=x, cu=torch.tensor([0, 4, 6], dtype=torch.int32), max_seqlen=4) | change

    def f(mesh: Mesh) -> None:
        options = {name: value for name, value in given.items() if name not in ("q", "k", "v", "cu")}
        fstep.cp_attention(given["q"], given["k"], given["v"], given["cu"], axis=mesh.cp, **options)

    with pytest.raises(ValueError, match=message):
        fstep.simulate(f, cp=2)
