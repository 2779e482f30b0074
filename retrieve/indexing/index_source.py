"""The source of an index: a run or a store, as its files describe it, and its model, loaded when first needed.

A run of `svb index` that has nothing to do loads none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.config import fingerprint
from svb.data.description import read_description
from svb.data.feature_store import FeatureStore, shard_names
from svb.errors import StoreError
from svb.retrieve.indexing.index_config import IndexConfig, state_of

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder
    from svb.retrieve.model.embedder import Embedder
    from svb.retrieve.model.source import OpenedSource


@dataclass(frozen=True)
class IndexSource:
    """A run or a store, and the options that say how it is read; see `svb.retrieve.model.source.open_source`."""

    path: Path
    config: IndexConfig

    def state(self) -> list[Any]:
        """Return a value that changes when the run or the captions are made again; reads no file."""
        files = [self.path / "config.json", self.path / (self.config.checkpoint or "best") / "checkpoint.json"]
        return [state_of(path) for path in [*files, *([self.captions_path] if self.captions_path else [])]]

    @property
    def is_run(self) -> bool:
        return (self.path / "config.json").is_file()

    @cached_property
    def store_path(self) -> Path:
        """Return the path of the features.

        Raises:
            InputError, StoreError: The run cannot be read.
        """
        if not self.is_run:
            return self.path
        return self.config.store or Path(self._run["paths"]["store"])

    @property
    def captions_path(self) -> Path | None:
        """Return the path of the captions' features; None for a store without captions."""
        if self.config.captions is not None or not self.is_run:
            return self.config.captions
        return Path(self._run["paths"]["captions"])

    def identity(self, store: FeatureStore) -> dict[str, Any]:
        """Return what determines model and captions: they are equal for equal identities.

        Raises:
            InputError, StoreError: The run or its checkpoint cannot be read.
        """
        config = self.config
        held = {
            "store": store.fingerprint,
            "captions": [state_of(self.captions_path)] if self.captions_path else [],
            "options": [
                config.backbone,
                config.text_encoder,
                config.checkpoint,
                not self.is_run and str(config.store),
            ],
        }
        if not self.is_run:
            return held
        run = {key: value for key, value in self._run.items() if key != "paths"}
        folder = self.path / (self.config.checkpoint or "best")
        checkpoint = read_description(folder / "checkpoint.json", kind="a whole checkpoint", make="svb train")
        return {**held, "run": run, "checkpoint": checkpoint}

    def watched(self, files: Sequence[Path]) -> list[Any]:
        """Return a value that changes when there is work to do: the store's shards, and other files' states."""
        paths = [*files, *([self.captions_path] if self.captions_path else [])]
        place = self.store_path if self.store_path.is_file() else self.store_path / "store.json"
        return [shard_names(self.store_path), *map(state_of, [place, *paths])]

    @cached_property
    def _run(self) -> dict[str, Any]:
        return read_description(self.path / "config.json", kind="a run", make=f"svb train -o {self.path}")


class IndexModel:
    """The model, store and captions of a source; each is loaded when it is first needed.

    Args:
        source: The run or store.
    """

    def __init__(self, source: IndexSource) -> None:
        self.source = source
        self._state: object = None
        self._index: tuple[Path, Mapping[str, Any]] | None = None

    def reuse(self, index: Path, manifest: Mapping[str, Any]) -> None:
        """Use the weights that an index holds, if they are of the same model."""
        self._index = index, manifest

    def up_to_date(self) -> IndexModel:
        """Return itself, or a new one if the run or its captions have been replaced."""
        source = replace(self.source)
        state = source.state()
        if self._state not in (None, state):
            return IndexModel(source)
        self._state = state
        return self

    @cached_property
    def device(self) -> torch.device:
        """Return the device of the model.

        Raises:
            UsageError: The device does not exist.
        """
        from svb.device import choose_device

        return choose_device(self.source.config.device)

    @cached_property
    def opened(self) -> OpenedSource:
        """Return embedder, store and captions; errors as `svb.retrieve.model.source.open_source`."""
        from svb.retrieve.model.source import open_source

        config = self.source.config
        return open_source(
            self.source.path,
            device=self.device,
            store=config.store,
            captions=config.captions,
            backbone=config.backbone,
            text_encoder=config.text_encoder,
            checkpoint=config.checkpoint,
            made_before=self._made_before,
        )

    @property
    def embedder(self) -> Embedder:
        return self.opened.embedder

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Return the frozen text encoder that queries are read with.

        Raises:
            MismatchError: The weights here differ from those that encoded the captions.
        """
        from svb.retrieve.model.embedder import load_matching_text_encoder

        settings: dict[str, Any] = self.embedder.model["text"]["text_encoder"]
        return load_matching_text_encoder(settings, self.device)

    def _made_before(self, model: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        """Return the index's weights of a model; empty if it has another model, or if they are damaged."""
        from svb.retrieve.model.embedder import load_heads

        if self._index is None or self._index[1].get("model_fingerprint") != fingerprint(model):
            return {}
        with contextlib.suppress(StoreError):
            return load_heads(*self._index)
        return {}
