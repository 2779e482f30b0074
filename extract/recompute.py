"""`svb verify --recompute`: some videos of a store are extracted again and compared with what it holds."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore
from svb.device import choose_device
from svb.errors import InputError, UsageError
from svb.extract.backbones.engine import load_matching_backbone
from svb.extract.decode.options import decoder_settings, stored_decode_options
from svb.extract.one_file import extract_file
from svb.extract.plan import is_done

logger = logging.getLogger(__name__)


def recompute(path: Path, num_videos: int, *, device: str = "auto") -> list[str]:
    """Extract some videos of a store again, chosen by a hash of what it holds, and compare.

    Another device than the store's may change the last bits.

    Returns:
        A line for each difference of more than float16's last bit.

    Raises:
        InputError: No video's file is there unchanged, or the features were not made from video here.
        MismatchError: A backbone's weights here are not those of the features.
        UsageError: `num_videos` is not positive.
    """
    if num_videos < 1:
        raise UsageError(f"cannot recompute {num_videos} videos - give a positive number")
    store = FeatureStore(path)
    if store.settings["decoder"]["name"] == "imported":
        raise InputError(f"the features of {path} were imported - expected a store that `svb extract` made")
    options = stored_decode_options(store.settings)
    here, stored = decoder_settings(options), store.settings["decoder"]
    if here != stored:
        logger.info(f"the decoder is {here['version']} here, {stored['version']} in the store: frames may differ")
    unchanged = [v for v in store.video_ids if is_done(record := store.records[v], Path(record.source_path))]
    at_hand = [v for v in unchanged if Path(store.records[v].source_path).exists()]
    if not at_hand:
        raise InputError(
            f"none of the {len(store.video_ids)} videos of {path} is where it was, unchanged - put their files "
            "back, or extract them again"
        )
    chosen = sorted(random.Random(store.fingerprint).sample(at_hand, min(num_videos, len(at_hand))))
    torch_device = choose_device(device)
    backbones = [
        load_matching_backbone(name, settings, torch_device)
        for name, settings in store.settings["backbones"].items()
    ]
    problems: list[str] = []
    num_same = 0
    for video_id in chosen:
        file, held = Path(store.records[video_id].source_path), store.rows_of(video_id)
        extracted = extract_file(file, backbones, options, store.settings["batch_size"])
        for backbone, (features, times_seconds) in zip(backbones, extracted, strict=True):
            rows, now = held[backbone.name], features.astype(np.float16)
            num_same += rows.features.tobytes() == now.tobytes()
            difference = _difference(rows.features, now)
            if rows.times_seconds.tolist() != times_seconds.tolist():
                difference = f"other frames: {len(rows.times_seconds)} held, {len(times_seconds)} now"
            if difference:
                problems.append(f"{path}, {backbone.name}: video {video_id!r} differs: {difference}")
    num_compared = len(chosen) * len(backbones)
    logger.info(
        f"recomputed {len(chosen)} of {len(store.video_ids)} videos: {num_same} of {num_compared} comparisons are "
        f"the same to the bit, {num_compared - num_same - len(problems)} within float16's last bit, "
        f"{len(problems)} differ"
    )
    return problems


def _difference(held: NDArray[np.float16], now: NDArray[np.float16]) -> str:
    """Return how rows differ; empty if it is by no more than the last bit."""
    if held.shape != now.shape:
        return f"shape {held.shape} held, {now.shape} now"
    if not held.size or np.abs(_ordered(held) - _ordered(now)).max() <= 1:
        return ""
    a, b = held.astype(np.float32), now.astype(np.float32)
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    return f"by up to {np.abs(a - b).max():.3g}, cosine at least {cosine.min():.5f}"


def _ordered(values: NDArray[np.float16]) -> NDArray[np.int32]:
    """Return integers that are 1 apart where float16 values are neighbours."""
    bits = values.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)
