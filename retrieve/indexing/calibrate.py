"""Fits how sure an answer is to the captions of an index's own val videos, and measures what the levels mean.

Each caption is a query. An answer is right if it is the caption's own video, or if one of the video's captions
shares enough of its words. `svb.retrieve.stored.calibration` says what is fitted: the first answers give the rule,
with the first wrong ones for queries without an answer, and the nine behind them give the weight of the gap. The
levels are measured on captions of videos that the rule was not fitted to: two rules, each of one half of the
videos, are measured on the other half. The one that is kept is fitted to all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svb.data.caption_words import content_words
from svb.retrieve.answer import CONFIDENCES
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.searching.vectors import SegmentVectors
from svb.retrieve.stored.calibration import (
    LEAST_CHANCES,
    RANDOM_SHARES,
    Calibration,
    Rule,
    level_of,
    publish_calibration,
)
from svb.retrieve.stored.segment import Segment

if TYPE_CHECKING:
    from svb.retrieve.model.source import OpenedSource

# A random text has one to eight of these words.
EVERYDAY_WORDS = """
man woman child girl boy people crowd team dog cat horse bird fish animal car train boat plane bicycle truck
road street house room kitchen table chair door window garden tree flower grass river lake sea beach mountain
snow rain sky sun moon star night day city village school office shop market church hospital factory farm field
forest bridge tower book paper letter picture music song guitar piano drum dance game ball race food bread meat
fruit apple cake soup water milk coffee glass bottle knife phone computer screen camera light lamp fire smoke
stone metal wood plastic cloth dress hat shoe money law tax bank war peace history science number word name
voice body head face hand eye hair foot heart circle square red blue green yellow white black small large old
new fast slow hot cold happy sad walk run jump sit stand talk sing read write draw paint build break open close
cut cook eat drink drive fly swim climb throw catch push pull buy sell teach learn play win lose"""
NUM_RANDOM_TEXTS = 400
# Fewer say too little; more cost time and hardly change the rule.
MIN_CAPTIONS, MAX_CAPTIONS = 100, 1000
# At most so many scores are computed: a million windows are asked with 100 captions, which takes seconds.
MAX_SCORES = 10**8
# More cost a query more: 60,000 gain 0.01 of AUC at most.
NUM_KNOWN = 4096
# Two captions that share this part of their words (IoU) mean much the same, as a person would say.
RIGHT_IOU = 0.3
ANSWERS = 10
# A caption whose right videos were all left out would get the first wrong answer instead, which is looked for among
# this many. It counts this much in the fit: one of five queries then has no answer in the index.
LOOKED_AT, LEFT_OUT_WEIGHT = 100, 0.25
VIDEOS_AT_ONCE = 4096
NUM_BINS = 10
# Keeps weights finite where answers can be told apart without an error.
RIDGE = 1e-3


@dataclass(frozen=True)
class Asked:
    """C captions as queries, and their A best answers; -1 in `right` is an answer whose video has no captions.

    Attributes:
        scores: `(C, A)`, best first.
        queries: `(C, 2)`, how well the model knows each caption: see `Calibration.query`.
        best_scores: `(C,)`, the highest score in the sample of the index's windows.
        right: `(C, A)`, 1 where an answer is right.
        left_out: `(C,)`, the score of the first wrong answer; NaN if there is none.
        video_of: `(C,)`, the number of each caption's own video.
    """

    scores: NDArray[np.float32]
    queries: NDArray[np.float64]
    best_scores: NDArray[np.float32]
    right: NDArray[np.int64]
    left_out: NDArray[np.float32]
    video_of: NDArray[np.int64]

    def features(self, rank: slice) -> NDArray[np.float64]:
        """Return `(n, 5)`, for answers that can be judged: the features of a `Rule`, and whether it is right."""
        scores, right = self.scores[:, rank], self.right[:, rank]
        gaps = np.maximum(0, self.best_scores[:, None] - scores)
        queries = np.broadcast_to(self.queries[:, None], (*scores.shape, 2))
        features = np.concatenate([scores[..., None], queries, gaps[..., None], right[..., None]], axis=-1)
        return features[right >= 0].astype(np.float64)

    def first(self, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what the rule is fitted to, first answers and first wrong ones: `(n, 5)`, and weights `(n,)`.

        Args:
            chosen: `(C,)`, the captions to fit to.
        """
        of = self.of(chosen)
        answers, missed = of.features(slice(0, 1)), ~np.isnan(of.left_out)
        zeros = np.zeros(int(missed.sum()))
        wrong = np.c_[of.left_out[missed], of.queries[missed], zeros, zeros]
        weights = np.concatenate([np.ones(len(answers)), np.full(len(wrong), LEFT_OUT_WEIGHT)])
        return np.concatenate([answers, wrong]), weights

    def of(self, chosen: NDArray[np.bool_]) -> Asked:
        """Return some of the captions."""
        return Asked(*(held[chosen] for held in vars(self).values()))


