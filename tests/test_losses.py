from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import naive
import pytest
import torch
import torch.nn.functional as F

from svb.errors import UsageError
from svb.train.config import NEGATIVES
from svb.train.losses import __all__ as losses_by_name
from svb.train.losses import (
    cross_captioning,
    embedding_distance,
    info_loob,
    info_nce,
    max_margin,
    relevant_pairs,
    retrieved,
    soft_labels,
)
from svb.train.support_set import own_mask

OWNERS = {
    "a caption a video": [0, 1, 2, 3, 4],
    "two of one video": [0, 1, 1, 2, 3],
    "pairs": [0, 0, 1, 1, 2],
    "all of one video": [3, 3, 3, 3, 3],
}
every_batch = pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS.keys())
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Loss = Callable[..., torch.Tensor]
SCALE = torch.tensor(20.0, dtype=torch.float64)


def softmax_losses(scale: float) -> dict[str, tuple[Loss, Callable[..., float]]]:
    """Return losses of `(*batch)`, each with the slow one of an anchor."""
    logit_scale = torch.tensor(scale, dtype=torch.float64)
    return {
        f"info_nce {scale}": (lambda *given: info_nce(*given, logit_scale), lambda *of: naive.info_nce(*of, scale)),
        f"info_loob {scale}": (
            lambda *given: info_loob(*given, logit_scale),
            lambda *of: naive.info_loob(*of, scale),
        ),
    }


def margin_losses(margin: float) -> dict[str, tuple[Loss, Callable[..., float]]]:
    """Return losses of `(*batch, relevance)`, each with the slow one of an anchor."""

    def pair(which: str) -> tuple[Loss, Callable[..., float]]:
        return (
            lambda positive, similarity, is_negative, *relevance: max_margin(
                positive, similarity, is_negative, margin, which, *relevance
            ),
            lambda positive, negatives, *relevances: naive.max_margin(
                positive, negatives, margin, which, *relevances
            ),
        )

    return {f"{which} {margin}": pair(which) for which in NEGATIVES}


STRONG = {**softmax_losses(20.0), **margin_losses(3.0)}
LOSSES = STRONG | softmax_losses(1.0) | softmax_losses(100.0) | margin_losses(0.0) | margin_losses(0.2)


def make_batch(owners: list[int], seed: int = 0) -> Batch:
    """Return `(B,)` positives, `(B, B)` cosines, and who is a negative; a video's columns are alike."""
    random = torch.Generator().manual_seed(seed)
    captions = F.normalize(torch.randn(len(owners), 6, generator=random, dtype=torch.float64), dim=-1)
    videos = F.normalize(torch.randn(max(owners) + 1, 6, generator=random, dtype=torch.float64), dim=-1)
    rows = torch.tensor(owners)
    similarity = captions @ videos[rows].T
    return similarity.diagonal().clone(), similarity, ~own_mask(rows, rows)


def slowly(cost: Callable[..., float], batch: Batch, *more: torch.Tensor) -> list[float]:
    """Return what every anchor costs, from its positive, its negatives, and `more` of each of these."""
    positive, similarity, is_negative = batch
    return [
        cost(float(own), *(table[row][mask].tolist() for table in (similarity, *more)))
        for row, (own, mask) in enumerate(zip(positive, is_negative, strict=True))
    ]


def assert_slopes(loss: Loss, *leaves: torch.Tensor) -> None:
    assert torch.autograd.gradcheck(loss, [leaf.clone().requires_grad_() for leaf in leaves])


@every_batch
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula_and_its_gradient_the_slope(name: str, owners: list[int]) -> None:
    (loss, slow), batch = LOSSES[name], make_batch(owners)
    costs = loss(*batch)
    assert costs.tolist() == pytest.approx(slowly(slow, batch))
    torch.testing.assert_close(loss(*(part[1:3] for part in batch)), costs[1:3])  # a share of the anchors
    positive, similarity, is_negative = batch
    assert_slopes(lambda *given: loss(*given, is_negative), positive, similarity)
    # However near another caption of the same video is, it changes nothing.
    nearer = similarity.masked_fill(~is_negative, 1.0)
    torch.testing.assert_close(loss(positive, nearer, is_negative), costs, rtol=0, atol=0)


def test_other_negatives_are_refused() -> None:
    with pytest.raises(UsageError, match="negatives is 'easy' - expected one of hardest, semi_hard, mean"):
        max_margin(*make_batch([0, 1]), 0.2, "easy")


def make_relevance(owners: list[int]) -> torch.Tensor:
    """Return `(B, B)` relevances with many that are equal, as those of captions."""
    random = torch.Generator().manual_seed(7)
    return torch.randint(5, (len(owners), len(owners)), generator=random).double() / 4


@every_batch
@pytest.mark.parametrize("name", margin_losses(0.2) | margin_losses(1.0))
def test_a_margin_by_relevance_is_its_formula(name: str, owners: list[int]) -> None:
    loss, slow = (margin_losses(0.2) | margin_losses(1.0))[name]
    batch, relevance = make_batch(owners), make_relevance(owners)
    assert loss(*batch, relevance).tolist() == pytest.approx(slowly(slow, batch, relevance))
    torch.testing.assert_close(loss(*batch, torch.zeros_like(relevance)), loss(*batch))
    assert_slopes(lambda *given: loss(*given, batch[2], relevance), *batch[:2])


@every_batch
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", STRONG)
def test_relevant_pairs_are_their_formula(name: str, owners: list[int], threshold: float) -> None:
    (loss, slow), batch = STRONG[name], make_batch(owners)
    is_relevant = make_relevance(owners) >= threshold
    costs = relevant_pairs(loss, *batch, is_relevant)
    expected = slowly(lambda *anchor: naive.relevant_pairs(slow, *anchor), batch, is_relevant)
    assert costs.tolist() == pytest.approx(expected)
    if threshold == 2.0:  # nothing is relevant
        assert costs.tolist() == loss(*batch).tolist()
    assert_slopes(lambda *given: relevant_pairs(loss, *given, batch[2], is_relevant), *batch[:2])


