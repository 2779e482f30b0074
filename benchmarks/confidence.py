"""Do the levels tell right answers from wrong ones? `python benchmarks/confidence.py --runs RUN RUN ...`.

Every run's store is indexed whole. Queries, each of which has one first answer:

captions   val captions of its videos; right is the caption's own video, or one with a caption that shares 0.3 of
           the words (IoU)
common     those of them that at least 5 % of the videos answer rightly
left out   the same captions, with all right videos taken out of the index: no answer is right
nonsense   texts of which no index has anything

The fitted rule is measured on captions of videos that it was not fitted to, half of the videos each time. Two rules
need no captions: that of random texts, which an index without captions has, and the earlier one, which compares how
far a score stands out from those of its query over the index. The bare score has no levels.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
from numpy.typing import NDArray

from svb.data.relevance import words_relevance
from svb.retrieve.answer import CONFIDENCES
from svb.retrieve.index import IndexConfig, index
from svb.retrieve.indexing import calibrate
from svb.retrieve.model.source import OpenedSource, open_source
from svb.retrieve.searching.results import Spread, independent_rows
from svb.retrieve.searching.searcher import Searcher
from svb.retrieve.stored.calibration import Calibration, level_of
from svb.train.training_data import positions_of_splits

NONSENSE = """
tax law reform of 1986; quarterly earnings of the bank; the constitution of belgium; quantum physics of black
holes; parish register of 1742; minutes of the annual meeting; terms and conditions of service; the nicene
creed; prime number theorem; interest rates and inflation; genome of the fruit fly; the treaty of westphalia;
invoice number 40217; medieval latin grammar; antitrust litigation; soil erosion statistics; monetary policy
committee; patent for a steam valve; radio spectrum auction; dative plural endings; sovereign debt
restructuring; papal bull of 1493; tensor calculus lecture notes; the gold standard; municipal zoning ordinance"""
COMMON_SHARE = 0.05


@dataclass(frozen=True)
class Answers:
    """The first answers to n queries.

    Attributes:
        features: `(n, 4)`, see `svb.retrieve.stored.calibration.Rule`.
        before: The levels by the earlier rule.
        right: `(n,)`.
    """

    features: NDArray[np.float64]
    before: NDArray[np.str_]
    right: NDArray[np.bool_]


def measure(folder: Path, options: argparse.Namespace) -> tuple[Any, str]:
    rows, figures = list[list[str]](), list[list[str]]()
    for number, run in enumerate(str(options.runs).split(",")):
        name, held, told = measure_run(Path(run), folder / str(number))
        rows += [[name, *row] for row in held]
        figures.append([name, *told])
    return {"levels": rows, "figures": figures}, "\n\n".join(
        [
            "Share of the first answers that have a level, and which share of those is right, percent:",
            shared.table(["index", "queries", "", "rule", *CONFIDENCES], rows),
            "AUC on captions, of captions against both wrong answers and those left out, and calibration error:",
            shared.table(["index", "AUC", "of the score", "with left out", "of the score", "error"], figures),
        ]
    )


def measure_run(run: Path, out: Path) -> tuple[str, list[list[str]], list[str]]:
    """Return the name of an index, the rows of its levels, and its figures."""
    opened = open_source(run, device=torch.device("cpu"))
    searcher = Searcher(index(run, out, IndexConfig(sidecars=False, speech=False)))
    assert opened.captions is not None
    table, rows_of = opened.captions.table, searcher.catalog.live_rows
    positions = positions_of_splits(opened.captions, val_fraction=opened.config.put_aside, quiet=True)
    words = calibrate.known_words(opened, positions["train"])
    held = [position for position in positions["val"] if table.video_ids[position] in rows_of]
    asked = calibrate.choose(held, calibrate.MAX_CAPTIONS)
    is_right = right_videos(opened, searcher, asked)
    texts = [table.captions[position] for position in asked]
    queries = opened.embedder.embed_captions(torch.from_numpy(opened.captions.features[asked]))
    captions = answers_to(searcher, words, texts, queries, is_right)
    left_out = answers_to(searcher, words, texts, queries, is_right, without=is_right)
    nonsense = [text.strip() for text in NONSENSE.replace("\n", " ").split(";")]
    embedded = np.stack([searcher.embed_text(text) for text in nonsense])
    nothing = answers_to(searcher, words, nonsense, embedded, np.zeros((len(nonsense), len(rows_of)), bool))

    own = np.array([rows_of[table.video_ids[position]] for position in asked])
    videos = np.random.default_rng(1).permutation(np.unique(own))
    half = np.isin(own, videos[::2])
    chances, chances_left_out = np.empty(len(asked)), np.empty(len(asked))
    held_answers = calibrate.ask(opened, searcher.catalog, asked, words)
    for fitted in (half, ~half):
        rule = calibrate.fit_first(*held_answers.first(fitted))
        chances[~fitted] = rule.chances(captions.features[~fitted])
        chances_left_out[~fitted] = rule.chances(left_out.features[~fitted])
    rule = calibrate.fit_first(*held_answers.first(half | ~half))
    common = is_right.mean(axis=1) >= COMMON_SHARE
    asked_at_random = np.stack([searcher.embed_text(text) for text in calibrate.random_texts()])
    of_random_texts = calibrate.fit_to_random_texts(searcher.catalog, asked_at_random, len(asked_at_random)).rule
    rows = []
    for kind, answers, of, chosen in (
        ("captions", captions, chances, slice(None)),
        ("common", captions, chances, common),
        ("left out", left_out, chances_left_out, slice(None)),
        ("nonsense", nothing, rule.chances(nothing.features), slice(None)),
    ):
        fitted_levels = np.array([level_of(chance) for chance in of])[chosen]
        by_random = np.array([level_of(chance) for chance in of_random_texts.chances(answers.features[chosen])])
        rules = {"fitted": fitted_levels, "earlier": answers.before[chosen], "random texts": by_random}
        for said, levels in rules.items():
            right = answers.right[chosen]
            rows.append([kind, str(len(right)), said, *(_share(levels == level, right) for level in CONFIDENCES)])
    both = np.concatenate([captions.right, left_out.right])
    scores = [captions.features[:, 0], left_out.features[:, 0]]
    return (
        f"{len(rows_of):,} videos of {run.name}",
        rows,
        [
            str(calibrate.auc(chances, captions.right)),
            str(calibrate.auc(scores[0], captions.right)),
            str(calibrate.auc(np.concatenate([chances, chances_left_out]), both)),
            str(calibrate.auc(np.concatenate(scores), both)),
            str(calibrate.calibration_error(chances, captions.right)),
        ],
    )


def right_videos(opened: OpenedSource, searcher: Searcher, asked: list[int]) -> NDArray[np.bool_]:
    """Return `(n, V)`, the videos that answer each caption rightly."""
    assert opened.captions is not None
    table, rows_of = opened.captions.table, searcher.catalog.live_rows
    held = [position for position, video_id in enumerate(table.video_ids) if video_id in rows_of]
    rows, columns = np.unique([rows_of[table.video_ids[position]] for position in held], return_inverse=True)
    relevance = words_relevance([table.captions[position] for position in held], columns, len(rows))
    place = {position: row for row, position in enumerate(held)}
    right = np.zeros((len(asked), searcher.catalog.num_videos), bool)
    for number, position in enumerate(asked):
        one = slice(place[position], place[position] + 1)
        right[number, rows] = relevance.block(one, slice(0, len(rows)))[0] >= calibrate.RIGHT_IOU
        right[number, rows_of[table.video_ids[position]]] = True
    return right


def answers_to(
    searcher: Searcher,
    words: Calibration,
    texts: list[str],
    queries: NDArray[np.float32],
    is_right: NDArray[np.bool_],
    without: NDArray[np.bool_] | None = None,
) -> Answers:
    """Return the first answers, by moments, to `(n, D)` queries; `without` takes `(n, V)` videos out."""
    catalog, background = searcher.catalog, searcher.vectors.background("moment")
    scores = best_scores(searcher, queries)
    if without is not None:
        scores[without] = -1.0
    best = scores.argmax(axis=1)
    firsts, of_windows = scores.max(axis=1), queries @ background.T
    number = independent_rows(catalog, "moment")
    known = [words.query([text], [query]) for text, query in zip(texts, queries, strict=True)]
    return Answers(
        np.c_[firsts, known, np.zeros(len(firsts))],
        np.array([Spread.of(of, number).confidence(s) for of, s in zip(of_windows, firsts.tolist(), strict=True)]),
        is_right[np.arange(len(best)), best] if without is None else np.zeros(len(best), bool),
    )


def best_scores(searcher: Searcher, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `(n, V)`, the scores of all videos by their best windows."""
    counts = searcher.catalog.moment_counts
    windows = searcher.vectors.embeddings(np.arange(counts.sum()), by="moment")
    scores: NDArray[np.float32] = np.maximum.reduceat(queries @ windows.T, np.cumsum(counts) - counts, axis=1)
    return scores


def _share(chosen: NDArray[np.bool_], right: NDArray[np.bool_]) -> str:
    if not chosen.any():
        return "0"
    return f"{100 * chosen.mean():.0f}, {100 * right[chosen].mean():.0f} right"


if __name__ == "__main__":
    shared.run_benchmark(
        __doc__,
        measure,
        runs=(None, "runs with their stores and captions, with commas between"),
    )
