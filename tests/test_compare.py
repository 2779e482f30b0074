"""`svb compare`: the paired differences of two runs, or of two sets of runs, from their saved ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import synthetic
from conftest import RunSvb, assert_refused
from numpy.typing import NDArray
from runs import as_of_an_older_svb, change_config

from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.retrieve.compare import compare
from svb.retrieve.evaluate import evaluate
from svb.retrieve.measure.paired import (
    RECALLS,
    is_chance,
    paired_differences,
    percentile_interval,
    resampled_ratios,
    t_interval,
)
from svb.retrieve.measure.query_ranks import Queries, Ranks, read_ranks
from svb.train.config import TrainConfig
from svb.train.retrieval_metrics import ranks_metrics
from svb.train.run import train

Edit = Callable[[dict[str, Any]], object]
DAMAGED = "is not a whole file of ranks .* - write it again with"
SMALL = TrainConfig(
    embedding_size=16, variant="none", batch_size=16, epochs=3, evaluate_every=1, learning_rate=5e-3
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` hold runs of seeds 0 and 1 that differ in their dropout; only to be read."""
    folder = tmp_path_factory.mktemp("runs")
    store, captions = synthetic.make_task(folder, num_train=30, num_val=20)
    for name, dropout in (("a", 0.5), ("b", 0.0)):
        for seed in (0, 1):
            config = replace(SMALL, dropout=dropout, seed=seed)
            run = train(store, captions, folder / name / f"seed-{seed}", config, device="cpu")
            evaluate(run, checkpoint="last")
    return folder


