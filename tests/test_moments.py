"""What a score curve tells of made-up events, and how sure a score is: moments and confidence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from svb.retrieve.searching.moments import curve_of, find_moments
from svb.retrieve.searching.results import Spread, independent_rows

# --- moments


def windows(total: float, length: float = 4.0, stride: float = 2.0) -> NDArray[np.float64]:
    begins = np.arange(0, max(total - length, 0) + 1e-9, stride)
    return np.stack([begins, np.minimum(begins + length, total)], axis=1)


def curve(
    seconds: NDArray[np.float64], events: Sequence[tuple[float, float, float]], rest: float = 0.1
) -> NDArray[np.float32]:
    """Return the scores of windows, given which share of each an event `(begin, end, score)` fills."""
    scores = np.full(len(seconds), rest)
    for begin, end, score in events:
        inside = np.minimum(seconds[:, 1], end) - np.maximum(seconds[:, 0], begin)
        scores += (score - rest) * np.clip(inside, 0, None) / (seconds[:, 1] - seconds[:, 0])
    return scores.astype(np.float32)


@pytest.mark.parametrize(
    ("begin", "end"), [(10.0, 20.0), (11.3, 18.9), (0.0, 9.0), (33.0, 60.0), (0.0, 60.0), (5.0, 55.0), (7.7, 13.2)]
)
@pytest.mark.parametrize("stride", [2.0, 1.0, 4.0])
def test_an_event_is_found_from_begin_to_end(begin: float, end: float, stride: float) -> None:
    seconds = windows(60.0, stride=stride)
    (moment,) = find_moments(seconds, curve(seconds, [(begin, end, 0.6)]), 0.05, 3)
    # An edge is off by a fraction of the stride, and by more where every other window sees a bit of the event.
    assert moment.begin_seconds == pytest.approx(begin, abs=max(stride / 4, 0.4))
    assert moment.end_seconds == pytest.approx(end, abs=max(stride / 4, 0.4))
    assert begin <= moment.best_seconds <= end
    assert moment.score == pytest.approx(0.6, abs=1e-6)


def test_an_event_shorter_than_a_window_lies_in_the_stretch() -> None:
    seconds = windows(60.0, stride=1.0)
    (moment,) = find_moments(seconds, curve(seconds, [(30.0, 31.0, 0.9)]), 0.01, 3)
    assert moment.begin_seconds <= 30 and moment.end_seconds >= 31
    assert moment.end_seconds - moment.begin_seconds <= 4.5


def test_events_come_best_first_and_reach_half_the_height_of_the_first() -> None:
    seconds = windows(100.0, stride=1.0)
    for events, spans in (
        ([(10, 20, 0.5), (40, 50, 0.8), (70, 80, 0.6)], [(40, 50), (70, 80), (10, 20)]),
        ([(10, 20, 0.9), (60, 70, 0.4)], [(10, 20)]),
        ([(10, 20, 0.9), (60, 70, 0.6)], [(10, 20), (60, 70)]),
        ([(10, 18, 0.8), (19, 28, 0.7)], [(10, 28)]),  # every window between the two tops sees both
    ):
        scores = curve(seconds, events)
        found = find_moments(seconds, scores, 0.05, 5)
        for moment, span in zip(found, spans, strict=True):
            assert (moment.begin_seconds, moment.end_seconds) == pytest.approx(span, abs=0.5)
        assert find_moments(seconds, scores, 0.05, 2) == found[:2]


def test_a_curve_of_noise_is_one_moment_of_the_whole_video() -> None:
    seconds = windows(60.0)
    scores = (0.4 + 0.005 * np.random.default_rng(0).normal(size=len(seconds))).astype(np.float32)
    (moment,) = find_moments(seconds, scores, 0.1, 5)
    assert (moment.begin_seconds, moment.end_seconds, moment.score) == (0, 60, scores.max())
    # The same curve is one of events if scores are spread less over the index.
    assert find_moments(seconds, scores, 0.001, 5)[0].end_seconds < 60


@pytest.mark.parametrize("deviation", [0.0, 0.1])
@pytest.mark.parametrize("score", [0.3, -0.3])
def test_flat_curves_and_single_windows(deviation: float, score: float) -> None:
    for seconds in (np.array([[0.0, 0.04]]), windows(30.0)):
        (moment,) = find_moments(seconds, np.full(len(seconds), score, np.float32), deviation, 3)
        assert (moment.begin_seconds, moment.end_seconds) == (0, seconds[-1, 1])
        assert moment.begin_seconds <= moment.best_seconds < moment.end_seconds


def test_a_moment_does_not_reach_over_a_gap_and_a_curve_is_read_at_the_middles_of_windows() -> None:
    held = curve_of(np.array([[0.0, 4.0], [2.0, 5.0]]), np.array([0.25, 0.5], np.float32))
    assert held.times_seconds == (2.0, 3.5) and held.scores == (0.25, 0.5)
    seconds = np.array([[0.0, 4.0], [2.0, 6.0], [100.0, 104.0], [102.0, 106.0]])
    first, second = find_moments(seconds, np.array([0.1, 0.9, 0.88, 0.1], np.float32), 0.01, 3)
    assert first.end_seconds <= 6 and second.begin_seconds >= 100


@pytest.mark.parametrize("seed", range(20))
def test_any_curve_gives_moments_that_hold_their_best_and_do_not_overlap(seed: int) -> None:
    random = np.random.default_rng(seed)
    seconds = windows(float(random.uniform(3, 200)), stride=float(random.choice([0.5, 1, 2, 4])))
    scores = np.convolve(random.normal(size=len(seconds)), np.ones(3) / 3, "same").astype(np.float32)
    found = find_moments(seconds, scores, float(random.choice([0, 0.1, 1])), 50)
    assert found[0].score == scores.max()
    assert [moment.score for moment in found] == sorted((moment.score for moment in found), reverse=True)
    for moment in found:
        assert 0 <= moment.begin_seconds <= moment.best_seconds <= moment.end_seconds <= seconds[-1, 1] + 1e-9
        assert moment.begin_seconds < moment.end_seconds
    spans = sorted((moment.begin_seconds, moment.end_seconds) for moment in found)
    assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(spans))


# --- confidence


@pytest.mark.parametrize("number", [30, 1_000, 100_000])
def test_the_best_of_unrelated_rows_is_hardly_ever_strong(number: int) -> None:
    random = np.random.default_rng(0)
    levels = []
    for _ in range(200):
        scores = random.normal(0.1, 0.05, number)
        levels.append(Spread.of(scores[:8192], number).confidence(scores.max()))
    assert levels.count("strong") <= 0.15 * len(levels)
    assert levels.count("weak") >= 0.4 * len(levels)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_few_that_are_left_are_not_sure_for_being_few(number: int) -> None:
    """Of a single row, chance would end at the mean: every other one would be strong."""
    random = np.random.default_rng(2)
    scores = random.normal(0.1, 0.05, 8192)
    best = random.choice(scores, (2_000, number)).max(axis=1)
    levels = [Spread.of(scores, number).confidence(score) for score in best.tolist()]
    assert levels.count("strong") <= 0.2 * len(levels)
    if number <= 3:
        assert Spread.of(np.linspace(0.9, 0.1, number), number).confidence(0.9) == "weak"


@pytest.mark.parametrize("number", [12, 1_000, 100_000])
def test_what_stands_out_is_strong_whatever_the_scale(number: int) -> None:
    random = np.random.default_rng(1)
    for mean, deviation in ((0.1, 0.05), (-0.3, 0.2), (0.7, 0.001)):
        spread = Spread.of(random.normal(mean, deviation, min(number, 8192)), number)
        above = [spread.confidence(mean + deviation * times) for times in (8.0, 0.5, -3.0)]
        assert above == ["strong", "weak", "weak"]
    levels = [Spread(0.0, 1.0, 4.0).confidence(score) for score in (4.0, 3.99, 3.6, 3.59, -9)]
    assert levels == ["strong", "fair", "fair", "weak", "weak"]
    assert Spread.of(np.full(100, 0.5), 100).confidence(0.5) == "weak"  # equal scores say nothing


def test_windows_of_a_scene_are_one_piece_of_evidence() -> None:
    def catalog(num_windows: int) -> Any:
        alive = np.array([*[True] * 100, False])
        return SimpleNamespace(alive=alive, moment_counts=np.array([*[num_windows] * 100, 10_000]))

    assert independent_rows(catalog(3), "moment") == 100
    assert independent_rows(catalog(800), "moment") == 10_000
    assert independent_rows(catalog(800), "video") == 100
