"""Explicit randomness. A `Key` is a value; the same key always draws the same numbers.

No function of fstep reads a global random state. A key is one 64-bit number; element i of a draw is a hash of (key, i),
so that a draw has the same bits on every device, under `vmap` and `torch.compile`, and does not depend on what was drawn
before. (`normal` takes a logarithm and a cosine, whose last digits are the device's.) The hash is SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fstep.tree import pytree


def _i64(unsigned: int) -> int:
    """Write an unsigned 64-bit constant as the signed integer with the same bits."""
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


_GAMMA = _i64(0x9E3779B97F4A7C15)
_MIX1 = _i64(0xBF58476D1CE4E5B9)
_MIX2 = _i64(0x94D049BB133111EB)
_FOLD = _i64(0xD1342543DE82EF95)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _hide(x: Tensor, data: Tensor) -> Tensor:
    """Return ``x``, in a way that the compiler cannot see through.

    What is known when compiling (an index, a constant) inductor computes in Python's integers or in 32 bits. The hash needs
    products that wrap around at 64 bits, as those of loaded data do.
    """
    return (x ^ data) ^ data


def _require_float(draw: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"Key.{draw}: dtype is {dtype}; pass a floating-point dtype, or draw whole numbers with bits")


@pytree
class Key:
    """A source of random numbers that is a value: using it twice gives the same numbers twice.

    Make one with `Key.seed`, derive others with `fold_in` (from a number: a step, a layer, a document) or `split`, and
    use each for one purpose.

    >>> import fstep
    >>> key = fstep.Key.seed(0)
    >>> key.uniform((2,)).equal(key.uniform((2,)))
    True
    >>> key.fold_in(7).uniform((2,)).equal(key.uniform((2,)))
    False
    """

    data: Tensor

    @staticmethod
    def seed(seed: int) -> Key:
        """Make a key from an integer."""
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"Key.seed: seed must be an int, got {seed!r}; pass e.g. Key.seed(0)")
        return Key(_mix(torch.tensor(_i64(seed % (1 << 64)), dtype=torch.int64) + _GAMMA))

    def fold_in(self, number: int | Tensor) -> Key:
        """Derive the key numbered ``number`` (an int or a 0-d integer tensor) from this one."""
        if isinstance(number, Tensor):
            if number.dim() or number.is_floating_point() or number.is_complex() or number.dtype == torch.bool:
                raise TypeError(
                    f"Key.fold_in: number is a tensor of {number.dtype} and shape {tuple(number.shape)}; pass an int or a "
                    "0-d integer tensor, and use vmap for many keys at once"
                )
            n = number
        else:
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"Key.fold_in: number is {number!r}; pass an int or a 0-d integer tensor")
            n = torch.full_like(self.data, number if -(1 << 63) <= number < 1 << 63 else _i64(number % (1 << 64)))
        return Key(_mix(self.data ^ _mix(_hide(n, self.data) * _FOLD)))

    def split(self, num: int) -> tuple[Key, ...]:
        """Derive ``num`` independent keys."""
        return tuple(self.fold_in(i) for i in range(num))

    def bits(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """Draw 64 random bits an element, as int64."""
        shape = tuple(shape)
        counter = torch.arange(1, math.prod(shape) + 1, device=device or self.data.device)
        data = self.data.to(counter.device)
        return _mix(data + _hide(counter, data) * _GAMMA).reshape(shape)

    def uniform(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw from [0, 1): multiples of 2^-p, p the digits of ``dtype`` (8 in bfloat16, 24 in float32)."""
        _require_float("uniform", dtype)
        # More digits than the dtype has would round some draws up to 1.
        bits = 1 - round(math.log2(torch.finfo(dtype).eps))
        return (_shift(self.bits(shape, device=device), 64 - bits).to(torch.float64) * 2.0**-bits).to(dtype)

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw from the standard normal distribution (Box and Muller, 1958)."""
        _require_float("normal", dtype)
        radius_key, angle_key = self.split(2)
        wide = torch.promote_types(dtype, torch.float32)
        radius = radius_key.uniform(shape, dtype=wide, device=device)
        angle = angle_key.uniform(shape, dtype=wide, device=device)
        # 1 - u lies in (0, 1], where the logarithm is finite.
        return (torch.sqrt(-2.0 * torch.log(1.0 - radius)) * torch.cos(2.0 * math.pi * angle)).to(dtype)

    def permutation(self, n: int, *, device: torch.device | str | None = None) -> Tensor:
        """Draw an order of ``range(n)``."""
        return torch.argsort(self.bits((n,), device=device), stable=True)

    def categorical(self, logits: Tensor) -> Tensor:
        """Draw an index along the last dimension with probability proportional to ``exp(logits)``."""
        u = self.uniform(logits.shape, dtype=torch.float64, device=logits.device)
        gumbel = -torch.log(-torch.log(u.clamp(min=2.0**-53)))
        return (logits.double() + gumbel).argmax(-1)
