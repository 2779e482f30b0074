"""Ranks, the measures made of them, and the normalisation of hubs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
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
from svb.train import retrieval_metrics as retrieval_metrics_module
from svb.train.retrieval_metrics import (
    V2T_CONVENTIONS,
    recall_sum,
    retrieval_metrics,
    summarise,
    t2v_ranks,
    v2t_ranks,
)

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "msrvtt_1kA_similarity.npy"
NAIVE_V2T = {"set": naive.v2t_ranks_set, "best": naive.v2t_ranks_best}


def make_cosines(rows: int, columns: int, seed: int = 0, *, levels: int | None = None) -> NDArray[np.float32]:
    """Return similarities; with few `levels` there are many ties."""
    random, shape = np.random.default_rng(seed), (rows, columns)
    values = random.uniform(-1, 1, shape) if levels is None else random.integers(0, levels, shape) / levels
    return values.astype(np.float32)


def make_similarity(seed: int, *, levels: int | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return similarities of 30 captions and 9 videos, and the video of each caption."""
    random = np.random.default_rng(seed)
    owners = random.permutation(np.concatenate([np.arange(9), random.integers(0, 9, size=21)]))
    return make_cosines(30, 9, seed, levels=levels), owners


@pytest.mark.parametrize("levels", [None, 1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_sorting(seed: int, levels: int | None) -> None:
    similarity, caption_video = make_similarity(seed, levels=levels)
    given = similarity.tolist(), caption_video.tolist()
    np.testing.assert_array_equal(t2v_ranks(similarity, caption_video), naive.t2v_ranks(*given))
    for convention, slow in NAIVE_V2T.items():
        np.testing.assert_array_equal(v2t_ranks(similarity, caption_video, convention), slow(*given))


@pytest.mark.parametrize("convention", V2T_CONVENTIONS)
@pytest.mark.parametrize("levels", [None, 1, 2])
def test_chunks_of_embeddings_have_the_ranks_of_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, levels: int | None, convention: str
) -> None:
    caption_video = make_similarity(0)[1]
    captions, videos = (torch.from_numpy(make_cosines(n, 4, n, levels=levels)) for n in (30, 9))

    def ranks() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        similarity = (captions @ videos.T).numpy()
        return t2v_ranks(similarity, caption_video), v2t_ranks(similarity, caption_video, convention)

    expected = ranks()
    for size in (9, 40, 1000):  # similarities at once: those of one caption, of four, of all
        monkeypatch.setattr(retrieval_metrics_module, "BLOCK_SIZE", size)
        monkeypatch.setattr(retrieval_metrics_module, "CHUNK_SIZE", size)
        chunked = retrieval_metrics_module.embedding_ranks(captions, videos, caption_video, convention)
        for found in (ranks(), chunked):
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def test_a_collapsed_model_scores_chance() -> None:
    metrics = retrieval_metrics(np.full((200, 100), 0.5, np.float32), np.arange(200) % 100)
    for direction in ("t2v", "v2t"):
        assert metrics[f"{direction}/MedR"] == metrics[f"{direction}/MeanR"] == 50.5
        assert [metrics[f"{direction}/R@{k}"] for k in (1, 5, 10, 50)] == [0, 0, 0, 0]
    best = retrieval_metrics(np.full((200, 100), 0.5, np.float32), np.arange(200) % 100, "best")
    assert best["v2t/MeanR"] == 100.0  # 198 captions of other videos, all equal


EVERY = slice(None)


@pytest.mark.parametrize(
    ("captions", "videos", "value", "message"),
    [
        (EVERY, 4, np.nan, r"video 4 and caption 0 is nan, .* 1 of 9 videos .* 30 of 30 captions - the video's"),
        (11, EVERY, np.inf, r"video 0 and caption 11 is inf, .* 9 of 9 videos .* 1 of 30 captions - the caption's"),
        (EVERY, EVERY, -np.inf, r"video 0 and caption 0 is -inf, .* - the model has diverged"),
        ([7, 9], [3, 1], np.nan, r"video 1 and caption 9 is nan, .* 2 of 9 .* 2 of 30 "),
    ],
)
def test_a_value_that_is_no_number_is_refused_naming_whose_fault_it_is(
    captions: Any, videos: Any, value: float, message: str
) -> None:
    similarity, caption_video = make_similarity(0)
    similarity[captions, videos] = value
    for ranks in (t2v_ranks, v2t_ranks):
        with pytest.raises(InputError, match=message):
            ranks(similarity, caption_video)


def test_what_cannot_be_ranked_is_refused() -> None:
    for shape, captions in (((3, 2), 4), ((6,), 6), ((0, 3), 0)):
        with pytest.raises(InputError, match=r"expected \(captions, videos\)"):
            t2v_ranks(np.zeros(shape), np.zeros(captions, np.int64))
    similarity, caption_video = make_similarity(0)
    caption_video[caption_video == 4] = 5
    with pytest.raises(InputError, match="1 videos have no caption, first column 4"):
        v2t_ranks(similarity, caption_video)
    with pytest.raises(InputError, match="'mean' - expected set or best"):
        v2t_ranks(np.eye(2), np.arange(2), "mean")


def test_summary_of_known_ranks() -> None:
    recalls = {"R@1": 20.0, "R@5": 60.0, "R@10": 80.0, "R@50": 80.0}
    expected = {**recalls, "MedR": 5.0, "MeanR": pytest.approx(13.7)}
    assert summarise(np.array([1, 1.5, 5, 10, 51])) == expected


def test_a_perfect_model_has_the_highest_recall_sum() -> None:
    assert recall_sum(retrieval_metrics(np.eye(20), np.arange(20))) == 600


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"the published similarity matrix is not at {PUBLISHED}")
@pytest.mark.parametrize("convention", ["set", "best"])
def test_the_published_matrix_gives_the_published_numbers(convention: str) -> None:
    similarity = np.load(PUBLISHED)
    metrics = retrieval_metrics(similarity, np.arange(1000), convention)
    expected = {"t2v": (48.0, 73.0, 82.9, 95.1, 2, 13.129), "v2t": (45.6, 74.1, 82.7, 97.1, 2, 8.680)}
    for direction, values in expected.items():
        names = ("R@1", "R@5", "R@10", "R@50", "MedR", "MeanR")
        assert [metrics[f"{direction}/{name}"] for name in names] == pytest.approx(values, abs=1e-9)


