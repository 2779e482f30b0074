"""A segment of an index: the embeddings of some videos and their moments, as plain immutable arrays.

video_embeddings.npy     (V, D) float16, L2-normalised before rounding
moment_embeddings.npy    (M, D) float16, moments of one video next to each other
moment_offsets.npy       (V + 1,) int64, video v owns moments offsets[v]:offsets[v + 1]
moment_seconds.npy       (M, 2) float64, each moment's half-open interval [begin, end)
duration_seconds.npy     (V,) float64, NaN if not known
size_bytes.npy, mtime_ns.npy    (V,) int64, of the extracted file
video_id, source_path, content_hash    columns of V strings, see `StringColumn`

A video that was deleted or changed stays in its segment, and its row is listed in the segment's tombstones,
`tombstones/<key>/videos.npy`, until the segment is merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError

if TYPE_CHECKING:
    from svb.data.rows import VideoRecord

DTYPES = {
    "video_embeddings": np.float16,
    "moment_embeddings": np.float16,
    "moment_offsets": np.int64,
    "moment_seconds": np.float64,
    "duration_seconds": np.float64,
    "size_bytes": np.int64,
    "mtime_ns": np.int64,
}
COLUMNS = {"video_id": "video_ids", "source_path": "source_paths", "content_hash": "content_hashes"}


@dataclass(frozen=True)
class MomentWindows:
    """A sliding window over a video's time.

    Attributes:
        seconds: Length of a moment.
        stride_seconds: The time from the begin of one moment to the next.
    """

    seconds: float
    stride_seconds: float


@dataclass(frozen=True)
class Segment:
    """A segment in memory or mapped from its files; see the layout above.

    Attributes:
        key: The name of the segment's folder; empty before it is written.
        deleted: The rows of videos that no longer count, ascending.
    """

    key: str
    video_embeddings: NDArray[np.float16]
    moment_embeddings: NDArray[np.float16]
    moment_offsets: NDArray[np.int64]
    moment_seconds: NDArray[np.float64]
    duration_seconds: NDArray[np.float64]
    size_bytes: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    video_ids: StringColumn
    source_paths: StringColumn
    content_hashes: StringColumn
    deleted: NDArray[np.int64]

    @property
    def num_videos(self) -> int:
        """Return V, with videos that were deleted."""
        return len(self.video_embeddings)

    @property
    def num_moments(self) -> int:
        """Return M, with those of videos that were deleted."""
        return len(self.moment_embeddings)

    @property
    def embedding_size(self) -> int:
        """Return D."""
        return int(self.video_embeddings.shape[1])


def content_of(record: VideoRecord) -> str:
    """Return the hash that an index keeps of a video's content.

    A video that was decoded in part may decode further in another try of the same file, so the try counts.
    """
    return f"{record.content_hash}.{record.tries}" if record.status == "partial" else record.content_hash


def is_untouched(segment: Segment, row: int, record: VideoRecord) -> bool:
    """Tell whether a record names the same file as a segment does, with the same size and time."""
    return (segment.source_paths[row], segment.size_bytes[row], segment.mtime_ns[row]) == (
        record.source_path,
        record.size_bytes,
        record.mtime_ns,
    )


def segment_of(
    records: Sequence[VideoRecord],
    video_embeddings: NDArray[np.float16],
    moment_embeddings: NDArray[np.float16],
    moment_offsets: NDArray[np.int64],
    moment_seconds: NDArray[np.float64],
) -> Segment:
    """Return a segment of V embedded videos with what the store knows of them; see the layout above."""
    durations = [r.duration_seconds if r.duration_seconds > 0 else np.nan for r in records]
    return Segment(
        key="",
        video_embeddings=video_embeddings,
        moment_embeddings=moment_embeddings,
        moment_offsets=moment_offsets,
        moment_seconds=moment_seconds,
        duration_seconds=np.array(durations, np.float64),
        size_bytes=np.array([r.size_bytes for r in records], np.int64),
        mtime_ns=np.array([r.mtime_ns for r in records], np.int64),
        video_ids=StringColumn.of(r.video_id for r in records),
        source_paths=StringColumn.of(r.source_path for r in records),
        content_hashes=StringColumn.of(map(content_of, records)),
        deleted=np.empty(0, np.int64),
    )


def write_segment(folder: Path, segment: Segment) -> None:
    """Write a segment's files into a folder; its tombstones are not among them.

    Raises:
        StoreError: An embedding is not finite: it would be nearest to every query, or to none.
    """
    require_finite(segment)
    for name, dtype in DTYPES.items():
        np.save(folder / f"{name}.npy", np.asarray(getattr(segment, name), dtype))
    for name, attribute in COLUMNS.items():
        getattr(segment, attribute).write(folder, name)


def require_finite(segment: Segment) -> None:
    """Refuse NaN and infinity, naming the first bad video.

    Raises:
        StoreError: There is one.
    """
    for name in ("video_embeddings", "moment_embeddings"):
        bad = non_finite_rows(getattr(segment, name))
        if bad.size:
            row = int(bad[0])
            if name == "moment_embeddings":
                row = int(np.searchsorted(segment.moment_offsets, row, side="right")) - 1
            raise StoreError(
                f"video {segment.video_ids[row]!r} has an embedding that is not finite, which no search "
                "could rank - check its features with `svb verify`, or train the run again"
            )


def non_finite_rows(embeddings: NDArray[np.float16], block: int = 65536) -> NDArray[np.int64]:
    """Return the rows of `(N, D)` that hold NaN or infinity."""
    # A row's sum in float32 is finite exactly when its float16 values are, without a mask of their size.
    bad = [
        begin + np.flatnonzero(~np.isfinite(embeddings[begin : begin + block].sum(axis=1, dtype=np.float32)))
        for begin in range(0, len(embeddings), block)
    ]
    return np.concatenate(bad).astype(np.int64) if bad else np.empty(0, np.int64)


def open_segments(folder: Path, manifest: Mapping[str, Any], *, with_vectors: bool = True) -> list[Segment]:
    """Map an index's segments: no vector is read.

    Args:
        folder: The index's.
        manifest: The index's manifest.
        with_vectors: Map the embeddings too; otherwise zeros that take no memory stand for them.

    Raises:
        StoreError: A file is missing, or is not what was written as far as its size and header tell.
    """
    size = int(manifest["embedding_size"])
    return [open_segment(folder, entry, size, with_vectors=with_vectors) for entry in manifest["segments"]]


def open_segment(
    folder: Path, entry: Mapping[str, Any], embedding_size: int, *, with_vectors: bool = True
) -> Segment:
    """Map one segment; see `open_segments`."""
    path = folder / "segments" / entry["key"]
    elsewhere = {} if with_vectors else {"video_embeddings": entry["videos"], "moment_embeddings": entry["moments"]}
    try:
        require_sizes(path, {name: size for name, size in entry["sizes"].items() if name[:-4] not in elsewhere})
        parts: dict[str, Any] = {name: open_array(path / f"{name}.npy") for name in DTYPES if name not in elsewhere}
        for name, rows in elsewhere.items():
            parts[name] = np.broadcast_to(np.float16(0), (rows, embedding_size))
        parts |= {attribute: StringColumn.open(path, name) for name, attribute in COLUMNS.items()}
        segment = Segment(key=entry["key"], deleted=_open_deleted(folder, entry), **parts)
        _require_fitting(segment, entry, embedding_size)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} is damaged ({error}) - restore it, or make it again with `svb index`") from error
    return segment


def require_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Check files' sizes, which costs no reading.

    Raises:
        OSError: A file is missing.
        ValueError: One has another size.
    """
    for name, expected in sizes.items():
        size = (folder / name).stat().st_size
        if size != expected:
            raise ValueError(f"{name} has {size} bytes, not {expected}")


