from __future__ import annotations

import naive
import numpy as np
import pytest
from numpy.typing import NDArray

from svb.errors import InputError
from svb.retrieve.measure import hub_normalisation as module
from svb.retrieve.measure.hub_normalisation import (
    METHODS,
    Embeddings,
    dual_softmax,
    normalised_scores,
    qb_norm,
    query_bank,
)
from svb.train.retrieval_metrics import t2v_ranks, v2t_ranks


def make_similarity(rows: int, columns: int, seed: int = 0, *, levels: int | None = None) -> NDArray[np.float32]:
    """Return cosines; with few `levels` there are many ties."""
    random = np.random.default_rng(seed)
    values = (
        random.uniform(-1, 1, (rows, columns)) if levels is None else random.integers(0, levels, (rows, columns))
    )
    return (values if levels is None else values / levels).astype(np.float32)


def make_embeddings(captions: int, videos: int, seed: int, *, name: str = "clip") -> Embeddings:
    random = np.random.default_rng(seed)
    sides = [random.normal(size=(size, 6)) for size in (captions, videos)]
    units = [(side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in sides]
    return Embeddings(
        units[0], [f"{name}-c{i}" for i in range(captions)], units[1], [f"{name}-v{i}" for i in range(videos)]
    )


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("block", [1, 7, 100])
def test_qb_norm_is_its_formula(scale: float, levels: int | None, block: int) -> None:
    similarity, bank = make_similarity(12, 9, levels=levels), make_similarity(20, 9, 1, levels=levels)
    blocks = [bank[begin : begin + block] for begin in range(0, len(bank), block)]
    scores = qb_norm(similarity, query_bank(blocks, scale))
    np.testing.assert_allclose(np.exp(scores), naive.qb_norm(similarity.tolist(), bank.tolist(), scale), rtol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("levels", [None, 3])
def test_dual_softmax_is_its_formula(scale: float, levels: int | None) -> None:
    similarity = make_similarity(12, 9, levels=levels)
    expected = naive.dual_softmax(similarity.tolist(), scale)
    np.testing.assert_allclose(dual_softmax(similarity, scale), expected, rtol=1e-9)


@pytest.mark.parametrize("block", [3, 1024])
def test_v2t_is_t2v_with_the_sides_exchanged(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    split, bank = make_embeddings(14, 9, 0), make_embeddings(20, 11, 1)
    exchanged = [Embeddings(each.videos, each.video_ids, each.captions, each.caption_ids) for each in (split, bank)]
    for method in METHODS:
        t2v, v2t = normalised_scores(method, split, bank, 20.0)
        other_t2v, other_v2t = normalised_scores(method, exchanged[0], exchanged[1], 20.0)
        np.testing.assert_allclose(t2v, other_v2t.T, atol=1e-6)
        np.testing.assert_allclose(v2t, other_t2v.T, atol=1e-6)
    similarity = split.captions @ split.videos.T
    t2v, v2t = normalised_scores("qb-norm", split, bank, 20.0)
    expected = naive.qb_norm(similarity.tolist(), (bank.captions @ split.videos.T).tolist(), 20.0)
    np.testing.assert_allclose(np.exp(t2v), expected, rtol=1e-4)
    expected = naive.qb_norm(similarity.T.tolist(), (bank.videos @ split.captions.T).tolist(), 20.0)
    np.testing.assert_allclose(np.exp(v2t.T), expected, rtol=1e-4)


def test_a_hub_gives_way_and_others_keep_their_order() -> None:
    # Candidate 0 is near to every query of the bank; the first query finds it by a hair, the second does not.
    bank = np.array([[0.9, 0.1, 0.0], [0.8, 0.0, 0.2], [0.9, 0.2, 0.1]])
    similarity = np.array([[0.52, 0.50, 0.1], [0.50, 0.52, 0.1]])
    normalised = query_bank([bank], 20.0)
    assert normalised.is_hub.tolist() == [True, False, False]
    scores = qb_norm(similarity, normalised)
    assert scores.argmax(axis=1).tolist() == [1, 1]
    np.testing.assert_allclose(scores[1], 20.0 * similarity[1])


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_nothing_overflows(scale: float) -> None:
    similarity, bank = make_similarity(40, 30), make_similarity(500, 30, 1)
    with np.errstate(all="raise", under="ignore"):
        normalised = query_bank([bank], scale)
        scores = qb_norm(similarity, normalised)
        dual = dual_softmax(similarity, scale)
    assert np.isfinite(scores).all()
    assert np.isfinite(dual).all()
    # A sum is at least its highest term and at most the bank times that.
    highest = scale * bank.astype(np.float64).max(axis=0)
    assert (normalised.log_sums >= highest).all()
    assert (normalised.log_sums <= highest + np.log(500)).all()


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("levels", [None, 3])
def test_a_bank_that_says_nothing_changes_no_rank(value: float, levels: int | None) -> None:
    owners = np.arange(36) % 9
    similarity, bank = make_similarity(36, 9, levels=levels), np.full((50, 9), value, np.float32)
    scores = qb_norm(similarity, query_bank([bank], 100.0))
    np.testing.assert_array_equal(t2v_ranks(scores, owners), t2v_ranks(similarity, owners))
    bank = np.full((50, 36), value, np.float32)
    scores = qb_norm(similarity.T, query_bank([bank], 100.0)).T
    for convention in ("set", "best"):
        np.testing.assert_array_equal(
            v2t_ranks(scores, owners, convention), v2t_ranks(similarity, owners, convention)
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_model_still_scores_chance(method: str) -> None:
    one = np.array([0.6, 0.8], np.float32)
    split = Embeddings(np.tile(one, (40, 1)), [""] * 40, np.tile(one, (20, 1)), [""] * 20)
    t2v, v2t = normalised_scores(method, split, split, 100.0)
    owners = np.arange(40) % 20
    assert (t2v_ranks(t2v, owners) == 10.5).all()
    assert (v2t_ranks(v2t, owners) == 10.5).all()


def test_the_dual_softmax_prefers_who_is_not_wanted_by_others() -> None:
    # Both queries are nearest to candidate 0, the second by more: the first is left candidate 1.
    similarity = np.array([[0.60, 0.55], [0.90, 0.10]])
    assert dual_softmax(similarity, 20.0).argmax(axis=1).tolist() == [1, 0]
    alone = similarity[:1]
    np.testing.assert_allclose(dual_softmax(alone, 20.0), alone)


def test_a_bank_that_is_no_number_is_refused_naming_it() -> None:
    split, bank = make_embeddings(14, 9, 0), make_embeddings(20, 11, 1, name="train")
    bank.videos[4] = np.nan
    with pytest.raises(InputError, match=r"similarity of video 'train-v4' and caption 'clip-c0' is nan"):
        normalised_scores("qb-norm", split, bank, 20.0)
    bank = make_embeddings(20, 11, 1, name="train")
    bank.captions[6] = np.nan
    with pytest.raises(InputError, match=r"video 'clip-v0' and caption 'train-c6' is nan"):
        normalised_scores("qb-norm", split, bank, 20.0)
