"""The model that an index is made with, loaded when it is first needed: a run with nothing to do needs none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.errors import StoreError
from svb.retrieve.indexing.index_source import IndexSource

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder
    from svb.retrieve.model.embedder import Embedder
    from svb.retrieve.model.inputs import Inputs


class IndexModel:
    """What a source stands for; nothing is loaded before it is asked for.

    Args:
        source: The run or store.
        device: `auto`, `cpu`, `cuda:0`, ...
    """

    def __init__(self, source: IndexSource, device: str) -> None:
        self.source = source
        self._device = device
        self._state: object = None
        self._index: tuple[Path, Mapping[str, Any]] | None = None

    def reuse(self, index: Path, manifest: Mapping[str, Any]) -> None:
        """Take from an index what was computed for the same model when it was made."""
        self._index = index, manifest

    def up_to_date(self) -> IndexModel:
        """Return itself, or another where the run or its captions were replaced since this was made."""
        source = replace(self.source)
        state = source.state()
        if self._state not in (None, state):
            return IndexModel(source, self._device)
        self._state = state
        return self

    @cached_property
    def device(self) -> torch.device:
        """Return where the model computes.

        Raises:
            UsageError: It is not there.
        """
        from svb.device import choose_device

        return choose_device(self._device)

    @cached_property
    def inputs(self) -> Inputs:
        """Return embedder, store and captions; errors as `svb.retrieve.model.inputs.open_inputs`."""
        from svb.retrieve.model.inputs import open_inputs

        source = self.source
        return open_inputs(
            source.path,
            device=self.device,
            store=source.store,
            captions=source.captions,
            backbone=source.backbone,
            text_encoder=source.text_encoder,
            checkpoint=source.checkpoint,
            made_before=self._made_before,
        )

    @property
    def embedder(self) -> Embedder:
        return self.inputs.embedder

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Return the frozen text encoder that queries are read with.

        Raises:
            MismatchError: The weights here are others than the captions were encoded with.
        """
        from svb.retrieve.model.embedder import load_matching_text_encoder

        settings: dict[str, Any] = self.embedder.model["text"]["text_encoder"]
        return load_matching_text_encoder(settings, self.device)

    def _made_before(self, model: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        """Return the weights that the index holds of a model; none where it is of another, or they are damaged."""
        from svb.config import fingerprint
        from svb.retrieve.model.embedder import load_heads

        if self._index is None or self._index[1].get("model_fingerprint") != fingerprint(model):
            return {}
        with contextlib.suppress(StoreError):
            return load_heads(*self._index)
        return {}
