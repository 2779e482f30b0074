from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from svb.errors import InputError
from svb.train import retrieval_metrics as retrieval_metrics_module
from svb.train.retrieval_metrics import (
    V2T_CONVENTIONS,
    recall_sum,
    require_finite_similarities,
    retrieval_metrics,
    summarise,
    t2v_ranks,
    v2t_ranks,
)

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "msrvtt_1kA_similarity.npy"
NAIVE_V2T = {"set": naive.v2t_ranks_set, "best": naive.v2t_ranks_best}


def make_similarity(seed: int, *, levels: int | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return similarities of 30 captions and 9 videos; with few `levels` there are many ties."""
    random = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(9), random.integers(0, 9, size=21)])
    values = random.normal(size=(30, 9)) if levels is None else random.integers(0, levels, size=(30, 9))
    return values.astype(np.float32), random.permutation(owners)


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
    random = np.random.default_rng(0)
    similarity, caption_video = make_similarity(0)
    captions, videos = (
        (random.normal(size=(n, 4)) if levels is None else random.integers(0, levels, size=(n, 4))).astype(
            np.float32
        )
        for n in similarity.shape
    )
    expected = (
        t2v_ranks(captions @ videos.T, caption_video),
        v2t_ranks(captions @ videos.T, caption_video, convention),
    )
    for size in (9, 40, 1000):  # similarities at once: those of one caption, of four, of all
        monkeypatch.setattr(retrieval_metrics_module, "BLOCK_SIZE", size)
        monkeypatch.setattr(retrieval_metrics_module, "CHUNK_SIZE", size)
        again = (
            t2v_ranks(captions @ videos.T, caption_video),
            v2t_ranks(captions @ videos.T, caption_video, convention),
        )
        tensors = torch.from_numpy(captions), torch.from_numpy(videos)
        chunked = retrieval_metrics_module.embedding_ranks(*tensors, caption_video, convention)
        for found in (again, chunked):
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def test_the_conventions_differ_where_a_video_has_several_captions() -> None:
    # Video 0: its best caption has 0.5; video 1 has two captions better than that, in one set.
    similarity = np.array([[0.5, 0.0], [0.1, 0.0], [0.9, 1.0], [0.8, 1.0]])
    caption_video = np.array([0, 0, 1, 1])
    assert v2t_ranks(similarity, caption_video, "set").tolist() == [2, 1]
    assert v2t_ranks(similarity, caption_video, "best").tolist() == [3, 1]


def test_a_collapsed_model_scores_chance() -> None:
    metrics = retrieval_metrics(np.full((200, 100), 0.5, np.float32), np.arange(200) % 100)
    for direction in ("t2v", "v2t"):
        assert metrics[f"{direction}/MedR"] == metrics[f"{direction}/MeanR"] == 50.5
        assert [metrics[f"{direction}/R@{k}"] for k in (1, 5, 10, 50)] == [0, 0, 0, 0]
    best = retrieval_metrics(np.full((200, 100), 0.5, np.float32), np.arange(200) % 100, "best")
    assert best["v2t/MeanR"] == 100.0  # 198 captions of other videos, all equal


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_naming_the_first_bad_video(value: float) -> None:
    similarity, caption_video = make_similarity(0)
    similarity[7, 3] = similarity[9, 1] = value
    for ranks in (t2v_ranks, v2t_ranks):
        with pytest.raises(InputError, match=r"video 1 and caption 9 is (nan|inf|-inf), .* 2 of 9 .* 2 of 30 "):
            ranks(similarity, caption_video)
    ids = [f"c{row}" for row in range(30)], [f"clip{column}" for column in range(9)]
    with pytest.raises(InputError, match=r"video 'clip1' and caption 'c9' is (nan|inf|-inf)"):
        require_finite_similarities(similarity, *ids)


@pytest.mark.parametrize(
    ("captions", "videos", "message"),
    [
        (slice(None), 4, r"video 4 and caption 0 is nan, .* 1 of 9 videos .* 30 of 30 captions - the video's"),
        (11, slice(None), r"video 0 and caption 11 is nan, .* 9 of 9 videos .* 1 of 30 captions - the caption's"),
        (slice(None), slice(None), r"video 0 and caption 0 is nan, .* - the model has diverged"),
    ],
)
def test_the_refusal_says_whose_fault_it_is(captions: slice | int, videos: slice | int, message: str) -> None:
    similarity, caption_video = make_similarity(0)
    similarity[captions, videos] = np.nan
    with pytest.raises(InputError, match=message):
        t2v_ranks(similarity, caption_video)


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
    metrics = retrieval_metrics(np.eye(20), np.arange(20))
    assert recall_sum(metrics) == 600
    assert metrics["t2v/MeanR"] == metrics["v2t/MedR"] == 1


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"the published similarity matrix is not at {PUBLISHED}")
@pytest.mark.parametrize("convention", ["set", "best"])
def test_the_published_matrix_gives_the_published_numbers(convention: str) -> None:
    similarity = np.load(PUBLISHED)
    metrics = retrieval_metrics(similarity, np.arange(1000), convention)
    expected = {"t2v": (48.0, 73.0, 82.9, 95.1, 2, 13.129), "v2t": (45.6, 74.1, 82.7, 97.1, 2, 8.680)}
    for direction, values in expected.items():
        names = ("R@1", "R@5", "R@10", "R@50", "MedR", "MeanR")
        assert [metrics[f"{direction}/{name}"] for name in names] == pytest.approx(values, abs=1e-9)
