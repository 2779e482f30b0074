"""A request -> the nearest videos, their best moments and the best captions: the main path of a search."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from svb.errors import InputError, StoreError, UsageError
from svb.retrieve.answer import CONFIDENCES, Answer, CaptionResult, SearchRequest, VideoResult
from svb.retrieve.model.query_embedder import QueryEmbedder
from svb.retrieve.searching.catalog import Catalog, allowed_videos
from svb.retrieve.searching.ivf import open_ivf
from svb.retrieve.searching.rank import EmbeddedRequest, rank_videos, require_cosines
from svb.retrieve.searching.results import VideoInfo, build_results, info_of, video_key
from svb.retrieve.searching.vectors import CaptionPools, SegmentVectors, Vectors
from svb.retrieve.stored.calibration import Calibration, open_calibration
from svb.retrieve.stored.manifest import read_manifest, read_whole
from svb.retrieve.stored.metadata import Metadata
from svb.retrieve.stored.segment import open_segments

if TYPE_CHECKING:
    from svb.retrieve.searching.said import SpeechSearch

T = TypeVar("T")


class Searcher:
    """One generation of an index, opened for searching; threads may share it.

    Args:
        path: The index's folder.
        device: Device that embeds images and videos; a GPU that FAISS can use also searches after some queries.
        previous: The searcher of another generation of the index. If the model is the same, what it has loaded to
            embed queries is used further, and with it its device.
        open_server: Opens the vectors of an index whose manifest says that a server searches them.

    Raises:
        InputError: There is no index.
        StoreError: It is damaged or has another format.
    """

    def __init__(
        self,
        path: Path | str,
        device: str = "auto",
        *,
        previous: Searcher | None = None,
        open_server: OpenServer | None = None,
    ) -> None:
        self.path = Path(path)
        self._device, self._open_server = device, open_server
        embedder = None if previous is None else previous._opened.embedder
        self._opened: OpenedIndex = read_whole(
            self.path,
            lambda manifest: _open_index(self.path, manifest, device, embedder, open_server),
        )
        self._seen: tuple[int, int, int] | None = None

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Return the manifest of this generation."""
        return self._opened.manifest

    @property
    def generation(self) -> int:
        """Return the number that grows with every change of the index."""
        return int(self._opened.manifest["generation"])

    @property
    def vectors(self) -> Vectors:
        """Return the vectors that are searched."""
        return self._opened.vectors

    @property
    def catalog(self) -> Catalog:
        """Return what the index knows about its videos."""
        return self.vectors.catalog

    def __len__(self) -> int:
        """Return the number of videos."""
        return int(self._opened.manifest["videos"])

    def search(self, request: SearchRequest) -> Answer:
        """Answer a request.

        Raises:
            UsageError: The value of a filter is not valid.
            InputError: A text is empty or longer than the text tower reads, a file has no picture, or `like` or a
                column is not in the index.
            MismatchError: The weights here are not those that made the index.
            StoreError: The index is damaged.
        """
        return self._ask(lambda searcher: searcher._timed(request))

    def search_embedding(self, embedding: NDArray[np.float32], request: SearchRequest) -> Answer:
        """Answer a request whose main query is already embedded, as `(D,)`; errors as in `search`."""
        size = int(self.manifest["embedding_size"])
        if embedding.shape != (size,):
            raise UsageError(f"the embedding is {embedding.shape} - expected ({size},), the index's size")
        length = float(np.linalg.norm(embedding.astype(np.float64)))
        if not 0 < length < np.inf:  # False of NaN as well
            raise UsageError(f"the embedding has the length {length} - expected finite numbers, not all of them 0")
        unit = (embedding / length).astype(np.float32)
        return self._ask(lambda searcher: searcher._timed(request, unit))

    def embed_text(self, text: str) -> NDArray[np.float32]:
        """Return the `(D,)` embedding of a text; errors as in `search`."""
        return self._ask(lambda searcher: searcher._opened.embedder.embed_text(text))

    def video(self, key: str) -> VideoInfo | None:
        """Return what the index knows about a video, by its `video_key`; None if it has no such video."""
        row = self._rows_of_keys.get(key)
        return None if row is None else info_of(self.catalog, self._opened.metadata, row)

    def is_stale(self) -> bool:
        """Tell whether the index has changed since it was opened; False if its manifest cannot be read."""
        try:
            stat = (self.path / "manifest.json").stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen == self._seen:
                return False
            if read_manifest(self.path) != self.manifest:
                return True
        except (OSError, StoreError, InputError):
            return False
        self._seen = seen
        return False

    def _ask(self, question: Callable[[Searcher], T]) -> T:
        """Return the answer of this generation, or of the next if a commit removed a file before it was read."""
        try:
            return question(self)
        except StoreError:
            if not self.is_stale():
                raise
        return Searcher(self.path, self._device, open_server=self._open_server)._ask(question)

    def _timed(self, request: SearchRequest, main: NDArray[np.float32] | None = None) -> Answer:
        """Answer a request, and say how long its parts took."""
        started, loaded = time.perf_counter(), self._opened.embedder.load_seconds
        embedded = self._embed(request, main)
        embed_seconds = time.perf_counter() - started
        load_seconds = self._opened.embedder.load_seconds - loaded
        answer = self._answer(request, embedded)
        total = time.perf_counter() - started
        took = {
            "embed": embed_seconds,
            "load": min(load_seconds, embed_seconds),  # other threads may have waited too
            "scan": total - embed_seconds,
            "total": total,
        }
        return replace(answer, elapsed_seconds=took)

    def _embed(self, request: SearchRequest, main: NDArray[np.float32] | None = None) -> EmbeddedRequest:
        """Embed the queries of a request; `main`, if given, is the main one."""
        embed_text = self._opened.embedder.embed_text
        return EmbeddedRequest(
            self._embed_main(request) if main is None else main,
            tuple(embed_text(text, "a text to match as well") for text in request.plus),
            tuple(embed_text(text, "a text not to match") for text in request.without),
        )

    def _embed_main(self, request: SearchRequest) -> NDArray[np.float32]:
        if request.text is not None:
            return self._opened.embedder.embed_text(request.text)
        if request.like is None:
            return self._opened.embedder.embed_media(request)
        row = np.array([self._row_of(request.like)])
        embedding: NDArray[np.float32] = self.vectors.embeddings(row, by="video")[0]
        length = np.linalg.norm(embedding)
        require_cosines(np.array([length, 1 / length], np.float32))
        return embedding / length

    def _answer(self, request: SearchRequest, embedded: EmbeddedRequest) -> Answer:
        vectors = self._opened.exact_vectors if request.exact else self.vectors
        if request.exact and not vectors.exact:
            raise StoreError(
                f"an exact search needs all vectors, and {self.path} does not hold them - search where `svb index` "
                "made it, or let the server search with FLAT"
            )
        allowed, about_filters = self._allowed(request)
        compared = self.catalog.counted(allowed)
        notes = [about_filters, self._opened.note]
        speech, results, confidence = self._speech_for(request), list[VideoResult](), CONFIDENCES[-1]
        if speech is not None and compared.any():
            from svb.retrieve.searching.fused import fused_results

            results, confidence, more = fused_results(
                vectors, self._opened.metadata, speech, request, embedded, allowed, self._opened.calibration
            )
            notes += more
        elif compared.any():
            query = embedded.query(vectors, request.ranked_by)
            found = rank_videos(
                vectors, query, request.k, by=request.ranked_by, allowed=allowed, folded=request.fold
            )
            results, confidence = build_results(
                self.vectors, self._opened.metadata, request, embedded, found, self._opened.calibration
            )
        num_videos, num_windows = int(compared.sum()), int(self.catalog.moment_counts[compared].sum())
        return Answer(
            request=request,
            results=tuple(results),
            captions=tuple(self._captions(request, embedded)),
            confidence=confidence,
            num_videos=num_videos,
            num_windows=num_windows,
            exact=vectors.exact,
            recall=vectors.recall,
            generation=self.generation,
            elapsed_seconds={},
            notes=tuple(note for note in notes if note is not None),
        )

    def _speech_for(self, request: SearchRequest) -> SpeechSearch | None:
        """Return the speech to search; None if only pictures are searched.

        Raises:
            InputError: The request asks for speech, and the index has none.
        """
        asks = request.search_in in ("speech", "both") or request.language is not None
        if request.text is None or request.search_in == "picture":
            return None
        if self._speech is None and asks:
            raise InputError(
                f"{self.path} holds nothing that is said - run `svb index` on it again, which reads subtitles "
                "beside and inside the videos; `svb transcribe` makes transcripts where there are none"
            )
        return self._speech

    @cached_property
    def _speech(self) -> SpeechSearch | None:
        entry = next((entry for entry in self.manifest.get("speech", []) if entry["windows"]), None)
        if entry is None:
            return None
        from svb.retrieve.searching.said import SpeechSearch  # an index without speech needs no SQLite

        return SpeechSearch(self.path, entry, self.catalog)

    def _allowed(self, request: SearchRequest) -> tuple[NDArray[np.bool_] | None, str | None]:
        """Return which videos count, and why, if none does."""
        if not self.catalog.alive.any():
            return None, "the index holds no videos - add some with `svb index`"
        allowed, nothing = allowed_videos(self.catalog, request, self._opened.metadata)
        if request.like is not None:
            allowed = self.catalog.alive.copy() if allowed is None else allowed
            allowed[self._row_of(request.like)] = False
        return allowed, nothing

    def _captions(self, request: SearchRequest, embedded: EmbeddedRequest) -> list[CaptionResult]:
        if request.text is not None or not request.num_captions:
            return []
        return self._opened.pools.nearest(embedded.main, request.num_captions)

    def _row_of(self, video_id: str) -> int:
        row = self.catalog.row_of(video_id)
        if row is None:
            raise InputError(f"the index has no video {video_id!r} - name one as `svb search` prints it")
        return row

    @cached_property
    def _rows_of_keys(self) -> dict[str, int]:
        video_ids = self.catalog.video_ids
        return {video_key(video_ids[row]): row for row in np.flatnonzero(self.catalog.alive).tolist()}


