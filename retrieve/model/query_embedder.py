"""Queries into the space of an index: texts by its exported text tower, files by what made its rows."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svb.errors import InputError, StoreError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.model.query_cache import QueryCache
from svb.retrieve.stored.manifest import part_folder

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder
    from svb.retrieve.model.embedder import Embedder


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
    """Embeds queries; whatever it needs is loaded with the first query that does. Threads may share it.

    Args:
        folder: The index's.
        manifest: As `svb.retrieve.stored.manifest.read_manifest` gives it.
        device: Where torch computes, if it has to.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], device: str) -> None:
        self._folder = folder
        self._manifest = manifest
        self._device_name = device
        self._lock = threading.Lock()
        exported = [entry["key"] for entry in manifest["text"]]
        # Another export of the same model rounds otherwise.
        self._cache = QueryCache(folder / "cache", "-".join([manifest["model_fingerprint"], *exported]))

    def fits(self, manifest: Mapping[str, Any]) -> bool:
        """Tell whether it embeds queries for another generation of its index, as that one's own would."""
        return all(self._manifest[name] == manifest[name] for name in ("model_fingerprint", "text", "heads"))

    def embed_text(self, text: str, what: str = "the query") -> NDArray[np.float32]:
        """Return the `(D,)` embedding of a text.

        Args:
            text: The text.
            what: What it is, for messages.

        Raises:
            InputError: It is empty, not Unicode, or longer than the text encoder reads.
            MismatchError: The text encoder here is not the one that the index was made with.
        """
        if not text.strip():
            raise InputError(f"{what} is empty - say what to look for")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
            raise InputError(f"{what} {text!r} is not UTF-8 - type it in a UTF-8 terminal") from error
        embedding = self._cache.get(text)
        if embedding is None:
            with self._lock:
                tower = self._tower
            tokens = tower.num_tokens(text)
            if tokens > tower.max_tokens:
                name = self._manifest["model"]["text"]["text_encoder"]["name"]
                raise InputError(f"{what} has {tokens} tokens, {name} reads {tower.max_tokens} - make it shorter")
            embedding = tower.embed([text])[0]
            self._cache.put(text, embedding)
        if not np.isfinite(embedding).all():
            raise StoreError(
                f"the embedding of {text!r} is not finite - the model that {self._folder} was made with is broken: "
                "train it again, and make the index again with `svb index --rebuild`"
            )
        return embedding

    def embed_media(self, request: SearchRequest) -> NDArray[np.float32]:
        """Return the `(D,)` embedding of a request's image or video.

        Raises:
            InputError: The file gives no picture.
            MismatchError: A backbone's weights here are not those that the index was made with.
        """
        from svb.retrieve.model.query_media import embed_image, embed_video

        with self._lock:
            embedder, device = self._embedder, self._device
        if request.image is not None:
            return embed_image(Path(request.image), embedder, device)
        assert request.video is not None
        return embed_video(Path(request.video), request.span_seconds, embedder, device)

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

            return TextTower(part_folder(self._folder, "text", entry), entry)
        from svb.retrieve.model.embedder import TorchTower

        return TorchTower(self._text_encoder, self._embedder)
