"""Support weights and mixtures, and the videos of earlier batches that stand beside a batch."""

from __future__ import annotations

from collections import deque

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from svb.train.config import VARIANTS
from svb.train.heads import masked_mean
from svb.train.memory_bank import MemoryBank
from svb.train.support_set import entropy, mix, own_mask, support_weights
from svb.train.training_data import FrameTable

WEIGHTED = [variant for variant in VARIANTS if variant != "none"]
OWNERS = {"a caption a video": [0, 1, 2, 3], "pairs": [0, 0, 1, 1], "three of one": [2, 2, 0, 2]}
every_variant = pytest.mark.parametrize("variant", WEIGHTED)
every_batch = pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS.keys())


def make_embeddings(owners: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(B, D)` captions and the videos of each, and which videos are a caption's own."""
    random = torch.Generator().manual_seed(1)
    rows = torch.tensor(owners)
    captions = F.normalize(torch.randn(len(owners), 5, generator=random, dtype=torch.float64), dim=-1)
    videos = F.normalize(torch.randn(max(owners) + 1, 5, generator=random, dtype=torch.float64), dim=-1)
    return captions, videos[rows], own_mask(rows, rows)


@every_batch
@every_variant
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_weights_are_their_formula_and_rows_sum_to_one(variant: str, owners: list[int], temperature: float) -> None:
    captions, videos, own = make_embeddings(owners)
    weights = support_weights(captions, videos, own, variant=variant, temperature=temperature)
    expected = naive.support_weights(captions.tolist(), videos.tolist(), own.tolist(), variant, temperature)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights.sum(dim=1).numpy(), 1, rtol=1e-12)
    if variant == "cross":  # exactly
        assert (weights[own] == 0).all() and (weights[~own] > 0).all()


@every_variant
def test_a_collapsed_model_rebuilds_from_all_allowed_videos_alike(variant: str) -> None:
    same = F.normalize(torch.ones(4, 5), dim=-1)
    own = torch.eye(4, dtype=torch.bool)
    weights = support_weights(same, same, own, variant=variant, temperature=0.01)
    expected = {
        "cross": (1 - torch.eye(4)) / 3,
        "full": torch.full((4, 4), 0.25),
        "identity": torch.eye(4),
        "hybrid": (torch.eye(4) + 0.25) / 2,
    }
    torch.testing.assert_close(weights, expected[variant])


@pytest.mark.parametrize("temperature", [0.001, 0.02, 0.1, 1.0])
def test_mixtures_are_averaged_time_step_by_time_step(temperature: float) -> None:
    captions, videos, own = make_embeddings([0, 1, 2, 3])
    weights = support_weights(captions, videos, own, variant="cross", temperature=temperature)
    random = torch.Generator().manual_seed(2)
    frame_sequences = torch.randn(4, 6, 3, generator=random, dtype=torch.float64)
    frame_mask = torch.arange(6)[None] < torch.tensor([1, 3, 4, 4])[:, None]
    mixtures, goes_on = mix(weights, frame_sequences, frame_mask)
    expected = naive.mix(weights.tolist(), frame_sequences.tolist(), frame_mask.tolist())
    for b in range(4):
        for t in range(6):
            wanted = expected[b][t]
            if goes_on[b, t]:
                np.testing.assert_allclose(mixtures[b, t].numpy(), wanted, rtol=1e-9)
            elif wanted is not None:  # so little weight goes on that it is taken for none
                assert weights[b][frame_mask[:, t]].sum() < 1e-8
    assert goes_on[:, 0].all() and not goes_on[:, 4:].any()
    assert mixtures.isfinite().all()


def test_a_mixture_has_a_gradient_even_where_next_to_nothing_goes_on() -> None:
    logits = torch.tensor([[0.0, -60.0], [0.0, -200.0]], requires_grad=True)
    frame_mask = torch.tensor([[True, False], [True, True]])
    frame_sequences = torch.ones(2, 2, 3, requires_grad=True)
    mixtures, goes_on = mix(logits.softmax(dim=1), frame_sequences, frame_mask)
    mixtures.sum().backward()
    assert goes_on[:, 0].all()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert frame_sequences.grad is not None and frame_sequences.grad.isfinite().all()


def test_masked_mean_is_its_formula() -> None:
    frames = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(4))
    frame_mask = torch.arange(5)[None] < torch.tensor([1, 3, 5])[:, None]
    expected = naive.masked_mean(frames.tolist(), frame_mask.tolist())
    np.testing.assert_allclose(masked_mean(frames, frame_mask).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("max_frames", [1, 2, 3, 7, 8, 100])
def test_long_videos_are_thinned_to_the_middle_of_equal_parts(max_frames: int) -> None:
    lengths = [1, 2, 3, 7, 8, 9, 20]
    features = torch.arange(sum(lengths), dtype=torch.float16)[:, None]
    ends = torch.tensor(lengths).cumsum(0)
    table = FrameTable([], features, ends - torch.tensor(lengths), torch.tensor(lengths), max_frames)
    rows = torch.arange(len(lengths))
    frames, frame_mask = table.gather(rows)
    # A share of the videos, as long as the longest of all.
    longest = table.longest(rows.numpy())
    shared_frames, shared_mask = table.gather(rows[1:4], longest)
    assert torch.equal(shared_frames, frames[1:4]) and torch.equal(shared_mask, frame_mask[1:4])
    assert torch.equal(table.mask(rows[1:4], longest), shared_mask)
    assert table.real_places(rows[1:4].numpy(), longest).tolist() == shared_mask.flatten().nonzero()[:, 0].tolist()
    assert table.gather(rows[:1])[0].shape[1] == 1
    assert frames.shape[1] == min(max_frames, max(lengths))
    begin = 0
    for row, length in enumerate(lengths):
        kept = [int(value) - begin for value in frames[row, frame_mask[row], 0]]
        assert kept == naive.thin(length, max_frames)
        assert (frames[row, ~frame_mask[row]] == 0).all()
        begin += length


@every_variant
def test_an_older_state_of_its_own_video_counts_for_nothing(variant: str) -> None:
    captions, videos, _ = make_embeddings([0, 1, 1])
    _, stored, _ = make_embeddings([0, 1, 2])
    rows, stored_rows = torch.tensor([0, 1, 1]), torch.tensor([1, 2, 0])
    support = torch.cat([videos, stored])
    everyone = own_mask(rows, torch.cat([rows, stored_rows]))
    older = everyone.clone()
    older[:, :3] = False
    weights = support_weights(captions, support, everyone, variant=variant, temperature=0.1, older=older)
    for row in range(3):  # what is left when the older state is left out
        kept = ~older[row]
        expected = naive.support_weights(
            captions[row : row + 1].tolist(), support[kept].tolist(), [everyone[row, kept].tolist()], variant, 0.1
        )
        np.testing.assert_allclose(weights[row, kept].numpy(), expected[0], rtol=1e-9, atol=1e-12)
        assert (weights[row, ~kept] == 0).all()


@every_batch
@every_variant
def test_gradients_of_weights_and_mixtures_are_the_slopes(variant: str, owners: list[int]) -> None:
    captions, videos, own = make_embeddings(owners)
    random = torch.Generator().manual_seed(5)
    frame_sequences = torch.randn(4, 3, 2, generator=random, dtype=torch.float64)
    frame_mask = torch.arange(3)[None] < torch.tensor([1, 3, 2, 3])[:, None]
    temperature = torch.tensor(0.4, dtype=torch.float64)

    def mixtures(*given: torch.Tensor) -> torch.Tensor:
        captions, videos, temperature, frame_sequences = given
        weights = support_weights(captions, videos, own, variant=variant, temperature=temperature)
        return mix(weights, frame_sequences, frame_mask)[0]

    leaves = [tensor.requires_grad_() for tensor in (captions, videos, temperature, frame_sequences)]
    assert torch.autograd.gradcheck(mixtures, leaves)


def test_entropy_is_its_formula() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    assert entropy(weights).tolist() == pytest.approx([0.0, np.log(4), np.log(2)])


# The memory bank


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


@pytest.mark.parametrize("sizes", [[size] * 9 for size in (1, 2, 3, 4, 5, 6, 7, 10, 11)] + [[3, 1, 7, 2, 5, 1, 4]])
def test_first_in_first_out(sizes: list[int]) -> None:
    bank, queue, seen = make_bank(), deque[Row](maxlen=ROWS), 0
    assert [len(part) for part in bank.read()] == [0, 0, 0, 0]
    names = {"embeddings", "frame_sequences", "frame_mask", "video", "position", "num_valid"}
    assert set(bank.state_dict()) == names  # as checkpoints have them
    for size in sizes:
        batch = make_batch(size, seen)
        bank.add(*batch)
        queue.extend(rows_of(batch))
        seen += size
        held = rows_of(bank.read())
        assert bank.num_valid == len(held) == min(seen, ROWS)
        oldest = int(bank.position) if seen > ROWS else 0
        assert held[oldest:] + held[:oldest] == list(queue)
        other = make_bank()  # its state is all there is to it
        other.load_state_dict(bank.state_dict())
        bank = other


def test_what_is_held_does_not_change_with_what_it_was_made_of() -> None:
    bank, batch = make_bank(), make_batch(2, 0)
    bank.add(batch[0].requires_grad_(), *batch[1:])
    assert not bank.embeddings.requires_grad
    before = rows_of(bank.read())
    with torch.no_grad():
        batch[0].zero_()
    assert rows_of(bank.read()) == before
