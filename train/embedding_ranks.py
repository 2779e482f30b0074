"""Ranks straight from embeddings, on their device and in chunks: the matrix of similarities is never whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from svb.train.retrieval_metrics import RanksOfBoth, t2v_ranks

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
        videos: `(V, D)`, likewise, on the same device; each has a caption.
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
    num_equal = num_better.index_add(0, own_video, -is_best)  # a video's own captions are no candidates
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
