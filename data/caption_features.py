"""The features file of a caption table.

One HDF5 file, for C captions and a text encoder with features of size F:

    caption_id, video_id, caption, split   (C,) UTF-8
    group                                  (C,) UTF-8, only where the table names groups of videos
    <text encoder>/features                (C, F) float16, not normalised
    attributes                             format_version, settings (JSON), has_split

Every `/` of the text encoder's name is written `@` in the group's name.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.caption_table import CaptionTable
from svb.data.description import FORMAT_VERSION
from svb.data.publish import published_file
from svb.data.shard import group_name, hash_array
from svb.data.text import spelled_as
from svb.errors import InputError, StoreError


@dataclass(frozen=True)
class CaptionFeatures:
    """C captions with their frozen text features.

    Attributes:
        table: The captions, their ids, videos and splits.
        features: `(C, F)` float16, finite, in the table's order.
        settings: The text encoder's name, weights and size; the table's hash.
    """

    table: CaptionTable
    features: NDArray[np.float16]
    settings: dict[str, Any]

    @property
    def text_encoder(self) -> str:
        name: str = self.settings["text_encoder"]["name"]
        return name

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)


def write_caption_features(path: Path, captions: CaptionFeatures) -> Path:
    """Write a caption features file, whole or not at all; returns `path`."""
    table = captions.table
    with published_file(path) as aside, h5py.File(aside, "w") as file:
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["settings"] = json.dumps(captions.settings, ensure_ascii=False)
        file.attrs["has_split"] = table.has_split
        columns = {
            "caption_id": table.caption_ids,
            "video_id": table.video_ids,
            "caption": table.captions,
            "split": table.splits,
        }
        if table.groups:
            columns["group"] = table.groups
        for name, column in columns.items():
            file.create_dataset(name, data=column, dtype=h5py.string_dtype("utf-8"))
        group = file.create_group(group_name(captions.text_encoder))
        group.create_dataset("features", data=captions.features).attrs["sha256"] = hash_array(captions.features)
    return path


def read_caption_features(path: Path, stored: Collection[str] = ()) -> CaptionFeatures:
    """Read a caption features file into memory.

    Args:
        path: The file.
        stored: The video_ids of a feature store: an id that differs only by how accents are encoded is spelled so.

    Raises:
        InputError: There is no file at `path`.
        StoreError: It is damaged, of a newer format, or a value is not finite.
    """
    if not path.is_file():
        raise InputError(f"no caption features at {path} - make them with `svb captions TABLE -o {path}`")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if int(file.attrs["format_version"]) > FORMAT_VERSION:
                raise StoreError(f"{path} has a newer format than this svb reads - upgrade svb")
            settings: dict[str, Any] = json.loads(file.attrs["settings"])
            caption_ids, video_ids, captions, splits = (
                list(file[name].asstr()[...]) for name in ("caption_id", "video_id", "caption", "split")
            )
            groups = list(file["group"].asstr()[...]) if "group" in file else []
            table = CaptionTable(caption_ids, video_ids, captions, splits, bool(file.attrs["has_split"]), groups)
            features = file[group_name(settings["text_encoder"]["name"])]["features"][...]
            lengths = {len(caption_ids), len(video_ids), len(captions), len(splits), len(groups or captions)}
            if features.ndim != 2 or lengths != {len(features)}:
                raise ValueError(f"features of shape {features.shape} for {len(table)} captions")
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise StoreError(
            f"{path} is not a whole caption features file ({error}) - remove it, then make it again with "
            "`svb captions`"
        ) from error
    bad = np.flatnonzero(~np.isfinite(features.sum(axis=1, dtype=np.float32)))
    if bad.size:
        raise StoreError(
            f"{path}: features hold NaN or infinity, first for caption {table.caption_ids[bad[0]]!r} - "
            "remove it, then make it again with `svb captions`"
        )
    spelling = spelled_as(table.video_ids, stored)
    video_ids = [spelling.get(video_id, video_id) for video_id in table.video_ids] if spelling else table.video_ids
    return CaptionFeatures(replace(table, video_ids=video_ids), features, settings)


def verify_caption_features(path: Path) -> list[str]:
    """Return what is wrong with a caption features file, a line each.

    Raises:
        InputError, StoreError: It cannot be read at all.
    """
    captions = read_caption_features(path)
    with h5py.File(path, "r", locking=False) as file:
        written = file[group_name(captions.text_encoder)]["features"].attrs.get("sha256", "")
    return [] if written == hash_array(captions.features) else [f"{path}: features are not what was written"]
