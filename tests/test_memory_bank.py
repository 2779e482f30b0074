from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from svb.train.memory_bank import MemoryBank

ROWS, FRAMES, SIZE = 5, 4, 3
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, NDArray[np.int64]]
Row = tuple[list[float], list[list[float]], int]


def make_bank() -> MemoryBank:
    """Return an empty bank, whose rows would show in whatever read them."""
    bank = MemoryBank(ROWS, FRAMES, SIZE)
    bank.embeddings.fill_(float("nan"))
    bank.frame_sequences.fill_(float("nan"))
    bank.frame_mask.fill_(True)
    bank.video.fill_(-7)
    return bank


def make_batch(size: int, first_video: int) -> Batch:
    """Return videos of 1 to FRAMES frames each, padded to the longest of them."""
    random = torch.Generator().manual_seed(first_video)
    lengths = torch.randint(1, FRAMES + 1, (size,), generator=random)
    frame_mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    frames = torch.randn(*frame_mask.shape, SIZE, generator=random)
    return torch.randn(size, SIZE, generator=random), frames, frame_mask, np.arange(size) + first_video


def rows_of(batch: Batch) -> list[Row]:
    return [
        (embedding.tolist(), frames[mask].tolist(), int(video))
        for embedding, frames, mask, video in zip(*batch, strict=True)
    ]


def test_it_starts_empty() -> None:
    bank = make_bank()
    assert bank.num_valid == 0 and [len(part) for part in bank.read()] == [0, 0, 0, 0]
    assert set(bank.state_dict()) == {
        *("embeddings", "frame_sequences", "frame_mask", "video", "position", "num_valid")
    }


@pytest.mark.parametrize("sizes", [[size] * 9 for size in (1, 2, 3, 4, 5, 6, 7, 10, 11)] + [[3, 1, 7, 2, 5, 1, 4]])
def test_first_in_first_out(sizes: list[int]) -> None:
    bank, queue, seen = make_bank(), deque[Row](maxlen=ROWS), 0
    for size in sizes:
        batch = make_batch(size, seen)
        bank.add(*batch)
        queue.extend(rows_of(batch))
        seen += size
        held = rows_of(bank.read())
        assert bank.num_valid == len(held) == min(seen, ROWS)
        oldest = int(bank.position) if seen > ROWS else 0
        assert held[oldest:] + held[:oldest] == list(queue)


def test_what_is_held_does_not_change_with_what_it_was_made_of() -> None:
    bank, batch = make_bank(), make_batch(2, 0)
    batch[0].requires_grad_()
    bank.add(*batch)
    assert not bank.embeddings.requires_grad
    before = rows_of(bank.read())
    with torch.no_grad():
        batch[0].zero_()
    assert rows_of(bank.read()) == before


def test_its_state_is_all_there_is_to_it() -> None:
    bank, other = make_bank(), make_bank()
    for size in (3, 4):
        bank.add(*make_batch(size, 10 * size))
    other.load_state_dict(bank.state_dict())
    for size in (2, 1):
        for each in (bank, other):
            each.add(*make_batch(size, 100 * size))
    assert rows_of(other.read()) == rows_of(bank.read())
