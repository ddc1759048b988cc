"""transformers as an oracle in true float64.

Its models round to float32 inside norms, rotary tables and eager softmax whatever dtype the weights have. For a comparison
to 1e-10 the same code is run with the name ``float32`` meaning float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@contextlib.contextmanager
def true_float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def make_hf(config: Any, seed: int = 0) -> Any:
    """A transformers model with weights far enough from their initial values that every one of them matters."""
    torch.manual_seed(seed)
    with true_float64():
        module = AutoModelForCausalLM.from_config(config).to(torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return module


def run_separately(
    module: Any, docs: list[list[int]], weights: list[list[float]]
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Logits of each document alone, the summed weighted loss, and its gradient by parameter name."""
    names = dict(module.named_parameters())
    logits, total = [], torch.zeros((), dtype=torch.float64)
    with true_float64():
        for ids, w in zip(docs, weights, strict=True):
            out = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            logits.append(out.detach())
            logp = out.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
            total = total - (logp * torch.tensor(w[1:], dtype=torch.float64)).sum()
        grads = torch.autograd.grad(total, list(names.values()))
    return logits, total.detach(), dict(zip(names, grads, strict=True))
