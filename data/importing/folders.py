"""Folders of features with one file per video, or a few: `.npy`, the names of video_features, `.npz`."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.importing.found import (
    EXPECTED,
    PICKLES,
    TIMES,
    Find,
    FoundRows,
    FoundVideo,
    Source,
    choose_array,
    pickle_error,
    reading,
    times_of,
)
from svb.errors import InputError, UsageError

# video_features writes when each row was taken, and the video's frame rate, beside `<id>_<feature>.npy`.
STAMPS, RATE = "_timestamps_ms", "_fps"
# clip-retrieval's files, which hold a row for each of many images.
CLIP_RETRIEVAL = re.compile(r"(img|text)_emb_\d+")


def find_npy(folder: Path, array: str | None) -> Source:
    """Find `<video_id>.npy` files."""
    if array is not None:
        raise UsageError(".npy files hold one array each - leave out --array")
    files = _visible_files(folder, ".npy")

    def read(file: Path) -> FoundRows:
        return FoundRows(_load_npy(file))

    videos = (FoundVideo(_name(folder, f), str(f), f, True, functools.partial(read, f)) for f in files)
    return Source(len(files), videos)


def find_video_features(folder: Path, array: str | None) -> Source:
    """Find `<video_id>_<feature>.npy` files with their `<video_id>_timestamps_ms.npy` and `<video_id>_fps.npy`."""
    names = {_name(folder, file): file for file in _visible_files(folder, ".npy")}
    of_features: dict[str, tuple[str, str]] = {}
    for name, file in names.items():
        if not _is_beside_features(name):
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
    files = _visible_files(folder, ".npz")

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


def _visible_files(folder: Path, suffix: str) -> list[Path]:
    """Return the files below a folder with this suffix, sorted; hidden ones, which a Mac leaves, are left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == suffix
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _is_beside_features(name: str) -> bool:
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


# What a video is in each layout, for messages, and what reads it.
FOLDERS: dict[str, tuple[str, Find]] = {
    "npy": ("a .npy file a video", find_npy),
    "video-features": ("<video_id>_<feature>.npy files as video_features writes them", find_video_features),
    "npz": ("a .npz file a video", find_npz),
}


def layout_of_folder(source: Path) -> str:
    """Tell which layout of `FOLDERS` a folder has.

    Raises:
        InputError: It has none that is known, or runs code.
    """
    npy, npz = _visible_files(source, ".npy"), _visible_files(source, ".npz")
    if npy and npz:
        raise InputError(
            f"{source} holds {len(npy)} .npy and {len(npz)} .npz files - choose with --format npy or npz"
        )
    if npz:
        return "npz"
    if of_images := [file for file in npy if CLIP_RETRIEVAL.fullmatch(file.stem)]:
        raise InputError(
            f"{of_images[0]} has a row for each of many images, as clip-retrieval writes it, and does not say "
            "which rows are of one video - save each video's rows as <video_id>.npy, or take every file for one "
            "video with --format npy"
        )
    if npy:
        return "video-features" if any(_is_beside_features(file.stem) for file in npy) else "npy"
    others = Counter(path.suffix.lower() for path in source.rglob("*") if path.is_file())
    if any(suffix in PICKLES for suffix in others):
        raise pickle_error(source)
    held = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(5))
    raise InputError(f"{source} holds no .npy or .npz file (it holds {held or 'nothing'}) - {EXPECTED}")
