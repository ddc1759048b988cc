"""Rotary frequencies and tables beside transformers, whose code is run in true float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fstep.ops.rope import Rope, rope_tables
from tests.hf_oracle import true_float64

CASES: dict[str, dict[str, Any]] = {
    "default": dict(kind="default"),
    "linear": dict(kind="linear", factor=4.0),
    "linear-fraction": dict(kind="linear", factor=2.5),
    "dynamic": dict(kind="dynamic", factor=4.0, trained_length=16),
    "dynamic-8": dict(kind="dynamic", factor=8.0, trained_length=5),
    "llama3": dict(kind="llama3", factor=8.0, trained_length=64, low_freq_factor=1.0, high_freq_factor=4.0),
    "llama3-wide": dict(kind="llama3", factor=32.0, trained_length=8192, low_freq_factor=0.5, high_freq_factor=30.0),
    "llama3-all-short": dict(kind="llama3", factor=8.0, trained_length=10**9),
    "yarn": dict(kind="yarn", factor=4.0, trained_length=64),
    "yarn-long": dict(kind="yarn", factor=40.0, trained_length=4096),
    "yarn-squeezed-the-other-way": dict(kind="yarn", factor=0.5, trained_length=64),
    "yarn-betas": dict(kind="yarn", factor=4.0, trained_length=4096, beta_fast=12.0, beta_slow=3.0),
    "yarn-not-truncated": dict(kind="yarn", factor=4.0, trained_length=4096, truncate=False),
    "yarn-both-mscales": dict(kind="yarn", factor=4.0, trained_length=4096, mscale=0.7, mscale_all_dim=1.3),
    "yarn-one-mscale": dict(kind="yarn", factor=4.0, trained_length=4096, mscale=0.7),
    "yarn-attention-factor": dict(kind="yarn", factor=4.0, trained_length=4096, attention_factor=0.8),
    "yarn-attention-factor-and-mscales": dict(
        kind="yarn", factor=4.0, trained_length=4096, attention_factor=0.8, mscale=0.7, mscale_all_dim=1.3
    ),
    "yarn-step": dict(kind="yarn", factor=4.0, trained_length=64, beta_fast=2.0, beta_slow=2.0, truncate=False),
    "yarn-all-turn-often": dict(kind="yarn", factor=4.0, trained_length=10**8),
}
HF_NAMES = {"kind": "rope_type", "trained_length": "original_max_position_embeddings"}
BASES = [(1e4, 32), (5e5, 64), (1e6, 128), (1e4, 6)]


def hf_config(theta: float, dim: int, fields: dict[str, Any]) -> LlamaConfig:
    rope = {HF_NAMES.get(k, k): v for k, v in fields.items()} | {"rope_theta": theta}
    if fields["kind"] == "llama3":
        rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | rope
    positions = 4096
    if fields["kind"] == "dynamic":
        positions = rope.pop("original_max_position_embeddings")
    return LlamaConfig(head_dim=dim, max_position_embeddings=positions, rope_parameters=rope)


def oracle(config: LlamaConfig, length: int) -> tuple[Tensor, float]:
    kind = config.rope_parameters["rope_type"]
    with true_float64():
        if kind == "default":
            return LlamaRotaryEmbedding(config).inv_freq, 1.0
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize(("theta", "dim"), BASES)
@pytest.mark.parametrize("case", CASES)
def test_tables_equal_transformers(case: str, theta: float, dim: int) -> None:
    """Three documents in one row; each turns as it would alone, with its own length."""
    fields = CASES[case]
    rope = Rope(theta=theta, dim=dim, **fields)
    config = hf_config(theta, dim, fields)
    lengths = [3, 40, 17]
    positions = torch.cat([torch.arange(n) for n in lengths])
    own = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    cos, sin = rope_tables(rope, positions, lengths=own, dtype=torch.float64)
    start = 0
    for n in lengths:
        frequencies, scale = oracle(config, n)
        if fields["kind"] != "dynamic":
            torch.testing.assert_close(rope.frequencies(), frequencies, rtol=1e-12, atol=0)
            assert rope.scale() == pytest.approx(scale, rel=1e-14)
        angles = torch.arange(n, dtype=torch.float64)[:, None] * frequencies
        torch.testing.assert_close(cos[start : start + n], angles.cos() * scale, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sin[start : start + n], angles.sin() * scale, rtol=1e-12, atol=1e-12)
        start += n


@pytest.mark.parametrize("case", CASES)
def test_the_cases_differ(case: str) -> None:
    """A case whose oracle gives plain frequencies would not see its options being ignored."""
    if case in ("default", "llama3-all-short", "yarn-all-turn-often"):
        return
    frequencies, _ = oracle(hf_config(1e4, 32, CASES[case]), 40)
    plain, _ = oracle(hf_config(1e4, 32, CASES["default"]), 40)
    assert (frequencies / plain - 1).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_angles_are_float32_and_tables_have_the_dtype(dtype: torch.dtype) -> None:
    """What transformers computes for a model of that dtype, up to the last bit of a float32 angle."""
    rope = Rope(theta=1e4, dim=32)
    positions = torch.arange(0, 4096, 61)
    x = torch.zeros(1, dtype=dtype)
    expected = LlamaRotaryEmbedding(hf_config(1e4, 32, {"kind": "default"}))(x, positions[None])
    got = rope_tables(rope, positions, lengths=torch.full_like(positions, 4096), dtype=dtype)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 4096 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b[0, :, :16], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dynamic_in_each_dtype(dtype: torch.dtype) -> None:
    rope = Rope(theta=1e4, dim=16, kind="dynamic", factor=4.0, trained_length=8)
    positions = torch.arange(100)
    cos, _ = rope_tables(rope, positions, lengths=torch.full((100,), 100), dtype=dtype)
    base = 1e4 * (4.0 * 100 / 8 - 3.0) ** (16 / 14)
    exact = (positions[:, None] * base ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)).cos()
    assert cos.dtype == dtype
    assert (cos - exact).abs().max() < 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="longrope"), "Rope: kind 'longrope' is not supported; it is one of default, linear, dynamic, yarn"),
        (dict(dim=7), "Rope: 7 dimensions cannot be paired; pass an even number from 2 up"),
        (dict(dim=0), "Rope: 0 dimensions cannot be paired"),
        (dict(dim=2, kind="dynamic", trained_length=8), "Rope: 2 dimensions cannot be paired; .* from 4 up"),
        (dict(kind="yarn"), "Rope: kind 'yarn' needs trained_length"),
        (dict(kind="llama3", trained_length=-1), "Rope: kind 'llama3' needs trained_length"),
        (dict(kind="dynamic"), "Rope: kind 'dynamic' needs trained_length"),
        (dict(theta=0.0), "Rope: theta is 0.0 and factor 1.0; pass theta > 1 and factor > 0"),
        (dict(kind="linear", factor=0.0), "Rope: theta is 10000.0 and factor 0.0; pass theta > 1 and factor > 0"),
        (dict(attention_factor=0.8), "Rope: kind 'default' has no attention_factor, only yarn does"),
        (
            dict(kind="llama3", trained_length=8, low_freq_factor=4.0),
            "Rope: low_freq_factor 4.0 is not below high_freq_factor 4.0",
        ),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rope(**(dict(theta=1e4, dim=8) | change))