@pytest.mark.parametrize("scale", [0.5, 8.0, 50.0])
def test_what_is_retrieved_is_its_formula(scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(4, 3, generator=random, dtype=torch.float64), dim=1)
    stored = F.normalize(torch.randn(6, 3, generator=random, dtype=torch.float64), dim=1)
    for embedding, found in zip(embeddings, retrieved(embeddings, stored, scale), strict=True):
        assert found.tolist() == pytest.approx(naive.retrieved(embedding.tolist(), stored.tolist(), scale))
    assert_slopes(lambda *given: retrieved(*given, scale), embeddings, stored)
    nearest = (embeddings @ stored.T).argmax(dim=1)
    torch.testing.assert_close(retrieved(embeddings, stored, 1e4), stored[nearest])


@every_batch
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_soft_labels_are_their_formula(owners: list[int], temperature: float) -> None:
    _, similarity, is_negative = make_batch(owners)
    features = torch.randn(len(owners), 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = soft_labels(similarity, features, features, ~is_negative, SCALE, temperature)
    expected = [
        naive.soft_labels(row, feature, features.tolist(), own, 20.0, temperature)
        for row, feature, own in zip(similarity.tolist(), features.tolist(), (~is_negative).tolist(), strict=True)
    ]
    assert loss.tolist() == pytest.approx(expected)
    share = soft_labels(similarity[1:3], features[1:3], features, ~is_negative[1:3], SCALE, temperature)
    torch.testing.assert_close(share, loss[1:3])
    assert_slopes(
        lambda similarity, scale: soft_labels(similarity, features, features, ~is_negative, scale, temperature),
        *(similarity, SCALE),
    )


def make_words(dtype: torch.dtype = torch.float64) -> Batch:
    """Return hidden `(9, 4)`, output weights `(7, 4)` and the words `(9,)`."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=random, dtype=torch.float64).to(dtype)
    weight = torch.randn(7, 4, generator=random, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(7, (9,), generator=random)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets how many logits are computed at once."""
    # The module, which the package's function of the same name hides.
    module = importlib.import_module("svb.train.losses.cross_captioning")
    return lambda logits: monkeypatch.setattr(module, "CHUNK_LOGITS", logits)


@pytest.mark.parametrize("logits", [1, 7, 2 * 7, 4 * 7 + 3, 9 * 7, 2**22])
def test_cross_captioning_is_the_sum_over_words_and_its_gradient_the_slope(
    logits: int, chunked: Callable[[int], None]
) -> None:
    chunked(logits)
    hidden, weight, words = make_words()
    expected = 0.0
    for place, word in zip(hidden.tolist(), words.tolist(), strict=True):
        exponentials = [math.exp(naive.dot(place, row)) for row in weight.tolist()]
        expected -= math.log(exponentials[word] / sum(exponentials))
    assert cross_captioning(hidden, weight, words, torch.float64).item() == pytest.approx(expected)
    assert_slopes(lambda *given: 0.3 * cross_captioning(*given, words, torch.float64) ** 2, hidden, weight)


@pytest.mark.parametrize(
    ("dtype", "loss_within", "gradient_within"),
    [(torch.float32, (1.3e-6, 1e-5), (1.3e-6, 1e-5)), (torch.bfloat16, (0.02, 0), (0.1, 0.05))],
)
def test_products_of_any_precision_are_near_those_of_all_logits_at_once(
    chunked: Callable[[int], None],
    dtype: torch.dtype,
    loss_within: tuple[float, float],
    gradient_within: tuple[float, float],
) -> None:
    chunked(15)
    hidden, weight, words = make_words(torch.float32)
    expected = F.cross_entropy(hidden @ weight.T, words, reduction="sum")
    gradients = torch.autograd.grad(expected, (hidden, weight))
    loss = cross_captioning(hidden, weight, words, dtype)
    # One of the two alone, as where the decoder's words are frozen.
    alone = cross_captioning(hidden, weight.detach(), words, dtype)
    assert loss.dtype == torch.float32
    rtol, atol = loss_within
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    rtol, atol = gradient_within
    found = (*torch.autograd.grad(loss, (hidden, weight)), *torch.autograd.grad(alone, hidden))
    torch.testing.assert_close(found, (*gradients, gradients[0]), rtol=rtol, atol=atol)
    with torch.no_grad():
        torch.testing.assert_close(cross_captioning(hidden, weight, words, dtype), loss)


def test_no_words_cost_nothing() -> None:
    _, weight, words = make_words()
    hidden = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    loss = cross_captioning(hidden, weight, words[:0], torch.float64)
    loss.backward()
    assert loss.item() == 0 and weight.grad is not None and (weight.grad == 0).all()


def test_the_distance_of_embeddings_is_their_angle() -> None:
    one = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    other = torch.tensor([[0.5, 0.0], [-1.0, 0.0], [7.0, 0.0], [0.0, 4.0]])
    expected = [0.0, 2.0, 1.0, 1 - math.sqrt(0.5)]
    assert embedding_distance(one, other).tolist() == pytest.approx(expected, abs=1e-6)
    random = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_slopes(lambda given: embedding_distance(given, random.flip(0)), random)


def test_every_loss_is_tested_here() -> None:
    rivals = {"info_loob", "relevant_pairs", "retrieved", "soft_labels"}
    assert set(losses_by_name) == {"info_nce", "max_margin", "cross_captioning", "embedding_distance"} | rivals
