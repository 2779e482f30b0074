"""Similarities normalised against hubs, which are candidates that are near to everything.

Both methods change the candidate that a query finds, not the model. QB-Norm (Bogolin et al., CVPR 2022) also uses
the training split, and answers one query at a time. The dual softmax (Cheng et al., 2021) needs all queries of
the split at once, which a search never has. So `svb evaluate` prints their numbers beside the plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from svb.errors import UsageError
from svb.train.retrieval_metrics import (
    RanksOfBoth,
    ranks_metrics,
    require_finite_similarities,
    t2v_ranks,
    v2t_ranks,
)

METHODS = {
    "qb-norm": "QB-Norm, dynamic inverted softmax (Bogolin et al. 2022)",
    "dual-softmax": "dual softmax (Cheng et al. 2021)",
}
NEEDS_BANK = frozenset({"qb-norm"})
NEEDS_ALL_QUERIES = frozenset({"dual-softmax"})
# The inverse temperature that the authors publish with their code for nearly all of their models.
QB_NORM_SCALE = 20.0
# The authors use temperature 1 on logits, which are cosines multiplied by the model's learned scale. A zero-shot
# model has learned none; this is CLIP's scale, as in their work.
CLIP_LOGIT_SCALE = 100.0
# Queries of a bank to compare at once, so that 180,000 captions against a split need not fit in memory.
BLOCK = 1024


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a split.

    Attributes:
        captions: `(C, D)` float32, L2-normalised.
        caption_ids: C ids.
        videos: `(V, D)` float32, L2-normalised.
        video_ids: V ids.
    """

    captions: NDArray[np.float32]
    caption_ids: list[str]
    videos: NDArray[np.float32]
    video_ids: list[str]

    def similarity(self) -> NDArray[np.float32]:
        """Return `(C, V)`.

        Raises:
            InputError: A value is not finite; the error names the first bad video.
        """
        similarity: NDArray[np.float32] = self.captions @ self.videos.T
        require_finite_similarities(similarity, self.caption_ids, self.video_ids)
        return similarity


@dataclass(frozen=True)
class Normalised:
    """Metrics of normalised similarities, and what normalised them.

    Attributes:
        description: The method and its paper.
        needs_all_queries: The method uses all queries of the split at once, which no search can.
        scale: The inverse temperature.
        scale_source: Where the scale comes from, which is never the measured split.
        bank_split: The split whose captions (t2v) and videos (v2t) were the query bank; empty without a bank.
        bank_captions: Number of captions in the bank.
        bank_videos: Number of videos in the bank.
        metrics: The metrics, named as in `Evaluation`.
    """

    description: str
    needs_all_queries: bool
    scale: float
    scale_source: str
    bank_split: str
    bank_captions: int
    bank_videos: int
    metrics: dict[str, float]


def check_methods(methods: Sequence[str], split: str) -> None:
    """Refuse methods that are unknown or cannot measure a split.

    Raises:
        UsageError: There is one.
    """
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"unknown method {method!r} to normalise by - expected {' or '.join(METHODS)}")
        if method in NEEDS_BANK and split == "train":
            raise UsageError(
                f"{method} normalises with the train split, so it cannot measure train itself - measure another "
                "split, or leave out --normalise"
            )


