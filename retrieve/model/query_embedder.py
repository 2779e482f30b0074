"""Embeds queries for an index: texts by its exported text tower, files as its videos were embedded.

Embeddings of earlier texts are kept on disk, so a repeated query loads no model:

cache/queries/<hash>   SHA-256 of file name and embedding (32 bytes), then the embedding, (D,) float32

The name is a hash of the model and the text, so nobody can read queries from the disk. A file that was cut short or
changed does not match its checksum and is ignored. Losing the folder only costs time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svb.data.publish import ASIDE_PREFIX
from svb.errors import InputError, StoreError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.stored.manifest import part_folder

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder
    from svb.retrieve.model.embedder import Embedder
    from svb.retrieve.model.media_model import GraphMedia
    from svb.retrieve.model.torch_media import TorchMedia

MAX_ENTRIES = 10_000
# So many are removed at once, so that few queries must list all files.
REMOVED_AT_ONCE = 1_000
_CHECKSUM_BYTES = 32
# A file aside that is older was left by a killed process.
_ASIDE_SECONDS = 3600.0


class Tower(Protocol):
    """What turns texts into embeddings.

    Attributes:
        max_tokens: How many tokens it reads.
    """

    @property
    def max_tokens(self) -> int: ...
    def num_tokens(self, text: str) -> int: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return `(n, D)` float32, L2-normalised."""
        ...


