"""What is said in an index's videos: cues with their times, in tracks, joined to windows that are searched.

The files lie in `speech/<key>/` of an index, for S tracks, C cues and W windows, each in order of the one before:

video_id, source, language  columns of S strings, see `StringColumn`: the video, the file that the track was read
                            from (`#2` after it is the number of a stream), and its language, empty if not known
track_kind.npy              (S,) int8, a number in `KINDS`
track_state.npy             (S, 2) int64, size in bytes and mtime_ns of that file when it was read
track_offsets.npy           (S + 1,) int64, track s holds cues offsets[s]:offsets[s + 1]; a file without any cue has
                            a track too, so that it is not read again
cue                         column of C strings
cue_seconds.npy             (C, 2) float64, when each is said, half-open; NaN if not known
window_offsets.npy          (W + 1,) int64, window w joins cues offsets[w]:offsets[w + 1], all of one track
window_embeddings.npy       (W, D) float16, L2-normalised before rounding
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.retrieve.stored.manifest import part_folder, publish_part
from svb.retrieve.stored.segment import StringColumn, open_array, require_sizes

# A track lies beside the video, inside it, or was made by `svb transcribe`.
KINDS = ("sidecar", "stream", "transcript")
# What is said within this time is searched as one text.
WINDOW_SECONDS = 10.0
# No window crosses a silence.
SILENCE_SECONDS = 5.0
# Cues without times, the lines of a text file, are joined up to this length.
WINDOW_LETTERS = 200

_COLUMNS = {"video_id": "video_ids", "source": "sources", "language": "languages", "cue": "cues"}
_DTYPES = {
    "track_kind": np.int8,
    "track_state": np.int64,
    "track_offsets": np.int64,
    "cue_seconds": np.float64,
    "window_offsets": np.int64,
    "window_embeddings": np.float16,
}


@dataclass(frozen=True)
class Cue:
    """Words, and the half-open interval of seconds in which they are said; None if the file has no times."""

    text: str
    begin_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class Track:
    """The cues of one file or stream, in order of time; `state` is the file's size and mtime_ns as it was read."""

    video_id: str
    source: str
    language: str
    kind: str
    state: tuple[int, int]
    cues: Sequence[Cue]


@dataclass(frozen=True)
class Speech:
    """All tracks of an index, in memory or mapped from their files; see the layout above."""

    video_ids: StringColumn
    sources: StringColumn
    languages: StringColumn
    track_kind: NDArray[np.int8]
    track_state: NDArray[np.int64]
    track_offsets: NDArray[np.int64]
    cues: StringColumn
    cue_seconds: NDArray[np.float64]
    window_offsets: NDArray[np.int64]
    window_embeddings: NDArray[np.float16]

    @property
    def num_tracks(self) -> int:
        """Return S."""
        return len(self.track_kind)

    @property
    def num_windows(self) -> int:
        """Return W."""
        return len(self.window_embeddings)

    def track_of_windows(self) -> NDArray[np.int64]:
        """Return `(W,)`, the track of each window."""
        tracks = np.searchsorted(self.track_offsets, self.window_offsets[:-1], side="right") - 1
        return tracks.astype(np.int64)

    def cue_texts(self, begin: int, end: int) -> list[str]:
        """Return the texts of some cues; this is many times faster than one by one."""
        edges = self.cues.offsets[begin : end + 1]
        held = self.cues.utf8[edges[0] : edges[-1]].tobytes()
        return [held[a:b].decode() for a, b in pairwise((edges - edges[0]).tolist())]

    def window_texts(self) -> list[str]:
        """Return the joined cues of each window."""
        cues = self.cues.tolist()
        return [" ".join(cues[begin:end]) for begin, end in pairwise(self.window_offsets.tolist())]