@pytest.fixture
def runs(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` that the test may change."""
    return Path(shutil.copytree(whole, tmp_path / "own"))


def test_two_runs(whole: Path, run_svb: RunSvb) -> None:
    ran = run_svb("compare", whole / "a" / "seed-0", whole / "b" / "seed-1")
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    assert lines[:3] == [
        f"A: {whole}/a/seed-0, seed 0, last checkpoint",
        f"B: {whole}/b/seed-1, seed 1, last checkpoint",
        "val: 40 captions against 20 videos",
    ]
    ranks = [read_ranks(whole / run / "ranks.npz") for run in ("a/seed-0", "b/seed-1")]
    for line, expected in zip(lines[4:], paired_differences(ranks[:1], ranks[1:]), strict=True):
        over, numbers = expected.over_videos, (f"{expected.a:.1f}", f"{expected.b:.1f}")
        values = [*expected.metric.split("/"), *numbers, f"{expected.difference:+.2f}"]
        assert line.split()[:8] == [*values, f"{over.low:+.2f}", "to", f"{over.high:+.2f}"]
    assert "one pair of runs" in ran.stderr


def test_sets_of_runs_are_paired_by_seed(whole: Path, run_svb: RunSvb) -> None:
    comparison = compare(whole / "a", whole / "b")
    of_a, of_b = ([read_ranks(whole / side / f"seed-{seed}" / "ranks.npz") for seed in (0, 1)] for side in "ab")
    assert comparison.differences == paired_differences(of_a, of_b)
    assert comparison.a.seeds == (0, 1) and comparison.differences[0].over_seeds is not None
    ran = run_svb("compare", whole / "a", whole / "b", "--json")
    held = json.loads(ran.stdout)
    assert held == json.loads(json.dumps(comparison.as_json())) and not ran.stderr
    assert held["b"]["seeds"] == [0, 1] and held["split"] == "val" and not held["selected_on_split"]


def test_files_of_ranks(whole: Path, tmp_path: Path) -> None:
    evaluate(whole / "a" / "seed-0", checkpoint="last", ranks=tmp_path / "a.npz")
    comparison = compare(tmp_path / "a.npz", whole / "b" / "seed-0")
    assert comparison.differences == compare(whole / "a" / "seed-0", whole / "b" / "seed-0").differences
    with pytest.raises(InputError, match=r"a\.npz holds one file of ranks, .*b seeds 0, 1 - expected the same"):
        compare(tmp_path / "a.npz", whole / "b")


def test_a_checkpoint_chosen_on_the_split_is_said(runs: Path, run_svb: RunSvb) -> None:
    evaluate(runs / "a" / "seed-0", checkpoint="best")
    ran = run_svb("compare", runs / "a" / "seed-0", runs / "b" / "seed-0")
    is_last = "seed-0, seed 0, last checkpoint" in ran.stdout.splitlines()[0]  # it may be the best one, too
    assert ("this split chose a checkpoint" in ran.stdout) != is_last
    evaluate(runs / "a" / "seed-0", checkpoint="best", split="train")
    evaluate(runs / "b" / "seed-0", checkpoint="best", split="train")
    assert "this split chose" not in run_svb("compare", runs / "a" / "seed-0", runs / "b" / "seed-0").stdout


def set_items(**items: tuple[Any, Any]) -> Edit:
    def edit(held: dict[str, Any]) -> None:
        for name, (place, value) in items.items():
            held[name][place] = value

    return edit


def with_one_more_video(held: dict[str, Any]) -> None:
    held["video_ids"], held["v2t"] = np.append(held["video_ids"], "clip099"), np.append(held["v2t"], 1.0)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (set_items(caption_ids=(3, "99")), MismatchError,
         "caption 4 is '63' of 'clip031' in .*a/seed-0.*, '99' of 'clip031' in"),
        (set_items(caption_video_ids=(3, "clip030")), MismatchError,
         "caption 4 is '63' of 'clip031' in .*, '63' of 'clip030' in"),
        (set_items(video_ids=(19, "x"), caption_video_ids=(slice(38, 40), "x")), MismatchError,
         "caption 39 is '98' of 'clip049'"),
        (with_one_more_video, MismatchError, "has 20 videos, .* 21: the first extra one is 'clip099' in"),
        (lambda held: held.update(v2t_convention="best"), MismatchError,
         "with the v2t convention 'set', .* with 'best' - evaluate both in the same way"),
        (lambda held: held.pop("caption_video_ids"), InputError,
         "older svb wrote .*: it lacks caption_video_ids - write it again with"),
        (lambda held: held.update(t2v=held["t2v"][:-1]), StoreError, DAMAGED),
        (set_items(caption_video_ids=(0, "nowhere")), StoreError, DAMAGED),
        (lambda held: held.pop("t2v"), StoreError, DAMAGED),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_refused(runs: Path, edit: Edit, error: type[Exception], words: str) -> None:
    path = runs / "b" / "seed-0" / "ranks.npz"
    with np.load(path) as file:
        held = dict(file)
    edit(held)
    np.savez(path, **held)
    with pytest.raises(error, match=words):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")


def test_other_evaluations_are_refused(runs: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    a, b = runs / "a" / "seed-0", runs / "b" / "seed-0"
    data = (b / "ranks.npz").read_bytes()
    for damaged in (b"", data[:-100], b"no ranks"):
        (b / "ranks.npz").write_bytes(damaged)
        assert_refused(run_svb("compare", a, b), "is not a whole file of ranks")
    evaluate(b, split="train")
    assert_refused(run_svb("compare", a, b), "on train - evaluate both on the same split")
    shutil.copy(a / "ranks.npz", b / "ranks.npz")
    assert_refused(run_svb("compare", a, b), f"belongs to other weights than {b} holds now")
    (b / "ranks.npz").unlink()
    assert_refused(run_svb("compare", a, b), f"no ranks at {b}/ranks.npz - write them with `svb evaluate {b}`")
    assert_refused(run_svb("compare", tmp_path / "x", a), "is not a run and holds none - expected a run")


def test_sets_that_are_no_pair_are_refused(runs: Path) -> None:
    shutil.copytree(runs / "a" / "seed-0", runs / "a" / "seed-zero")
    with pytest.raises(InputError, match="both have the seed 0 - expected one run per seed"):
        compare(runs / "a", runs / "b")
    shutil.rmtree(runs / "a" / "seed-zero")
    (runs / "b" / "seed-1").rename(runs / "seed-1")
    with pytest.raises(InputError, match=r"a holds seeds 0, 1, .*b seeds 0 - expected the same seeds"):
        compare(runs / "a", runs / "b")
    shutil.rmtree(runs / "a" / "seed-1")
    (runs / "seed-1").rename(runs / "a" / "seed-1")
    with pytest.raises(InputError, match=r"differ in more than their seed \(dropout: 0\.5 and 0\.0\)"):
        compare(runs / "a", runs / "b")


def test_a_run_of_an_older_svb_is_compared(runs: Path) -> None:
    """One of its options had another name, which its fingerprint holds too."""
    expected = compare(runs / "a", runs / "b").differences
    change_config(runs / "a" / "seed-0", as_of_an_older_svb)
    evaluate(runs / "a" / "seed-0", checkpoint="last")
    assert compare(runs / "a", runs / "b").differences == expected


# The intervals of paired differences


def make_queries(captions_a_video: list[int]) -> Queries:
    video_ids = [f"clip{video:04}" for video in range(len(captions_a_video))]
    owners = [video_id for video_id, count in zip(video_ids, captions_a_video, strict=True) for _ in range(count)]
    return Queries("val", tuple(f"{row}" for row in range(len(owners))), tuple(owners), tuple(video_ids))


def make_ranks(queries: Queries, t2v: NDArray[np.floating], v2t: NDArray[np.floating]) -> Ranks:
    return Ranks(Path("ranks.npz"), queries, t2v, v2t, "set", "ties averaged", "made up", "val")


def random_ranks(queries: Queries, random: np.random.Generator) -> Ranks:
    """Draw ranks: captions of a video succeed and fail together, whoever the model."""
    hardness = np.random.default_rng(1).normal(size=len(queries.video_ids))
    own = random.normal(size=len(queries.video_ids))  # what this model makes of a video
    row = queries.caption_video()
    noise = random.normal(size=(2, max(len(row), len(own))))
    t2v = hardness[row] + own[row] + noise[0, : len(row)]
    v2t = hardness + own + noise[1, : len(own)]
    return make_ranks(queries, *(np.maximum(1.0, np.round(np.exp(1.2 * value + 1.5))) for value in (t2v, v2t)))


def test_differences_are_those_of_a_slow_bootstrap() -> None:
    random = np.random.default_rng(0)
    queries = make_queries([1, 4, 2, 3, 2, 1, 5])
    a, b = ([random_ranks(queries, random) for _ in range(2)] for _ in range(2))
    draws = np.random.default_rng(7).integers(0, 7, (300, 7)).tolist()
    differences = paired_differences(a, b, resamples=300, seed=7)
    assert {difference.metric for difference in differences} == {*RECALLS}
    assert all(one.over_seeds is None for one in paired_differences(a[:1], b[:1], resamples=1))
    for difference in differences:
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
        means = [[ranks_metrics(ranks.t2v, ranks.v2t)[difference.metric] for ranks in side] for side in (a, b)]
        assert (difference.a, difference.b) == pytest.approx(tuple(np.mean(means, axis=1)))
        assert difference.num_pairs == 2


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


def test_what_little_was_seen_is_not_overstated() -> None:
    assert percentile_interval(np.full(999, 3.0)).p == pytest.approx(2 / 1000)
    assert percentile_interval(np.zeros(999)).p == 1.0
    # Seeds that differ by exactly the same say nothing of others; those that do not differ at all have a p of 1.
    assert t_interval(np.array([0.5, 0.5, 0.5])) is None
    nothing = t_interval(np.zeros(3))
    assert nothing is not None and nothing.p == 1.0