class QueryEmbedder:
    """Embeds queries, and loads each model with the first query that needs it. Threads may share it.

    Args:
        folder: The index's.
        manifest: The index's manifest.
        device: Device for torch, if it is needed.
        exports: After the first file in torch, export graphs, so that later processes embed files without torch.

    Attributes:
        load_seconds: How long queries have waited for models to be loaded.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], device: str, *, exports: bool = True) -> None:
        self._exports = exports
        self._folder = folder
        self._manifest = manifest
        self._device_name = device
        self._lock = threading.Lock()
        self.load_seconds = 0.0
        exported = [entry["key"] for entry in manifest["text"]]
        # Another export of the same model rounds differently.
        self._cache = QueryCache(folder / "cache", "-".join([manifest["model_fingerprint"], *exported]))

    def fits(self, manifest: Mapping[str, Any]) -> bool:
        """Tell whether another generation of the index has the same model, so that this embedder fits it too."""
        return all(self._manifest[name] == manifest[name] for name in ("model_fingerprint", "text", "heads"))

    def embed_text(self, text: str, what: str = "the query") -> NDArray[np.float32]:
        """Return the `(D,)` embedding of a text.

        Args:
            text: The text.
            what: The name to use in messages.

        Raises:
            InputError: It is empty, not Unicode, or longer than the text encoder reads.
            MismatchError: The text encoder here differs from the one that made the index.
        """
        if not text.strip():
            raise InputError(f"{what} is empty - expected a text to search for")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
            raise InputError(f"{what} {text!r} is not UTF-8 - type it in a UTF-8 terminal") from error
        embedding = self._cache.get(text)
        if embedding is None:
            with self._loading(), self._lock:
                tower = self._tower
            tokens = tower.num_tokens(text)
            if tokens > tower.max_tokens:
                name = self._manifest["model"]["text"]["text_encoder"]["name"]
                raise InputError(
                    f"{what} has {tokens} tokens, but {name} reads {tower.max_tokens} - make it shorter"
                )
            embedding = tower.embed([text])[0]
            self._cache.put(text, embedding)
        if not np.isfinite(embedding).all():
            raise StoreError(
                f"the embedding of {text!r} is not finite, so the model that made {self._folder} is broken - "
                "train it again, and make the index again with `svb index --rebuild`"
            )
        return embedding

    def embed_media(self, request: SearchRequest) -> NDArray[np.float32]:
        """Return the `(D,)` embedding of a request's image or video.

        Raises:
            InputError: The file gives no picture.
            MismatchError: A backbone's weights here differ from those that made the index.
        """
        from svb.retrieve.model.query_media import embed_image, embed_video

        with self._lock:
            media = self._media
        if request.image is not None:
            embedding = embed_image(Path(request.image), media)
        else:
            assert request.video is not None
            embedding = embed_video(Path(request.video), request.span_seconds, media)
        if self._exports:
            self._exports = False
            media.keep_graphs()
        return embedding

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except ModuleNotFoundError as error:
            raise InputError(
                f"{error.name} is not installed, so only texts and videos of the index can be searched with, in "
                "an index with its own text tower - `pip install svb-video`, or take the full image"
            ) from error
        finally:
            self.load_seconds += time.perf_counter() - began

    @cached_property
    def _media(self) -> GraphMedia | TorchMedia:
        """The backbones and the video head; graphs if the cache has them, because they need no torch."""
        from svb.retrieve.model.media_model import open_graph_media

        with self._loading():
            media = open_graph_media(self._folder, self._manifest) if self._device_name in ("auto", "cpu") else None
            if media is not None:
                return media
            from svb.retrieve.model.torch_media import TorchMedia

            return TorchMedia(self._embedder, self._device, self._loading)

    @cached_property
    def _device(self) -> torch.device:
        from svb.device import choose_device

        return choose_device(self._device_name)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        from svb.retrieve.model.embedder import load_matching_text_encoder

        return load_matching_text_encoder(self._manifest["model"]["text"]["text_encoder"], self._device)

    @cached_property
    def _embedder(self) -> Embedder:
        from svb.retrieve.model.embedder import index_embedder

        return index_embedder(self._folder, self._manifest, self._device, lambda: self._text_encoder)

    @cached_property
    def _tower(self) -> Tower:
        for entry in self._manifest["text"]:
            from svb.retrieve.model.text_tower import TextTower

            return TextTower(part_folder(self._folder, "text", entry), entry).load()
        from svb.retrieve.model.embedder import TorchTower

        return TorchTower(self._text_encoder, self._embedder)


class QueryCache:
    """Embeddings of texts, of one model; processes and threads may share the folder.

    Args:
        folder: An index's `cache`.
        fingerprint: The model's; embeddings of other models are not found.
        max_entries: Most files to keep, of all models together; the oldest are removed.
    """

    def __init__(self, folder: Path, fingerprint: str, max_entries: int = MAX_ENTRIES) -> None:
        self._folder = folder / "queries"
        self._fingerprint = fingerprint
        self._max_entries = max_entries

    def get(self, text: str) -> NDArray[np.float32] | None:
        """Return the `(D,)` embedding of a text, or None if it is not known."""
        path = self._path(text)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        checksum, embedding = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if not embedding or len(embedding) % 4 or _checksum(path.name, embedding) != checksum:
            return None
        return np.frombuffer(embedding, "<f4").astype(np.float32)

    def put(self, text: str, embedding: NDArray[np.float32]) -> None:
        """Keep a text's `(D,)` embedding; does nothing if the disk is full or read-only."""
        path = self._path(text)
        aside = self._folder / f"{ASIDE_PREFIX}{uuid.uuid4().hex}"
        content = np.ascontiguousarray(embedding, "<f4").tobytes()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Not synced: the remains of a power cut do not match their checksum.
            aside.write_bytes(_checksum(path.name, content) + content)
            aside.replace(path)
            self._remove_oldest()
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _path(self, text: str) -> Path:
        named = f"{self._fingerprint}\0{text}".encode("utf-8", "surrogatepass")
        return self._folder / hashlib.sha256(named).hexdigest()[:32]

    def _remove_oldest(self) -> None:
        with os.scandir(self._folder) as found:
            files = list(found)
        if len(files) <= self._max_entries:
            return
        ages = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # another process removes them too
                ages.append((file.stat().st_mtime, file.name))
        now = time.time()
        kept = max(self._max_entries - min(REMOVED_AT_ONCE, self._max_entries // 10), 1)
        entries = sorted(of for of in ages if not of[1].startswith(ASIDE_PREFIX))
        left_over = [of for of in ages if of[1].startswith(ASIDE_PREFIX) and of[0] < now - _ASIDE_SECONDS]
        for _, name in [*entries[: max(len(entries) - kept, 0)], *left_over]:
            (self._folder / name).unlink(missing_ok=True)


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()
