"""What the readers of all layouts give to `svb import`: videos, found first and read one at a time."""

from __future__ import annotations

import contextlib
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import InputError

# Names of the times of rows in files, and the seconds in one of their units.
TIMES = {"times_seconds": 1.0, "time_seconds": 1.0, "timestamps_ms": 1e-3}
# The name of the features if a video has several arrays; another is given with --array.
FEATURES = "features"
# What numpy, h5py, pyarrow and torch raise for files that are damaged or of another kind.
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
)


PICKLES = (".pickle", ".pkl")
EXPECTED = "expected a folder of .npy or .npz files, or one HDF5, Parquet (.parquet) or PyTorch (.pt, .pth) file"


@dataclass(frozen=True)
class FoundRows:
    """One video's features as they were found, not yet checked; `times_seconds` if the source has times."""

    features: NDArray[Any]
    times_seconds: NDArray[Any] | None = None


@dataclass(frozen=True)
class FoundVideo:
    """A video in a source.

    Attributes:
        video_id: The video's id as the source spells it.
        place: The name to use in messages: the file, and the place in it.
        file: The file that it is in.
        is_whole_file: Whether the file holds this video alone.
        read: Reads its rows.
        frame_rate: The video file's frame rate; NaN if the source does not have it.
    """

    video_id: str
    place: str
    file: Path
    is_whole_file: bool
    read: Callable[[], FoundRows]
    frame_rate: float = math.nan


@dataclass(frozen=True)
class Source:
    """The videos of a source; `num_videos` is None if only reading all of it tells."""

    num_videos: int | None
    videos: Iterator[FoundVideo]


# Finds the videos of a folder or file; `--array` names the features of a video with several arrays.
Find = Callable[[Path, "str | None"], Source]


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Turn the errors of damaged files into one that names the place.

    Raises:
        InputError: Reading failed.
    """
    try:
        yield
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{place} cannot be read ({reason}) - make it again, or leave it out") from error


def choose_array(names: Collection[str], array: str | None, place: str) -> str:
    """Return which of a video's arrays are its features.

    Args:
        names: The names of its arrays, without times and the id.
        array: The name that was asked for.
        place: The name to use in messages.

    Raises:
        InputError: The array is not there, or there are several and none was asked for.
    """
    held = ", ".join(sorted(names)) or "nothing"
    if array is not None and array not in names:
        raise InputError(f"{place} has no array {array!r}, only {held} - name one of them with --array")
    if array is None and FEATURES not in names and len(names) != 1:
        raise InputError(f"{place} holds {held} - expected one array of features; name it with --array")
    return array or (FEATURES if FEATURES in names else next(iter(names)))


def times_of(arrays: Mapping[str, Callable[[], NDArray[Any]]]) -> NDArray[Any] | None:
    """Return the `(T,)` times in seconds among a video's arrays, or None."""
    for name, seconds in TIMES.items():
        if name in arrays:
            return np.asarray(arrays[name](), np.float64) * seconds
    return None


def pickle_error(source: Path) -> InputError:
    """Return the error of a source that runs code when it is read."""
    return InputError(
        f"{source} holds pickles, and reading one runs whatever code is in it - load them where you trust them and "
        "save every video with numpy.save as <video_id>.npy, then import that folder"
    )
