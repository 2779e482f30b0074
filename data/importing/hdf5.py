"""HDF5 files of features: a dataset a video, or a group a video."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from svb.data.importing.source import TIMES, FoundRows, FoundVideo, Source, choose_array, reading, times_of
from svb.errors import UsageError


def find_h5_per_video(path: Path, array: str | None) -> Source:
    """Find a dataset a video; its id is its whole name, groups and all, or its attribute `video_id`."""
    if array is not None:
        raise UsageError("a dataset a video is one array each - leave out --array, or give --format h5-groups")

    def read(name: str, place: str) -> FoundRows:
        with reading(place), h5py.File(path, "r", locking=False) as file:
            attributes = file[name].attrs
            readers = {key: functools.partial(attributes.__getitem__, key) for key in attributes}
            return FoundRows(_read(file[name]), times_of(readers))

    with reading(str(path)), h5py.File(path, "r", locking=False) as file:
        ids = {name: _video_id(file[name], name) for names in arrays_by_group(file).values() for name in names}
    places = {name: f"{path}, dataset {name!r}" for name in ids}
    videos = (
        FoundVideo(video_id, places[name], path, False, functools.partial(read, name, places[name]))
        for name, video_id in ids.items()
    )
    return Source(len(ids), videos)


def find_h5_groups(path: Path, array: str | None) -> Source:
    """Find a group a video, which holds its features and perhaps their times."""

    def read(group: str, place: str) -> FoundRows:
        with reading(place), h5py.File(path, "r", locking=False) as file:
            arrays = {name: item for name, item in file[group].items() if isinstance(item, h5py.Dataset)}
            chosen = choose_array([name for name in arrays if name not in TIMES], array, place)
            readers = {name: functools.partial(_read, item) for name, item in arrays.items()}
            return FoundRows(readers[chosen](), times_of(readers))

    with reading(str(path)), h5py.File(path, "r", locking=False) as file:
        ids = {group: _video_id(file[group], group) for group in arrays_by_group(file) if group}
    places = {group: f"{path}, group {group!r}" for group in ids}
    videos = (
        FoundVideo(video_id, places[group], path, False, functools.partial(read, group, places[group]))
        for group, video_id in ids.items()
    )
    return Source(len(ids), videos)


def arrays_by_group(file: h5py.File) -> dict[str, list[str]]:
    """Return the full names of all datasets by that of their group, `""` for the root; soft links are left out."""
    groups: dict[str, list[str]] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            groups.setdefault(name.rpartition("/")[0], []).append(name)

    file.visititems(visit)
    return groups


def has_group_a_video(groups: dict[str, list[str]], array: str | None) -> bool:
    """Tell `v_1/c3d_features, v_2/c3d_features` from ids with a `/`: every group holds the same names.

    A single group is a video if it holds one array, beside times.
    """
    if "" in groups or not groups:
        return False
    contents = [{name.rpartition("/")[2] for name in names} - {*TIMES} for names in groups.values()]
    same = all(names == contents[0] for names in contents)
    return array is not None or (same and (len(groups) > 1 or len(contents[0]) == 1))


def _video_id(item: h5py.Group | h5py.Dataset, name: str) -> str:
    held = item.attrs.get("video_id", name)
    return held.decode() if isinstance(held, bytes) else str(held)


def _read(dataset: h5py.Dataset) -> NDArray[Any]:
    numbers: NDArray[Any] = np.asarray(dataset[()])
    return numbers