def write_tombstones(folder: Path, rows: NDArray[np.int64]) -> None:
    """Write which of a segment's videos no longer count, ascending."""
    np.save(folder / "videos.npy", rows)


def _open_deleted(folder: Path, entry: Mapping[str, Any]) -> NDArray[np.int64]:
    if entry["deleted"] is None:
        return np.empty(0, np.int64)
    path = folder / "tombstones" / entry["deleted"]["key"]
    require_sizes(path, entry["deleted"]["sizes"])
    rows: NDArray[np.int64] = np.load(
        path / "videos.npy", allow_pickle=False
    )  # read, being small, and needed by every search
    if rows.dtype != np.int64 or rows.ndim != 1 or (np.diff(rows, prepend=-1) <= 0).any():
        raise ValueError(f"the tombstones in {path} are not ascending rows")
    if len(rows) and rows[-1] >= entry["videos"]:
        raise ValueError(f"the tombstones in {path} name rows beyond {entry['videos']} videos")
    return rows


def _require_fitting(segment: Segment, entry: Mapping[str, Any], embedding_size: int) -> None:
    V, M = int(entry["videos"]), int(entry["moments"])
    shapes = {
        "video_embeddings": (V, embedding_size),
        "moment_embeddings": (M, embedding_size),
        "moment_offsets": (V + 1,),
        "moment_seconds": (M, 2),
        "duration_seconds": (V,),
        "size_bytes": (V,),
        "mtime_ns": (V,),
    }
    for name, shape in shapes.items():
        array = getattr(segment, name)
        if array.shape != shape or array.dtype != DTYPES[name]:
            raise ValueError(f"{name} is {array.shape} of {array.dtype}, not {shape} of {np.dtype(DTYPES[name])}")
    if segment.moment_offsets[0] != 0 or segment.moment_offsets[-1] != M:
        raise ValueError(f"moment_offsets do not cover {M} moments")
    for attribute in COLUMNS.values():
        if len(getattr(segment, attribute)) != V:
            raise ValueError(f"{attribute} has {len(getattr(segment, attribute))} values for {V} videos")


