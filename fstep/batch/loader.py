"""Where in the data a run stands, as a value.

    position (epoch 0, index 6) of 8 documents, 4 a step  ->  documents 6, 7 of pass 0 and 0, 1 of pass 1's order

There is no iterator with a hidden cursor: the position is in the state, so a run resumed from a checkpoint sees the
documents it would have seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.key import Key
from fstep.tree import check_type, pytree


@pytree
class DataPosition:
    """Where the next batch starts: pass number ``epoch``, document number ``index`` of that pass's order.

    >>> import fstep
    >>> fstep.DataPosition.start()
    DataPosition(epoch=tensor(0), index=tensor(0))
    """

    epoch: Tensor
    index: Tensor

    @staticmethod
    def start() -> DataPosition:
        """Return the beginning of the data."""
        return DataPosition(torch.tensor(0), torch.tensor(0))


def draw_documents(position: DataPosition, *, num: int, of: int, key: Key | None = None) -> tuple[Tensor, DataPosition]:
    """Return the numbers of the next ``num`` documents out of ``of``, and the position after them.

    Every pass visits each document once, in an order shuffled by ``key`` and the pass's number (in order without a key).
    A batch may span the end of a pass.

    >>> import fstep
    >>> rows, position = fstep.draw_documents(fstep.DataPosition.start(), num=3, of=4)
    >>> rows, fstep.draw_documents(position, num=3, of=4)[0]
    (tensor([0, 1, 2]), tensor([3, 0, 1]))
    """
    check_type("draw_documents", "position", position, DataPosition, "state.data, or DataPosition.start()")
    if num < 1 or of < 1:
        raise ValueError(f"draw_documents: num={num} and of={of}; pass 1 or more for both")
    epoch, index = int(position.epoch), int(position.index)
    if not 0 <= index <= of:
        raise ValueError(
            f"draw_documents: the position is at document {index} of {of}; it belongs to other data, start again with "
            "DataPosition.start()"
        )
    parts: list[Tensor] = []
    while num > 0:
        if index == of:
            epoch, index = epoch + 1, 0
        order = torch.arange(of) if key is None else key.fold_in(epoch).permutation(of, device="cpu")
        taken = order[index : index + num]
        parts.append(taken)
        index += len(taken)
        num -= len(taken)
    return torch.cat(parts), DataPosition(torch.tensor(epoch), torch.tensor(index))
