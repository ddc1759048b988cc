"""Embedding, norm, linear map and rotation beside torch.nn, transformers and hand arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fstep.ops.layers import embed, linear, rms_norm, rotate


def test_embed_is_rows_and_scatters_back() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([4, 0, 4])
    out = embed(tokens, weight)
    assert torch.equal(out, torch.stack([weight[4], weight[0], weight[4]]))
    g = torch.randn(3, 3, dtype=torch.float64)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[4], expected[0] = g[0] + g[2], g[1]
    assert torch.equal(torch.autograd.grad(out, weight, g)[0], expected)


@pytest.mark.parametrize(("tokens", "bad"), [([0, 5], "5 at place 1"), ([-1], "-1 at place 0"), ([2, -100], "-100 at")])
def test_embed_names_the_id_past_the_vocabulary(tokens: list[int], bad: str) -> None:
    with pytest.raises(ValueError, match=f"embed: token {bad}.* is not in the vocabulary of 5; ids come from the tok"):
        embed(torch.tensor(tokens), torch.zeros(5, 3))


def test_embed_per_document_under_vmap() -> None:
    weight, tokens = torch.randn(5, 3), torch.tensor([[0, 1], [4, 4]])
    got = torch.func.vmap(lambda t: embed(t, weight))(tokens)
    assert torch.equal(got, weight[tokens])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 8, dtype=dtype, requires_grad=True)
    module = nn.RMSNorm(8, eps=1e-3, dtype=dtype)
    with torch.no_grad():
        module.weight.normal_()
    got, expected = rms_norm(x, module.weight, eps=1e-3), module(x)
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, expected, **tolerance)
    g = torch.randn_like(x)
    for a, b in zip(*(torch.autograd.grad(y, (x, module.weight), g) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_computes_wide_and_rounds_as_the_checkpoints_expect(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 32) * 100).to(dtype)  # squares of these overflow float16
    module = LlamaRMSNorm(32, eps=1e-6).to(dtype)
    with torch.no_grad():
        module.weight.normal_()
    got = rms_norm(x, module.weight.detach(), eps=1e-6)
    assert got.dtype == dtype and got.isfinite().all()
    assert torch.equal(got, module(x).detach())


def test_rms_norm_eps_is_inside_the_root() -> None:
    got = rms_norm(torch.tensor([3.0, 4.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64), eps=3.5)
    torch.testing.assert_close(got, torch.tensor([0.75, 1.0], dtype=torch.float64))  # sqrt(12.5 + 3.5) = 4
    zero = torch.zeros(2, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(zero, torch.ones(2), eps=1e-6).sum(), zero)
    assert grad.isfinite().all()


def test_linear() -> None:
    x, weight, bias = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([10.0, 20.0])
    assert linear(x, weight, bias).tolist() == [21.0, 37.0]
    assert linear(x[None, None], weight).tolist() == [[[11.0, 17.0]]]


def test_rotate_equals_complex_multiplication_and_transformers() -> None:
    x = torch.randn(6, 2, 8, dtype=torch.float64)
    angles = torch.randn(6, 4, dtype=torch.float64)
    got = rotate(x, angles.cos(), angles.sin())
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1), rtol=1e-13, atol=1e-13)
    both = [torch.cat([t, t], -1)[None] for t in (angles.cos(), angles.sin())]
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], *both)
    torch.testing.assert_close(got, theirs[0].transpose(0, 1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rotate(got, angles.cos(), -angles.sin()), x, rtol=1e-13, atol=1e-13)
    assert rotate(x.bfloat16(), angles.cos().bfloat16(), angles.sin().bfloat16()).dtype == torch.bfloat16
