"""Where the params of a dense decoder live: which stage has which layers, and which leaf is cut along which dimension.

    stage 0            stage 1            stage 2               on each rank of an axis tp of 2
    embed              layers 2, 3        layers 4, 5           q, k, v, gate, up, embed, head     half of the rows
    layers 0, 1                           norm, head            o, down                            half of the columns
                                                                norms, o_bias, down_bias           the whole

A tree of `HFTensor` leaves, with the shapes of the whole model, inside the nodes `Shard`, `Copied` and `Stages`. Params are
drawn, loaded, cut and saved by it. And what a row of a microbatch is to a model: the rotary tables, and what is refused.
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fstep
from fstep import Axis, Copied, HFTensor, Key, Mesh, Packed, Rope, Schedule, Shard, Stages, Tied, require_single, stage_ranks
from fstep.mesh.place import even_span
from fstep.ops.attention import check_method
from fstep.ops.context import METHODS
from fstep.tree import check_type
from fstep_models.config import ConfigError
from fstep_models.dense_config import Config

Params = dict[Any, Any]

# The dimension along which a leaf is cut over tp; the others are whole on every rank.
CUT = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1}
CUT |= {f"{name}_bias": 0 for name, dim in CUT.items() if dim == 0}


def spec_on(config: Config, mesh: Mesh, schedule: Any) -> Any:
    """Return the params' structure on one rank: each leaf's Hugging Face name and whole shape, inside nodes."""
    # One rank has one stage, whatever the schedule's name; only a table given as a value says otherwise.
    alone = mesh.pp.size == 1 and not isinstance(schedule, Schedule)
    stages = (0,) if alone else stage_ranks(schedule, mesh.pp.size)
    dealt = deal_layers(config.layers, len(stages))
    first, last = stages[0], stages[-1]

    def part(stage: int) -> Params:
        tree: Params = {"layers": {i: layer_spec(config, i, mesh.tp) for i in dealt[stage]}}
        embed = cut(HFTensor("model.embed_tokens.weight", (config.vocab, config.dim)), mesh.tp, 0)
        if config.tied and first != last and stage in (0, len(stages) - 1):
            embed = Copied(embed, mesh.pp, tuple(sorted((first, last))))
        if stage == 0:
            tree["embed"] = embed
        if stage == len(stages) - 1:
            tree["norm"] = HFTensor("model.norm.weight", (config.dim,))
            tree["head"] = Tied("embed")
            if not config.tied:
                tree["head"] = cut(HFTensor("lm_head.weight", (config.vocab, config.dim)), mesh.tp, 0)
            elif first != last:
                tree["embed"] = embed
        return tree

    here = [stage for stage, rank in enumerate(stages) if rank == mesh.pp.rank]
    return part(here[0]) if len(here) == 1 else Stages({stage: part(stage) for stage in here})


def layer_spec(config: Config, i: int, tp: Axis) -> Params:
    """Return the structure of layer ``i``."""
    c, at = config, f"model.layers.{i}"
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
    tree: Params = {k: HFTensor(f"{at}.{name}.weight", (n, m)) for k, (name, n, m, _) in maps.items()}
    tree |= {f"{k}_bias": HFTensor(f"{at}.{name}.bias", (n,)) for k, (name, n, _, b) in maps.items() if b}
    tree |= {k: HFTensor(f"{at}.{name}.weight", (n,)) for k, (name, n) in norms.items()}
    whole = {"k", "v", "k_bias", "v_bias"} if c.kv_heads % tp.size else set()
    return {k: cut(leaf, tp, CUT[k]) if k in CUT and k not in whole else leaf for k, leaf in tree.items()}


def cut(leaf: HFTensor, axis: Axis, dim: int) -> Any:
    """Say that a leaf is cut over an axis."""
    of = leaf.shape[dim]
    return leaf if axis.size == 1 else Shard(leaf, axis, dim, even_span(of, axis), of)


def deal_layers(layers: int, stages: int) -> list[range]:
    """Deal layers to stages, neighbours together, as evenly as possible; the first stages get one more where needed.

    The last stage has the head besides, which is more work than the embedding of the first.
    """
    if stages > layers:
        raise ConfigError(
            f"dense: {layers} layers do not make {stages} stages; take at most {layers}, with fewer ranks on pp or fewer "
            "stages a rank"
        )
    small, more = divmod(layers, stages)
    starts = [stage * small + min(stage, more) for stage in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def draw(key: Key, place: fstep.Place, std: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Draw a fresh parameter, the whole of it: a weight normal, a norm 1, a bias 0."""
    if place.path.endswith("_bias"):
        return torch.zeros(place.shape, dtype=dtype, device=device)
    if len(place.shape) == 1:
        return torch.ones(place.shape, dtype=dtype, device=device)
    # A leaf's numbers depend on its name only, not on which other leaves are drawn beside it.
    own = key.fold_in(zlib.crc32(place.path.encode()))
    return own.normal(place.shape, dtype=dtype, device=device) * std


