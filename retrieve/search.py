"""`svb search`: a text or a video -> the nearest videos, their best moments, the best captions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from svb.data.publish import hash_file, published_file
from svb.device import choose_device
from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.retrieve.embedder import (
    Embedder,
    embed_file,
    heads_embedder,
    load_matching_text_encoder,
    zero_shot_embedder,
)
from svb.retrieve.index import read_manifest
from svb.retrieve.segment import Segment, read_segment


@dataclass(frozen=True)
class Moment:
    """An interval `[begin_seconds, end_seconds)` of a video, and how well it fits, -1 to 1."""

    begin_seconds: float
    end_seconds: float
    score: float


@dataclass(frozen=True)
class VideoResult:
    """A video found.

    Attributes:
        rank: From 1.
        score: Cosine similarity of the query with the video, or with the moment where moments are ranked.
        video_id: As in the store.
        source_path: Where its file lay when it was extracted.
        moment: Its best moment.
    """

    rank: int
    score: float
    video_id: str
    source_path: str
    moment: Moment

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CaptionResult:
    """A caption found: rank from 1, cosine similarity, and the video it was written about."""

    rank: int
    score: float
    caption: str
    video_id: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Searcher:
    """An index opened for searching; the text encoder is loaded with the first text.

    Search is exact: FAISS compares the query with every row.

    Args:
        path: The index's folder.
        device: Where queries are embedded; the search itself runs on the CPU.

    Raises:
        InputError: There is no index.
        StoreError: It is damaged or of a newer format.
    """

    def __init__(self, path: Path | str, device: str = "auto") -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._device = choose_device(device)
        self._segment = self._read_segment()
        self._opened: dict[str, faiss.Index] = {}
        self._text_encoder: TextEncoder | None = None
        self._embedder: Embedder | None = None

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self._segment.videos)

    def search_text(self, query: str, k: int = 10, *, by: str = "video") -> list[VideoResult]:
        """Return the K best videos for a text, best first; all of them where there are fewer.

        Args:
            query: What to look for.
            k: K.
            by: `video` ranks whole videos, `moment` single moments: a video may come several times.

        Raises:
            UsageError: K is less than 1, or `by` is neither.
            InputError: The query is empty, not Unicode, or longer than the text encoder reads.
            MismatchError: The text encoder here is not the one the index was made with.
        """
        _check_request(k, by)
        if not query.strip():
            raise InputError("the query is empty - say what to look for")
        try:
            query.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
            raise InputError(f"the query {query!r} is not UTF-8 - type it in a UTF-8 terminal") from error
        encoder = self._load_text_encoder()
        tokens = encoder.num_tokens(query)
        if tokens > encoder.max_tokens:
            raise InputError(
                f"the query has {tokens} tokens, {encoder.name} reads {encoder.max_tokens} - make it shorter"
            )
        features = torch.from_numpy(encoder.encode([query])).to(self._device)
        return self.search_embedding(self._load_embedder().embed_captions(features)[0], k, by=by)

    def search_video(self, file: Path, k: int = 10) -> tuple[list[CaptionResult], list[VideoResult]]:
        """Return the K captions that fit a video file best, and the K videos most like it.

        Raises:
            InputError: The file gives no frame.
            MismatchError: The backbone here is not the one the index was made with.
        """
        _check_request(k, "video")
        embedding = embed_file(file, self._load_embedder(), self._device)
        return self._captions_of(embedding, k), self.search_embedding(embedding, k)

    def search_embedding(
        self, embedding: NDArray[np.float32], k: int = 10, *, by: str = "video"
    ) -> list[VideoResult]:
        """Return the K best videos for a `(D,)` embedding; see `search_text`."""
        _check_request(k, by)
        size = self._segment.video_embeddings.shape[1]
        if embedding.shape != (size,):
            raise UsageError(f"the embedding is {embedding.shape} - expected ({size},), the index's size")
        scores, rows = self._nearest(f"{by}_embeddings", embedding, k)
        results = []
        for rank, (score, row) in enumerate(zip(scores, rows, strict=True), start=1):
            if by == "video":
                video, moment = row, self._best_moment(row, embedding)
            else:
                video = int(np.searchsorted(self._segment.moment_offsets, row, side="right")) - 1
                moment = self._moment(row, score)
            found = self._segment.videos[video]
            results.append(VideoResult(rank, score, found["video_id"], found["source_path"], moment))
        return results

    def _best_moment(self, video: int, embedding: NDArray[np.float32]) -> Moment:
        begin, end = self._segment.moment_offsets[video : video + 2]
        scores = self._segment.moment_embeddings[begin:end].astype(np.float32) @ embedding
        best = int(scores.argmax())
        return self._moment(int(begin) + best, float(scores[best]))

    def _moment(self, row: int, score: float) -> Moment:
        begin_seconds, end_seconds = self._segment.moment_seconds[row].tolist()
        return Moment(begin_seconds, end_seconds, score)

    def _captions_of(self, embedding: NDArray[np.float32], k: int) -> list[CaptionResult]:
        if not self.manifest["captions"]:
            return []
        folder = self._part("captions")
        try:
            captions = json.loads((folder / "captions.json").read_text("utf-8"))
            embeddings = np.load(folder / "caption_embeddings.npy")
            if len(captions) != len(embeddings):
                raise ValueError(f"{len(captions)} captions with {len(embeddings)} embeddings")
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{folder} is damaged ({error}) - make the index again with `svb index`") from error
        scores, rows = _search(_build_faiss(embeddings), embedding, k)
        return [
            CaptionResult(rank, score, captions[row]["caption"], captions[row]["video_id"])
            for rank, (score, row) in enumerate(zip(scores, rows, strict=True), start=1)
        ]

    def _nearest(self, array: str, embedding: NDArray[np.float32], k: int) -> tuple[list[float], list[int]]:
        return _search(self._faiss(array), embedding, k)

    def _faiss(self, array: str) -> faiss.Index:
        """Return a FAISS index over an array, mapped from the cache; made anew where it is not there."""
        if array not in self._opened:
            self._opened[array] = self._open_faiss(array)
        return self._opened[array]

    def _open_faiss(self, array: str) -> faiss.Index:
        files, cache = self.manifest["segments"][0]["files"], self.path / "cache"
        key = files[f"{array}.npy"][:16]
        for path in cache.glob(f"{key}-*.faiss"):
            # One flipped bit of its header can hang FAISS, so a file is read once before it is believed, which
            # costs about as much as one search. Damaged, it is made anew: the arrays are the truth.
            if path.stem == f"{key}-{hash_file(path)[:16]}":
                return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        built = _build_faiss(getattr(self._segment, array))
        try:
            for stale in cache.glob("*.faiss"):
                if stale.name.startswith(key) or not any(stale.name.startswith(h[:16]) for h in files.values()):
                    stale.unlink()
            with published_file(cache / f"{key}.building") as aside:
                faiss.write_index(built, str(aside))
                final = cache / f"{key}-{hash_file(aside)[:16]}.faiss"
            (cache / f"{key}.building").replace(final)
        except (OSError, RuntimeError):  # an index on a read-only or full disk can still be searched
            pass
        return built

    def _read_segment(self) -> Segment:
        folder = self._part("segments")
        try:
            segment = read_segment(folder)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{folder} is damaged ({error}) - make the index again with `svb index`") from error
        if not np.isfinite(segment.video_embeddings).all():
            raise StoreError(f"{folder} holds NaN - make the index again with `svb index`")
        return segment

    def _part(self, part: str) -> Path:
        key: str = self.manifest[part][0]["key"]
        return self.path / part / key

    def _load_text_encoder(self) -> TextEncoder:
        if self._text_encoder is None:
            settings = self.manifest["model"]["text"]["text_encoder"]
            self._text_encoder = load_matching_text_encoder(settings, self._device)
        return self._text_encoder

    def _load_embedder(self) -> Embedder:
        if self._embedder is None:
            model = self.manifest["model"]
            if model["kind"] == "run":
                path = self._part("heads") / "heads.safetensors"
                try:
                    weights = load_file(path)
                except (OSError, SafetensorError) as error:
                    raise StoreError(f"{path} is damaged ({error}) - make the index again") from error
                self._embedder = heads_embedder(model, weights, path, self._device)
            else:
                self._embedder = zero_shot_embedder(model["video"], self._load_text_encoder(), self._device)
            if self._embedder.fingerprint != self.manifest["model_fingerprint"]:
                raise MismatchError(
                    f"{self.path} was made with model {self.manifest['model_fingerprint']}, here it is "
                    f"{self._embedder.fingerprint} - install the package versions of then, or make the index again"
                )
        return self._embedder


def _check_request(k: int, by: str) -> None:
    if k < 1:
        raise UsageError(f"k is {k} - expected at least 1")
    if by not in ("video", "moment"):
        raise UsageError(f"cannot rank by {by!r} - expected video or moment")


def _build_faiss(embeddings: NDArray[np.float16]) -> faiss.Index:
    """Return an exact inner-product index that holds the float16 values as they are."""
    built = faiss.IndexScalarQuantizer(
        embeddings.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    for begin in range(0, len(embeddings), 65536):
        built.add(np.ascontiguousarray(embeddings[begin : begin + 65536], np.float32))
    return built


def _search(index: faiss.Index, embedding: NDArray[np.float32], k: int) -> tuple[list[float], list[int]]:
    scores, rows = index.search(embedding[None].astype(np.float32), min(k, index.ntotal))
    return scores[0].tolist(), rows[0].tolist()
