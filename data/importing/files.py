"""One file of features: HDF5 (a dataset or a group a video), Parquet (a row a video or a feature row), PyTorch."""

from __future__ import annotations

import functools
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from svb.data.importing.found import (
    EXPECTED,
    FEATURES,
    PICKLES,
    TIMES,
    UNREADABLE,
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

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]
    import torch

# Rows of Parquet that are decoded at a time: feature rows, and whole videos.
BATCH_ROWS, BATCH_VIDEOS = 4096, 16
SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".pt": "torch", ".pth": "torch"}
PARQUET_MAGIC = b"PAR1"


def find_h5_per_video(path: Path, array: str | None) -> Source:
    """Find one dataset per video; its id is its whole name with its groups, or its attribute `video_id`."""
    if array is not None:
        raise UsageError("a dataset a video is one array each - leave out --array, or give --format h5-groups")

    def read(name: str, place: str) -> FoundRows:
        with reading(place), h5py.File(path, "r", locking=False) as file:
            attributes = file[name].attrs
            readers = {key: functools.partial(attributes.__getitem__, key) for key in attributes}
            return FoundRows(_read_dataset(file[name]), times_of(readers))

    with reading(str(path)), h5py.File(path, "r", locking=False) as file:
        ids = {name: _video_id(file[name], name) for names in _arrays_by_group(file).values() for name in names}
    places = {name: f"{path}, dataset {name!r}" for name in ids}
    videos = (
        FoundVideo(video_id, places[name], path, False, functools.partial(read, name, places[name]))
        for name, video_id in ids.items()
    )
    return Source(len(ids), videos)


def find_h5_groups(path: Path, array: str | None) -> Source:
    """Find one group per video, which holds its features and perhaps their times."""

    def read(group: str, place: str) -> FoundRows:
        with reading(place), h5py.File(path, "r", locking=False) as file:
            arrays = {name: item for name, item in file[group].items() if isinstance(item, h5py.Dataset)}
            chosen = choose_array([name for name in arrays if name not in TIMES], array, place)
            readers = {name: functools.partial(_read_dataset, item) for name, item in arrays.items()}
            return FoundRows(readers[chosen](), times_of(readers))

    with reading(str(path)), h5py.File(path, "r", locking=False) as file:
        ids = {group: _video_id(file[group], group) for group in _arrays_by_group(file) if group}
    places = {group: f"{path}, group {group!r}" for group in ids}
    videos = (
        FoundVideo(video_id, places[group], path, False, functools.partial(read, group, places[group]))
        for group, video_id in ids.items()
    )
    return Source(len(ids), videos)


def _arrays_by_group(file: h5py.File) -> dict[str, list[str]]:
    """Return the full names of all datasets by their group, which is `""` for the root; soft links are left out."""
    groups: dict[str, list[str]] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            groups.setdefault(name.rpartition("/")[0], []).append(name)

    file.visititems(visit)
    return groups


def _has_group_a_video(groups: dict[str, list[str]], array: str | None) -> bool:
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


def _read_dataset(dataset: h5py.Dataset) -> NDArray[Any]:
    numbers: NDArray[Any] = np.asarray(dataset[()])
    return numbers


def find_parquet(path: Path, array: str | None) -> Source:
    """Find the videos of a table with `video_id` and a column of lists, and perhaps their times.

    A list of numbers is a feature row, and those of one video must stand next to each other; a list of lists is
    a video.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with reading(str(path)):
        schema = pq.read_schema(path)
    if "video_id" not in schema.names:
        raise InputError(f"{path}: no column video_id, only {', '.join(schema.names) or 'nothing'} - add it")
    lists = [field.name for field in schema if _is_list(field.type) and field.name not in TIMES]
    if not lists:
        raise InputError(f"{path}: no column of lists of numbers - expected one called {FEATURES}")
    column = choose_array(lists, array, str(path))
    times_column = next((name for name in TIMES if name in schema.names), None)
    if _is_list(schema.field(column).type.value_type):
        return Source(pq.read_metadata(path).num_rows, _videos_of_rows(path, column, times_column))
    return Source(None, _videos_of_feature_rows(path, column, times_column))


def _videos_of_rows(path: Path, column: str, times_column: str | None) -> Iterator[FoundVideo]:
    for number, row in _single_rows(path, column, times_column, BATCH_VIDEOS):
        place = f"{path}, row {number}"
        with reading(place):
            features = _lists_as_matrix(row.column(column).flatten())
            times = row.column(times_column).flatten() if times_column else None
            rows = FoundRows(features, _seconds(times, times_column))
        yield _video(path, _video_id_of(row, place), rows)


def _videos_of_feature_rows(path: Path, column: str, times_column: str | None) -> Iterator[FoundVideo]:
    current, parts = "", list[FoundRows]()
    done: set[str] = set()
    for number, run in _runs(path, column, times_column):
        place = f"{path}, row {number}"
        video_id = _video_id_of(run, place)
        if parts and video_id != current:
            yield _video(path, current, _joined(parts, f"{path}, video {current!r}"))
            done.add(current)
            parts = []
        if video_id in done:
            raise InputError(
                f"{place}: the rows of video {video_id!r} are not next to each other - sort the table by video_id"
            )
        current = video_id
        with reading(place):
            times = run.column(times_column) if times_column else None
            parts.append(FoundRows(_lists_as_matrix(run.column(column)), _seconds(times, times_column)))
    if parts:
        yield _video(path, current, _joined(parts, f"{path}, video {current!r}"))


def _single_rows(path: Path, *columns: Any) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield each row with its number, from 1."""
    number = 1
    for batch in _batches(path, *columns):
        for row in range(len(batch)):
            yield number + row, batch.slice(row, 1)
        number += len(batch)


