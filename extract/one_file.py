"""The one way from a file to its rows: decoded in a worker process, computed as the rows of a store are.

torch is imported inside the functions: frames alone need none of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svb.data.rows import USABLE
from svb.errors import InputError
from svb.extract.decode.decoder import FrameChunk, VideoProperties
from svb.extract.decode.options import DecodeOptions
from svb.extract.plan import PlannedVideo
from svb.extract.pool.decode_pool import DecodePool
from svb.extract.pool.worker import Finished

if TYPE_CHECKING:
    from svb.extract.backbones.backbone import Backbone

# `(T, F)` float32 features and their `(T,)` times in seconds.
Rows = tuple[NDArray[np.float32], NDArray[np.float64]]


def decode_files(
    files: Sequence[Path], options: DecodeOptions, num_workers: int = 1
) -> Iterator[tuple[int, VideoProperties | FrameChunk | InputError]]:
    """Yield each file's position with its properties and frames, and with an error where it cannot be used.

    A chunk's frames are valid until the next item is asked for.
    """
    planned = [PlannedVideo(str(file), file) for file in files]
    for position, message in DecodePool(num_workers, options).run(planned):
        if isinstance(message, VideoProperties | FrameChunk):
            yield position, message
        elif isinstance(message, Finished) and message.status not in USABLE:
            words = f"{files[position]} cannot be used as a video ({message.status}): {message.error}"
            yield position, InputError(words)


class OneFile:
    """One file's sampled frames, to be read once.

    Attributes:
        last_seconds: The time of the last frame that was read.
        end_seconds: When the video ends, as its container promises and by what was read; NaN before it was read.
    """

    def __init__(self, file: Path, options: DecodeOptions) -> None:
        self._file, self._options = file, options
        self._first_seconds = self._promised_seconds = math.nan
        self.last_seconds = math.nan

    @property
    def end_seconds(self) -> float:
        if self._promised_seconds > 0:
            return max(self.last_seconds, self._first_seconds + self._promised_seconds)
        return self.last_seconds

    def chunks(self) -> Iterator[FrameChunk]:
        """Yield its frames.

        Raises:
            InputError: The file gives no frame.
        """
        for _, item in decode_files([self._file], self._options):
            if isinstance(item, InputError):
                raise item
            if isinstance(item, VideoProperties):
                self._promised_seconds = item.duration_seconds
                continue
            if math.isnan(self._first_seconds):
                self._first_seconds = float(item.frame_times_seconds[0])
            self.last_seconds = float(item.frame_times_seconds[-1])
            yield item


def compute_rows(chunks: Iterable[FrameChunk], backbones: Sequence[Backbone], batch_size: int) -> list[Rows]:
    """Return the rows of one video's frames, by each backbone; all are on one device."""
    from svb.extract.compute.machine import cores_for_batches
    from svb.extract.compute.packing import Packer
    from svb.extract.compute.pipeline import run_packers
    from svb.extract.compute.transform import Uploader

    device = backbones[0].device
    uploader = Uploader(device)
    with cores_for_batches(device) as (executor, ahead):
        packers = [Packer(backbone, batch_size, executor=executor, ahead=ahead) for backbone in backbones]
        for chunk in chunks:
            run_packers(packers, uploader, 0, chunk)
        for packer in packers:
            packer.end(0)
            packer.flush()
        return [packer.take(0) for packer in packers]


def extract_file(file: Path, backbones: Sequence[Backbone], options: DecodeOptions, batch_size: int) -> list[Rows]:
    """Return one file's rows by each backbone, decoded once.

    Raises:
        InputError: The file gives no frame.
    """
    return compute_rows(OneFile(file, options).chunks(), backbones, batch_size)