def speech_of(tracks: Sequence[Track], embeddings: NDArray[np.float16], windows: Sequence[Sequence[int]]) -> Speech:
    """Return tracks as columns.

    Args:
        tracks: S tracks.
        embeddings: `(W, D)` of their windows.
        windows: How many cues each window of each track has, as `cut_into_windows` returns it.
    """
    cues = [cue for track in tracks for cue in track.cues]
    seconds = np.array([(cue.begin_seconds, cue.end_seconds) for cue in cues], np.float64)  # None becomes NaN
    return Speech(
        StringColumn.of(track.video_id for track in tracks),
        StringColumn.of(track.source for track in tracks),
        StringColumn.of(track.language for track in tracks),
        np.array([KINDS.index(track.kind) for track in tracks], np.int8),
        np.array([track.state for track in tracks], np.int64).reshape(-1, 2),
        _offsets(len(track.cues) for track in tracks),
        StringColumn.of(cue.text for cue in cues),
        seconds.reshape(-1, 2),
        _offsets(count for of_track in windows for count in of_track),
        embeddings.astype(np.float16),
    )


def select_tracks(speech: Speech, tracks: Sequence[int]) -> Speech:
    """Return some tracks of a speech, with their windows, in the order given."""
    cue_edges = speech.track_offsets
    window_edges = np.searchsorted(speech.window_offsets, cue_edges)

    def strings(column: StringColumn, edges: NDArray[np.integer]) -> StringColumn:
        lengths = _take(np.diff(column.offsets), edges, tracks)
        return StringColumn(_take(column.utf8, column.offsets[edges], tracks), _offsets(lengths))

    each = np.arange(speech.num_tracks + 1)
    rows = np.array(tracks, np.int64)
    return Speech(
        strings(speech.video_ids, each),
        strings(speech.sources, each),
        strings(speech.languages, each),
        speech.track_kind[rows],
        speech.track_state[rows],
        _offsets(np.diff(cue_edges)[rows]),
        strings(speech.cues, cue_edges),
        _take(speech.cue_seconds, cue_edges, tracks),
        _offsets(_take(np.diff(speech.window_offsets), window_edges, tracks)),
        _take(speech.window_embeddings, window_edges, tracks),
    )


def join_speech(first: Speech, second: Speech) -> Speech:
    """Return the tracks of both, one after the other."""
    parts: dict[str, Any] = {}
    for name in Speech.__dataclass_fields__:
        a, b = getattr(first, name), getattr(second, name)
        if isinstance(a, StringColumn):
            parts[name] = StringColumn(np.concatenate([a.utf8, b.utf8]), _joined(a.offsets, b.offsets))
        elif name.endswith("_offsets"):
            parts[name] = _joined(a, b)
        elif name == "window_embeddings" and not (len(a) and len(b)):  # one without windows may have another D
            parts[name] = a if len(a) else b
        else:
            parts[name] = np.concatenate([a, b])
    return Speech(**parts)


def cut_into_windows(cues: Sequence[Cue]) -> list[int]:
    """Return how many cues each window joins: what is said within ten seconds, without a silence in it."""
    counts: list[int] = []
    first = until = letters = 0.0
    for cue in cues:
        if cue.begin_seconds is None or cue.end_seconds is None:
            letters += len(cue.text) + 1
            fits = letters <= WINDOW_LETTERS
        else:
            fits = cue.end_seconds - first <= WINDOW_SECONDS and cue.begin_seconds - until <= SILENCE_SECONDS
        if counts and fits:
            counts[-1] += 1
            until = max(until, cue.end_seconds or 0.0)
        else:
            counts.append(1)
            first, until, letters = cue.begin_seconds or 0.0, cue.end_seconds or 0.0, len(cue.text) + 1.0
    return counts