def _runs(path: Path, column: str, times_column: str | None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield neighbouring rows of one video, as far as a batch reaches, with the number of the first."""
    number = 1
    for batch in _batches(path, column, times_column, BATCH_ROWS):
        ids = batch.column("video_id").to_pylist()
        begins = [row for row in range(len(ids)) if row == 0 or ids[row] != ids[row - 1]]
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            yield number + begin, batch.slice(begin, end - begin)
        number += len(batch)


def _batches(path: Path, column: str, times_column: str | None, batch_size: int) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    columns = ["video_id", column, *([times_column] if times_column else [])]
    # Neither a whole row group, which may be the whole table, nor its pages are kept in memory.
    with reading(str(path)):
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    with file:
        batches = file.iter_batches(batch_size=batch_size, columns=columns)
        while True:
            with reading(str(path)):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _lists_as_matrix(lists: pa.Array) -> NDArray[Any]:
    """Return equally long lists as the rows of an array."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if None in lengths:
        raise ValueError("a row has no features")
    if len(lengths) > 1:
        raise ValueError(f"rows of {lengths[0]} and of {lengths[1]} numbers")
    numbers: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(lists), *lengths) if lengths else np.empty((0, 0), np.float32)


def _seconds(times: pa.Array | None, name: str | None) -> NDArray[np.float64] | None:
    if times is None or name is None:
        return None
    return np.asarray(times.to_numpy(zero_copy_only=False), np.float64) * TIMES[name]


def _joined(parts: list[FoundRows], place: str) -> FoundRows:
    with reading(place):
        times = [part.times_seconds for part in parts if part.times_seconds is not None]
        return FoundRows(
            np.concatenate([part.features for part in parts]), np.concatenate(times) if times else None
        )


def _video_id_of(rows: pa.RecordBatch, place: str) -> str:
    held = rows.column("video_id")[0].as_py()
    if held is None:
        raise InputError(f"{place}: video_id is missing - give every row the id of its video")
    return str(held)


def _video(path: Path, video_id: str, rows: FoundRows) -> FoundVideo:
    return FoundVideo(video_id, f"{path}, video {video_id!r}", path, False, lambda: rows)


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def find_torch(path: Path, array: str | None) -> Source:
    """Find the tensors of a dict by video_id; they stay in the file until they are read if it can be mapped."""
    import torch

    if array is not None:
        raise UsageError("a PyTorch file holds one tensor a video - leave out --array")
    held = _load_torch(path)
    if not isinstance(held, dict):
        raise InputError(f"{path} holds a {type(held).__name__} - expected a dict of video_id to tensor")
    for video_id, tensor in held.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path} holds a {type(tensor).__name__} for {video_id!r} - expected a tensor a video")
    places = {video_id: f"{path}, tensor {video_id!r}" for video_id in held}
    videos = (
        FoundVideo(str(v), places[v], path, False, functools.partial(_read_tensor, tensor, places[v]))
        for v, tensor in held.items()
    )
    return Source(len(held), videos)


def _load_torch(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exception says what goes wrong
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError):  # a file older than PyTorch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, and loading that could run code that is hidden in it - load it where "
            "you trust it, and save a dict of video_id to tensor or a folder of .npy files"
        ) from error
    except (*UNREADABLE, IndexError, AssertionError) as error:  # damage makes torch's unpickler raise many errors
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as a PyTorch file ({reason}) - make it again") from error


def _read_tensor(tensor: torch.Tensor, place: str) -> FoundRows:
    import torch

    with reading(place):
        dense = tensor.detach().to_dense()
        return FoundRows((dense.float() if dense.dtype == torch.bfloat16 else dense).numpy())


# What a video is in each layout, for messages, and what reads it.
FILES: dict[str, tuple[str, Find]] = {
    "h5-per-video": ("an HDF5 dataset a video", find_h5_per_video),
    "h5-groups": ("an HDF5 group a video", find_h5_groups),
    "parquet": ("a table with video_id and lists of numbers", find_parquet),
    "torch": ("a dict of video_id to tensor", find_torch),
}


def layout_of_file(source: Path, array: str | None) -> str:
    """Tell which layout of `FILES` a file has; errors as `svb.data.importing.folders.layout_of_folder`."""
    suffix = source.suffix.lower()
    if suffix in PICKLES:
        raise pickle_error(source)
    if h5py.is_hdf5(source):
        with reading(str(source)), h5py.File(source, "r", locking=False) as file:
            return "h5-groups" if _has_group_a_video(_arrays_by_group(file), array) else "h5-per-video"
    with source.open("rb") as file:
        if file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC:
            return "parquet"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if suffix in (".npy", ".npz"):
        raise InputError(f"{source} is one {suffix} file - give the folder that holds one for every video")
    raise InputError(f"cannot tell what {source} is - {EXPECTED}; --format says which where the name does not")
