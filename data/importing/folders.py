"""Folders of features with one file per video, or a few: `.npy`, the names of video_features, `.npz`."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.importing.source import TIMES, FoundRows, FoundVideo, Source, choose_array, reading, times_of
from svb.errors import InputError, UsageError

# Beside `<id>_<feature>.npy`, video_features writes when each row was taken and the video's frame rate.
STAMPS, RATE = "_timestamps_ms", "_fps"


def find_npy(folder: Path, array: str | None) -> Source:
    """Find `<video_id>.npy` files."""
    if array is not None:
        raise UsageError(".npy files hold one array each - leave out --array")
    files = visible_files(folder, ".npy")

    def read(file: Path) -> FoundRows:
        return FoundRows(_load_npy(file))

    videos = (FoundVideo(_name(folder, f), str(f), f, True, functools.partial(read, f)) for f in files)
    return Source(len(files), videos)


def find_video_features(folder: Path, array: str | None) -> Source:
    """Find `<video_id>_<feature>.npy` files with their `<video_id>_timestamps_ms.npy` and `<video_id>_fps.npy`."""
    names = {_name(folder, file): file for file in visible_files(folder, ".npy")}
    of_features: dict[str, tuple[str, str]] = {}
    for name, file in names.items():
        if not is_beside_features(name):
            video_id, underscore, feature = name.rpartition("_")
            if not underscore or "/" in feature or not video_id.rpartition("/")[2]:
                raise InputError(
                    f"{file} is not called <video_id>_<feature>.npy, as video_features does - rename it, or "
                    "take the names for video_ids with --format npy"
                )
            of_features[name] = (video_id, feature)
    features = Counter(feature for _, feature in of_features.values())
    chosen = choose_array(features, array, str(folder))

    def read(name: str, video_id: str) -> FoundRows:
        stamps = names.get(video_id + STAMPS)
        times = None if stamps is None else np.asarray(_load_npy(stamps), np.float64) * TIMES["timestamps_ms"]
        return FoundRows(_load_npy(names[name]), times)

    def videos() -> Iterator[FoundVideo]:
        for name, (video_id, feature) in of_features.items():
            if feature == chosen:
                rate = names.get(video_id + RATE)
                yield FoundVideo(
                    video_id,
                    str(names[name]),
                    names[name],
                    True,
                    functools.partial(read, name, video_id),
                    math.nan if rate is None else _number(rate),
                )

    return Source(features[chosen], videos())


def find_npz(folder: Path, array: str | None) -> Source:
    """Find `<video_id>.npz` files; an array `video_id` in a file takes the place of its name."""
    files = visible_files(folder, ".npz")

    def read(file: Path) -> FoundRows:
        with reading(str(file)), np.load(file, allow_pickle=False) as arrays:
            readers = {name: functools.partial(arrays.__getitem__, name) for name in arrays.files}
            held = [name for name in arrays.files if name not in (*TIMES, "video_id")]
            return FoundRows(arrays[choose_array(held, array, str(file))], times_of(readers))

    def videos() -> Iterator[FoundVideo]:
        for file in files:
            with reading(str(file)), np.load(file, allow_pickle=False) as arrays:
                video_id = str(arrays["video_id"]) if "video_id" in arrays.files else _name(folder, file)
            yield FoundVideo(video_id, str(file), file, True, functools.partial(read, file))

    return Source(len(files), videos())


def visible_files(folder: Path, suffix: str) -> list[Path]:
    """Return the files below a folder with this suffix, sorted; hidden ones, which a Mac leaves, are left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == suffix
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def is_beside_features(name: str) -> bool:
    """Tell whether a file's name, without suffix, is one that video_features writes beside features."""
    return name.endswith((STAMPS, RATE))


def _name(folder: Path, file: Path) -> str:
    relative = file.relative_to(folder).as_posix()
    return relative[: len(relative) - len(file.suffix)]


def _load_npy(file: Path) -> NDArray[Any]:
    with reading(str(file)):
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            raise ValueError("it is an .npz file")
        return loaded


def _number(file: Path) -> float:
    with reading(str(file)):
        return float(_load_npy(file).reshape(()))
