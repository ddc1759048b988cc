"""Dense decoders: Llama 3, Qwen2, Qwen3 and Mistral, one set of functions.

    tokens ── embed ── block ── block ── ... ── norm ── head ── log probabilities
                       │
                       x += o( attention( rope(norm(q(h))), rope(norm(k(h))), v(h) ) )     h = rms_norm(x)
                       x += down( act(gate(h)) * up(h) )                                    h = rms_norm(x)

Shapes: T tokens, H query heads, D head_dim. A weight is [out, in]. What the families differ in is in the params: a bias
that is there is added, a q_norm that is there is applied. A stage runs whatever parts its params have.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

import fstep
from fstep import HFTensor, Key, Mesh, Packed, Tied
from fstep.tree import check_type
from fstep_models.config import read_json, tokenizer_files
from fstep_models.dense_config import ACTIVATIONS, Config

Params = dict[Any, Any]
__all__ = ["Config", "Dense", "block"]


def block(
    layer: Params, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, model: Dense
) -> Tensor:
    """Run one decoder layer on [T, dim]."""
    c = model.config
    p = fstep.cast(layer, model.dtype)
    h = fstep.rms_norm(x, p["attn_norm"], eps=c.eps)
    q = fstep.linear(h, p["q"], p.get("q_bias")).view(-1, c.heads, c.head_dim)
    k = fstep.linear(h, p["k"], p.get("k_bias")).view(-1, c.kv_heads, c.head_dim)
    v = fstep.linear(h, p["v"], p.get("v_bias")).view(-1, c.kv_heads, c.head_dim)
    if "q_norm" in p:
        q, k = fstep.rms_norm(q, p["q_norm"], eps=c.eps), fstep.rms_norm(k, p["k_norm"], eps=c.eps)
    q, k = fstep.rotate(q, cos, sin), fstep.rotate(k, cos, sin)
    y = fstep.packed_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, window=window, method=model.attention)
    x = x + fstep.linear(y.reshape(-1, c.heads * c.head_dim), p["o"], p.get("o_bias"))
    h = fstep.rms_norm(x, p["mlp_norm"], eps=c.eps)
    gate = ACTIVATIONS[c.act](fstep.linear(h, p["gate"], p.get("gate_bias")))
    return x + fstep.linear(gate * fstep.linear(h, p["up"], p.get("up_bias")), p["down"], p.get("down_bias"))


@dataclass(frozen=True)
class Dense:
    """A dense decoder: its `Config` and how it is computed. It holds no parameters; every method takes them.

    ``dtype`` is what blocks and head compute in (None: the params' own), ``remat`` a policy of `fstep.remat` for each
    block, ``attention`` a method of `fstep.packed_attention`, ``compile`` whether the block goes through torch.compile
    (once for all layers).
    """

    config: Config
    dtype: torch.dtype | None = None
    remat: Any = "none"
    attention: str = "auto"
    compile: bool = False

    @cached_property
    def _block(self) -> Callable[..., Tensor]:
        run = fstep.remat(block, self.remat)
        return torch.compile(run, fullgraph=True) if self.compile else run

    def spec(self) -> Params:
        """Return the params' structure: for each leaf its Hugging Face name and shape."""
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        maps = {
            "q": ("self_attn.q_proj", q, c.dim, c.qkv_bias),
            "k": ("self_attn.k_proj", kv, c.dim, c.qkv_bias),
            "v": ("self_attn.v_proj", kv, c.dim, c.qkv_bias),
            "o": ("self_attn.o_proj", c.dim, q, c.out_bias),
            "gate": ("mlp.gate_proj", c.ffn, c.dim, c.mlp_bias),
            "up": ("mlp.up_proj", c.ffn, c.dim, c.mlp_bias),
            "down": ("mlp.down_proj", c.dim, c.ffn, c.mlp_bias),
        }
        norms = {"attn_norm": ("input_layernorm", c.dim), "mlp_norm": ("post_attention_layernorm", c.dim)}
        if c.qk_norm:
            norms |= {"q_norm": ("self_attn.q_norm", c.head_dim), "k_norm": ("self_attn.k_norm", c.head_dim)}

        def layer(i: int) -> Params:
            at = f"model.layers.{i}"
            tree = {k: HFTensor(f"{at}.{name}.weight", (n, m)) for k, (name, n, m, _) in maps.items()}
            tree |= {f"{k}_bias": HFTensor(f"{at}.{name}.bias", (n,)) for k, (name, n, _, b) in maps.items() if b}
            return tree | {k: HFTensor(f"{at}.{name}.weight", (n,)) for k, (name, n) in norms.items()}

        return {
            "embed": HFTensor("model.embed_tokens.weight", (c.vocab, c.dim)),
            "layers": {i: layer(i) for i in range(c.layers)},
            "norm": HFTensor("model.norm.weight", (c.dim,)),
            "head": Tied("embed") if c.tied else HFTensor("lm_head.weight", (c.vocab, c.dim)),
        }

    def init(self, key: Key, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        """Draw fresh params: weights normal with the config's deviation, norms 1, biases 0."""

        def draw(path: str, want: HFTensor) -> Tensor:
            if path.endswith("_bias"):
                return torch.zeros(want.shape, dtype=dtype, device=device)
            if len(want.shape) == 1:
                return torch.ones(want.shape, dtype=dtype, device=device)
            # A leaf's numbers depend on its name only, not on which other leaves are drawn beside it.
            own = key.fold_in(zlib.crc32(path.encode()))
            return own.normal(want.shape, dtype=dtype, device=device) * self.config.init_std

        return fstep.tree_map_with_path(draw, self.spec())

    @staticmethod
    def load(
        folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Dense, Params]:
        """Read a Hugging Face folder: the model of its config.json, and its weights in ``dtype``."""
        model = Dense(Config.from_hf(folder))
        tied = {"lm_head.weight": "embed"} if model.config.tied else {}
        ignore = ("rotary_emb.inv_freq",)
        return model, fstep.load_hf(folder, model.spec(), dtype=dtype, device=device, tied=tied, ignore=ignore)

    def save(
        self,
        folder: str | Path,
        params: Params,
        *,
        like: str | Path | None = None,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> Path:
        """Write a folder that transformers loads, in ``dtype`` (by default the params' own), and return its path.

        ``like`` is a model folder whose tokenizer files and config details (special tokens, ...) are kept.
        """
        config = self.config.to_hf({} if like is None else read_json(like))
        config["dtype"] = str(dtype or fstep.tree_leaves(params)[0].dtype).removeprefix("torch.")
        files = [] if like is None else tokenizer_files(like)
        return fstep.save_hf(
            folder, params, self.spec(), config=config, dtype=dtype, max_shard_bytes=max_shard_bytes, extra_files=files
        )

    def stage(self, mesh: Mesh = Mesh()) -> Callable[[Params, Tensor | None, Packed], Tensor]:  # noqa: B008
        """Return ``stage_fn(params, x, packed)``: hidden states [T, dim] after the layers that the params have."""
        check_type("Dense.stage", "mesh", mesh, Mesh, "Mesh(), or the mesh this runs over")
        for axis in (mesh.pp, mesh.cp, mesh.tp, mesh.ep):
            fstep.require_single("Dense.stage", axis)

        def run(params: Params, x: Tensor | None, mb: Packed) -> Tensor:
            if not isinstance(mb, Packed):
                raise TypeError(f"Dense.stage: the microbatch is a {type(mb).__name__}; pass it through pack_thd first")
            if x is None:
                x = fstep.embed(mb.tokens, params["embed"])
                x = x if self.dtype is None else x.to(self.dtype)
            cos, sin = self._tables(mb, x.dtype)
            for i in sorted(params.get("layers", {})):
                layer, window = params["layers"][i], self.config.windows[i]
                x = self._block(layer, x, cos, sin, mb.cu_seqlens_padded, mb.max_seqlen, window, self)
            return x

        return run

    def _tables(self, mb: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        place = torch.arange(len(mb.positions), device=mb.positions.device)
        cu = mb.cu_seqlens_padded.to(place.dtype)
        document = torch.searchsorted(cu, place + cu[0], right=True) - 1  # cu[0] is 0: vmap batches both alike
        lengths = mb.cu_seqlens.diff()[document]
        return fstep.rope_tables(self.config.rope, mb.positions, lengths=lengths, dtype=dtype)

    def _head(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        head = params["head"]
        weight = params[head.to] if isinstance(head, Tied) else head
        hidden = fstep.rms_norm(x, fstep.cast(params["norm"], self.dtype), eps=self.config.eps)
        return hidden, fstep.cast(weight, self.dtype)

    def logits(self, params: Params, x: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Return logits [T, vocab] of the last stage's hidden states; for a few tokens, as in generation."""
        return fstep.head_logits(*self._head(params, x), temperature=temperature)

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
        """Return the log probability of each label [T], and with ``entropy`` each distribution's entropy."""
        fstep.require_single("Dense.logprobs", mesh.tp)
        hidden, weight = self._head(params, x)
        return fstep.token_logprobs(hidden, weight, mb.labels, temperature=temperature, entropy=entropy)  # type: ignore[call-overload]