def calibrate(
    out: Path,
    segments: Sequence[Segment],
    opened: OpenedSource,
    embed_random_texts: Callable[[], NDArray[np.float16] | None],
) -> list[dict[str, Any]]:
    """Return the entry of an index's calibration in a list; it is empty without videos or without a text encoder.

    Args:
        out: The index's folder.
        segments: All segments of the index.
        opened: The run or store that the index was made from.
        embed_random_texts: Returns `(n, D)` embeddings of `random_texts`, None if there is no text encoder; called
            if there are too few captions.
    """
    catalog = Catalog(segments)
    if not catalog.alive.any():
        return []
    most = min(MAX_CAPTIONS, max(MIN_CAPTIONS, MAX_SCORES // max(1, catalog.num_moments)))
    training, held = _captions_of_splits(opened, catalog)
    if len(held) < MIN_CAPTIONS:
        if (embeddings := embed_random_texts()) is None:
            return []
        calibration = fit_to_random_texts(catalog, embeddings, most)
        measured: dict[str, Any] = {
            "random_texts": min(most, len(embeddings)),
            "made_for": opened.embedder.fingerprint,
        }
    else:
        words = known_words(opened, training)
        calibration, measured = fit(ask(opened, catalog, choose(held, most), words), words)
    return [publish_calibration(out, calibration, measured)]


def _captions_of_splits(opened: OpenedSource, catalog: Catalog) -> tuple[Sequence[int], Sequence[int]]:
    """Return the positions of the training captions, and of the val captions of the index's videos."""
    from svb.train.training_data import positions_of_splits

    if opened.captions is None:
        return [], []
    video_ids, rows = opened.captions.table.video_ids, catalog.live_rows
    positions = positions_of_splits(opened.captions, val_fraction=opened.config.put_aside, quiet=True)
    return positions["train"], [position for position in positions["val"] if video_ids[position] in rows]


def random_texts() -> list[str]:
    """Return texts that fit nothing in particular, always the same."""
    draw, words = np.random.default_rng(0), EVERYDAY_WORDS.split()
    return [" ".join(draw.choice(words, draw.integers(1, 9), replace=False)) for _ in range(NUM_RANDOM_TEXTS)]


def fit_to_random_texts(catalog: Catalog, embeddings: NDArray[np.floating], most: int) -> Calibration:
    """Return the rule by which an answer is strong, or fair, if it beats the best answers to most random texts.

    Args:
        catalog: What is searched.
        embeddings: `(n, D)`, of `random_texts`.
        most: How many of them to search with at most.
    """
    best_scores = _best_videos(catalog, embeddings[:most].astype(np.float32))[1][:, 0]
    least = {level: float(np.quantile(best_scores, share)) for level, share in RANDOM_SHARES.items()}
    logits = {level: float(np.log(chance / (1 - chance))) for level, chance in LEAST_CHANCES.items()}
    # The logistic function that has each level's least chance at its least score.
    weight = (logits["strong"] - logits["fair"]) / max(1e-3, least["strong"] - least["fair"])
    rule = Rule(_rounded(logits["fair"] - weight * least["fair"]), _rounded(weight), 0.0, 0.0, 0.0)
    return Calibration(rule, 0, {}, embeddings.astype(np.float16))


def known_words(opened: OpenedSource, positions: Sequence[int]) -> Calibration:
    """Return what is known of the training captions at some positions, with a rule that is not fitted yet."""
    assert opened.captions is not None
    texts = opened.captions.table.captions
    counts = Counter(word for position in positions for word in content_words(texts[position]))
    known = _embeddings(opened, choose(positions, NUM_KNOWN)).astype(np.float16)
    return Calibration(Rule(0.0, 0.0, 0.0, 0.0, 0.0), len(positions), counts, known)


def ask(opened: OpenedSource, catalog: Catalog, positions: Sequence[int], words: Calibration) -> Asked:
    """Search with the captions at some positions, whose videos are in the index, and judge the answers."""
    assert opened.captions is not None
    table, rows = opened.captions.table, catalog.live_rows
    queries = _embeddings(opened, positions)
    of_video: dict[int, list[set[str]]] = {}
    for video_id, caption in zip(table.video_ids, table.captions, strict=True):
        if video_id in rows:
            of_video.setdefault(rows[video_id], []).append(content_words(caption))
    videos, scores = _best_videos(catalog, queries)
    own = np.array([rows[table.video_ids[position]] for position in positions])
    right, left_out = np.full((len(videos), ANSWERS), -1), np.full(len(videos), np.nan, np.float32)
    for number, position in enumerate(positions):
        asked = content_words(table.captions[position])
        for rank, video in enumerate(videos[number].tolist()):
            if rank >= ANSWERS and not np.isnan(left_out[number]):
                break
            if video in of_video:
                is_right = video == own[number] or any(_mean_the_same(asked, o) for o in of_video[video])
                if rank < ANSWERS:
                    right[number, rank] = is_right
                if not is_right and np.isnan(left_out[number]):
                    left_out[number] = scores[number, rank]
    sample = SegmentVectors(catalog.segments).embeddings(catalog.sample_rows("moment"), by="moment")
    known = [words.query([table.captions[p]], [query]) for p, query in zip(positions, queries, strict=True)]
    best_scores, right = (queries @ sample.T).max(axis=1), right[:, : scores.shape[1]]
    return Asked(scores[:, :ANSWERS], np.array(known), best_scores, right, left_out, own)


def fit(asked: Asked, words: Calibration) -> tuple[Calibration, dict[str, Any]]:
    """Return the rule of all captions, and what the levels were measured to mean."""
    first = asked.features(slice(0, 1))
    chances, right = chances_of_other_half(asked), first[:, 4] > 0
    rule = _with_gap(fit_first(*asked.first(np.ones(len(asked.scores), bool))), asked.features(slice(1, None)))
    return replace(words, rule=rule), {
        "captions": len(first),
        "auc": auc(chances, right),
        "score_auc": auc(first[:, 0], right),
        "error": calibration_error(chances, right),
        "levels": levels_of(chances, right),
    }


def chances_of_other_half(asked: Asked) -> NDArray[np.float64]:
    """Return `(n,)` chances of the first answers that can be judged, by rules of the other half of the videos."""
    first, videos = asked.features(slice(0, 1)), np.unique(asked.video_of)
    chosen = np.random.default_rng(0).permutation(videos)[: len(videos) // 2]
    is_chosen, is_judged = np.isin(asked.video_of, chosen), asked.right[:, 0] >= 0
    chances = np.empty(len(first))
    for half in (is_chosen, ~is_chosen):
        others = ~half[is_judged]
        chances[others] = fit_first(*asked.first(half)).chances(first[others, :4])
    return chances


def levels_of(chances: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    """Return for each confidence how many answers have it, and which share of them is right."""
    levels = np.array([level_of(chance) for chance in chances.tolist()])
    return {
        level: {
            "answers": int((levels == level).sum()),
            "right": round(float(right[levels == level].mean()), 4) if (levels == level).any() else None,
        }
        for level in CONFIDENCES
    }


def auc(values: NDArray[np.floating], right: NDArray[np.bool_]) -> float | None:
    """Return how often a right answer has a higher value than a wrong one; ties count half, None without both."""
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return round(float((ranks[right].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong)), 4)


def calibration_error(chances: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Return how far `(n,)` chances are off the share that is right, the mean over ten bins of equally many."""
    bins = np.array_split(np.argsort(chances, kind="stable"), NUM_BINS)
    off = [len(rows) * abs(chances[rows].mean() - right[rows].mean()) for rows in bins if len(rows)]
    return round(float(sum(off) / max(1, len(chances))), 4)


def choose(positions: Sequence[int], most: int) -> list[int]:
    """Return at most so many positions, always the same, ascending."""
    chosen = np.random.default_rng(0).permutation(len(positions))[:most]
    return [positions[row] for row in sorted(chosen.tolist())]


def _embeddings(opened: OpenedSource, positions: Sequence[int]) -> NDArray[np.float32]:
    """Return `(n, D)` of the captions at some positions."""
    import torch

    assert opened.captions is not None
    features = torch.from_numpy(opened.captions.features[list(positions)])
    return opened.embedder.embed_captions(features)


def _best_videos(catalog: Catalog, queries: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return `(C, n)` rows of the best videos by their best windows, and their scores; n is `LOOKED_AT` at most."""
    parts = []
    for segment in catalog.segments:
        offsets = segment.moment_offsets
        for begin in range(0, segment.num_videos, VIDEOS_AT_ONCE):
            begins = offsets[begin : begin + VIDEOS_AT_ONCE + 1]
            windows = segment.moment_embeddings[begins[0] : begins[-1]].astype(np.float32)
            parts.append(np.maximum.reduceat(queries @ windows.T, begins[:-1] - begins[0], axis=1))
    scores = np.concatenate(parts, axis=1)  # (C, V)
    scores[:, ~catalog.alive] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, : min(LOOKED_AT, int(catalog.alive.sum()))]
    return best, np.take_along_axis(scores, best, axis=1)


def _mean_the_same(words: set[str], others: set[str]) -> bool:
    union = len(words | others)
    return union > 0 and len(words & others) >= RIGHT_IOU * union


# --- the fit


def fit_first(answers: NDArray[np.float64], counts: NDArray[np.float64]) -> Rule:
    """Return the rule of first answers, which have no gap; a weight that would be negative is 0.

    Args:
        answers: `(n, 5)`, as `Asked.features` returns them.
        counts: `(n,)`, how much each counts.
    """
    columns = [0, 1, 2]
    while True:
        bias, weights = logistic(answers[:, columns], answers[:, 4], counts)
        if (weights >= 0).all():
            held = dict(zip(columns, weights.tolist(), strict=True))
            score, words, known = (_rounded(held.get(column, 0.0)) for column in (0, 1, 2))
            return Rule(_rounded(bias), score, words, known, 0.0)
        columns.remove(columns[int(weights.argmin())])


def _with_gap(rule: Rule, answers: NDArray[np.float64]) -> Rule:
    """Return the rule with the weight of the gap that answers behind the first have."""
    weight, gaps, right = 0.0, answers[:, 3], answers[:, 4]
    for _ in range(50):  # Newton's method
        chances = replace(rule, gap=weight).chances(answers[:, :4])
        slope = gaps @ (right - chances) + RIDGE * weight
        weight -= float(slope / (gaps**2 @ (chances * (1 - chances)) + RIDGE))
    return replace(rule, gap=_rounded(max(0.0, weight)))


def logistic(
    features: NDArray[np.float64], right: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Return the bias and the `(m,)` weights of a logistic regression, by Newton's method.

    The targets are Platt's (*Probabilistic outputs for support vector machines*, 1999, section 2.2): one more right
    and one more wrong answer, so that no chance becomes 0 or 1 where all are right.

    Args:
        features: `(n, m)`.
        right: `(n,)`, 1 or 0.
        counts: `(n,)`, how much each answer counts.
    """
    num_right, num_wrong = float(counts @ right), float(counts @ (1 - right))
    targets = np.where(right > 0, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-9
    design = np.c_[np.ones(len(features)), (features - mean) / deviation]
    weights, ridge = np.zeros(design.shape[1]), np.eye(design.shape[1]) * RIDGE * len(features)
    ridge[0, 0] = 0.0
    for _ in range(50):
        chances = 1 / (1 + np.exp(-design @ weights))
        hessian = (design * (counts * chances * (1 - chances))[:, None]).T @ design + ridge
        weights -= np.linalg.solve(
            hessian + 1e-9 * np.eye(len(weights)), design.T @ (counts * (chances - targets)) + ridge @ weights
        )
    raw = weights[1:] / deviation
    return float(weights[0] - raw @ mean), raw


def _rounded(value: float) -> float:
    """Return three decimals: the number of threads changes a matrix product only behind them."""
    return round(float(value), 3)
