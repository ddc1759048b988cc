"""Context parallelism: one row of packed documents spread over the ranks of an axis, each with its part of every document.

    cp_shard        whole row -> this rank's tokens, labels, weights, positions          no communication
    cp_attention    the one function of a model in which tokens meet                      keys and values
    cp_unshard      one value a token, of all ranks, back in the order of documents       small results

Everything else in a model and in a loss works on one token at a time, and does not know. See `zigzag` for which rank holds
what. On an axis of size 1 the row stays whole, so that a larger mesh changes the mesh and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from fstep.batch.packed import Packed
from fstep.mesh import exchange as ex
from fstep.mesh.axis import Axis, check_axis
from fstep.mesh.collectives import Grad, all_gather, check_grad
from fstep.ops import zigzag
from fstep.ops.attention import attend, causal, check_attention, check_method, packed_attention
from fstep.ops.gathered import gathered_attention
from fstep.ops.ring import ring_attention
from fstep.trace import in_transform
from fstep.tree import check_type, tree_map

METHODS = ("auto", "ring", "allgather", "ulysses")


def cp_shard(packed: Packed, *, axis: Axis) -> Packed:
    """Return this rank's part of a packed row. Input: replicated over ``axis``; output: a shard of it.

    Of every document, cut with its padding into 2C chunks for C ranks, rank r holds chunks r and 2C-1-r, end to end. All
    fields with an entry a token are cut by the same index, labels and weights too: they were shifted when the row was
    packed, and stay with the place that predicts them. ``cu_seqlens_padded`` and ``max_seqlen`` become those of the shard.
    ``cu_seqlens``, which says how long documents really are, stays, and so does what there is one of a document. Shapes:
    ``[T, ...] -> [T / C, ...]``. No communication: every rank packs the same documents.

    Raises ValueError if a document does not divide into 2C chunks, or for a row that is a shard already.

    >>> import fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]), multiple_of=4)
    >>> fstep.cp_shard(packed, axis=fstep.Mesh().cp) is packed
    True
    >>> [part.tokens.tolist() for part in fstep.simulate(lambda mesh: fstep.cp_shard(packed, axis=mesh.cp), cp=2)]
    [[1, 2, 7, 8, 9, 0], [3, 4, 5, 6, 10, 0]]
    """
    check_type("cp_shard", "packed", packed, Packed, "what pack_thd returns")
    check_axis("cp_shard", axis)
    if packed.parts > 1:
        raise ValueError(f"cp_shard: the row is one of {packed.parts} shards already; pass what pack_thd returns")
    if axis.size == 1:
        return packed
    chunks = 2 * axis.size
    lengths = packed.cu_seqlens_padded.diff().tolist()
    for i, n in enumerate(lengths):
        if n % chunks:
            raise ValueError(
                f"cp_shard: {n} tokens do not divide into 2*{axis.name}={chunks} chunks (document {i} with its padding); "
                f"pack with pack_thd(multiple_of={chunks})"
            )
    cu = packed.cu_seqlens_padded // axis.size
    at = zigzag.places(cu, len(packed.tokens) // axis.size, axis.rank, axis.size)
    fields = [f.name for f in dataclasses.fields(packed) if f.metadata.get("cut") == "token"]
    own = {name: tree_map(lambda x: x[at.to(x.device)], getattr(packed, name)) for name in fields}
    return dataclasses.replace(
        packed, cu_seqlens_padded=cu, max_seqlen=packed.max_seqlen // axis.size, parts=axis.size, **own
    )


def cp_unshard(x: Any, packed: Packed, *, axis: Axis, grad: Grad) -> Any:
    """Lay what the ranks computed at each of their places in the order of documents. Input: a shard; output: replicated.

    ``x`` is a tensor with one entry a place, or a tree of them; ``packed`` is the shard that they belong to. Entry t of the
    result belongs to place t of the whole row, so that ``split_documents`` with the whole row splits it. Shapes:
    ``[T / C, ...] -> [T, ...]``. ``grad`` says what the gradient of the result will be, as for `all_gather`: ``"slice"`` if
    every rank computes the same loss from it, ``"sum"`` if each computes its own part of the loss. The wrong one is off by a
    factor C, which the value of the loss does not show.

    Raises ValueError for another ``grad``, a ``packed`` that is no shard over this axis, or an ``x`` of another length.

    >>> import fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]), multiple_of=4)
    >>> def f(mesh):
    ...     part = fstep.cp_shard(packed, axis=mesh.cp)
    ...     return fstep.cp_unshard(part.tokens, part, axis=mesh.cp, grad="slice")
    >>> fstep.simulate(f, cp=2)[1]
    tensor([ 1,  2,  3,  4,  5,  6,  7,  8,  9, 10,  0,  0])
    """
    return _unshard("cp_unshard", x, packed, axis, grad)


def _unshard(function: str, x: Any, packed: Packed, axis: Axis, grad: Grad) -> Any:
    check_grad(function, grad)
    check_type(function, "packed", packed, Packed, "what cp_shard returns")
    check_axis(function, axis)
    if packed.parts != axis.size:
        has = "a whole row" if packed.parts == 1 else f"one of {packed.parts} shards"
        raise ValueError(
            f"{function}: packed is {has}, and axis {axis.name!r} has {axis.size} ranks; pass what cp_shard(axis=) returned"
        )
    tokens = len(packed.tokens)

    def check(leaf: Any) -> None:
        check_type(function, "x", leaf, Tensor, "a tensor with one entry a place")
        if leaf.dim() < 1 or len(leaf) != tokens:
            raise ValueError(
                f"{function}: x has shape {tuple(leaf.shape)}, and the shard {tokens} places; give one entry a place"
            )

    tree_map(check, x)
    if axis.size == 1:
        return x
    order = zigzag.order(packed.cu_seqlens_padded, tokens, axis.size)
    return tree_map(lambda rows: rows[order.to(rows.device)], all_gather(x, axis=axis, grad=grad))


def cp_gather_logprobs(logp: Any, packed: Packed, *, axis: Axis, grad: Grad) -> Any:
    """Gather one number a token from all ranks, in the order of documents. Input: a shard [T / C]; output: replicated [T].

    For losses that are no sum over tokens: of the log probability of a whole answer, say. ``packed`` is the shard. It is
    `cp_unshard` for what such a loss needs, one number a token: what is larger (hidden states, logits) is refused, since
    every rank would hold all of it. Entropies or a tree of both are gathered likewise.

    ``grad="slice"`` if every rank computes the whole loss from the result, ``grad="sum"`` if each computes its part. A loss
    that all ranks have computed alike is added up by `finalize_grads` once a rank: pass it through `as_partial`.

    Raises ValueError for another ``grad``, a ``packed`` that is no shard over this axis, or more than one number a token.

    >>> import fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[1, 2, 3], [4, 5]]), multiple_of=4)
    >>> def f(mesh):
    ...     part = fstep.cp_shard(packed, axis=mesh.cp)
    ...     logp = -part.tokens.float()  # from a model
    ...     whole = fstep.cp_gather_logprobs(logp, part, axis=mesh.cp, grad="slice")
    ...     return fstep.split_documents(whole, packed)
    >>> fstep.simulate(f, cp=2)[0]
    (tensor([-1., -2., -3.]), tensor([-4., -5.]))
    """

    def check(leaf: Any) -> None:
        if isinstance(leaf, Tensor) and leaf.dim() != 1:
            raise ValueError(
                f"cp_gather_logprobs: logp has shape {tuple(leaf.shape)}; pass one number a token, or gather more of them "
                "with cp_unshard"
            )

    tree_map(check, logp)
    return _unshard("cp_gather_logprobs", logp, packed, axis, grad)


def cp_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    *,
    axis: Axis,
    max_seqlen: int,
    window: int = 0,
    scale: float | None = None,
    method: Literal["auto", "ring", "allgather", "ulysses"] | str = "auto",
    kernel: str = "auto",
) -> Tensor:
    """Causal attention of a row that `cp_shard` has cut. Inputs and output: shards over ``axis``, gradients too.

    What `packed_attention` computes of the whole row, of which each rank has its places: q [T, heads, head_dim], k and v
    [T, kv_heads, head_dim], out [T, heads, head_dim], T this rank's tokens. ``cu_seqlens`` and ``max_seqlen`` are those of
    the shard (``cu_seqlens_padded``); ``window`` counts places of the document, wherever they are. How ranks talk changes
    cost and not the result:

    - ``"allgather"``: every rank gets all keys and values, and uses those before its queries, in one call of the kernel.
    - ``"ulysses"``: every rank gets all tokens of some of the heads, which have to divide; one call of the kernel.
    - ``"ring"``: keys and values go round, the next while the present ones are used; a call of the kernel for each rank's.
    - ``"auto"``: the fastest of these whose copies stay near a rank's own size; see `choose`.

    ``kernel`` is a method of `packed_attention`. On an axis of size 1 this is `packed_attention`. A ring can be
    differentiated once, and not under torch.func; ``kernel="math"``, which can, needs another method.

    Raises ValueError for an unknown method or kernel, shapes that do not fit, boundaries that are not those of a shard,
    heads that do not divide (ulysses).

    >>> import torch, fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[1, 2, 3, 4]]))
    >>> def f(mesh):  # queries of 0 see all alike: the mean of the values
    ...     part = fstep.cp_shard(packed, axis=mesh.cp)
    ...     v = part.tokens.float()[:, None, None]
    ...     y = fstep.cp_attention(0 * v, v, v, part.cu_seqlens_padded, axis=mesh.cp, max_seqlen=part.max_seqlen)
    ...     return y.flatten()
    >>> fstep.simulate(f, cp=2)
    [tensor([1.0000, 2.5000]), tensor([1.5000, 2.0000])]
    """
    if method not in METHODS:
        raise ValueError(f"cp_attention: method {method!r} is unknown; pass one of {', '.join(METHODS)}")
    check_method("cp_attention", "kernel", kernel)
    check_axis("cp_attention", axis)
    q, k, v, cu = q_THD, k_THD, v_THD, cu_seqlens
    if axis.size == 1:
        return packed_attention(q, k, v, cu, max_seqlen=max_seqlen, window=window, scale=scale, method=kernel)
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "cp_attention: ranks do not talk inside a compiled graph; compile what is before and after, or without fullgraph"
        )
    lengths = check_attention("cp_attention", q, k, v, cu, max_seqlen, window)
    if any(n % 2 for n in lengths):
        raise ValueError(
            "cp_attention: a document has an odd number of places on this rank, and two chunks are of one length; pass "
            "cu_seqlens_padded of what cp_shard returned"
        )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not torch.is_grad_enabled():  # which autograd functions do not see, and ranks compare whether something is recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    window = 0 if window >= axis.size * max_seqlen else window
    method = choose(axis.size, len(q), q.shape[1], k.shape[1], window, kernel) if method == "auto" else method
    run = {"ring": ring_attention, "allgather": gathered_attention, "ulysses": _ulysses}[method]
    return run(q, k, v, cu, axis=axis, max_seqlen=max_seqlen, window=window, scale=scale, kernel=kernel)


# From so many tokens a rank on, trading heads is faster than gathering keys.
LONG = 16384


def choose(size: int, tokens: int, heads: int, kv_heads: int, window: int, kernel: str) -> str:
    """Return what "auto" means: the fastest that does not take more memory than a rank's own tensors do.

    Percent of a single GPU's rate on 4 H200, forward and backward, 32 query and 8 key heads of 128, bfloat16:

    =========  =====  =====  =====================  ======
    .          8k     32k    128k in 52 documents   128k
    =========  =====  =====  =====================  ======
    allgather  23.5   72.8   81.4                   93.6
    ulysses    15.9   73.0   87.9                   97.5
    ring       15.9   75.4   73.8                   93.3
    =========  =====  =====  =====================  ======

    So long rows trade heads, if these divide. Otherwise keys and values are gathered where that makes them at most four
    times a rank's queries, ``2 * size * kv_heads <= 4 * heads``: 8 ranks where four heads share a key head. Beyond that the
    ring is left, which asks for nothing; but with a window it would wait for the host, and it cannot be differentiated
    twice.
    """
    if in_transform():
        return "allgather"
    traded, small = heads % size == kv_heads % size == 0, 2 * size * kv_heads <= 4 * heads
    if traded and (tokens >= LONG or not small):
        return "ulysses"
    return "allgather" if small or window or kernel == "math" else "ring"


class _Reorder(Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, *ctx.orders = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        order, back = ctx.orders
        return _reorder(g, back, order), None, None


def _reorder(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Return x[order]; ``back`` is the inverse, so that the gradient is laid back, where indexing would add it up."""
    out: Tensor = _Reorder.apply(x, order, back)  # type: ignore[no-untyped-call]
    return out


def _ulysses(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *, axis: Axis, max_seqlen: int, window: int, scale: float, kernel: str
) -> Tensor:
    """Trade tokens for heads, attend over whole documents, and trade back."""
    tokens, heads, size = len(q), q.shape[1], axis.size
    if heads % size:
        raise ValueError(
            f"cp_attention: {heads} heads do not divide over axis {axis.name!r} of size {size}, as method 'ulysses' needs; "
            "pass method='ring' or method='allgather'"
        )
    # Key heads that do not divide are copied until they do; both numbers divide heads, and so does what they make.
    copies = size // math.gcd(k.shape[1], size)
    k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    back = torch.cat([zigzag.places(cu, tokens, rank, size) for rank in range(size)])
    order = zigzag.inverse(back)
    q, k, v = (_reorder(ex.all_to_all(x, axis, 1, 0, "cp_attention"), order, back) for x in (q, k, v))
    spans = causal(cu * size, cu * size, size * max_seqlen, size * max_seqlen, window)
    y = attend(q, k, v, spans, scale=scale, method=kernel)
    return ex.all_to_all(_reorder(y, back, order), axis, 0, 1, "cp_attention")
