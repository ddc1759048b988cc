"""What goes over a wire is a tensor's memory, as it would read."""

from __future__ import annotations

import torch

from fstep.mesh.wire import as_bytes


def test_views_that_are_not_yet_computed_are_sent_as_what_they_say() -> None:
    """Conjugates and negatives are flags on the memory of others."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    for x in (z.conj(), z.conj().imag, z):
        sent = as_bytes(x).view(x.dtype).view(x.shape)
        assert torch.equal(sent, x)
    out = torch.empty(2)
    as_bytes(out).view(torch.float32).copy_(torch.ones(2))
    assert out.tolist() == [1.0, 1.0]  # a receiver's memory itself, not a copy