# Normalisation


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
    similarity, bank = make_cosines(12, 9, levels=levels), make_cosines(20, 9, 1, levels=levels)
    blocks = [bank[begin : begin + block] for begin in range(0, len(bank), block)]
    scores = qb_norm(similarity, query_bank(blocks, scale))
    np.testing.assert_allclose(np.exp(scores), naive.qb_norm(similarity.tolist(), bank.tolist(), scale), rtol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("levels", [None, 3])
def test_dual_softmax_is_its_formula(scale: float, levels: int | None) -> None:
    similarity = make_cosines(12, 9, levels=levels)
    expected = naive.dual_softmax(similarity.tolist(), scale)
    np.testing.assert_allclose(dual_softmax(similarity, scale), expected, rtol=1e-9)


@pytest.mark.parametrize("block", [3, 1024])
def test_v2t_is_t2v_with_the_sides_exchanged(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    split, bank = make_embeddings(14, 9, 0), make_embeddings(20, 11, 1)
    exchanged = [Embeddings(each.videos, each.video_ids, each.captions, each.caption_ids) for each in (split, bank)]
    for method in METHODS:
        scores = normalised_scores(method, split, bank, 20.0)
        other = normalised_scores(method, *exchanged, 20.0)
        for found, expected in zip(scores, other[::-1], strict=True):
            np.testing.assert_allclose(found, expected.T, atol=1e-6)
    similarity, of_bank = split.captions @ split.videos.T, bank.captions @ split.videos.T
    t2v, _ = normalised_scores("qb-norm", split, bank, 20.0)
    expected = naive.qb_norm(similarity.tolist(), of_bank.tolist(), 20.0)
    np.testing.assert_allclose(np.exp(t2v), expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_nothing_overflows(scale: float) -> None:
    similarity, bank = make_cosines(40, 30), make_cosines(500, 30, 1)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(qb_norm(similarity, query_bank([bank], scale))).all()
        assert np.isfinite(dual_softmax(similarity, scale)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_model_still_scores_chance(method: str) -> None:
    one = np.array([0.6, 0.8], np.float32)
    split = Embeddings(np.tile(one, (40, 1)), [""] * 40, np.tile(one, (20, 1)), [""] * 20)
    t2v, v2t = normalised_scores(method, split, split, 100.0)
    owners = np.arange(40) % 20
    assert (t2v_ranks(t2v, owners) == 10.5).all()
    assert (v2t_ranks(v2t, owners) == 10.5).all()


@pytest.mark.parametrize(
    ("side", "row", "words"),
    [
        ("videos", 4, "similarity of video 'train-v4' and caption 'clip-c0' is nan"),
        ("captions", 6, "video 'clip-v0' and caption 'train-c6' is nan"),
    ],
)
def test_a_bank_that_is_no_number_is_refused_naming_it(side: str, row: int, words: str) -> None:
    split, bank = make_embeddings(14, 9, 0), make_embeddings(20, 11, 1, name="train")
    getattr(bank, side)[row] = np.nan
    with pytest.raises(InputError, match=words):
        normalised_scores("qb-norm", split, bank, 20.0)
