"""Are fstep's losses those of TRL and verl, on the same numbers? Prints each one's errors, in float64.

    python benchmarks/peers_losses.py              values and gradients over 5 seeds; on the CPU, in seconds

The peers are installed for the run only, beside an environment that has torch and fstep, without their dependencies:

    python -m venv /tmp/peers
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" > /tmp/peers/more.pth
    mv /tmp/peers/more.pth /tmp/peers/lib/python3.11/site-packages/
    /tmp/peers/bin/pip install --no-deps trl verl tensordict ray datasets accelerate ...  (what their imports name)
    /tmp/peers/bin/python benchmarks/peers_losses.py

A peer that is not there has its rows say so. What is compared is the peer's own function, never a copy. Both get answers, a
batch of rows [answers, tokens] with a mask: one answer all masked, one of one token, tokens masked inside, ratios on the
bounds of the clamp and far past them, a prompt whose answers are equally good. Where nothing counts a peer gets 0, since it
multiplies by its mask, and fstep gets NaN and infinities. Where definitions differ the note says how, and what was done so
that the two should be equal again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fstep

PEERS = {"verl": ["peers_losses_verl"], "trl": ["peers_losses_trl", "peers_losses_pairs"]}
F64 = torch.float64
BOUND = 1e-10
ROWS, LENGTH, VOCAB = 12, 9, 11
HEAD = "| loss | peer | error of the value | of the gradient | bound | where definitions differ |\n|---|---|---|---|---|---|"


@dataclasses.dataclass
class Row:
    """A line of the table: the worst errors over all seeds, relative to the peer's value and gradient."""

    loss: str
    peer: str
    value: float = 0.0
    gradient: float | None = None  # None for what is a constant
    bound: float = BOUND
    note: str = ""
    missing: str = ""

    def line(self) -> str:
        """Return the row in markdown."""
        if self.missing:
            return f"| {self.loss} | {self.peer} | - | - | - | {self.missing} |"
        slope = "-" if self.gradient is None else f"{self.gradient:.1e}"
        return f"| {self.loss} | {self.peer} | {self.value:.1e} | {slope} | {self.bound:.0e} | {self.note} |"

    @property
    def equal(self) -> bool:
        """Whether both errors are within the bound."""
        return bool(self.missing) or max(self.value, self.gradient or 0.0) <= self.bound


@dataclasses.dataclass
class Case:
    """Random answers: numbers of tokens [ROWS, LENGTH], and the documents that fstep makes of them."""

    mask: Tensor
    x: dict[str, Tensor]
    rewards: Tensor
    groups: Tensor
    docs: fstep.Docs

    def __getattr__(self, name: str) -> Tensor:
        """Return a field as a peer gets it: [ROWS, LENGTH], 0 where nothing counts."""
        if name not in self.__dict__.get("x", {}):
            raise AttributeError(name)
        return self.x[name].clone()

    def flat(self, x: Tensor | str) -> Tensor:
        """Return a field as fstep gets it: [tokens], garbage where nothing counts."""
        given = (self.x[x] if isinstance(x, str) else x).flatten()
        junk = torch.tensor([math.nan, -math.inf, math.inf], dtype=given.dtype).repeat(len(given))[: len(given)]
        return torch.where(self.mask.flatten() != 0, given, junk)

    @property
    def each(self) -> Tensor:
        """Return weights that count each answer once."""
        return fstep.document_weights(self.docs)

    @property
    def lively(self) -> int:
        """Return how many answers have a token that counts."""
        return int((self.mask.sum(1) > 0).sum())


