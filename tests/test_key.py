"""Keys: the published numbers, the same bits everywhere, and draws that are distributed as they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fstep.testing
from fstep import Key

MASK = (1 << 64) - 1


# SplitMix64 in Python's integers, written from the paper.
def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def seed(n: int) -> int:
    return mix((n + 0x9E3779B97F4A7C15) & MASK)


def fold(data: int, n: int) -> int:
    return mix(data ^ mix(n * 0xD1342543DE82EF95 & MASK))


def bits(data: int, n: int) -> list[int]:
    return [mix((data + i * 0x9E3779B97F4A7C15) & MASK) for i in range(1, n + 1)]


def unsigned(x: torch.Tensor) -> list[int]:
    return [v & MASK for v in x.flatten().tolist()]


KNOWN_BITS = [12035550249420947055, 12935080325729570654, 7141179953334974231]
KNOWN_FOLD = 9680243981952160909
SEEDS = [0, 1, 2, 42, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), 2**64 + 5]


def test_bits_are_those_of_the_published_generator() -> None:
    # The first outputs of SplitMix64 started at 1234567, as the reference implementation in C prints them.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert unsigned(Key(torch.tensor(1234567)).bits((5,))) == published == bits(1234567, 5)


@pytest.mark.parametrize("n", SEEDS)
def test_seed_and_bits(n: int) -> None:
    key = Key.seed(n)
    assert key.data.dtype == torch.int64 and key.data.shape == ()
    assert unsigned(key.data) == [seed(n)]
    assert unsigned(key.bits((2, 3))) == bits(seed(n), 6)
    assert unsigned(key.bits(())) == bits(seed(n), 1)
    assert key.bits((0, 3)).shape == (0, 3)


@pytest.mark.parametrize("n", SEEDS)
def test_fold_in(n: int) -> None:
    assert unsigned(Key.seed(9).fold_in(n).data) == [fold(seed(9), n)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_fold_in_of_a_tensor_is_that_of_its_number(dtype: torch.dtype) -> None:
    for n in (0, 1, 7, 100):
        assert Key.seed(9).fold_in(torch.tensor(n, dtype=dtype)).data == Key.seed(9).fold_in(n).data
    if dtype.is_signed:
        assert Key.seed(9).fold_in(torch.tensor(-3, dtype=dtype)).data == Key.seed(9).fold_in(-3).data


def test_known_answers() -> None:
    # Computed with the Python functions above; they may never change, or resumed runs would.
    key = Key.seed(0)
    assert unsigned(key.data) == [16294208416658607535]
    assert unsigned(key.bits((3,))) == KNOWN_BITS
    assert unsigned(key.fold_in(1).data) == [KNOWN_FOLD]
    assert key.uniform((3,), dtype=torch.float64).tolist() == [(b >> 11) / 2**53 for b in KNOWN_BITS]
    assert key.uniform((3,)).tolist() == [(b >> 40) / 2**24 for b in KNOWN_BITS]
    assert key.uniform((3,), dtype=torch.float16).tolist() == [(b >> 53) / 2**11 for b in KNOWN_BITS]
    assert key.uniform((3,), dtype=torch.bfloat16).tolist() == [(b >> 56) / 2**8 for b in KNOWN_BITS]


def test_normal_is_box_and_muller_of_two_derived_keys() -> None:
    radius, angle = (bits(fold(seed(3), i), 4) for i in (0, 1))
    expected = [
        math.sqrt(-2 * math.log(1 - (r >> 11) / 2**53)) * math.cos(2 * math.pi * (a >> 11) / 2**53)
        for r, a in zip(radius, angle, strict=True)
    ]
    got = Key.seed(3).normal((4,), dtype=torch.float64)
    fstep.testing.assert_trees_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-14)


def test_permutation_sorts_the_bits() -> None:
    drawn = [b - (1 << 64) if b >> 63 else b for b in bits(seed(4), 50)]
    assert Key.seed(4).permutation(50).tolist() == sorted(range(50), key=drawn.__getitem__)


def test_split_is_fold_in_of_the_first_numbers() -> None:
    assert [k.data for k in Key.seed(1).split(3)] == [Key.seed(1).fold_in(i).data for i in range(3)]


DRAWS: dict[str, Callable[[Key], Any]] = {
    "bits": lambda k: k.bits((3, 5)),
    "uniform": lambda k: k.uniform((3, 5)),
    "uniform64": lambda k: k.uniform((3, 5), dtype=torch.float64),
    "normal": lambda k: k.normal((3, 5)),
    "normal bf16": lambda k: k.normal((3, 5), dtype=torch.bfloat16),
    "permutation": lambda k: k.permutation(11),
    "categorical": lambda k: k.categorical(torch.arange(15.0).reshape(3, 5)),
    "fold_in": lambda k: k.fold_in(7).data,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draw_is_a_function_of_the_key(draw: Callable[[Key], Any]) -> None:
    key = Key.seed(5)
    first = fstep.testing.assert_pure(draw, key)
    torch.manual_seed(99)  # nobody asks
    assert torch.equal(draw(key), first)
    assert not torch.equal(draw(Key.seed(6)), first)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_vmap_over_keys_is_a_loop(draw: Callable[[Key], Any]) -> None:
    keys = Key.seed(5).split(4)
    many = torch.func.vmap(draw)(Key(torch.stack([k.data for k in keys])))
    assert torch.equal(many, torch.stack([draw(k) for k in keys]))
    derived = torch.func.vmap(lambda n: draw(keys[0].fold_in(n)))(torch.arange(4))
    assert torch.equal(derived, torch.stack([draw(keys[0].fold_in(n)) for n in range(4)]))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_compiled_is_one_graph_and_the_same_bits(draw: Callable[[Key], Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda key, n: draw(key.fold_in(n)), fullgraph=True, backend="aot_eager")
    for n in range(3):
        assert torch.equal(compiled(Key.seed(1), torch.tensor(n)), draw(Key.seed(1).fold_in(n)))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("draw", [DRAWS[name] for name in ("bits", "categorical")])
def test_inductor_gives_the_same_bits(draw: Callable[[Key], Any]) -> None:
    # It computes with indices and constants in 32 bits or in Python's integers, unless they are hidden from it.
    torch._dynamo.reset()
    compiled = torch.compile(lambda key, n: draw(key.fold_in(n)), fullgraph=True)
    for n in (5, torch.tensor(5), 6):
        assert torch.equal(compiled(Key.seed(1), n), draw(Key.seed(1).fold_in(n)))
    torch._dynamo.reset()


def test_a_longer_draw_begins_like_a_shorter_one() -> None:
    assert torch.equal(Key.seed(2).uniform((100,))[:7], Key.seed(2).uniform((7,)))


# Statistics. The keys are fixed, so that a bound of 5 standard deviations either always holds or never.
N = 1 << 16


@pytest.mark.parametrize("source", ["one draw", "seeds", "folds", "folds of folds"])
def test_uniform_is_uniform(source: str) -> None:
    numbers = torch.arange(N)
    key = Key.seed(11)
    u = {
        "one draw": lambda: key.uniform((N,), dtype=torch.float64),
        "seeds": lambda: torch.stack([Key.seed(i).uniform((), dtype=torch.float64) for i in range(2048)]),
        "folds": lambda: torch.func.vmap(lambda n: key.fold_in(n).uniform((), dtype=torch.float64))(numbers),
        "folds of folds": lambda: torch.func.vmap(
            lambda n: key.fold_in(n // 256).fold_in(n % 256).uniform((), dtype=torch.float64)
        )(numbers),
    }[source]()
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    assert abs(float(u.mean()) - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    # Kolmogorov and Smirnov: sqrt(n) D exceeds 2 with probability 0.0007.
    d = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(d) * math.sqrt(n) < 2
    # Neighbours are not correlated.
    c = u - u.mean()
    assert abs(float((c[1:] * c[:-1]).mean() / c.var())) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_never_rounds_up_to_one(dtype: torch.dtype) -> None:
    u = Key.seed(12).uniform((N,), dtype=dtype)
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    assert bool((u.double() * 2.0**digits == (u.double() * 2.0**digits).round()).all())
    assert abs(float(u.double().mean()) - (1 - 2.0**-digits) / 2) < 5 * math.sqrt(1 / 12 / N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_normal_is_normal(dtype: torch.dtype) -> None:
    drawn = Key.seed(13).normal((N,), dtype=dtype)
    assert drawn.dtype == dtype and bool(drawn.isfinite().all())
    x = drawn.double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(x.pow(power).mean()) - expected) < 5 * math.sqrt(variance / N), power
    if dtype != torch.bfloat16:
        d = (torch.special.ndtr(x.sort().values) - (torch.arange(N) + 0.5) / N).abs().max()
        assert float(d) * math.sqrt(N) < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_normals_are_rounded_once(dtype: torch.dtype) -> None:
    # Made of uniforms of 8 digits they would have no tails past 3.3.
    assert torch.equal(Key.seed(13).normal((N,), dtype=dtype), Key.seed(13).normal((N,)).to(dtype))


def test_every_bit_is_a_fair_coin() -> None:
    drawn = Key.seed(14).bits((N,))
    for i in range(64):
        assert abs(float(((drawn >> i) & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(N), i


def test_related_keys_are_not_correlated() -> None:
    key = Key.seed(15)
    family = [key, *key.split(16), *key.fold_in(0).split(8), *(Key.seed(15 + i) for i in range(1, 8))]
    x = torch.stack([k.uniform((4096,), dtype=torch.float64) for k in family])
    correlation = torch.corrcoef(x) - torch.eye(len(family))
    assert float(correlation.abs().max()) < 5 / math.sqrt(4096)
    # Two keys whose streams met would share numbers; 64-bit numbers do not meet by chance.
    drawn = torch.stack([k.bits((4096,)) for k in family])
    assert len(drawn.unique()) == drawn.numel()


def test_a_change_of_one_bit_changes_half_of_them() -> None:
    key = Key.seed(16)
    flips = [bin(unsigned(key.fold_in(n).data)[0] ^ unsigned(key.fold_in(n ^ (1 << b)).data)[0]).count("1")
             for n in range(32) for b in range(0, 63, 3)]  # fmt: skip
    assert abs(sum(flips) / len(flips) - 32) < 5 * 4 / math.sqrt(len(flips))
    assert min(flips) > 8


def test_folds_do_not_collide_and_do_not_commute() -> None:
    key = Key.seed(17)
    many = torch.func.vmap(lambda n: key.fold_in(n).data)(torch.arange(-50_000, 50_000))
    assert len(many.unique()) == 100_000
    assert key.fold_in(1).fold_in(2).data != key.fold_in(2).fold_in(1).data
    assert key.fold_in(0).data != key.data


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_is_one(n: int) -> None:
    assert Key.seed(18).permutation(n).sort().values.tolist() == list(range(n))


def test_every_permutation_is_as_likely() -> None:
    keys = Key(torch.stack([k.data for k in Key.seed(19).split(6000)]))
    drawn = torch.func.vmap(lambda k: k.permutation(3))(keys)
    counts = torch.bincount(drawn @ torch.tensor([9, 3, 1]))
    counts = counts[counts > 0]
    assert len(counts) == 6
    assert float(((counts - 1000) ** 2 / 1000.0).sum()) < 20.5  # chi squared, 5 degrees of freedom, p = 0.001


def test_categorical_has_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    drawn = Key.seed(20).categorical(logits.expand(N, 5))
    assert drawn.dtype == torch.int64 and drawn.shape == (N,)
    counts, p = torch.bincount(drawn, minlength=5).double(), logits.double().softmax(0)
    assert counts[4] == 0
    assert float(((counts - N * p)[:4] ** 2 / (N * p)[:4]).sum()) < 16.3  # chi squared, 3 degrees of freedom, p = 0.001
    # A constant added to all logits changes nothing, and rows are independent of each other.
    assert torch.equal(Key.seed(20).categorical((logits + 8).expand(N, 5)), drawn)
    assert Key.seed(20).categorical(torch.zeros(8, 3, 4)).shape == (8, 3)


@pytest.mark.parametrize("wrong", [1.0, "0", True, None, torch.tensor(0)])
def test_seed_wants_an_int(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"Key.seed: seed must be an int, got .*; pass e.g. Key.seed\(0\)"):
        Key.seed(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1.0, "number is 1.0"),
        (True, "number is True"),
        ("a", "number is 'a'"),
        (torch.tensor(1.0), "number is a tensor of torch.float32"),
        (torch.tensor(True), "number is a tensor of torch.bool"),
        (torch.arange(3), r"shape \(3,\); pass an int or a 0-d integer tensor, and use vmap"),
    ],
)
def test_fold_in_wants_one_whole_number(wrong: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^Key.fold_in: .*{message}"):
        Key.seed(0).fold_in(wrong)


def test_a_draw_in_whole_numbers_is_refused() -> None:
    for draw in ("uniform", "normal"):
        with pytest.raises(TypeError, match=f"Key.{draw}: dtype is torch.int64; pass a floating-point dtype"):
            getattr(Key.seed(0), draw)((2,), dtype=torch.int64)
