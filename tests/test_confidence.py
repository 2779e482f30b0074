"""Confidence tells what stands out of a query's scores from the best of what does not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from svb.retrieve.answer import CONFIDENCES
from svb.retrieve.searching.confidence import Spread, independent_rows


@pytest.mark.parametrize("number", [30, 1_000, 100_000])
def test_the_best_of_unrelated_rows_is_hardly_ever_strong(number: int) -> None:
    random = np.random.default_rng(0)
    levels = []
    for _ in range(200):
        scores = random.normal(0.1, 0.05, number)
        levels.append(Spread.of(scores[:8192], number).confidence(scores.max()))
    assert levels.count("strong") <= 0.15 * len(levels)
    assert levels.count("weak") >= 0.4 * len(levels)


@pytest.mark.parametrize("number", [12, 1_000, 100_000])
def test_what_stands_out_is_strong_whatever_the_scale(number: int) -> None:
    random = np.random.default_rng(1)
    for mean, deviation in ((0.1, 0.05), (-0.3, 0.2), (0.7, 0.001)):
        scores = random.normal(mean, deviation, min(number, 8192))
        spread = Spread.of(scores, number)
        above = [spread.confidence(mean + deviation * times) for times in (8.0, 0.5, -3.0)]
        assert above == ["strong", "weak", "weak"]


def test_levels_follow_the_score() -> None:
    spread = Spread(mean=0.0, deviation=1.0, chance=4.0)
    levels = [spread.confidence(score) for score in (9, 4.0, 3.99, 3.6, 3.59, 0, -9)]
    assert levels == ["strong", "strong", "fair", "fair", "weak", "weak", "weak"]
    assert set(levels) == set(CONFIDENCES)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_index_of_next_to_nothing_is_never_sure(number: int) -> None:
    scores = np.linspace(0.9, 0.1, number)
    assert Spread.of(scores, number).confidence(0.9) == "weak"


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_few_that_filters_leave_are_not_sure_for_being_few(number: int) -> None:
    """Of a single row, chance would end at the mean: every other one would be strong."""
    random = np.random.default_rng(2)
    scores = random.normal(0.1, 0.05, 8192)
    best = random.choice(scores, (2_000, number)).max(axis=1)
    spread = Spread.of(scores, number)
    levels = [spread.confidence(score) for score in best.tolist()]
    assert levels.count("strong") <= 0.2 * len(levels)


def test_equal_scores_say_nothing() -> None:
    assert Spread.of(np.full(100, 0.5), 100).confidence(0.5) == "weak"


def test_moments_of_a_scene_are_one_piece_of_evidence() -> None:
    def catalog(moments: int) -> Any:
        alive = np.array([*[True] * 100, False])
        return SimpleNamespace(alive=alive, moment_counts=np.array([*[moments] * 100, 10_000]))

    assert independent_rows(catalog(3), "moment") == 100
    assert independent_rows(catalog(800), "moment") == 10_000
    assert independent_rows(catalog(800), "video") == 100
