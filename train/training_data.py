"""What training reads, loaded once: frame features, caption features, and which caption has which video."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.caption_features import CaptionFeatures
from svb.data.feature_store import FeatureStore
from svb.data.rows import FrameFeatures
from svb.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameTable:
    """Frame features of V videos as tensors, from which `gather` makes batches.

    Attributes:
        video_ids: V ids.
        features: `(N, F)` float16.
        begins: `(V,)` int64, the first row of each video.
        lengths: `(V,)` int64, the number of its rows, at least one.
        max_frames: Longer videos are thinned evenly to this many frames.
    """

    video_ids: list[str]
    features: torch.Tensor
    begins: torch.Tensor
    lengths: torch.Tensor
    max_frames: int

    @classmethod
    def of(cls, loaded: FrameFeatures, max_frames: int, device: torch.device) -> FrameTable:
        features, offsets = torch.from_numpy(loaded.features), torch.from_numpy(loaded.offsets).to(device)
        return cls(loaded.video_ids, features.to(device), offsets[:-1], offsets.diff(), max_frames)

    @cached_property
    def num_frames(self) -> NDArray[np.int64]:
        """`(V,)` frames of each video that `gather` takes, on the host, which then need not ask a GPU for them."""
        counts: NDArray[np.int64] = self.lengths.clamp_max(self.max_frames).cpu().numpy()
        return counts

    def longest(self, rows: NDArray[np.int64]) -> int:
        """Return T of some videos: the frames of the longest."""
        return int(self.num_frames[rows].max())

    def real_places(self, rows: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
        """Return the `(N,)` places of the real frames of some videos in their flattened `(B, T)` mask."""
        return np.flatnonzero(np.arange(longest)[None, :] < self.num_frames[rows][:, None])

    def mask(self, rows: torch.Tensor, longest: int | None = None) -> torch.Tensor:
        """Return `(B, T)` bool, True on a real frame; arguments as `gather`."""
        lengths = self.lengths[rows].clamp_max(self.max_frames)
        step = torch.arange(int(lengths.max()) if longest is None else longest, device=rows.device)
        return step[None, :] < lengths[:, None]

    def gather(self, rows: torch.Tensor, longest: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the frame features of some videos.

        Args:
            rows: `(B,)` rows of the videos.
            longest: T; by default that of the longest of them, which the host must ask the device for.

        Returns:
            `(B, T, F)` float32 and `(B, T)` bool, True on a real frame.
        """
        begin, length = self.begins[rows], self.lengths[rows]
        frame_mask = self.mask(rows, longest)
        kept, step = frame_mask.sum(dim=1), torch.arange(frame_mask.shape[1], device=rows.device)
        # The middle of each of `kept` equal parts, or all frames in order if none is left out.
        position = (2 * step[None, :] + 1) * length[:, None] // (2 * kept[:, None])
        index = begin[:, None] + torch.minimum(position, length[:, None] - 1)
        frames = self.features[index.flatten()].view(*index.shape, -1).float()
        return frames * frame_mask[..., None], frame_mask


@dataclass(frozen=True)
class SplitData:
    """One split: the videos that have both features and captions.

    Attributes:
        frames: Features of V videos.
        caption_features: `(C, F)` float16, captions of one video next to each other.
        caption_video: `(C,)` int64, the row of each caption's video, ascending.
        captions: C sentences.
        caption_ids: C ids.
    """

    frames: FrameTable
    caption_features: torch.Tensor
    caption_video: torch.Tensor
    captions: list[str]
    caption_ids: list[str]

    @property
    def num_videos(self) -> int:
        return len(self.frames.video_ids)

    @cached_property
    def video_of(self) -> NDArray[np.int64]:
        """`caption_video` on the host."""
        rows: NDArray[np.int64] = self.caption_video.cpu().numpy()
        return rows


