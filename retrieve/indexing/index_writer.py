"""The one writer of an index: segments, tombstones and other parts, a commit at a time."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.config import differing_fields
from svb.data.publish import FolderLock
from svb.errors import MismatchError, StoreError
from svb.retrieve.indexing.index_plan import Place
from svb.retrieve.indexing.merge import choose_merges, live_moments, write_merged
from svb.retrieve.stored.manifest import OLD_PARTS, commit, publish_part, read_manifest, remove_unnamed
from svb.retrieve.stored.segment import Segment, open_segment, write_segment

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Be an index's one writer.

    Raises:
        StoreError: Another process is.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out)
    try:
        lock.take()
        yield
    finally:
        lock.close()


class IndexWriter:
    """An index that grows; every commit leaves it whole. Call it inside `writing`.

    Args:
        out: The index's folder.
        rebuild: Begin with nothing, and let what is there alone until the first commit.

    Attributes:
        before: The manifest that is there, whose settings go on; empty where there is none that can be read.
        draft: The next manifest, `videos`, `moments_total` and `generation` apart: parts may be put into it.
        segments: Mapped, as in the draft; a `Place` counts through them, and stays right until `merge`.

    Raises:
        StoreError: The manifest that is there is damaged.
    """

    def __init__(self, out: Path, *, rebuild: bool = False) -> None:
        self._out = out
        self.before: dict[str, Any] = {}
        if (out / "manifest.json").exists():
            try:
                self.before = read_manifest(out)
            except StoreError as error:
                if not rebuild:
                    raise
                logger.info(
                    f"{error}; nothing of how it was made is known, so what is not said now is as by default"
                )
        self._generation = int(self.before.get("generation", 0))
        self._committed = self.before if self.before and not rebuild else None
        self.draft: dict[str, Any] = _empty() if self._committed is None else copy.deepcopy(self._committed)
        for field in (*OLD_PARTS, "normalise"):
            self.draft.pop(field, None)
        self.segments: list[Segment] = []
        if self._committed is not None:
            self._open_segments()
            remove_unnamed(out, self._committed)  # what a run left that was killed

    @property
    def is_new(self) -> bool:
        """Tell whether nothing was committed before."""
        return self._committed is None

    def require_model(self, model: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
        """Refuse to put what two models made into one index.

        Raises:
            MismatchError: Model or moments are others than the index's; names what differs, and both ways out.
        """
        held = {"model": self.draft["model"], "moments": self.draft["moments"]}
        wanted: dict[str, Any] = {"model": model, "moments": moments}
        if held["model"]["kind"] != model["kind"]:  # of which the rest has other fields altogether
            held, wanted = ({"model": {"kind": part["model"]["kind"]}} for part in (held, wanted))
        lines = differing_fields(held, wanted)
        if lines:
            raise MismatchError(
                f"{self._out} was made with another model or other moments ({'; '.join(lines)}) - what they give "
                "cannot be compared: write to another folder with -o, or make all of it again with --rebuild"
            )

    def add(self, segment: Segment) -> None:
        """Publish a segment's files and put it into the draft."""
        entry = publish_part(self._out, "segments", lambda folder: write_segment(folder, segment))
        entry |= {"videos": segment.num_videos, "moments": segment.num_moments, "deleted": None}
        self.draft["embedding_size"] = segment.embedding_size
        self.draft["segments"].append(entry)
        self.segments.append(self._open(entry))

    def delete(self, places: Iterable[Place]) -> None:
        """Publish tombstones of videos and put them into the draft."""
        rows_of: dict[int, list[int]] = {}
        for s, row in places:
            rows_of.setdefault(s, []).append(row)
        for s, rows in rows_of.items():
            segment, entry = self.segments[s], self.draft["segments"][s]
            deleted = np.union1d(segment.deleted, np.array(rows, np.int64))
            part = publish_part(self._out, "tombstones", functools.partial(_write_tombstones, deleted))
            moments = int(np.diff(segment.moment_offsets)[deleted].sum())
            entry["deleted"] = {**part, "videos": len(deleted), "moments": moments}
            self.segments[s] = self._open(entry)

    def merge(self) -> None:
        """Merge small segments in the draft and leave out what was deleted, where that pays."""
        for begin, end in reversed(choose_merges(self.segments)):
            entries = self._merged(self.segments[begin:end])
            self.draft["segments"][begin:end] = entries
            self.segments[begin:end] = [self._open(entry) for entry in entries]

    def commit(self) -> bool:
        """Make the draft the index; returns whether there was anything to write."""
        entries = self.draft["segments"]
        deleted = [entry["deleted"] or {"videos": 0, "moments": 0} for entry in entries]
        self.draft["videos"] = sum(e["videos"] - d["videos"] for e, d in zip(entries, deleted, strict=True))
        self.draft["moments_total"] = sum(
            e["moments"] - d["moments"] for e, d in zip(entries, deleted, strict=True)
        )
        self.draft["generation"] = self._generation
        if self.draft == self._committed:
            return False
        self._generation += 1
        self.draft["generation"] = self._generation
        commit(self._out, self.draft)
        self._committed = copy.deepcopy(self.draft)
        return True

    def _open_segments(self) -> None:
        for entry in list(self.draft["segments"]):
            try:
                self.segments.append(self._open(entry))
            except StoreError as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                    raise  # what cannot be read now may be whole
                logger.info(
                    f"segments/{entry['key']} is damaged ({error.__cause__ or error}): its {entry['videos']:,} "
                    "videos are embedded again, as far as the store has them"
                )
                self.draft["segments"].remove(entry)

    def _merged(self, segments: list[Segment]) -> list[dict[str, Any]]:
        """Return the entry of segments copied into one; none where all their videos were deleted."""
        counts = [0, 0]

        def write(folder: Path) -> None:
            counts[:] = write_merged(folder, segments)

        if not sum(map(live_moments, segments)):
            return []
        entry = publish_part(self._out, "segments", write)
        return [{**entry, "videos": counts[0], "moments": counts[1], "deleted": None}]

    def _open(self, entry: Mapping[str, Any]) -> Segment:
        return open_segment(self._out, entry, int(self.draft["embedding_size"]))


def _write_tombstones(rows: NDArray[np.int64], folder: Path) -> None:
    np.save(folder / "videos.npy", rows)


def _empty() -> dict[str, Any]:
    parts: dict[str, Any] = {part: [] for part in ("segments", "captions", "metadata", "heads", "text")}
    return {"format": "svb index", "embedding_size": 0, **parts, "vectors": None}
