"""Retrieval metrics by ranks. Ties count by their average, and NaN is refused.

A rank is 1 plus the number of better candidates plus half the number of equal ones. A collapsed model, whose
similarities are all equal, therefore scores chance, and the order of the rows changes no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from svb.errors import InputError

RECALL_AT = (1, 5, 10, 50)
# Similarities that are compared at once.
BLOCK_SIZE = 2**22
TIE_RULE = "ties averaged"
RanksOfBoth = tuple[NDArray[np.float64], NDArray[np.float64]]
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
    ranks = np.empty(len(similarity))
    for rows in _blocks(similarity):
        block = similarity[rows]
        own = block[np.arange(len(block)), caption_video[rows]][:, None]
        better, equal = (block > own).sum(axis=1), (block == own).sum(axis=1) - 1
        ranks[rows] = 1.0 + better + equal / 2
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
        InputError: A case of `t2v_ranks`, or a video has no caption, or the convention is unknown.
    """
    _check(similarity, caption_video)
    num_videos = similarity.shape[1]
    missing = np.setdiff1d(np.arange(num_videos), caption_video)
    if missing.size:
        raise InputError(f"{missing.size} videos have no caption, first column {missing[0]} - leave them out")
    # The captions of a video next to each other; `firsts` is where each video begins.
    order = np.argsort(caption_video, kind="stable")
    firsts = np.searchsorted(caption_video, np.arange(num_videos), sorter=order)
    if convention == "set":
        sets = np.empty((num_videos, num_videos), similarity.dtype)  # (sets of captions, videos)
        edges = [*firsts.tolist(), len(order)]
        step = max(1, BLOCK_SIZE // len(order))  # a video's captions have C similarities on average
        for begin in range(0, num_videos, step):
            end = min(begin + step, num_videos)
            block = similarity[order[edges[begin] : edges[end]]]
            sets[begin:end] = np.maximum.reduceat(block, firsts[begin:end] - edges[begin], axis=0)
        return t2v_ranks(np.ascontiguousarray(sets.T), np.arange(num_videos))
    if convention != "best":
        raise InputError(f"unknown v2t convention {convention!r} - expected {' or '.join(V2T_CONVENTIONS)}")
    own = similarity[np.arange(len(caption_video)), caption_video]
    best = np.maximum.reduceat(own[order], firsts)
    better = np.zeros(num_videos, np.int64)
    # A video's own captions are not candidates, and the best of them are among the equal ones.
    equal = -np.add.reduceat((own == best[caption_video])[order].astype(np.int64), firsts)
    for rows in _blocks(similarity):
        better += (similarity[rows] > best).sum(axis=0)
        equal += (similarity[rows] == best).sum(axis=0)
    ranks: NDArray[np.float64] = 1.0 + better + equal / 2
    return ranks


def _blocks(similarity: NDArray[np.floating]) -> Iterator[slice]:
    """Yield slices of rows whose comparisons take a few megabytes, however large the matrix is."""
    step = max(1, BLOCK_SIZE // max(1, similarity.shape[1]))
    for begin in range(0, len(similarity), step):
        yield slice(begin, begin + step)


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


def require_finite_similarities(
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
    if all(np.isfinite(similarity[rows]).all() for rows in _blocks(similarity)):
        return
    is_bad = ~np.isfinite(similarity)
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
    require_finite_similarities(similarity, range(similarity.shape[0]), range(similarity.shape[1]))


# --- the same straight from embeddings, on their device: the matrix of similarities is never whole

# Similarities that are computed at once: 64 MB, and as much again to compare them.
CHUNK_SIZE = 2**24


@torch.inference_mode()
def embedding_ranks(
    captions: torch.Tensor, videos: torch.Tensor, caption_video: NDArray[np.int64], convention: str = "set"
) -> RanksOfBoth:
    """Return the ranks of t2v and v2t as `t2v_ranks` and `v2t_ranks` of the similarities give them.

    `set` keeps `(V, V)` numbers; 10,000 videos take 400 MB, whatever the number of captions.

    Args:
        captions: `(C, D)` float32, L2-normalised and finite.
        videos: `(V, D)` float32, L2-normalised and finite, on the same device; each has a caption.
        caption_video: `(C,)` row of each caption's own video.
        convention: One of `V2T_CONVENTIONS`.
    """
    own_video = torch.from_numpy(caption_video).to(videos.device)
    t2v: list[torch.Tensor] = []
    own = torch.empty(len(captions), device=videos.device)
    sets = videos.new_full((len(videos), len(videos)), -torch.inf) if convention == "set" else None
    for rows, block in _chunks(captions, videos):
        own[rows] = block.gather(1, own_video[rows, None])[:, 0]
        better, equal = _counts(block, own[rows, None], dim=1)
        t2v.append(1.0 + better.double() + (equal - 1).double() / 2)
        if sets is not None:
            sets.scatter_reduce_(0, own_video[rows, None].expand_as(block), block, "amax")
    if sets is not None:
        v2t = t2v_ranks(np.ascontiguousarray(sets.T.cpu().numpy()), np.arange(len(videos)))
        return torch.cat(t2v).cpu().numpy(), v2t
    best = videos.new_full((len(videos),), -torch.inf).scatter_reduce_(0, own_video, own, "amax")
    is_best = (own == best[own_video]).long()
    num_better = torch.zeros(len(videos), dtype=torch.int64, device=videos.device)
    num_equal = num_better.index_add(0, own_video, -is_best)  # a video's own captions are not candidates
    for _, block in _chunks(captions, videos):
        better, equal = _counts(block, best, dim=0)
        num_better, num_equal = num_better + better, num_equal + equal
    return torch.cat(t2v).cpu().numpy(), (1.0 + num_better.double() + num_equal.double() / 2).cpu().numpy()


def _chunks(captions: torch.Tensor, videos: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of captions with their `(rows, V)` similarities, with the same bits each time."""
    step = max(1, CHUNK_SIZE // len(videos))
    for begin in range(0, len(captions), step):
        rows = slice(begin, begin + step)
        yield rows, captions[rows] @ videos.T


def _counts(block: torch.Tensor, than: torch.Tensor, *, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (block > than).sum(dim=dim), (block == than).sum(dim=dim)