def scale_of(method: str, weights: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """Return a method's inverse temperature for a model of these weights, and where it comes from."""
    if method == "qb-norm":
        return QB_NORM_SCALE, "as its authors published"
    if "log_logit_scale" in weights:
        return math.exp(float(weights["log_logit_scale"])), "the run's own logit_scale"
    return CLIP_LOGIT_SCALE, "CLIP's logit_scale"


def describe_normalised(
    method: str, scale: float, scale_source: str, bank: Embeddings | None, metrics: dict[str, float]
) -> Normalised:
    """Return the metrics that a method gave, with what it used."""
    bank = bank if method in NEEDS_BANK else None
    return Normalised(
        description=METHODS[method],
        needs_all_queries=method in NEEDS_ALL_QUERIES,
        scale=scale,
        scale_source=scale_source,
        bank_split="train" if bank else "",
        bank_captions=len(bank.captions) if bank else 0,
        bank_videos=len(bank.videos) if bank else 0,
        metrics=metrics,
    )


def measure_normalised(
    method: str,
    split: Embeddings,
    bank: Embeddings | None,
    weights: Mapping[str, torch.Tensor],
    caption_video: NDArray[np.int64],
    v2t_convention: str,
) -> tuple[RanksOfBoth, Normalised]:
    """Return the ranks of a split by one of `METHODS`, and their metrics.

    Args:
        method: `qb-norm` or `dual-softmax`.
        split: Queries and candidates.
        bank: The training split, which only qb-norm needs.
        weights: The model's, which may hold its scale.
        caption_video: `(C,)` column of each caption's own video.
        v2t_convention: One of `V2T_CONVENTIONS`.

    Raises:
        InputError: A value is not finite; the error names the first bad video.
    """
    scale, scale_source = scale_of(method, weights)
    t2v, v2t = normalised_scores(method, split, bank, scale)
    ranks = t2v_ranks(t2v, caption_video), v2t_ranks(v2t, caption_video, v2t_convention)
    return ranks, describe_normalised(method, scale, scale_source, bank, ranks_metrics(*ranks))


def normalised_scores(
    method: str, split: Embeddings, bank: Embeddings | None, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the `(C, V)` scores of t2v and of v2t by one of `METHODS`.

    Args:
        method: `qb-norm` or `dual-softmax`.
        split: Queries and candidates.
        bank: The training split, which only qb-norm needs: its captions are the bank of t2v, its videos that of
            v2t.
        scale: The inverse temperature.

    Raises:
        InputError: A value is not finite; the error names the first bad video.
    """
    similarity = split.similarity()
    if method == "dual-softmax":
        return dual_softmax(similarity, scale), dual_softmax(similarity.T, scale).T
    assert method == "qb-norm" and bank is not None
    captions_bank = query_bank(_blocks_of_captions(split, bank), scale)
    videos_bank = query_bank(_blocks_of_videos(split, bank), scale)
    return qb_norm(similarity, captions_bank), qb_norm(similarity.T, videos_bank).T


@dataclass(frozen=True)
class QueryBank:
    """The similarities of a bank's queries and G candidates, summed up.

    Attributes:
        log_sums: `(G,)` float64, log of the sum over the bank of `exp(scale * similarity)`.
        is_hub: `(G,)` bool, True on the best candidate of at least one query of the bank (the paper's activation
            set, k = 1), and on all equally good ones.
        scale: The inverse temperature.
    """

    log_sums: NDArray[np.float64]
    is_hub: NDArray[np.bool_]
    scale: float


def query_bank(blocks: Iterable[NDArray[np.floating]], scale: float) -> QueryBank:
    """Sum up a bank, one block of its queries at a time.

    Args:
        blocks: `(B, G)` similarities of bank queries and candidates, finite.
        scale: The inverse temperature.
    """
    log_sums, is_hub = np.array(-np.inf), np.array(False)
    for block in blocks:
        logits = scale * block.astype(np.float64)
        log_sums = np.logaddexp(log_sums, _log_sum_exp(logits, axis=0)[0])
        is_hub = is_hub | (block == block.max(axis=1, keepdims=True)).any(axis=0)
    return QueryBank(log_sums, is_hub, scale)


def qb_norm(similarity: NDArray[np.floating], bank: QueryBank) -> NDArray[np.float64]:
    """Normalise by the dynamic inverted softmax, in log space.

    If the best candidate of a query is a hub of the bank, each candidate's score is divided by its sum over the
    bank: `exp(scale * similarity) / sum`. The logarithm gives the same order and does not overflow. Other queries
    keep their order. Scores are comparable only within a row, which is enough for ranks.

    Args:
        similarity: `(Q, G)`, rows are queries; transpose for v2t.
        bank: A bank over the same G candidates.

    Returns:
        `(Q, G)` scores.
    """
    logits = bank.scale * similarity.astype(np.float64)
    finds_hub = ((similarity == similarity.max(axis=1, keepdims=True)) & bank.is_hub).any(axis=1)
    return np.where(finds_hub[:, None], logits - bank.log_sums, logits)


def dual_softmax(similarity: NDArray[np.floating], scale: float) -> NDArray[np.float64]:
    """Multiply each similarity by its share among all queries, the softmax over rows of `scale * similarity`.

    Args:
        similarity: `(Q, G)`, rows are queries; transpose for v2t.
        scale: The inverse temperature.

    Returns:
        `(Q, G)` scores. A share is at least `exp(-2 * scale) / Q` for cosines, so float64 holds it.
    """
    cosines = similarity.astype(np.float64)
    logits = scale * cosines
    shares: NDArray[np.float64] = np.exp(logits - _log_sum_exp(logits, axis=0))
    return cosines * shares


def _blocks_of_captions(split: Embeddings, bank: Embeddings) -> Iterator[NDArray[np.float32]]:
    for begin in range(0, len(bank.captions), BLOCK):
        rows = slice(begin, begin + BLOCK)
        queries = Embeddings(bank.captions[rows], bank.caption_ids[rows], split.videos, split.video_ids)
        yield queries.similarity()


def _blocks_of_videos(split: Embeddings, bank: Embeddings) -> Iterator[NDArray[np.float32]]:
    for begin in range(0, len(bank.videos), BLOCK):
        rows = slice(begin, begin + BLOCK)
        queries = Embeddings(split.captions, split.caption_ids, bank.videos[rows], bank.video_ids[rows])
        yield queries.similarity().T


def _log_sum_exp(logits: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    highest = logits.max(axis=axis, keepdims=True)
    log_sum: NDArray[np.float64] = highest + np.log(np.exp(logits - highest).sum(axis=axis, keepdims=True))
    return log_sum