def load_split(
    store: FeatureStore,
    backbone: str,
    captions: CaptionFeatures,
    positions: Sequence[int],
    *,
    max_frames: int,
    device: torch.device,
) -> SplitData:
    """Load those captions at `positions` of the table whose videos are in the store, and these videos.

    Raises:
        InputError: None of the captions' videos has features.
    """
    usable = set(store.video_ids)
    held = [position for position in positions if captions.table.video_ids[position] in usable]
    if not held:
        raise InputError(
            f"no caption belongs to a video in {store.path} - the video_ids of the caption table must be those "
            f"of the store, such as {next(iter(store.records), 'none: it is empty')!r}"
        )
    video_ids = sorted({captions.table.video_ids[position] for position in held})
    row_of = {video_id: row for row, video_id in enumerate(video_ids)}
    held.sort(key=lambda position: row_of[captions.table.video_ids[position]])
    caption_video = [row_of[captions.table.video_ids[position]] for position in held]
    return SplitData(
        FrameTable.of(store.load(backbone, video_ids), max_frames, device),
        torch.from_numpy(captions.features[held]).to(device),
        torch.tensor(caption_video, device=device),
        [captions.table.captions[position] for position in held],
        [captions.table.caption_ids[position] for position in held],
    )


def positions_of_splits(
    captions: CaptionFeatures, *, val_fraction: float, quiet: bool = False
) -> dict[str, list[int]]:
    """Return the positions of each split's captions; a missing val split is held out from train.

    Whole videos are held out, the same ones for every seed of a training, so that seeds can be compared. The log
    says so unless `quiet`.
    """
    splits = np.array(captions.table.splits)
    positions = {split: np.flatnonzero(splits == split).tolist() for split in ("train", "val", "test")}
    if positions["val"] or not positions["train"] or not val_fraction:
        return positions
    video_ids = sorted({captions.table.video_ids[position] for position in positions["train"]})
    num_val = round(val_fraction * len(video_ids))
    chosen = np.random.default_rng(1).permutation(len(video_ids))[:num_val]
    val_ids = {video_ids[video] for video in chosen}
    train = positions["train"]
    positions["val"] = [position for position in train if captions.table.video_ids[position] in val_ids]
    positions["train"] = [position for position in train if captions.table.video_ids[position] not in val_ids]
    if not quiet:
        logger.info(
            f"the captions have no val split: holding out {num_val} of {len(video_ids)} training videos as val"
        )
    return positions


def draw_captions(captions: CaptionFeatures, positions: Sequence[int], number: int, seed: int) -> list[int]:
    """Draw at most `number` captions of each video from those at `positions`."""
    taken: Counter[str] = Counter()
    drawn = []
    for choice in np.random.default_rng([seed, 3]).permutation(len(positions)).tolist():
        video_id = captions.table.video_ids[positions[choice]]
        taken[video_id] += 1
        if taken[video_id] <= number:
            drawn.append(positions[choice])
    return sorted(drawn)


def epoch_batches(
    caption_video: NDArray[np.int64], *, caption_sampling: str, batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the captions of every batch of an epoch, a pure function of its arguments.

    Args:
        caption_video: `(C,)` ascending video rows.
        caption_sampling: `one` draws a caption of each video, `all` takes every caption.
        batch_size: Largest batch size (exceeded by one if a caption would be left alone); sizes differ by at most
            one.
        seed: The seed of the run.
        epoch: The epoch, from 0.
    """
    random = np.random.default_rng([seed, 0, epoch])
    if caption_sampling == "one":
        first = np.flatnonzero(np.diff(caption_video, prepend=-1))
        counts = np.diff(first, append=len(caption_video))
        chosen = first + (random.random(len(first)) * counts).astype(np.int64)
    else:
        chosen = np.arange(len(caption_video))
    chosen = random.permutation(chosen)
    # A batch needs two captions: a single one has no negative, and no other video from which to rebuild it.
    num_batches = max(1, min(-(-len(chosen) // batch_size), len(chosen) // 2))
    return np.array_split(chosen, num_batches)
