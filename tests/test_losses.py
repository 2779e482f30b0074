from __future__ import annotations

import math

import naive
import pytest
import torch
import torch.nn.functional as F

from svb.train.losses import __all__ as losses_by_name
from svb.train.losses import cross_captioning, info_nce, max_margin
from svb.train.support_set import own_mask

OWNERS = {
    "a caption a video": [0, 1, 2, 3, 4],
    "two of one video": [0, 1, 1, 2, 3],
    "pairs": [0, 0, 1, 1, 2],
    "all of one video": [3, 3, 3, 3, 3],
}


def make_similarity(owners: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(B, B)` cosines, and which pairs belong together; a video's columns are alike, as in a batch."""
    random = torch.Generator().manual_seed(seed)
    captions = F.normalize(torch.randn(len(owners), 6, generator=random, dtype=torch.float64), dim=-1)
    videos = F.normalize(torch.randn(max(owners) + 1, 6, generator=random, dtype=torch.float64), dim=-1)
    rows = torch.tensor(owners)
    return captions @ videos[rows].T, own_mask(rows, rows)


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS.keys())
@pytest.mark.parametrize("logit_scale", [1.0, 20.0, 100.0])
def test_info_nce_is_its_formula(owners: list[int], logit_scale: float) -> None:
    similarity, same_video = make_similarity(owners)
    loss = info_nce(similarity, same_video, torch.tensor(logit_scale, dtype=torch.float64))
    assert loss.item() == pytest.approx(naive.info_nce(similarity.tolist(), same_video.tolist(), logit_scale))


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS.keys())
@pytest.mark.parametrize("margin", [0.0, 0.2, 3.0])
def test_max_margin_is_its_formula(owners: list[int], margin: float) -> None:
    similarity, same_video = make_similarity(owners)
    loss = max_margin(similarity, same_video, margin)
    assert loss.item() == pytest.approx(naive.max_margin(similarity.tolist(), same_video.tolist(), margin))


@pytest.mark.parametrize("name", ["info_nce", "max_margin"])
@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS.keys())
def test_pairs_of_one_video_are_never_negatives(name: str, owners: list[int]) -> None:
    similarity, same_video = make_similarity(owners)
    similarity.requires_grad_()
    logit_scale = torch.tensor(20.0, dtype=torch.float64)
    loss = (
        info_nce(similarity, same_video, logit_scale)
        if name == "info_nce"
        else max_margin(similarity, same_video, 3)
    )
    loss.backward()
    gradient = similarity.grad
    assert gradient is not None and gradient.isfinite().all()
    own_but_not_positive = same_video & ~torch.eye(len(owners), dtype=torch.bool)
    assert (gradient[own_but_not_positive] == 0).all()
    if len(set(owners)) > 1:
        assert (gradient[~same_video] >= 0).all() and (gradient[~same_video] > 0).any()
        assert (gradient.diagonal() < 0).any()


@pytest.mark.parametrize("name", ["info_nce", "max_margin"])
def test_a_batch_of_one_video_costs_nothing(name: str) -> None:
    similarity, same_video = make_similarity(OWNERS["all of one video"])
    similarity.requires_grad_()
    loss = (
        info_nce(similarity, same_video, torch.tensor(20.0))
        if name == "info_nce"
        else max_margin(similarity, same_video, 0.2)
    )
    loss.backward()
    assert loss.item() == 0
    assert similarity.grad is not None and (similarity.grad == 0).all()


@pytest.mark.parametrize("logit_scale", [1.0, 100.0])
def test_info_nce_of_a_collapsed_model_is_that_of_guessing(logit_scale: float) -> None:
    similarity, same_video = torch.full((8, 8), 0.7), torch.eye(8, dtype=torch.bool)
    loss = info_nce(similarity, same_video, torch.tensor(logit_scale))
    assert loss.item() == pytest.approx(math.log(8), abs=1e-5)


def test_info_nce_trains_its_scale() -> None:
    similarity, same_video = make_similarity([0, 1, 2, 3])
    logit_scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    info_nce(similarity, same_video, logit_scale).backward()
    step = 1e-6
    value = [naive.info_nce(similarity.tolist(), same_video.tolist(), 5.0 + sign * step) for sign in (1, -1)]
    assert logit_scale.grad is not None
    assert logit_scale.grad.item() == pytest.approx((value[0] - value[1]) / (2 * step), rel=1e-5)


def test_max_margin_pushes_the_hardest_negative_alone() -> None:
    similarity = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.9, 0.3], [0.0, 0.1, 0.8]], requires_grad=True)
    max_margin(similarity, torch.eye(3, dtype=torch.bool), 0.2).backward()
    assert similarity.grad is not None
    # Caption 0 against video 1: 0.2 + 0.4 - 0.5 > 0; every other margin is kept.
    expected = torch.zeros(3, 3)
    expected[0, 1], expected[0, 0] = 1 / 3, -1 / 3
    torch.testing.assert_close(similarity.grad, expected)


def test_cross_captioning_is_the_mean_over_words_that_are_no_padding() -> None:
    random = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]])
    logits = torch.randn(2, 3, 7, generator=random)
    total, count = 0.0, 0
    for b in range(2):
        for position in range(3):
            target = int(tokens[b, position + 1])
            if target != 0:
                row = logits[b, position].tolist()
                total -= math.log(math.exp(row[target]) / sum(math.exp(value) for value in row))
                count += 1
    assert count == 5
    is_word = tokens[:, 1:] != 0
    loss = cross_captioning(logits[is_word], tokens[:, 1:][is_word])
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_every_loss_is_tested_here() -> None:
    assert set(losses_by_name) == {"info_nce", "max_margin", "cross_captioning"}
