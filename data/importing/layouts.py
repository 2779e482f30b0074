"""Which layout a source of features has, and which function reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py

from svb.data.importing.files import (
    arrays_by_group,
    find_h5_groups,
    find_h5_per_video,
    find_parquet,
    find_torch,
    has_group_a_video,
)
from svb.data.importing.folders import find_npy, find_npz, find_video_features, is_beside_features, visible_files
from svb.data.importing.source import Source, reading
from svb.errors import InputError, UsageError

Find = Callable[[Path, "str | None"], Source]
# Layouts of folders and of single files: what a video is in each, for messages, and what reads them.
FOLDERS: dict[str, tuple[str, Find]] = {
    "npy": ("a .npy file a video", find_npy),
    "video-features": ("<video_id>_<feature>.npy files as video_features writes them", find_video_features),
    "npz": ("a .npz file a video", find_npz),
}
FILES: dict[str, tuple[str, Find]] = {
    "h5-per-video": ("an HDF5 dataset a video", find_h5_per_video),
    "h5-groups": ("an HDF5 group a video", find_h5_groups),
    "parquet": ("a table with video_id and lists of numbers", find_parquet),
    "torch": ("a dict of video_id to tensor", find_torch),
}
LAYOUTS = {**FOLDERS, **FILES}
SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".pt": "torch", ".pth": "torch"}
PARQUET_MAGIC = b"PAR1"
CLIP_RETRIEVAL = re.compile(r"(img|text)_emb_\d+")
PICKLES = (".pickle", ".pkl")
EXPECTED = "expected a folder of .npy or .npz files, or one HDF5, Parquet (.parquet) or PyTorch (.pt, .pth) file"


def find_videos(source: Path, layout: str | None, array: str | None) -> tuple[str, Source]:
    """Return a source's layout and its videos.

    Args:
        source: A folder or file.
        layout: One of `LAYOUTS`; told from the source by default.
        array: The name of the features, if a video has several arrays.

    Raises:
        InputError: There is nothing at `source`, it is not of the layout or of any that is known, or runs code.
        UsageError: An option means nothing.
    """
    if not source.exists():
        raise InputError(f"no such file or folder: {source} - {EXPECTED}")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r} - expected one of {', '.join(LAYOUTS)}")
    if layout is not None and (layout in FOLDERS) != source.is_dir():
        wanted, is_there = ("a folder", "a file") if layout in FOLDERS else ("a file", "a folder")
        raise InputError(f"{source} is {is_there} - {layout} is {wanted}: {LAYOUTS[layout][0]}")
    _refuse_a_store(source)
    layout = layout or (_layout_of_folder(source) if source.is_dir() else _layout_of_file(source, array))
    return layout, LAYOUTS[layout][1](source, array)


def _refuse_a_store(source: Path) -> None:
    is_store = (source / "store.json").is_file()
    if not is_store and source.is_file() and h5py.is_hdf5(source):
        with reading(str(source)), h5py.File(source, "r", locking=False) as file:
            is_store = "videos" in file and "store" in file.attrs
    if is_store:
        raise InputError(f"{source} is a feature store already - give it to `svb train` or any command as it is")


def _layout_of_folder(source: Path) -> str:
    npy, npz = visible_files(source, ".npy"), visible_files(source, ".npz")
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
        return "video-features" if any(is_beside_features(file.stem) for file in npy) else "npy"
    others = Counter(path.suffix.lower() for path in source.rglob("*") if path.is_file())
    if any(suffix in PICKLES for suffix in others):
        raise _pickle_error(source)
    held = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(5))
    raise InputError(f"{source} holds no .npy or .npz file (it holds {held or 'nothing'}) - {EXPECTED}")


def _layout_of_file(source: Path, array: str | None) -> str:
    suffix = source.suffix.lower()
    if suffix in PICKLES:
        raise _pickle_error(source)
    if h5py.is_hdf5(source):
        with reading(str(source)), h5py.File(source, "r", locking=False) as file:
            return "h5-groups" if has_group_a_video(arrays_by_group(file), array) else "h5-per-video"
    with source.open("rb") as file:
        if file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC:
            return "parquet"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if suffix in (".npy", ".npz"):
        raise InputError(f"{source} is one {suffix} file - give the folder that holds one for every video")
    raise InputError(f"cannot tell what {source} is - {EXPECTED}; --format says which where the name does not")


def _pickle_error(source: Path) -> InputError:
    return InputError(
        f"{source} holds pickles, and reading one runs whatever code is in it - load them where you trust them and "
        "save every video with numpy.save as <video_id>.npy, then import that folder"
    )
