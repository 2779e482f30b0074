from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
from numpy.typing import NDArray

from svb.errors import MismatchError, UsageError
from svb.retrieve.measure.paired import (
    RECALLS,
    is_chance,
    paired_differences,
    percentile_interval,
    resampled_ratios,
    t_interval,
)
from svb.retrieve.measure.query_ranks import Queries, Ranks
from svb.train.retrieval_metrics import ranks_metrics


def make_queries(captions_a_video: list[int]) -> Queries:
    video_ids = [f"clip{video:04}" for video in range(len(captions_a_video))]
    owners = [video_id for video_id, count in zip(video_ids, captions_a_video, strict=True) for _ in range(count)]
    return Queries("val", tuple(f"{row}" for row in range(len(owners))), tuple(owners), tuple(video_ids))


def make_ranks(queries: Queries, t2v: NDArray[np.floating], v2t: NDArray[np.floating]) -> Ranks:
    return Ranks(Path("ranks.npz"), queries, t2v, v2t, "set", "ties averaged", "made up", "val")


def random_ranks(queries: Queries, random: np.random.Generator, gain: float = 0.0) -> Ranks:
    """Draw ranks: captions of a video succeed and fail together, whoever the model; `gain` makes all better."""
    hardness = np.random.default_rng(1).normal(size=len(queries.video_ids))
    own = random.normal(size=len(queries.video_ids))  # what this model makes of a video
    row = queries.caption_video()
    noise = random.normal(size=(2, max(len(row), len(own))))
    t2v = hardness[row] + own[row] + noise[0, : len(row)] - gain
    v2t = hardness + own + noise[1, : len(own)] - gain
    return make_ranks(queries, *(np.maximum(1.0, np.round(np.exp(1.2 * value + 1.5))) for value in (t2v, v2t)))


def test_differences_are_those_of_a_slow_bootstrap() -> None:
    random = np.random.default_rng(0)
    queries = make_queries([1, 4, 2, 3, 2, 1, 5])
    a, b = ([random_ranks(queries, random) for _ in range(2)] for _ in range(2))
    draws = np.random.default_rng(7).integers(0, 7, (300, 7)).tolist()
    for difference in paired_differences(a, b, resamples=300, seed=7):
        way, _, k = difference.metric.partition("/R@")
        hits_a, hits_b = ([(getattr(ranks, way) <= int(k)).tolist() for ranks in side] for side in (a, b))
        query_video = queries.caption_video().tolist() if way == "t2v" else list(range(7))
        expected = naive.resampled_differences(hits_a, hits_b, query_video, draws)
        interval = difference.over_videos
        low, high = np.percentile(100 * np.array(expected), [2.5, 97.5])
        assert (interval.low, interval.high) == pytest.approx((low, high))
        beyond = min(sum(value <= 0 for value in expected), sum(value >= 0 for value in expected))
        assert interval.p == pytest.approx(min(1.0, 2 * (beyond + 1) / 301))
        [whole] = naive.resampled_differences(hits_a, hits_b, query_video, [list(range(7))])
        assert difference.difference == pytest.approx(100 * whole)
        assert difference.difference == pytest.approx(difference.b - difference.a)


def test_means_are_those_of_the_metrics() -> None:
    random = np.random.default_rng(0)
    queries = make_queries([2] * 30)
    a, b = ([random_ranks(queries, random) for _ in range(3)] for _ in range(2))
    for difference in paired_differences(a, b, resamples=10):
        for side, value in ((a, difference.a), (b, difference.b)):
            metrics = [ranks_metrics(ranks.t2v, ranks.v2t)[difference.metric] for ranks in side]
            assert value == pytest.approx(np.mean(metrics))
        assert difference.num_pairs == 3
    assert {d.metric for d in paired_differences(a, b, resamples=1)} == {*RECALLS}


