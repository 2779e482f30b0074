"""Batches of one fixed shape, packed across videos.

A row comes out bitwise the same whatever its neighbours in a batch of the same shape, so every batch is
run full and the last one padded: a resumed run repeats to the byte, and short videos cost no more than
long ones.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.rows import VideoRows
from svb.device import is_out_of_memory
from svb.errors import DeviceError
from svb.extract.backbones.backbone import Backbone, RunningBatch
from svb.extract.backbones.export import one_line

logger = logging.getLogger(__name__)

# If memory runs out, ONNX Runtime raises a MemoryError and torch a RuntimeError.
_MAYBE_OUT_OF_MEMORY = (RuntimeError, MemoryError)

Made = TypeVar("Made")


@dataclass
class _OpenVideo:
    """A video whose rows are still coming: its rows so far, and for a clip backbone its latest frames."""

    times_seconds: list[float] = field(default_factory=list)
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    latest: deque[tuple[torch.Tensor, float]] = field(default_factory=deque)
    since_window: int = 0


@dataclass
class _StartedBatch:
    """A batch that was started: whose images it holds, how many run at once, and the run itself."""

    owners: list[_OpenVideo]
    batch: torch.Tensor
    at_once: int
    running: RunningBatch


class Packer:
    """Collects the images of many videos for one backbone and runs it on full batches.

    Up to `ahead` batches are under way while the next is filled: a GPU never waits for one to be copied back,
    and a CPU's cores each have a batch of their own.

    Args:
        batch_size: B, of every batch.
        executor: Runs batches on the CPU's cores; without one the backbone starts them itself.
    """

    def __init__(
        self, backbone: Backbone, batch_size: int, *, executor: Executor | None = None, ahead: int = 1
    ) -> None:
        self.backbone = backbone
        self._batch_size = self._at_once = batch_size
        self._executor, self._ahead = executor, ahead
        self._batch: torch.Tensor | None = None
        self._owners: list[_OpenVideo] = []
        self._running: deque[_StartedBatch] = deque()
        self._open: dict[int, _OpenVideo] = {}

    def add(self, video: int, squares: torch.Tensor, times_seconds: NDArray[np.float64]) -> None:
        """Take the next frames of a video: `(T, 3, S, S)` uint8 and `(T,)`."""
        state = self._open.setdefault(video, _OpenVideo())
        if self.backbone.clip_frames == 1:
            self._push(state, squares, times_seconds.tolist())
            return
        for square, time_seconds in zip(squares, times_seconds.tolist(), strict=True):
            self._add_to_window(state, square, time_seconds)

    def end(self, video: int) -> None:
        """Say that a video has no more frames: this closes a clip backbone's last window.

        Windows follow each other without overlap; the last one ends at the last frame and overlaps the
        one before, and a video shorter than a window repeats its last frame.
        """
        state = self._open[video]
        if state.since_window and state.latest:
            while len(state.latest) < self.backbone.clip_frames:
                state.latest.append((state.latest[-1][0], state.latest[-1][1]))
            self._push_window(state)

    def is_complete(self, video: int) -> bool:
        """Tell whether every image added for a video has been run."""
        state = self._open[video]
        return len(state.rows) == len(state.times_seconds)

    def take(self, video: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return a complete video's `(T, F)` float32 features and `(T,)` times, and forget it."""
        state = self._open.pop(video)
        return np.stack(state.rows), np.array(state.times_seconds, np.float64)

    def forget(self, video: int) -> None:
        """Drop a video that failed; its images still waiting in the batch are run for nothing."""
        self._open.pop(video, None)

    def flush(self) -> None:
        """Run what is waiting, padded to a full batch, and fetch all features."""
        if self._owners:
            self._start()
        self.fetch()

    def fetch(self) -> None:
        """Wait for the batches that are under way."""
        while self._running:
            self._fetch_oldest()

    def fetch_done(self) -> None:
        """Take the features of batches that have ended; cores go on with the others meanwhile."""
        while self._running and self._running[0].running.is_done():
            self._fetch_oldest()

    def _start(self) -> None:
        assert self._batch is not None
        self._running.append(_StartedBatch(self._owners, self._batch, self._at_once, self._begin(self._batch)))
        self._owners, self._batch = [], None
        while len(self._running) > self._ahead:
            self._fetch_oldest()

    def _fetch_oldest(self) -> None:
        oldest = self._running.popleft()
        while True:
            try:
                features = oldest.running.fetch()
                break
            except _MAYBE_OUT_OF_MEMORY as error:
                if not is_out_of_memory(error):
                    raise
                failed = _without_tensors(error)
            # Behind the except block, which would hold what the failed batch had allocated.
            if oldest.at_once == self._at_once:  # else an earlier batch has halved it already
                self._halve(failed)
            oldest.at_once, oldest.running = self._at_once, self._begin(oldest.batch)
        for owner, row in zip(oldest.owners, features[: len(oldest.owners)].numpy(), strict=True):
            owner.rows.append(row.copy())  # a view would keep the batch's pinned memory until the video ends

    def _begin(self, batch: torch.Tensor) -> RunningBatch:
        """Start a batch, whole or in parts that fit; what goes wrong is raised when it is fetched."""
        parts = batch.split(self._at_once)
        if self._executor is not None:
            futures = [self._executor.submit(self._compute, part) for part in parts]
            return _joined([RunningBatch(future.result, future.done) for future in futures])
        try:
            return _joined([self.backbone.start(part) for part in parts])
        except _MAYBE_OUT_OF_MEMORY as error:
            # It waits to be fetched, while other batches want the memory.
            return _raising(_without_tensors(error) if is_out_of_memory(error) else error)

    def _compute(self, part: torch.Tensor) -> torch.Tensor:
        try:
            return self.backbone(part)
        except _MAYBE_OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            failed = _without_tensors(error)
        raise failed

    def _halve(self, error: Exception) -> None:
        """Have batches run in smaller parts from now on."""
        if self._at_once == 1:
            raise DeviceError(
                f"{self.backbone.device} has too little memory for {self.backbone.name} even with one input at a "
                "time - free it, or choose another --device or a smaller backbone"
            ) from error
        self._at_once = max(1, self._at_once // 2)
        _give_cached_memory_back(self.backbone.device)
        logger.info(
            f"{self.backbone.name}: out of memory on {self.backbone.device}, going on with {self._at_once} inputs "
            f"at a time instead of {self._batch_size}; last bits of features may differ"
        )

    def _push(self, state: _OpenVideo, images: torch.Tensor, times_seconds: list[float]) -> None:
        """Put images of one video into batches, each of which is started once it is full."""
        state.times_seconds += times_seconds
        while len(images):
            if self._batch is None:
                self._batch = with_memory(partial(self._empty_batch, images), [self])
            filled = len(self._owners)
            part, images = images[: self._batch_size - filled], images[self._batch_size - filled :]
            self._batch[filled : filled + len(part)] = part
            self._owners += [state] * len(part)
            if len(self._owners) == self._batch_size:
                self._start()

    def _empty_batch(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros((self._batch_size, *images.shape[1:]), dtype=torch.uint8, device=images.device)

    def _add_to_window(self, state: _OpenVideo, square: torch.Tensor, time_seconds: float) -> None:
        if len(state.latest) == self.backbone.clip_frames:
            state.latest.popleft()
        # Not a view of a whole chunk, nor of memory that will be written to again.
        state.latest.append((square.clone(), time_seconds))
        state.since_window += 1
        if state.since_window == self.backbone.clip_frames:
            self._push_window(state)

    def _push_window(self, state: _OpenVideo) -> None:
        clip = torch.stack([square for square, _ in state.latest], dim=1)  # (3, clip_frames, S, S)
        self._push(state, clip[None], [(state.latest[0][1] + state.latest[-1][1]) / 2])
        state.since_window = 0


def _raising(error: Exception) -> RunningBatch:
    def fetch() -> torch.Tensor:
        raise error

    return RunningBatch(fetch, lambda: True)


def _joined(parts: list[RunningBatch]) -> RunningBatch:
    if len(parts) == 1:
        return parts[0]
    return RunningBatch(
        lambda: torch.cat([part.fetch() for part in parts]), lambda: all(part.is_done() for part in parts)
    )


def with_memory(make: Callable[[], Made], packers: Sequence[Packer]) -> Made:
    """Return what `make` returns; if memory runs out, let the batches under way end and call it again.

    Raises:
        DeviceError: There is too little even then.
    """
    try:
        return make()
    except _MAYBE_OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        _without_tensors(error)
    for packer in packers:
        packer.fetch()
    device = packers[0].backbone.device
    _give_cached_memory_back(device)
    try:
        return make()
    except _MAYBE_OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            f"{device} has too little memory for frames that wait for the backbones ({one_line(error)}) - free it, "
            "or choose another --device or a smaller --batch-size"
        ) from error


def _without_tensors(error: Exception) -> Exception:
    """Return an error without its traceback, whose variables would keep their memory."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _give_cached_memory_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def to_rows(features: NDArray[np.float32], times_seconds: NDArray[np.float64]) -> VideoRows | None:
    """Return rows as they are stored, or None if a value is not finite or too large for float16."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = features.astype(np.float16)
    return VideoRows(stored, times_seconds) if np.isfinite(stored).all() else None
