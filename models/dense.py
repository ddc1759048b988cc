"""Dense decoders: Llama 3, Qwen2, Qwen3 and Mistral, one set of functions.

    tokens ── embed ── block ── block ── ... ── norm ── head ── log probabilities
                       │
                       x += o( attention( rope(norm(q(h))), rope(norm(k(h))), v(h) ) )     h = rms_norm(x)
                       x += down( act(gate(h)) * up(h) )                                    h = rms_norm(x)

Shapes: T tokens, H query heads, D head_dim. A weight is [out, in]. What the families differ in is in the params: a bias
that is there is added, a q_norm that is there is applied. A stage runs whatever parts its params have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

import fstep
from fstep import Key, Mesh, Packed, Tied
from fstep.ops.tensor import part_of
from fstep_models.compiled import compiled
from fstep_models.config import read_json, tokenizer_files
from fstep_models.dense_block import block, mlp, qkv
from fstep_models.dense_config import Config
from fstep_models.dense_decode import Cache, decode
from fstep_models.dense_parts import check_mesh, check_options, check_row, draw, spec_on, tables
from fstep_models.scores import Scores, read

Params = dict[Any, Any]
__all__ = ["Config", "Dense", "Scores", "block"]


@dataclass(frozen=True)
class Dense:
    """A dense decoder: its `Config` and how it is computed. It holds no parameters; every method takes them.

    ``dtype`` is what blocks and head compute in (None: the params' own), ``remat`` a policy of `fstep.remat` for each
    block, ``attention`` a method of `fstep.packed_attention`, ``context`` one of `fstep.cp_attention`, ``compile`` whether
    the block goes through torch.compile (once for all layers; on a mesh with cp or tp, what is between two exchanges).
    """

    config: Config
    dtype: torch.dtype | None = None
    remat: Any = "none"
    attention: str = "auto"
    context: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        check_options(self)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # not what is compiled

    def _through(self, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        run = fstep.remat(f, self.remat)
        return compiled(run, of=self) if self.compile else run

    @cached_property
    def _block(self) -> Callable[..., Tensor]:
        """The block where nothing is exchanged inside."""
        return self._through(block)

    @cached_property
    def _block_in_halves(self) -> Callable[..., Tensor]:
        """The same in a pipeline, whose schedule may put weights' gradients off."""
        return fstep.split_weights(block, through=self._through)

    @cached_property
    def _block_on_mesh(self) -> Callable[..., Tensor]:
        run = block
        if self.compile:
            pieces = [compiled(f, of=self) for f in (fstep.rms_norm, qkv, mlp)]
            run = partial(block, pieces=tuple(pieces))
        return fstep.remat(run, self.remat)

    def spec(self, mesh: Mesh = Mesh(), schedule: Any = "1f1b") -> Any:  # noqa: B008
        """Return the params' structure on this rank: for each leaf its Hugging Face name and whole shape, inside nodes."""
        check_mesh("spec", mesh, self)
        return spec_on(self.config, mesh, schedule)

    def part(self, params: Params, *, mesh: Mesh, schedule: Any = "1f1b") -> Any:
        """Cut whole params to those of this rank."""
        return fstep.cut_like(self.spec(mesh, schedule), params)

    def init(
        self,
        key: Key,
        *,
        mesh: Mesh = Mesh(),  # noqa: B008
        schedule: Any = "1f1b",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Any:
        """Draw fresh params, this rank's: weights normal with the config's deviation, norms 1, biases 0."""

        spec = self.spec(mesh, schedule)
        leaves = [place.cut(draw(key, place, self.config.init_std, dtype, device)) for place in fstep.places(spec)]
        return fstep.tree_replace_leaves(spec, leaves)

    @staticmethod
    def load(
        folder: str | Path,
        *,
        mesh: Mesh = Mesh(),  # noqa: B008
        schedule: Any = "1f1b",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Dense, Any]:
        """Read a Hugging Face folder: the model of its config.json, and this rank's weights in ``dtype``."""
        model = Dense(Config.from_hf(folder))
        tied = {"lm_head.weight": "embed"} if model.config.tied else {}
        here, whole, ignore = model.spec(mesh, schedule), model.spec(), ("rotary_emb.inv_freq",)
        return model, fstep.load_hf(folder, here, whole=whole, dtype=dtype, device=device, tied=tied, ignore=ignore)

    def save(
        self,
        folder: str | Path,
        params: Any,
        *,
        mesh: Mesh | None = None,
        like: str | Path | None = None,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> Path:
        """Write a folder that transformers loads, in ``dtype`` (by default the params' own), and return its path.

        On a mesh every rank calls it with its own params and ``mesh``, which may be left out in a program of one rank, and
        rank 0 writes the same files as one process would.
        ``like`` is a model folder whose tokenizer files and config details (special tokens, ...) are kept.
        """
        config = self.config.to_hf({} if like is None else read_json(like))
        config["dtype"] = str(dtype or fstep.tree_leaves(params)[0].dtype).removeprefix("torch.")
        files = [] if like is None else tokenizer_files(like)
        options: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "extra_files": files}
        return fstep.save_hf(folder, params, self.spec(), mesh=mesh, config=config, **options)

    def stream_weights(
        self, params: Any, *, mesh: Mesh = Mesh(), dtype: torch.dtype | None = None  # noqa: B008
    ) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        """Yield ``(Hugging Face name, whole tensor)`` of each parameter, for an engine that generates: `fstep.stream_hf`.

        On a mesh every rank calls it with its own params, goes through to the end and gets every tensor, one at a time, in
        ``dtype`` (by default its own). A tied head is its embedding, and is not named again.
        """
        # Not a generator's loop, which would hold a tensor while the next one is made.
        return map(partial(fstep.cast, dtype=dtype), fstep.stream_hf(params, self.spec(), mesh=mesh))

    def whole(self, params: Any, *, mesh: Mesh = Mesh(), dtype: torch.dtype | None = None) -> Params:  # noqa: B008
        """Make whole params of every rank's parts, for `decode`: collective over all. What is whole here is not copied."""
        return fstep.tree_replace_leaves(self.spec(), [x for _, x in self.stream_weights(params, mesh=mesh, dtype=dtype)])

    def decode(self, params: Params, cache: Cache | None, mb: Packed) -> tuple[Tensor, Cache]:
        """Return the logits after each document's last token, [documents, vocab], and a cache: for `fstep.generate`.

        Without a cache ``mb`` has the documents so far; with one, the next token of each, at its position. ``params`` are
        whole (`whole`). The cache is donated: it is written into, and used up. Blocks are not compiled here.
        """
        return decode(self, params, cache, mb)

    def stage(self, mesh: Mesh = Mesh()) -> Callable[[Params, Tensor | None, Packed], Tensor]:  # noqa: B008
        """Return ``stage_fn(params, x, packed)``: hidden states after the layers that the params have.

        ``packed`` is this rank's of ``mesh.cp`` and has T tokens; ``x``, and what comes out, is a shard of them over
        ``mesh.tp``, [ceil(T / tp), dim].
        """
        check_mesh("stage", mesh, self)

        def run(params: Params, x: Tensor | None, mb: Packed) -> Tensor:
            check_row("stage", mb, mesh)
            if x is None:
                x = fstep.tp_embed(mb.tokens, fstep.gather_params(params["embed"]), axis=mesh.tp)
                x = x if self.dtype is None else x.to(self.dtype)
            cos, sin = tables(self.config.rope, mb, x.dtype)
            alone = self._block if mesh.pp.size == 1 else self._block_in_halves
            run_block = alone if mesh.cp.size == mesh.tp.size == 1 else self._block_on_mesh

            def layer(i: int, p: Params, x: Tensor) -> Tensor:
                part_of(f"Dense.stage: layers.{i}.q", p["q"], mesh.tp, dim=0)
                p = fstep.tp_local(p, axis=mesh.tp)
                return run_block(p, x, cos, sin, mb.cu_seqlens_padded, mb.max_seqlen, self.config.windows[i], self, mesh)

            head = params.get("head")
            ahead = params.get("norm"), params.get(head.to) if isinstance(head, Tied) else head
            return fstep.fold_layers(layer, params.get("layers", {}), x, ahead=ahead)

        return run

    def head(self, params: Params, x: Tensor, *, mesh: Mesh = Mesh()) -> tuple[Tensor, Any]:  # noqa: B008
        """Return what each product with the vocabulary takes: normed hidden states of the last stage, and the head's weight.

        For a loss of your own, e.g. `fstep.tp_distill_loss`. Over ``mesh.tp`` the hidden states stay a shard of the tokens,
        and the weight is this rank's rows of the vocabulary.
        """
        head = params["head"]
        weight = fstep.gather_params(params[head.to] if isinstance(head, Tied) else head)
        norm = fstep.tp_local(fstep.gather_params(params["norm"]), axis=mesh.tp)
        hidden = fstep.rms_norm(x, fstep.cast(norm, self.dtype), eps=self.config.eps)
        (leaf,) = fstep.tree_leaves(weight)
        # A wider weight stays as it is: the head rounds it for its products, and does not round the gradient.
        return hidden, fstep.cast(weight, torch.promote_types(leaf.dtype, hidden.dtype))

    def logits(
        self,
        params: Params,
        x: Tensor,
        *,
        mesh: Mesh = Mesh(),  # noqa: B008
        tokens: int | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return logits [T, vocab] of the last stage's hidden states; for a few tokens, as in generation.

        Over ``mesh.tp`` they are replicated; ``tokens`` says then how many there are, which a shard cannot.
        """
        hidden, weight = self.head(params, x, mesh=mesh)
        return fstep.tp_head_logits(hidden, weight, axis=mesh.tp, tokens=tokens, temperature=temperature)

    @overload
    def logprobs(
        self, params: Params, x: Tensor, mb: Packed, *, mesh: Mesh = ..., temperature: float = ...,
        entropy: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def logprobs(
        self,
        params: Params,
        x: Tensor,
        mb: Packed,
        *,
        mesh: Mesh = ...,
        temperature: float = ...,
        entropy: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    def logprobs(
        self,
        params: Params,
        x: Tensor,
        mb: Packed,
        *,
        mesh: Mesh = Mesh(),  # noqa: B008
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the log probability of each label [T], and with ``entropy`` each distribution's entropy.

        ``mb`` and the result are this rank's of ``mesh.cp``; ``x`` is a shard of its tokens over ``mesh.tp``, the result
        is replicated over it.
        """
        check_mesh("logprobs", mesh, self)
        check_row("logprobs", mb, mesh)
        hidden, weight = self.head(params, x, mesh=mesh)
        return fstep.tp_token_logprobs(  # type: ignore[call-overload]
            hidden, weight, mb.labels, axis=mesh.tp, temperature=temperature, entropy=entropy
        )

    def logprob_sum(
        self, params: Params, x: Tensor, mb: Packed, *, mesh: Mesh = Mesh(),  # noqa: B008
        weights: Tensor | None = None, temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Return the sum of weight * log probability over the tokens, 0-d: less work than `logprobs` (`token_logprob_sum`).

        ``weights`` are those of ``mb``, or other numbers [T] known before. Over ``mesh.cp`` it is a partial sum.
        """
        check_mesh("logprob_sum", mesh, self)
        check_row("logprob_sum", mb, mesh)
        hidden, weight = self.head(params, x, mesh=mesh)
        weights = mb.weights if weights is None else weights
        return fstep.tp_token_logprob_sum(hidden, weight, mb.labels, weights, axis=mesh.tp, temperature=temperature)

    def score(
        self,
        params: Params,
        rows: Sequence[Packed],
        *,
        mesh: Mesh = Mesh(),  # noqa: B008
        schedule: Any = "1f1b",
        temperature: float = 1.0,
        entropy: bool = False,
        top: int = 0,
    ) -> tuple[Scores, ...]:
        """Say how likely each token of each row is, without gradients: for a reference model, an evaluation, a teacher.

        ``rows`` are this rank's microbatches, as `fstep.pp_forward_backward` takes them, ``params`` its part. Returns
        `Scores` for each row, of all its places in document order (``fstep.split_documents`` with the whole row splits
        them), replicated over ``mesh.pp``, ``mesh.cp`` and ``mesh.tp``. ``top`` is how many of the likeliest tokens to name.
        """

        def last(params: Params, x: Tensor, mb: Packed) -> Scores:
            check_row("score", mb, mesh)
            hidden, weight = self.head(params, x, mesh=mesh)
            return read(hidden, weight, mb, mesh, temperature=temperature, entropy=entropy, top=top)

        return fstep.pp_forward(self.stage(mesh), last, params, rows, axis=mesh.pp, schedule=schedule)
