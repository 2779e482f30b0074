"""Fused backbones, named `a+b`: the rows of several, aligned in time and joined.

The rows of the first backbone are kept, with their times. Each is joined with the row of every other backbone that
is nearest in time, the earlier one of two equally near. A clip backbone has one row per window, which is thus
joined with every frame of the window.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.rows import FrameFeatures
from svb.errors import StoreError

ALIGNMENT = "nearest in time to the rows of the first, the earlier of two"


def split_name(name: str, held: Collection[str]) -> list[str]:
    """Return the parts of a backbone's name: one if it is not fused, none if it is not made of `held`.

    A held name may itself contain a `+`, such as the path of a weights file. No part is repeated.
    """
    for part in held:
        others = [other for other in held if other != part]
        if name == part:
            return [part]
        rest = split_name(name[len(part) + 1 :], others) if name.startswith(f"{part}+") else []
        if rest:
            return [part, *rest]
    return []


def fused_settings(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of a backbone that is fused of several."""
    return {
        "feature_size": sum(int(settings["feature_size"]) for settings in parts.values()),
        "alignment": ALIGNMENT,
        "parts": {name: dict(settings) for name, settings in parts.items()},
    }


def parts_of(video: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of each backbone, in order, from `FeatureStore.video_settings`."""
    settings = video["backbone_settings"]
    held = settings.get("parts", {video["backbone"]: settings})
    return {name: held[name] for name in split_name(video["backbone"], held)}


def shared_part(video: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> int | None:
    """Return which of the fused backbones shares its space with a text encoder, being one model with it; or None.

    The hash of a tower's weights covers both towers, so it tells whatever their names are.
    """
    hashes = [settings["weights_hash"] for settings in parts_of(video).values()]
    return hashes.index(text_encoder["weights_hash"]) if text_encoder["weights_hash"] in hashes else None


def fuse(parts: Sequence[FrameFeatures]) -> FrameFeatures:
    """Return the rows of several backbones as those of one, `(N, F1 + F2 + ...)`; a single part stays as it is.

    Args:
        parts: The same videos in the same order, one part per backbone.

    Raises:
        StoreError: A video has rows of one backbone and none of another.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    fused = np.empty((len(first.features), sum(part.features.shape[1] for part in parts)), np.float16)
    column = 0
    for part in parts:
        features = part.features if part is first else part.features[_rows_beside(first, part)]
        fused[:, column : column + features.shape[1]] = features
        column += features.shape[1]
    return replace(first, features=fused)


def _rows_beside(first: FrameFeatures, other: FrameFeatures) -> NDArray[np.int64]:
    rows = np.empty(len(first.times_seconds), np.int64)
    for video, video_id in enumerate(first.video_ids):
        grid = slice(*first.offsets[video : video + 2])
        begin, end = other.offsets[video : video + 2]
        if begin == end:
            raise StoreError(
                f"video {video_id!r} has no rows of one of the fused backbones - `svb verify` says what is damaged"
            )
        rows[grid] = begin + nearest_rows(other.times_seconds[begin:end], first.times_seconds[grid])
    return rows


def nearest_rows(times_seconds: NDArray[np.float64], wanted_seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the position of the nearest of ascending `(T,)` times, at least one, for each wanted one.

    If two are equally near, the earlier one counts.
    """
    after = np.searchsorted(times_seconds, wanted_seconds).clip(max=len(times_seconds) - 1)
    before = np.maximum(after - 1, 0)
    earlier = np.abs(wanted_seconds - times_seconds[before]) <= np.abs(times_seconds[after] - wanted_seconds)
    nearest: NDArray[np.int64] = np.where(earlier, before, after)
    return nearest
