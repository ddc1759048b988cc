"""What the tests of this room share: a tree of params with awkward leaves in it, its gradients, and ways to compare."""

from __future__ import annotations

from typing import Any

import torch

from fstep.state.state import TrainState, init_state
from fstep.tree import tree_leaves, tree_map


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def make_params(dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Two matrices inside layers (tall and wide), a stack of three, an embedding, norms, and zeros of both signs."""
    shapes = {"q": (6, 4), "o": (3, 7), "experts": (3, 4, 5), "norm": (4,)}
    layer = {name: randn(seed + i, *shape, dtype=dtype, device=device) for i, (name, shape) in enumerate(shapes.items())}
    layer["norm"] = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=dtype, device=device)
    return {"embed": randn(seed + 9, 5, 4, dtype=dtype, device=device), "layers": {0: layer}}


def make_grads(params: Any, seed: int) -> Any:
    seeds = iter(range(1000 * (seed + 1), 1000 * (seed + 2)))
    return tree_map(lambda p: randn(next(seeds), *p.shape, dtype=p.dtype, device=str(p.device)), params)


def run(opt: Any, params: Any, steps: int, *, lr: Any = 0.1, **kwargs: Any) -> TrainState:
    state = init_state(params, opt)
    for i in range(steps):
        state = opt.update(state, make_grads(params, i), lr=lr, **kwargs)
    return state


def bits(tree: Any) -> list[tuple[torch.dtype, bytes]]:
    """Return what tells +0 from -0 and one NaN from another."""
    return [(x.dtype, bytes(x.detach().cpu().contiguous().flatten().view(torch.uint8).tolist())) for x in tree_leaves(tree)]


def versions(tree: Any) -> list[int]:
    return [x._version for x in tree_leaves(tree)]


def assert_close(a: Any, b: Any, rtol: float = 1e-12) -> None:
    left, right = tree_leaves(a), tree_leaves(b)
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        assert x.shape == y.shape
        # A leaf is one vector: an element that cancelled to nearly 0 has no relative accuracy of its own.
        assert (x - y).norm() <= rtol * y.norm(), (x, y)
