"""The usual way to feed a trainer: a PyTorch DataLoader, an HDF5 dataset a video, padding in `collate_fn`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from svb.train.training_data import SplitData

Item = tuple[torch.Tensor, torch.Tensor, int]


@dataclass(frozen=True)
class Batch:
    """B captions and their videos.

    Attributes:
        frame_features: `(B, T, F)` float32.
        frame_mask: `(B, T)` bool.
        caption_features: `(B, F)` float32.
        rows: `(B,)` of the videos.
    """

    frame_features: torch.Tensor
    frame_mask: torch.Tensor
    caption_features: torch.Tensor
    rows: torch.Tensor


class VideoDataset(Dataset[Item]):
    """A video an item: its frames from an HDF5 dataset of its own, and one of its captions from memory.

    Args:
        path: Of the HDF5 file.
        split: Whose captions are drawn.
        keep_open: Open the file once; otherwise for every video.
    """

    def __init__(self, path: Path, split: SplitData, *, keep_open: bool) -> None:
        self.path, self.keep_open = path, keep_open
        self.file: h5py.File | None = None
        self.video_ids = split.frames.video_ids
        self.caption_features = split.caption_features.numpy()
        rows = np.arange(split.num_videos + 1)
        self.begins: NDArray[np.int64] = np.searchsorted(split.caption_video.numpy(), rows)
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.video_ids)

    def __getitem__(self, row: int) -> Item:
        with self._opened() as file:
            frames = torch.from_numpy(file[self.video_ids[row]][()]).float()  # (T, F)
        caption = self.random.integers(self.begins[row], self.begins[row + 1])
        return frames, torch.from_numpy(self.caption_features[caption]).float(), row

    def _opened(self) -> AbstractContextManager[h5py.File]:
        if not self.keep_open:
            opened: AbstractContextManager[h5py.File] = h5py.File(self.path, "r")
            return opened
        if self.file is None:  # in the process that reads: a handle does not survive a fork
            self.file = h5py.File(self.path, "r")
        return nullcontext(self.file)


def make_loader(
    path: Path, split: SplitData, batch_size: int, *, workers: int, keep_open: bool
) -> DataLoader[Item]:
    """Return a loader of `Batch`es in a new random order each time."""
    dataset = VideoDataset(path, split, keep_open=keep_open)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, collate_fn=collate)


def collate(items: list[Item]) -> Batch:
    """Pad the videos of a batch to the longest and stack them."""
    frames = [frames for frames, _, _ in items]
    lengths = torch.tensor([len(video) for video in frames])
    padded = pad_sequence(frames, batch_first=True)  # (B, T, F)
    frame_mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
    rows = torch.tensor([row for _, _, row in items])
    return Batch(padded, frame_mask, torch.stack([caption for _, caption, _ in items]), rows)
