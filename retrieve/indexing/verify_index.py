"""`svb verify` of an index: are its files unchanged, do they fit together, do its vectors have length 1?"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svb.config import require_same
from svb.data.publish import hash_file
from svb.errors import InputError, StoreError, UsageError
from svb.retrieve.indexing.index_plan import Place, live_videos
from svb.retrieve.stored.cues import open_speech, speech_problems
from svb.retrieve.stored.ivf_file import verify_ivf
from svb.retrieve.stored.manifest import named_parts, part_folder, read_manifest
from svb.retrieve.stored.segment import COLUMNS, MomentWindows, Segment, StringColumn, content_of, open_segment

if TYPE_CHECKING:
    from svb.data.feature_store import FeatureStore

logger = logging.getLogger(__name__)

# float16 rounds each number, and so the length of a vector, by at most 2^-11 of it; twice that to be safe.
NORM_TOLERANCE = 2.0**-10
# The most by which a number of a vector may differ: another batch may change it, and both sides round to float16.
RECOMPUTED_TOLERANCE = 1.5e-3
BLOCK_ROWS = 65536


def verify_index(folder: Path) -> list[str]:
    """Return what is wrong with an index, a line each; empty when it is whole.

    It checks that every file has its size and hash, also that of an approximate index; that offsets ascend; that
    counts agree with the manifest; that every video appears once; and that all vectors have length 1, except for
    rounding.

    Raises:
        InputError, StoreError: There is no index, or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    problems = [problem for part, entry in named_parts(manifest) for problem in _file_problems(folder, part, entry)]
    if problems:
        return problems
    return [
        *_segments_problems(folder, manifest),
        *_captions_problems(folder, manifest),
        *_speech_problems(folder, manifest),
        *verify_ivf(folder),
    ]


def _file_problems(folder: Path, part: str, entry: Mapping[str, Any]) -> Iterator[str]:
    for name, expected in entry["files"].items():
        path = part_folder(folder, part, entry) / name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != entry["sizes"][name]:
            yield f"{path} has {path.stat().st_size} bytes, not {entry['sizes'][name]}"
        elif hash_file(path) != expected:
            yield f"{path} has changed since it was written"


def _segments_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    segments = []
    for entry in manifest["segments"]:
        try:
            segments.append(open_segment(folder, entry, int(manifest["embedding_size"])))
        except StoreError as error:
            yield str(error)
            return
    problems = [
        f"{folder / 'segments' / segment.key}: {problem}"
        for segment in segments
        for problem in _segment_problems(segment)
    ]
    yield from problems
    if problems:
        return
    held = live_videos(segments)
    counted = Counter(video_id for video_id, _ in held)
    yield from (f"{folder}: video {video_id!r} appears {n} times" for video_id, n in counted.items() if n > 1)
    moments = sum(int(np.diff(segments[s].moment_offsets[row : row + 2])[0]) for _, (s, row) in held)
    for what, found in (("videos", len(held)), ("moments_total", moments)):
        if manifest[what] != found:
            yield f"{folder}: there are {found} {what}, but the manifest says {manifest[what]}"


def _segment_problems(segment: Segment) -> Iterator[str]:
    if (np.diff(segment.moment_offsets) < 1).any():
        yield "moment_offsets do not ascend"
        return
    seconds = segment.moment_seconds
    if not np.isfinite(seconds).all() or (seconds[:, 0] >= seconds[:, 1]).any():
        yield "a moment has no length"
    for attribute in COLUMNS.values():
        if not _is_readable(getattr(segment, attribute)):
            yield f"{attribute} are not UTF-8"
    for name in ("video_embeddings", "moment_embeddings"):
        bad = rows_not_of_length_1(getattr(segment, name))
        if bad.size:
            yield f"{name}: {bad.size} vectors do not have length 1, first in row {bad[0]}"


def _is_readable(column: StringColumn) -> bool:
    if (np.diff(column.offsets) < 0).any():
        return False
    try:
        column.tolist()
    except UnicodeDecodeError:
        return False
    return True


def _captions_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    for entry in manifest["captions"]:
        path = part_folder(folder, "captions", entry) / "caption_embeddings.npy"
        embeddings = np.load(path, mmap_mode="r")
        if embeddings.shape != (entry["captions"], manifest["embedding_size"]):
            yield f"{path} is {embeddings.shape}, expected ({entry['captions']}, {manifest['embedding_size']})"
        elif (bad := rows_not_of_length_1(embeddings)).size:
            yield f"{path}: {bad.size} vectors do not have length 1, first in row {bad[0]}"


