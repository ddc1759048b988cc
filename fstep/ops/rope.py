"""Rotary frequencies and their scalings, as published and as the checkpoints that ship with them expect.

    default   1 / theta^(2i/D)                                        Su et al., 2021
    linear    positions squeezed by a factor                          Chen et al., 2023
    dynamic   theta grown with the length of the document             "NTK-aware", 2023
    yarn      low frequencies squeezed, high ones kept, a ramp between  Peng et al., 2023
    llama3    the same idea with a smooth step by wavelength          Llama 3.1

`Rope` is a value; `rope_tables` turns positions into cosines and sines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """Which rotary embedding a model uses: its base ``theta``, how many dimensions turn, and its scaling.

    ``trained_length`` is the context length before scaling, ``attention_factor`` multiplies yarn's cosines and sines (None:
    what the scaling prescribes). The fields below ``trained_length`` matter to the kinds they are named for.

    >>> import fstep
    >>> fstep.Rope(theta=10000.0, dim=4).frequencies()
    tensor([1.0000, 0.0100], dtype=torch.float64)
    """

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    trained_length: int = 0
    attention_factor: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Rope: kind {self.kind!r} is not supported; it is one of {', '.join(KINDS)}")
        least = 4 if self.kind == "dynamic" else 2  # its exponent is D / (D - 2)
        if self.dim % 2 or self.dim < least:
            raise ValueError(f"Rope: {self.dim} dimensions cannot be paired; pass an even number from {least} up")
        if not (self.theta > 1 and self.factor > 0):
            raise ValueError(f"Rope: theta is {self.theta} and factor {self.factor}; pass theta > 1 and factor > 0")
        if self.attention_factor is not None and self.kind != "yarn":
            raise ValueError(f"Rope: kind {self.kind!r} has no attention_factor, only yarn does; leave it out")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"Rope: low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )
        if self.kind in ("dynamic", "yarn", "llama3") and self.trained_length < 1:
            raise ValueError(f"Rope: kind {self.kind!r} needs trained_length, the context length before scaling")

    def frequencies(self) -> Tensor:
        """Return the D/2 angles a position turns by, float64."""
        base = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        if self.kind == "linear":
            return base / self.factor
        if self.kind == "yarn":
            return self._yarn(base)
        if self.kind == "llama3":
            return self._llama3(base)
        return base

    def scale(self) -> float:
        """Return the number cosines and sines are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def grow(m: float) -> float:
            return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return grow(self.mscale) / grow(self.mscale_all_dim)
        return grow(1.0)

    def _yarn(self, base: Tensor) -> Tensor:
        def dimension(turns: float) -> float:
            """Return the dimension that makes ``turns`` full turns over the trained context."""
            return self.dim * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001  # a step instead of a ramp
        squeeze = ((torch.arange(self.dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        return base / self.factor * squeeze + base * (1 - squeeze)

    def _llama3(self, base: Tensor) -> Tensor:
        turns = self.trained_length * base / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)  # 0: long waves, squeezed; 1: short waves, kept
        return base / self.factor * (1 - keep) + base * keep


def rope_tables(rope: Rope, positions: Tensor, *, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, D/2] for tokens at ``positions`` of documents of ``lengths`` (both [T]).

    Angles are computed in float32, or float64 if ``dtype`` is. The length of a token's own document matters to the dynamic
    scaling only, which therefore turns each document as if it were alone.

    >>> import torch, fstep
    >>> rope = fstep.Rope(theta=10000.0, dim=4)
    >>> cos, sin = fstep.rope_tables(rope, torch.tensor([0, 1]), lengths=torch.tensor([2, 2]), dtype=torch.float32)
    >>> sin
    tensor([[0.0000, 0.0000],
            [0.8415, 0.0100]])
    """
    wide = torch.promote_types(dtype, torch.float32)
    if rope.kind == "dynamic":
        length = lengths.to(wide).clamp(min=rope.trained_length)
        grown = (rope.factor * length / rope.trained_length - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
        exponent = torch.arange(0, rope.dim, 2, dtype=wide, device=positions.device) / rope.dim
        frequencies = (rope.theta * grown)[:, None] ** -exponent
    else:
        # Not to wait for the device: the few numbers are taken along with the launch.
        frequencies = rope.frequencies().to(device=positions.device, dtype=wide, non_blocking=True)
    angles = positions.to(wide)[:, None] * frequencies
    scale = rope.scale()
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