def draw(seed: int) -> Case:
    """Draw a case; the first token of each row is the prompt."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(ROWS, LENGTH, generator=g) < 0.7).double()
    mask[:, 0] = 0
    mask[3] = 0
    mask[5], mask[5, 4], mask[8, 1] = torch.zeros(LENGTH, dtype=F64), 1, 1
    mask[0], mask[0, 1:] = torch.zeros(LENGTH, dtype=F64), 1
    names = ("advantages", "ref", "value", "old_value", "returns", "reward", "generator", "entropy")
    x = {name: torch.randn(ROWS, LENGTH, generator=g, dtype=F64) for name in names}
    x["logp"] = -3 * torch.rand(ROWS, LENGTH, generator=g, dtype=F64)
    x["old"] = x["logp"] + 0.4 * torch.randn(ROWS, LENGTH, generator=g, dtype=F64)
    # On policy; on the bounds of [1/2, 2], for which log probabilities are 0 and the old ones the bounds; far past them.
    x["old"][1] = x["logp"][1]
    x["logp"][2], x["old"][2] = 0, torch.tensor([1.0, 0.5, 2.0] * 3, dtype=F64).log().neg()
    x["old"][4, ::2] -= 15
    x["ref"], x["generator"] = x["logp"] + 0.7 * x["ref"], x["old"] + 0.5 * x["generator"]
    x = {name: v * mask for name, v in x.items()}
    groups = torch.tensor([7, 7, 7, -1, -1, -1, 0, 0, 0, 0, 4, 4])[torch.randperm(ROWS, generator=g)]
    rewards = torch.where(
        groups == 0, 0.1, torch.randint(0, 3, (ROWS,), generator=g) / 3 + 0.01 * torch.rand(ROWS, generator=g)
    )
    docs = fstep.make_docs([[0] * LENGTH] * ROWS, weights=list(mask))
    return Case(mask, x, rewards.double(), groups, docs)


Found = tuple[Tensor, Tensor | None]
Pair = tuple[Callable[[Case], Found], Callable[[Case], Found]]


def slope(f: Callable[[Tensor], Any], x: Tensor) -> Found:
    """Return a loss and its gradient; of a `Ratio` those of the mean, of (loss, metrics) those of the loss."""
    x = x.detach().clone().requires_grad_()
    found = f(x)
    found = found[0] if isinstance(found, tuple) else found
    value = found.mean() if isinstance(found, fstep.Ratio) else found
    return value.detach(), torch.autograd.grad(value, x)[0]


def error(x: Tensor, y: Tensor) -> float:
    """Return the norm of the difference over the norm; NaN counts as infinitely wrong."""
    x, y = x.detach().double().flatten(), y.detach().double().flatten()
    found = float((x - y).norm() / y.norm().clamp(min=1e-300))
    return found if found == found else math.inf


def compare(loss: str, peer: str, ours: Callable[[Case], Found], theirs: Callable[[Case], Found], **more: Any) -> Row:
    """Compare over all seeds."""
    row = Row(loss, peer, **more)
    for seed in range(5):
        (a, da), (b, db) = ours(draw(seed)), theirs(draw(seed))
        row.value = max(row.value, error(a, b))
        if da is not None and db is not None:
            row.gradient = max(row.gradient or 0.0, error(da, db))
    return row


def rows_of(peer: str, modules: Iterable[str]) -> Iterable[Row]:
    """Yield the comparisons of a peer, or a row that says that it, or what its imports need, is not installed."""
    try:
        name = f"{peer} {metadata.version(peer)}"
    except metadata.PackageNotFoundError:
        yield Row("all", peer, missing="not installed")
        return
    for module in modules:
        try:
            found = importlib.import_module(module).comparisons()
        except ImportError as e:
            yield Row(module, name, missing=f"cannot be imported: {e}")
            continue
        for loss, ours, theirs, more in found:
            yield compare(loss, name, ours, theirs, **more)


def main() -> None:
    """Compare, and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, help="write the rows here too")
    a = p.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, float64, the worst of 5 seeds\n\n{HEAD}")
    rows = []
    for peer, modules in PEERS.items():
        for row in rows_of(peer, modules):
            rows.append(row)
            print(row.line(), flush=True)
    found = [row for row in rows if not row.missing]
    worst = [f"{row.loss} ({row.peer})" for row in found if not row.equal]
    print(f"\n{len(found)} compared, {len(found) - len(worst)} equal" + "".join(f"\nDIFFERENT: {name}" for name in worst))
    if a.json is not None:
        a.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    raise SystemExit(bool(worst))


if __name__ == "__main__":
    main()