def tables(rope: Rope, mb: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make the rotary tables of a row's tokens."""
    place = torch.arange(len(mb.positions), device=mb.positions.device)
    cu = mb.cu_seqlens_padded.to(place.dtype)
    document = torch.searchsorted(cu, place + cu[0], right=True) - 1  # cu[0] is 0: vmap batches both alike
    lengths = mb.cu_seqlens.diff()[document]
    return fstep.rope_tables(rope, mb.positions, lengths=lengths, dtype=dtype)


def check_options(model: Any) -> None:
    """Refuse a model that could not run, when it is made."""
    check_type("Dense", "config", model.config, Config, "a Config, e.g. what Config.from_hf(folder) returns")
    if not (model.dtype is None or (isinstance(model.dtype, torch.dtype) and model.dtype.is_floating_point)):
        raise TypeError(f"Dense: dtype is {model.dtype!r}; pass a floating-point one, e.g. torch.bfloat16, or None")
    check_type("Dense", "remat", model.remat, (str, tuple, list), "'none', 'full', or a tuple of operations to keep")
    try:
        fstep.remat(check_options, model.remat)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Dense: {error}") from error
    if model.context not in METHODS:
        raise ValueError(f"Dense: context {model.context!r} is unknown; pass one of {', '.join(METHODS)}")
    check_method("Dense", "attention", model.attention)


def check_mesh(method: str, mesh: Mesh, model: Any) -> None:
    """Refuse what is no mesh, and sizes that the model does not divide over: a rank has whole heads, and some ids."""
    check_type(f"Dense.{method}", "mesh", mesh, Mesh, "Mesh(), or the mesh this runs over")
    require_single(f"Dense.{method}", mesh.ep)
    h, kv, vocab, tp = model.config.heads, model.config.kv_heads, model.config.vocab, mesh.tp.size

    def fits(n: int) -> bool:
        return h % n == 0 and (kv % n == 0 or n % kv == 0) and vocab >= n

    if not fits(tp):
        works = ", ".join(str(n) for n in range(1, h + 1) if fits(n))
        ids = "" if vocab >= tp else f", or {vocab} ids of the vocabulary,"
        raise ConfigError(
            f"dense: {h} query and {kv} key heads{ids} do not divide over axis 'tp' of size {tp}; sizes that do: {works}"
        )
    if model.context == "ulysses" and h // tp % mesh.cp.size:
        works = ", ".join(str(n) for n in range(1, h // tp + 1) if h // tp % n == 0)
        raise ConfigError(
            f"dense: {h // tp} query heads of a rank do not divide over axis 'cp' of size {mesh.cp.size}, as "
            f"context='ulysses' needs; sizes that do: {works}, or pass context='ring' or 'allgather'"
        )


def check_row(method: str, mb: Any, mesh: Mesh) -> None:
    """Refuse a microbatch that is not this mesh's: a whole row where tokens are spread over cp, or a part where not."""
    check_type(f"Dense.{method}", "the microbatch", mb, Packed, "it through pack_thd first")
    if mb.parts == mesh.cp.size:
        return
    if mb.parts == 1:
        has, fix = "a whole row (parts=1)", "pass it through cp_shard(packed, axis=mesh.cp) first"
    else:
        has, fix = (
            f"one of {mb.parts} shards (parts={mb.parts})",
            f"call {method} with the mesh that it was cut for, mesh=mesh",
        )
    raise ValueError(f"Dense.{method}: the microbatch is {has}, and axis 'cp' has size {mesh.cp.size}; {fix}")