def publish_speech(out: Path, speech: Speech) -> dict[str, Any]:
    """Write all tracks into an index and return their entry for the manifest, under `speech`.

    Raises:
        StoreError: An embedding is not finite.
    """
    if not np.isfinite(speech.window_embeddings.sum(axis=1, dtype=np.float32)).all():
        raise StoreError(
            "what is said has an embedding that is not finite, which no search could rank - train the run again"
        )

    def write(folder: Path) -> None:
        for name, attribute in _COLUMNS.items():
            getattr(speech, attribute).write(folder, name)
        for name, dtype in _DTYPES.items():
            np.save(folder / f"{name}.npy", np.asarray(getattr(speech, name), dtype))

    counts = {"tracks": speech.num_tracks, "cues": len(speech.cues), "windows": speech.num_windows}
    spoken = np.flatnonzero(np.diff(speech.track_offsets))
    languages = sorted({speech.languages[track] for track in spoken.tolist()} - {""})
    return {**publish_part(out, "speech", write), **counts, "languages": languages}


def open_speech(folder: Path, entry: Mapping[str, Any]) -> Speech:
    """Map what is said; no vector is read.

    Args:
        folder: The index's folder.
        entry: The speech's entry in the manifest.

    Raises:
        StoreError: A file is missing, or is not what was written as far as its size and header tell.
    """
    path = part_folder(folder, "speech", entry)
    try:
        require_sizes(path, entry["sizes"])
        parts: dict[str, Any] = {held: StringColumn.open(path, name) for name, held in _COLUMNS.items()}
        parts |= {name: open_array(path / f"{name}.npy") for name in _DTYPES}
        speech = Speech(**parts)
        _require_fitting(speech, entry)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} is damaged ({error}) - restore it, or make it again with `svb index`") from error
    return speech


def _require_fitting(speech: Speech, entry: Mapping[str, Any]) -> None:
    S, C, W = (int(entry[name]) for name in ("tracks", "cues", "windows"))
    shapes = {
        "track_kind": (S,),
        "track_state": (S, 2),
        "track_offsets": (S + 1,),
        "cue_seconds": (C, 2),
        "window_offsets": (W + 1,),
        "window_embeddings": (W, speech.window_embeddings.shape[-1]),
    }
    for name, shape in shapes.items():
        array = getattr(speech, name)
        if array.shape != shape or array.dtype != _DTYPES[name]:
            raise ValueError(f"{name} is {array.shape} of {array.dtype}, not {shape} of {np.dtype(_DTYPES[name])}")
    lengths = {len(speech.video_ids), len(speech.sources), len(speech.languages)}
    if lengths != {S} or len(speech.cues) != C:
        raise ValueError(f"columns of {sorted(lengths)} tracks and {len(speech.cues)} cues, not {S} and {C}")
    for offsets, least in ((speech.track_offsets, 0), (speech.window_offsets, 1)):
        if offsets[0] != 0 or offsets[-1] != C or (np.diff(offsets) < least).any():
            raise ValueError(f"offsets do not cover {C} cues")


def speech_problems(speech: Speech) -> list[str]:
    """Return what does not fit together in mapped files whose hashes are right, a line each."""
    problems = []
    edges = set(speech.window_offsets.tolist())
    if not edges.issuperset(speech.track_offsets.tolist()):
        problems.append("a window crosses two tracks")
    seconds = speech.cue_seconds
    if (seconds[:, 0] >= seconds[:, 1]).any() or (np.isnan(seconds[:, 0]) != np.isnan(seconds[:, 1])).any():
        problems.append("a cue has no length")
    return problems


def _offsets(counts: Iterable[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    lengths = counts if isinstance(counts, np.ndarray) else np.array(list(counts), np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _joined(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([first, second[1:] + first[-1]])


def _take(array: NDArray[Any], edges: NDArray[np.integer], rows: Sequence[int]) -> NDArray[Any]:
    """Return the parts `array[edges[row]:edges[row + 1]]` of some rows, one after the other."""
    return np.concatenate([array[:0], *(array[edges[row] : edges[row + 1]] for row in rows)])


def clock_of(seconds: float) -> str:
    """Return a time as WebVTT has it."""
    thousandths = math.floor(seconds * 1000 + 0.5)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"