# --- opening


@dataclass(frozen=True)
class OpenedIndex:
    """One generation of an index: everything a search reads, mapped.

    Attributes:
        manifest: The manifest of this generation.
        vectors: All rows, or an approximate index over them.
        exact_vectors: All rows; equal to `vectors` if the embeddings do not lie here.
        note: What the user should know about the search; None if nothing.
    """

    manifest: dict[str, Any]
    vectors: Vectors
    exact_vectors: Vectors
    note: str | None
    pools: CaptionPools
    metadata: Metadata
    embedder: QueryEmbedder
    calibration: Calibration | None


class ServerVectors(Vectors, Protocol):
    """`Vectors` that a server searches; `num_missing` counts the videos that it lacks."""

    @property
    def num_missing(self) -> int: ...


# Opens the vectors of an index, by its folder and manifest.
OpenServer = Callable[[Path, dict[str, Any]], ServerVectors]


def _open_index(
    folder: Path,
    manifest: dict[str, Any],
    device: str,
    previous: QueryEmbedder | None,
    open_server: OpenServer | None,
) -> OpenedIndex:
    """Map what a manifest names; no vector is read.

    Args:
        folder: The index's.
        manifest: The manifest of a generation.
        device: Device that embeds images and videos, and that searches if it is a GPU.
        previous: Embedder of another generation on the same device; kept if the model is the same.
        open_server: Opens the vectors of an index whose manifest says that a server searches them.

    Raises:
        StoreError: A file is missing or damaged, or a server has the vectors and `open_server` is None.
    """
    exact: Vectors
    approximate: Vectors | None = None
    note: str | None = None
    if manifest["vectors"] is not None:
        if open_server is None:
            raise StoreError(
                f"a server has the vectors of {folder} - open the index with svb.retrieve.search.open_searcher"
            )
        exact = remote = open_server(folder, manifest)
        if remote.num_missing:
            note = f"{remote.num_missing} videos are not on the server yet: `svb index` has not finished"
        if not remote.exact:
            approximate = remote
            with contextlib.suppress(StoreError):  # the embeddings may not be here
                exact = SegmentVectors(open_segments(folder, manifest), device)
    else:
        segments = open_segments(folder, manifest)
        exact = SegmentVectors(segments, device)
        approximate, note = open_ivf(folder, exact, segments)
    return OpenedIndex(
        manifest,
        approximate or exact,
        exact,
        note,
        CaptionPools(folder, manifest),
        Metadata.open(folder, manifest),
        previous if previous is not None and previous.fits(manifest) else QueryEmbedder(folder, manifest, device),
        open_calibration(folder, manifest),
    )
