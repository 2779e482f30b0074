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
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SCALE = torch.tensor(20.0, dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "info_nce": lambda *given: info_nce(*given, SCALE),
    "info_loob": lambda *given: info_loob(*given, SCALE),
    "hardest": lambda *given: max_margin(*given, 3.0, "hardest"),
    "semi_hard": lambda *given: max_margin(*given, 3.0, "semi_hard"),
    "mean": lambda *given: max_margin(*given, 3.0, "mean"),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
# The module, which the package's function of the same name hides.
chunked = importlib.import_module("svb.train.losses.cross_captioning")


def make_batch(owners: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(B,)` positives, `(B, B)` cosines, and who is a negative; a video's columns are alike."""
    random = torch.Generator().manual_seed(seed)
    captions = F.normalize(torch.randn(len(owners), 6, generator=random, dtype=torch.float64), dim=-1)
    videos = F.normalize(torch.randn(max(owners) + 1, 6, generator=random, dtype=torch.float64), dim=-1)
    rows = torch.tensor(owners)
    similarity = captions @ videos[rows].T
    return similarity.diagonal().clone(), similarity, ~own_mask(rows, rows)


def slowly(cost: Callable[[float, list[float]], float], batch: tuple[torch.Tensor, ...]) -> list[float]:
    positive, similarity, is_negative = (tensor.tolist() for tensor in batch)
    return [
        cost(own, [value for value, counts in zip(row, mask, strict=True) if counts])
        for own, row, mask in zip(positive, similarity, is_negative, strict=True)
    ]


@every_batch
@pytest.mark.parametrize("logit_scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize(("softmax_loss", "slow"), [(info_nce, naive.info_nce), (info_loob, naive.info_loob)])
def test_softmax_losses_are_their_formulas(
    owners: list[int], logit_scale: float, softmax_loss: Callable[..., torch.Tensor], slow: Callable[..., float]
) -> None:
    batch = make_batch(owners)
    loss = softmax_loss(*batch, torch.tensor(logit_scale, dtype=torch.float64))
    assert loss.tolist() == pytest.approx(slowly(lambda *anchor: slow(*anchor, logit_scale), batch))


@every_batch
@pytest.mark.parametrize("margin", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("which", NEGATIVES)
def test_max_margin_is_its_formula(owners: list[int], margin: float, which: str) -> None:
    batch = make_batch(owners)
    loss = max_margin(*batch, margin, which)
    expected = slowly(lambda *anchor: naive.max_margin(*anchor, margin, which), batch)
    assert loss.tolist() == pytest.approx(expected)
    if margin == 0.2 and len(set(owners)) > 1:
        assert any(cost > 0 for cost in expected) or which == "semi_hard"


@every_loss
def test_a_share_of_the_anchors_costs_its_share(name: str) -> None:
    positive, similarity, is_negative = make_batch([0, 1, 1, 2, 3, 4, 4])
    whole = LOSSES[name](positive, similarity, is_negative)
    share = slice(2, 5)
    torch.testing.assert_close(LOSSES[name](positive[share], similarity[share], is_negative[share]), whole[share])


@every_loss
@every_batch
def test_pairs_of_one_video_are_never_negatives(name: str, owners: list[int]) -> None:
    positive, similarity, is_negative = make_batch(owners)
    positive.requires_grad_()
    similarity.requires_grad_()
    loss = LOSSES[name](positive, similarity, is_negative)
    loss.sum().backward()
    pushed, pulled = similarity.grad, positive.grad
    assert pushed is not None and pulled is not None
    assert pushed.isfinite().all() and pulled.isfinite().all()
    assert (pushed[~is_negative] == 0).all() and (pushed[is_negative] >= 0).all()
    assert (pushed > 0).any() == (pulled < 0).any() == (len(set(owners)) > 1)
    # However near another caption of the same video is, it changes nothing.
    nearer = similarity.detach().masked_fill(~is_negative, 1.0)
    torch.testing.assert_close(LOSSES[name](positive, nearer, is_negative), loss, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchors_without_negatives_cost_nothing(name: str, dtype: torch.dtype) -> None:
    positive, similarity, is_negative = (
        tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in make_batch([0, 0, 0, 1])
    )
    is_negative[3] = False
    is_negative[0] = False
    positive.requires_grad_()
    similarity.requires_grad_()
    loss = LOSSES[name](positive, similarity, is_negative)
    assert loss[[0, 3]].tolist() == [0, 0] and (loss[[1, 2]] != 0).any()
    loss.sum().backward()
    assert similarity.grad is not None and positive.grad is not None
    assert (similarity.grad[[0, 3]] == 0).all() and (positive.grad[[0, 3]] == 0).all()
    assert similarity.grad.isfinite().all() and ((positive.grad < 0) == (loss != 0)).all()


@every_loss
@every_batch
def test_gradients_are_the_slopes(name: str, owners: list[int]) -> None:
    positive, similarity, is_negative = make_batch(owners)
    assert torch.autograd.gradcheck(
        lambda positive, similarity: LOSSES[name](positive, similarity, is_negative),
        (positive.requires_grad_(), similarity.requires_grad_()),
    )


def test_info_nce_trains_its_scale() -> None:
    batch = make_batch([0, 1, 2, 3])
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scale: info_nce(*batch, scale), (scale,))


@pytest.mark.parametrize("logit_scale", [1.0, 100.0])
def test_info_nce_of_a_collapsed_model_is_that_of_guessing(logit_scale: float) -> None:
    is_negative = ~torch.eye(8, dtype=torch.bool)
    loss = info_nce(torch.full((8,), 0.7), torch.full((8, 8), 0.7), is_negative, torch.tensor(logit_scale))
    assert loss.tolist() == pytest.approx([math.log(8)] * 8, abs=1e-5)


def test_max_margin_pushes_the_negatives_that_it_names() -> None:
    positive = torch.tensor([0.5, 0.5, 0.5])
    similarity = torch.tensor([[0.5, 0.6, 0.4, 0.1], [0.2, 0.5, 0.9, 0.6], [0.0, 0.1, 0.5, 0.2]])
    is_negative = ~torch.eye(3, 4, dtype=torch.bool)
    pushed = {
        "hardest": [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
        # Anchor 0 leaves out 0.6, which is nearer than its positive; anchor 1 has 0.2 left, which keeps the margin.
        "semi_hard": [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        "mean": [[0, 1 / 3, 1 / 3, 0], [0, 0, 1 / 3, 1 / 3], [0, 0, 0, 0]],
    }
    for which, expected in pushed.items():
        given = similarity.clone().requires_grad_()
        max_margin(positive, given, is_negative, 0.2, which).sum().backward()
        torch.testing.assert_close(given.grad, torch.tensor(expected, dtype=torch.float32))


def test_other_negatives_are_refused() -> None:
    with pytest.raises(UsageError, match="negatives is 'easy' - expected one of hardest, semi_hard, mean"):
        max_margin(*make_batch([0, 1]), 0.2, "easy")


def make_relevance(owners: list[int]) -> torch.Tensor:
    """Return `(B, B)` relevances with many that are equal, as those of captions."""
    random = torch.Generator().manual_seed(7)
    return torch.randint(5, (len(owners), len(owners)), generator=random).double() / 4


@every_batch
@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize("which", NEGATIVES)
def test_a_margin_by_relevance_is_its_formula(owners: list[int], margin: float, which: str) -> None:
    positive, similarity, is_negative = make_batch(owners)
    relevance = make_relevance(owners)
    expected = [
        naive.relevance_margin(
            float(positive[row]), similarity[row, is_negative[row]].tolist(),
            relevance[row, is_negative[row]].tolist(), margin, which,
        )
        for row in range(len(owners))
    ]  # fmt: skip
    loss = max_margin(positive, similarity, is_negative, margin, which, relevance)
    assert loss.tolist() == pytest.approx(expected)
    nothing = max_margin(positive, similarity, is_negative, margin, which, torch.zeros_like(relevance))
    torch.testing.assert_close(nothing, max_margin(positive, similarity, is_negative, margin, which))
    assert torch.autograd.gradcheck(
        lambda *given: max_margin(*given, is_negative, margin, which, relevance),
        (positive.requires_grad_(), similarity.requires_grad_()),
    )


SLOW_LOSSES: dict[str, Callable[..., float]] = {
    "info_nce": lambda *anchor: naive.info_nce(*anchor, 20.0),
    "info_loob": lambda *anchor: naive.info_loob(*anchor, 20.0),
    **{which: lambda *anchor, which=which: naive.max_margin(*anchor, 3.0, which) for which in NEGATIVES},
}


@every_loss
@every_batch
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_relevant_pairs_are_their_formula(name: str, owners: list[int], threshold: float) -> None:
    positive, similarity, is_negative = make_batch(owners)
    is_relevant = make_relevance(owners) >= threshold
    loss = relevant_pairs(LOSSES[name], positive, similarity, is_negative, is_relevant)
    expected = [
        naive.relevant_pairs(
            SLOW_LOSSES[name], float(positive[row]), similarity[row, is_negative[row]].tolist(),
            is_relevant[row, is_negative[row]].tolist(),
        )
        for row in range(len(owners))
    ]  # fmt: skip
    assert loss.tolist() == pytest.approx(expected)
    if threshold == 2.0:  # nothing is relevant
        assert loss.tolist() == LOSSES[name](positive, similarity, is_negative).tolist()
    assert torch.autograd.gradcheck(
        lambda *given: relevant_pairs(LOSSES[name], *given, is_negative, is_relevant),
        (positive.requires_grad_(), similarity.requires_grad_()),
    )


def test_the_farthest_relevant_pair_is_pulled_and_none_is_pushed() -> None:
    similarity = torch.tensor([[0.5, 0.6, 0.1, 0.3]], requires_grad=True)
    is_negative = torch.tensor([[False, True, True, True]])
    is_relevant = torch.tensor([[True, True, True, False]])
    relevant_pairs(LOSSES["hardest"], torch.tensor([0.5]), similarity, is_negative, is_relevant).sum().backward()
    assert similarity.grad is not None and similarity.grad.tolist() == [[0.0, 0.0, -1.0, 2.0]]


@pytest.mark.parametrize("scale", [0.5, 8.0, 50.0])
def test_what_is_retrieved_is_its_formula(scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(4, 3, generator=random, dtype=torch.float64), dim=1)
    stored = F.normalize(torch.randn(6, 3, generator=random, dtype=torch.float64), dim=1)
    for embedding, found in zip(embeddings, retrieved(embeddings, stored, scale), strict=True):
        assert found.tolist() == pytest.approx(naive.retrieved(embedding.tolist(), stored.tolist(), scale))
    assert torch.autograd.gradcheck(
        lambda embeddings, stored: retrieved(embeddings, stored, scale),
        (embeddings.requires_grad_(), stored.requires_grad_()),
    )
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
    share = slice(1, 3)
    torch.testing.assert_close(
        soft_labels(similarity[share], features[share], features, ~is_negative[share], SCALE, temperature),
        loss[share],
    )
    scale = SCALE.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda similarity, scale: soft_labels(similarity, features, features, ~is_negative, scale, temperature),
        (similarity.requires_grad_(), scale),
    )


def test_soft_labels_rest_where_similarities_are_those_of_the_captions() -> None:
    features = F.normalize(
        torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=1
    )
    similarity = (features @ features.T).requires_grad_()
    own = torch.eye(5, dtype=torch.bool)
    soft_labels(similarity, features, features, own, torch.tensor(4.0), 0.25).sum().backward()
    assert similarity.grad is not None
    torch.testing.assert_close(similarity.grad, torch.zeros_like(similarity))


def make_words(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden `(9, 4)`, output weights `(7, 4)` and the words `(9,)`."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=random, dtype=torch.float64).to(dtype)
    weight = torch.randn(7, 4, generator=random, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(7, (9,), generator=random)


@pytest.mark.parametrize("logits", [1, 7, 2 * 7, 4 * 7 + 3, 9 * 7, 2**22])
def test_cross_captioning_is_the_sum_over_words_and_its_gradient_the_slope(
    logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", logits)
    hidden, weight, words = make_words()
    expected = 0.0
    for place, word in zip(hidden.tolist(), words.tolist(), strict=True):
        exponentials = [math.exp(naive.dot(place, row)) for row in weight.tolist()]
        expected -= math.log(exponentials[word] / sum(exponentials))
    assert cross_captioning(hidden, weight, words, torch.float64).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: 0.3 * cross_captioning(hidden, weight, words, torch.float64) ** 2, (hidden, weight)
    )


def test_it_is_what_torch_makes_of_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 15)
    hidden, weight, words = make_words(torch.float32)
    loss = F.cross_entropy(hidden @ weight.T, words, reduction="sum")
    expected = torch.autograd.grad(loss / 9, (hidden, weight))
    mine = cross_captioning(hidden, weight, words)
    torch.testing.assert_close(mine, loss)
    torch.testing.assert_close(torch.autograd.grad(mine / 9, (hidden, weight)), expected)
    # One of the two alone, as where the decoder's words are frozen.
    alone = cross_captioning(hidden, weight.detach(), words)
    torch.testing.assert_close(torch.autograd.grad(alone / 9, hidden)[0], expected[0])
    with torch.no_grad():
        torch.testing.assert_close(cross_captioning(hidden, weight, words), loss)


def test_products_in_bfloat16_change_it_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 15)
    hidden, weight, words = make_words(torch.float32)
    exact = cross_captioning(hidden, weight, words)
    rounded = cross_captioning(hidden, weight, words, torch.bfloat16)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (rounded, exact))
    torch.testing.assert_close(*gradients, rtol=0.1, atol=0.05)


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
    wanted = random.flip(0)
    assert torch.autograd.gradcheck(lambda given: embedding_distance(given, wanted), (random.requires_grad_(),))


def test_every_loss_is_tested_here() -> None:
    rivals = {"info_loob", "relevant_pairs", "retrieved", "soft_labels"}
    assert set(losses_by_name) == {"info_nce", "max_margin", "cross_captioning", "embedding_distance"} | rivals
