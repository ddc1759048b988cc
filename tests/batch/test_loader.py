"""The stream of documents: every pass visits each once, and a run resumed anywhere sees what it would have seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fstep
import fstep.testing
from fstep import DataPosition, Key, draw_documents


def stream(
    steps: int, *, num: int, of: int, key: Key | None, position: DataPosition | None = None
) -> tuple[list[int], DataPosition]:
    position = DataPosition.start() if position is None else position
    seen: list[int] = []
    for _ in range(steps):
        rows, position = draw_documents(position, num=num, of=of, key=key)
        assert rows.shape == (num,) and rows.dtype == torch.int64
        seen += rows.tolist()
    return seen, position


@pytest.mark.parametrize("key", [None, Key.seed(1)], ids=["in order", "shuffled"])
@pytest.mark.parametrize(("num", "of"), [(1, 1), (4, 4), (3, 7), (7, 3), (20, 3), (5, 1)])
def test_every_pass_visits_each_document_once(num: int, of: int, key: Key | None) -> None:
    seen, position = stream(2 * of, num=num, of=of, key=key)
    passes = [seen[i : i + of] for i in range(0, len(seen), of)]
    assert len(passes) == 2 * num
    for number, order in enumerate(passes):
        assert sorted(order) == list(range(of))
        expected = list(range(of)) if key is None else key.fold_in(number).permutation(of).tolist()
        assert order == expected
    assert int(position.epoch) * of + int(position.index) == len(seen)


@pytest.mark.parametrize("key", [None, Key.seed(1)], ids=["in order", "shuffled"])
@pytest.mark.parametrize("stop", range(8))
def test_resuming_anywhere_gives_the_same_stream(stop: int, key: Key | None) -> None:
    whole, end = stream(8, num=3, of=7, key=key)
    first, position = stream(stop, num=3, of=7, key=key)
    # What a checkpoint keeps is two numbers.
    saved = DataPosition(torch.tensor(int(position.epoch)), torch.tensor(int(position.index)))
    rest, last = stream(8 - stop, num=3, of=7, key=key, position=saved)
    assert first + rest == whole
    assert (int(last.epoch), int(last.index)) == (int(end.epoch), int(end.index))


def test_batch_size_may_change_on_the_way() -> None:
    whole, _ = stream(12, num=1, of=5, key=Key.seed(3))
    first, position = stream(2, num=2, of=5, key=Key.seed(3))
    rest, _ = stream(1, num=8, of=5, key=Key.seed(3), position=position)
    assert first + rest == whole


def test_the_key_and_the_pass_change_the_order() -> None:
    a, b = stream(2, num=50, of=50, key=Key.seed(1))[0], stream(2, num=50, of=50, key=Key.seed(2))[0]
    assert a[:50] != b[:50] and a[:50] != a[50:]
    assert a == stream(2, num=50, of=50, key=Key.seed(1))[0]


def test_drawing_changes_no_argument_and_no_random_state() -> None:
    position = DataPosition(torch.tensor(2), torch.tensor(3))
    rows, after = fstep.testing.assert_pure(draw_documents, position, num=4, of=5, key=Key.seed(0))
    again, _ = draw_documents(position, num=4, of=5, key=Key.seed(0))
    assert torch.equal(rows, again)
    assert (int(after.epoch), int(after.index)) == (3, 2)
    assert after.epoch.shape == after.index.shape == () and after.epoch.dtype == after.index.dtype == torch.int64


def test_a_position_at_the_end_of_a_pass_goes_on_with_the_next() -> None:
    at_end, fresh = DataPosition(torch.tensor(0), torch.tensor(5)), DataPosition(torch.tensor(1), torch.tensor(0))
    key = Key.seed(0)
    assert (
        draw_documents(at_end, num=3, of=5, key=key)[0].tolist() == draw_documents(fresh, num=3, of=5, key=key)[0].tolist()
    )


@pytest.mark.parametrize(
    ("arguments", "index", "message"),
    [
        (dict(num=0, of=5), 0, "num=0 and of=5; pass 1 or more for both"),
        (dict(num=1, of=0), 0, "num=1 and of=0; pass 1 or more for both"),
        (dict(num=1, of=5), 6, r"the position is at document 6 of 5; it belongs to other data, start again"),
        (dict(num=1, of=5), -1, "the position is at document -1 of 5"),
    ],
)  # fmt: skip
def test_draw_refuses(arguments: dict[str, Any], index: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^draw_documents: {message}"):
        draw_documents(DataPosition(torch.tensor(0), torch.tensor(index)), **arguments)
