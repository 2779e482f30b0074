"""Retrieval metrics by ranks. Ties count by their average, and NaN is refused.

A rank is 1 plus the number of better candidates plus half the number of equal ones. A collapsed model, whose
similarities are all equal, therefore scores chance, and the order of the rows changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svb.errors import InputError

RECALL_AT = (1, 5, 10, 50)
TIE_RULE = "ties averaged"
V2T_CONVENTIONS = {
    "set": "a video's captions are one candidate, as good as the best of them; ranked among the videos' sets",
    "best": "a video's best own caption, ranked among all other videos' captions",
}


def t2v_ranks(similarity: NDArray[np.floating], caption_video: NDArray[np.integer]) -> NDArray[np.float64]:
    """Rank each caption's own video among all videos.

    Args:
        similarity: `(C, V)`, finite.
        caption_video: `(C,)` column of each caption's own video.

    Returns:
        `(C,)` ranks from 1; averaged ties give halves.

    Raises:
        InputError: A similarity is NaN or infinite, or the shapes disagree.
    """
    _check(similarity, caption_video)
    own = similarity[np.arange(len(caption_video)), caption_video][:, None]
    better = (similarity > own).sum(axis=1)
    equal = (similarity == own).sum(axis=1) - 1
    ranks: NDArray[np.float64] = 1.0 + better + equal / 2
    return ranks


def v2t_ranks(
    similarity: NDArray[np.floating], caption_video: NDArray[np.integer], convention: str = "set"
) -> NDArray[np.float64]:
    """Rank each video's own captions by one of `V2T_CONVENTIONS`.

    Args:
        similarity: `(C, V)`, finite; every video has at least one caption.
        caption_video: `(C,)` column of each caption's own video.
        convention: `set` or `best`.

    Returns:
        `(V,)` ranks from 1.

    Raises:
        InputError: As `t2v_ranks`, or a video has no caption, or the convention is unknown.
    """
    _check(similarity, caption_video)
    num_videos = similarity.shape[1]
    missing = np.setdiff1d(np.arange(num_videos), caption_video)
    if missing.size:
        raise InputError(f"{missing.size} videos have no caption, first column {missing[0]} - leave them out")
    if convention == "set":
        sets = np.full((num_videos, num_videos), -np.inf, similarity.dtype)  # (sets of captions, videos)
        np.maximum.at(sets, caption_video, similarity)
        return t2v_ranks(np.ascontiguousarray(sets.T), np.arange(num_videos))
    if convention != "best":
        raise InputError(f"unknown v2t convention {convention!r} - expected {' or '.join(V2T_CONVENTIONS)}")
    ranks = np.empty(num_videos)
    for video in range(num_videos):
        is_own = caption_video == video
        others, best = similarity[~is_own, video], similarity[is_own, video].max()
        ranks[video] = 1.0 + (others > best).sum() + (others == best).sum() / 2
    return ranks


def summarise(ranks: NDArray[np.float64]) -> dict[str, float]:
    """Return R@1, R@5, R@10 and R@50 in percent, MedR and MeanR of `(Q,)` ranks."""
    recalls = {f"R@{k}": float(100 * (ranks <= k).mean()) for k in RECALL_AT}
    return {**recalls, "MedR": float(np.median(ranks)), "MeanR": float(ranks.mean())}


def retrieval_metrics(
    similarity: NDArray[np.floating], caption_video: NDArray[np.integer], convention: str = "set"
) -> dict[str, float]:
    """Return t2v and v2t metrics under keys such as `t2v/R@1`; arguments and errors as `v2t_ranks`."""
    return ranks_metrics(t2v_ranks(similarity, caption_video), v2t_ranks(similarity, caption_video, convention))


def ranks_metrics(t2v: NDArray[np.float64], v2t: NDArray[np.float64]) -> dict[str, float]:
    """Return the `summarise` of both directions under keys such as `t2v/R@1`."""
    return {
        f"{direction}/{name}": value
        for direction, ranks in (("t2v", t2v), ("v2t", v2t))
        for name, value in summarise(ranks).items()
    }


def recall_sum(metrics: dict[str, float]) -> float:
    """Return the sum of R@1, R@5 and R@10 in both directions, which chooses the best checkpoint."""
    return sum(metrics[f"{direction}/R@{k}"] for direction in ("t2v", "v2t") for k in (1, 5, 10))


def require_finite(
    similarity: NDArray[np.floating], caption_ids: Sequence[object], video_ids: Sequence[object]
) -> None:
    """Refuse `(C, V)` similarities that are not finite.

    Args:
        similarity: `(C, V)`.
        caption_ids: C names of its rows.
        video_ids: V names of its columns.

    Raises:
        InputError: A value is NaN or infinite; the error names the first such column, and the first such row in it.
    """
    is_bad = ~np.isfinite(similarity)
    if not is_bad.any():
        return
    bad_videos, bad_captions = is_bad.any(axis=0), is_bad.any(axis=1)
    video = int(bad_videos.argmax())
    caption = int(is_bad[:, video].argmax())
    if bad_videos.all() and bad_captions.all():
        do_next = "the model has diverged: train again with a lower learning rate"
    elif is_bad[:, video].all():
        do_next = "the video's embedding is not finite: extract it again, or leave its captions out of the table"
    elif is_bad[caption].all():
        do_next = "the caption's embedding is not finite: encode the captions again, or leave it out of the table"
    else:
        do_next = "expected only finite numbers"
    raise InputError(
        f"similarity of video {video_ids[video]!r} and caption {caption_ids[caption]!r} is "
        f"{similarity[caption, video]}, and such values are in {bad_videos.sum()} of {len(bad_videos)} videos and "
        f"{bad_captions.sum()} of {len(bad_captions)} captions - {do_next}"
    )


def _check(similarity: NDArray[np.floating], caption_video: Sequence[int] | NDArray[np.integer]) -> None:
    if similarity.ndim != 2 or similarity.shape[0] != len(caption_video) or not len(caption_video):
        raise InputError(
            f"similarity is {similarity.shape} for {len(caption_video)} captions - expected (captions, videos)"
        )
    require_finite(similarity, range(similarity.shape[0]), range(similarity.shape[1]))