# --- columns of strings


@dataclass(frozen=True)
class StringColumn:
    """N strings, mapped from their files or in memory.

    <name>_utf8.npy      (B,) uint8, the strings' UTF-8 one after the other
    <name>_offsets.npy   (N + 1,) int64, string i is bytes offsets[i]:offsets[i + 1]
    """

    utf8: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringColumn:
        """Return a column in memory."""
        encoded = [string.encode() for string in strings]
        offsets = np.concatenate([[0], np.cumsum([len(string) for string in encoded])]).astype(np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a column of {len(self)} strings")
        return self.utf8[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def tolist(self) -> list[str]:
        """Return all strings; many times faster than row by row."""
        held, ends = self.utf8.tobytes(), self.offsets.tolist()
        return [held[begin:end].decode() for begin, end in pairwise(ends)]

    def write(self, folder: Path, name: str) -> None:
        """Write the column's two files into a folder."""
        np.save(folder / f"{name}_utf8.npy", self.utf8)
        np.save(folder / f"{name}_offsets.npy", self.offsets)

    @classmethod
    def open(cls, folder: Path, name: str) -> StringColumn:
        """Map a column's files; nothing but their ends is read.

        Raises:
            OSError: A file is missing.
            ValueError, EOFError: A file is damaged, or the two do not belong together.
        """
        utf8, offsets = (open_array(folder / f"{name}_{kind}.npy") for kind in ("utf8", "offsets"))
        if utf8.dtype != np.uint8 or offsets.dtype != np.int64 or utf8.ndim != 1 or offsets.ndim != 1:
            raise ValueError(f"{name} is of {utf8.dtype} and {offsets.dtype}, expected uint8 and int64")
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(utf8):
            raise ValueError(f"{name}'s offsets do not cover its {len(utf8)} bytes")
        return cls(utf8, offsets)


def open_array(path: Path) -> NDArray[Any]:
    """Map a .npy file; nothing but its header is read.

    Raises:
        OSError: It is missing.
        ValueError, EOFError: It is damaged.
    """
    # A plain view: numpy's own memmap class makes every single index many times slower.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