def _speech_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    for entry in manifest.get("speech", []):
        path = part_folder(folder, "speech", entry)
        try:
            speech = open_speech(folder, entry)
        except StoreError as error:
            yield str(error)
            return
        yield from (f"{path}: {problem}" for problem in speech_problems(speech))
        if (bad := rows_not_of_length_1(speech.window_embeddings)).size:
            yield f"{path}: {bad.size} windows do not have length 1, first in row {bad[0]}"
        if speech.num_windows:
            from svb.retrieve.searching.words import words_problems

            yield from words_problems(folder, entry["key"], speech)


def rows_not_of_length_1(embeddings: NDArray[np.float16]) -> NDArray[np.int64]:
    """Return the rows of `(N, D)` that are not finite, or differ from length 1 by more than rounding."""
    bad = []
    for begin in range(0, len(embeddings), BLOCK_ROWS):
        lengths = np.linalg.norm(embeddings[begin : begin + BLOCK_ROWS].astype(np.float32), axis=1)
        bad.append(begin + np.flatnonzero(~(np.abs(lengths - 1) <= NORM_TOLERANCE)))
    return np.concatenate(bad).astype(np.int64) if bad else np.empty(0, np.int64)


def recompute_index(
    folder: Path,
    num_videos: int,
    *,
    device: str = "auto",
) -> list[str]:
    """Embed some videos of an index again from the features in its store, chosen by a hash, and compare.

    Args:
        folder: The index's.
        num_videos: How many.
        device: Where to compute.

    Returns:
        One line for each difference beyond rounding.

    Raises:
        InputError: The store is gone, or holds none of the videos unchanged.
        MismatchError: The store or the weights differ from those that made the index.
        StoreError: The index or the store is damaged.
        UsageError: `num_videos` is not positive.
    """
    from svb.data.feature_store import FeatureStore
    from svb.device import choose_device
    from svb.retrieve.indexing.embed_segment import embed_segment
    from svb.retrieve.model.embedder import index_embedder

    if num_videos < 1:
        raise UsageError(f"cannot recompute {num_videos} videos - expected a number above 0")
    manifest = read_manifest(folder)
    store = FeatureStore(Path(manifest["store"]))
    segments = [open_segment(folder, entry, int(manifest["embedding_size"])) for entry in manifest["segments"]]
    chosen = _sample(manifest, segments, store, num_videos)
    torch_device = choose_device(device)
    embedder = index_embedder(folder, manifest, torch_device)
    require_same(
        store.video_settings(embedder.backbone),
        embedder.model["video"],
        what=f"the feature store {store.path}",
        do_next="Restore the store that the index was made from.",
    )
    again = embed_segment(store, embedder, MomentWindows(**manifest["moments"]), torch_device, sorted(chosen))
    problems = []
    for row, video_id in enumerate(sorted(chosen)):
        difference = _difference(segments, chosen[video_id], again, row)
        if difference:
            problems.append(f"{folder}: video {video_id!r} differs: {difference}")
    logger.info(
        f"embedded {len(chosen)} of {manifest['videos']} videos again from {store.path}: "
        f"{len(chosen) - len(problems)} are the same but for rounding, {len(problems)} differ"
    )
    return problems


def _sample(
    manifest: Mapping[str, Any], segments: Sequence[Segment], store: FeatureStore, num_videos: int
) -> dict[str, Place]:
    """Return videos that have not changed in the store since they were embedded, and where the index has them."""
    as_then = {}
    for video_id, (s, row) in sorted(live_videos(segments)):
        record = store.records.get(video_id)
        if record is not None and record.usable and content_of(record) == segments[s].content_hashes[row]:
            as_then[video_id] = (s, row)
    if not as_then:
        raise InputError(
            f"none of the {manifest['videos']} videos of the index is unchanged in {store.path} - run `svb index`"
        )
    chosen = random.Random(manifest["model_fingerprint"]).sample([*as_then], min(num_videos, len(as_then)))
    return {video_id: as_then[video_id] for video_id in chosen}


def _difference(segments: Sequence[Segment], place: Place, again: Segment, row: int) -> str:
    """Return how a video's rows differ from recomputed ones; empty if only by rounding."""
    segment, held_row = segments[place[0]], place[1]
    held = slice(*segment.moment_offsets[held_row : held_row + 2].tolist())
    now = slice(*again.moment_offsets[row : row + 2].tolist())
    seconds, seconds_now = segment.moment_seconds[held], again.moment_seconds[now]
    if seconds.shape != seconds_now.shape or not np.allclose(seconds, seconds_now, atol=1e-6):
        return f"other moments: {len(seconds)} held, {len(seconds_now)} now"
    pairs = (
        (segment.video_embeddings[held_row], again.video_embeddings[row]),
        (segment.moment_embeddings[held], again.moment_embeddings[now]),
    )
    worst = max(float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max()) for a, b in pairs)
    return "" if worst <= RECOMPUTED_TOLERANCE else f"by up to {worst:.3g}"