def test_a_chunked_bootstrap_draws_as_one_in_one_piece() -> None:
    num_clusters, resamples = 3_000, 1_500  # more than one chunk
    random = np.random.default_rng(0)
    sums = random.integers(-3, 4, (num_clusters, 1)).astype(np.float64)
    sizes = random.integers(1, 5, (num_clusters, 1))
    draws = np.random.default_rng(5).integers(0, num_clusters, (resamples, num_clusters))
    expected = sums[draws, 0].sum(axis=1) / sizes[draws, 0].sum(axis=1)
    np.testing.assert_allclose(resampled_ratios(sums, sizes, resamples, 5)[:, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_t_is_that_of_summing_up_its_density(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.4, 1.0, count)
    interval = t_interval(differences)
    assert interval is not None
    assert interval.p == pytest.approx(naive.paired_t_p(differences.tolist()), abs=1e-6)
    # At an end of the interval the mean lies just so far away that p is 5 %.
    for end in (interval.low, interval.high):
        assert naive.paired_t_p((differences - end).tolist()) == pytest.approx(0.05, abs=1e-6)


def test_equal_runs_do_not_differ() -> None:
    queries = make_queries([3] * 20)
    runs = [random_ranks(queries, np.random.default_rng(seed)) for seed in range(3)]
    for difference in paired_differences(runs, runs):
        for interval in (difference.over_videos, difference.over_seeds):
            assert interval is not None
            assert (interval.low, interval.high, interval.p) == (0.0, 0.0, 1.0)


def test_intervals_cover_no_difference_at_their_rate() -> None:
    """Of pairs that differ by chance alone, about 95 % of the intervals cover 0, and about 5 % have p < 0.05."""
    queries, random = make_queries([5] * 150), np.random.default_rng(0)
    covers, small, small_over_seeds = [], [], []
    for _ in range(250):
        a, b = ([random_ranks(queries, random) for _ in range(3)] for _ in range(2))
        for difference in paired_differences(a, b, resamples=300):
            assert difference.over_seeds is not None
            covers.append(difference.over_videos.low <= 0 <= difference.over_videos.high)
            small.append(difference.over_videos.p < 0.05)
            small_over_seeds.append(difference.over_seeds.p < 0.05)
    assert 0.92 < np.mean(covers) < 0.98
    assert 0.02 < np.mean(small) < 0.08
    assert 0.02 < np.mean(small_over_seeds) < 0.08


def test_a_gain_is_found() -> None:
    queries, random = make_queries([5] * 150), np.random.default_rng(0)
    a = [random_ranks(queries, random) for _ in range(3)]
    b = [random_ranks(queries, random, gain=0.8) for _ in range(3)]
    for difference in paired_differences(a, b, resamples=1_000):
        assert difference.over_seeds is not None
        assert difference.over_videos.p < 0.01 and difference.over_videos.low > 0
        assert difference.over_seeds.p < 0.05 and difference.over_seeds.low > 0


def test_ten_captions_that_say_the_same_are_no_more_evidence_than_one() -> None:
    random = np.random.default_rng(0)
    one, ten = make_queries([1] * 40), make_queries([10] * 40)
    ranks = [random.integers(1, 4, 40).astype(np.float64) for _ in range(2)]
    of_one = paired_differences(*([make_ranks(one, values, values)] for values in ranks))
    of_ten = paired_differences(*([make_ranks(ten, np.repeat(values, 10), values)] for values in ranks))
    for single, repeated in zip(of_one, of_ten, strict=True):
        assert repeated.over_videos == single.over_videos


def test_one_pair_says_nothing_over_seeds() -> None:
    queries = make_queries([2] * 10)
    a, b = (random_ranks(queries, np.random.default_rng(seed)) for seed in range(2))
    assert all(difference.over_seeds is None for difference in paired_differences([a], [b]))


def test_p_is_never_nothing() -> None:
    assert percentile_interval(np.full(999, 3.0)).p == pytest.approx(2 / 1000)


def test_sets_that_cannot_be_paired_are_refused() -> None:
    random = np.random.default_rng(0)
    a, b = (random_ranks(make_queries(counts), random) for counts in ([2] * 5, [2] * 6))
    for num_a, num_b in ((0, 0), (2, 1)):
        with pytest.raises(UsageError, match=f"cannot pair {num_a} evaluations with {num_b}"):
            paired_differences([a] * num_a, [a] * num_b)
    with pytest.raises(MismatchError, match=r"has 10 captions, .* 12: the first extra one is '10' of 'clip0005'"):
        paired_differences([a], [b])


def test_chance_is_told_from_learning() -> None:
    queries, random = make_queries([3] * 50), np.random.default_rng(0)
    guessed = make_ranks(queries, random.integers(1, 51, 150).astype(np.float64), np.ones(50))
    collapsed = make_ranks(queries, np.full(150, 25.5), np.full(50, 25.5))
    worse = make_ranks(queries, np.full(150, 40.0), np.ones(50))
    learned = make_ranks(queries, random.integers(1, 30, 150).astype(np.float64), np.ones(50))
    assert [is_chance(ranks) for ranks in (guessed, collapsed, worse, learned)] == [True, True, True, False]


def test_seeds_that_differ_by_exactly_the_same_say_nothing_of_others() -> None:
    assert t_interval(np.array([0.5, 0.5, 0.5])) is None
    nothing = t_interval(np.zeros(3))
    assert nothing is not None and nothing.p == 1.0
