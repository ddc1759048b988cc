"""`lift` turns any nn.Module into params and a pure function, so that the same step trains it.

params, apply = lift(module)
apply(params, *inputs)  ==  module(*inputs)      and the module itself is never touched again
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fstep.key import Key
from fstep.tree import tree_leaves


def _draws_random(module: nn.Module) -> str | None:
    """Return the name of a submodule that draws random numbers in training mode."""
    for name, part in module.named_modules():
        if part.training and isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return name or type(part).__name__
        if part.training and isinstance(part, nn.RNNBase | nn.MultiheadAttention) and part.dropout > 0:
            return name or type(part).__name__
    return None


def _skeleton(module: nn.Module) -> nn.Module:
    """Copy a module without its parameters: what is left of them are shapes.

    torch.utils.checkpoint inside a forward runs it again in the backward pass, after `functional_call` has put the module's
    own parameters back, and would silently use their values. Here there are none to use.
    """
    for path, part in module.named_modules():
        name = path or type(part).__name__
        if part.training and getattr(part, "gradient_checkpointing", False):  # transformers' name for it
            raise ValueError(
                f"lift: {name!r} has gradient checkpointing on, which computes with the module's own "
                "parameters again; turn it off, and wrap the function in fstep.remat"
            )
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
            raise ValueError(
                f"lift: {name!r} has max_norm, and rescales its weight in place whenever it is called; "
                "set it to None, and rescale the params in the step"
            )
        for key, value in vars(part).items():
            # torch itself puts an RNN's flat weights right.
            known = key in ("_parameters", "_modules") or (key == "_flat_weights" and isinstance(part, nn.RNNBase))
            if not known and any(isinstance(x, nn.Parameter) for x in tree_leaves(value)):
                raise ValueError(
                    f"lift: {name!r} keeps a parameter in {key!r}, where it cannot be replaced; let the forward look it up "
                    "by its name, or keep it in an nn.ParameterList"
                )
    meta = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return deepcopy(module, meta)


def _random_states(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def lift(module: nn.Module, *, copy: bool = True) -> tuple[dict[str, Tensor], Callable[..., Any]]:
    """Return ``(params, apply)`` with ``apply(params, *args, **kwargs) == module(*args, **kwargs)``, and pure.

    ``params`` maps the module's parameter names to tensors (parameters that are one in the module are one here); with
    ``copy=False`` they share its memory, which a donated update would then write to. Everything else is taken as it is at
    the time of lifting, training mode and buffers too; a forward that updates its buffers (batch norm in training mode)
    updates copies that are dropped. (What else a forward writes to ``self``, a counter or a cache, stays.) A module that
    draws random numbers (dropout in training mode) needs ``apply(params, ..., key=key)``, and draws the same numbers for the
    same key.

    A parameter with ``requires_grad=False`` is in ``params`` like any other, since freezing is said to whoever takes
    gradients: ``trainable=lambda name: module.get_parameter(name).requires_grad``.

    Raises ValueError if a key is needed and not given, if params are not the module's, for a transformers model with
    gradient checkpointing, an embedding with ``max_norm``, and a module that keeps a parameter in a list or dict of its own.

    >>> import torch, fstep
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> params, apply = fstep.lift(module)
    >>> loss = lambda p, x: (apply(p, x) ** 2).sum()
    >>> value, grads = fstep.value_and_grad(loss)({"weight": torch.tensor([[1.0, 2.0]])}, torch.tensor([[3.0, 4.0]]))
    >>> value, grads
    (tensor(121.), {'weight': tensor([[66., 88.]])})
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"lift: got a {type(module).__name__}; pass an nn.Module")
    params = {name: p.detach().clone() if copy else p.detach() for name, p in module.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    names, random, skeleton = sorted(params), _draws_random(module), _skeleton(module)

    def apply(params: dict[str, Tensor], *args: Any, key: Key | None = None, **kwargs: Any) -> Any:
        if sorted(params) != names:
            wrong = sorted(set(params).symmetric_difference(names))[:4]
            raise ValueError(f"lift: params do not have the module's names; {wrong} are in one of the two only")
        if random is not None and key is None:
            raise ValueError(f"lift: {random!r} draws random numbers; pass apply(..., key=key), or lift module.eval()")
        state = {**params, **{name: b.clone() for name, b in buffers.items()}}
        if key is None and torch.compiler.is_compiling():
            return functional_call(skeleton, state, args, kwargs)
        devices = sorted({p.device.index for p in params.values() if p.device.type == "cuda"})
        if key is not None:
            with torch.random.fork_rng(devices=devices):
                seed = int(key.data) % (1 << 63)
                torch.default_generator.manual_seed(seed)
                for d in devices:
                    torch.cuda.default_generators[d].manual_seed(seed)
                return functional_call(skeleton, state, args, kwargs)
        before = _random_states(devices)
        out = functional_call(skeleton, state, args, kwargs)
        if not all(map(torch.equal, before, _random_states(devices))):
            raise ValueError("lift: the forward drew random numbers; pass apply(..., key=key), or lift module.eval()")
        return out

    return params, apply
