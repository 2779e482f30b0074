"""An index's backbones and video head in torch; it exports their graphs for the next query."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.fusion import parts_of
from svb.data.rows import FrameFeatures
from svb.errors import MismatchError
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.engine import load_matching_backbone, prepare_graph
from svb.extract.backbones.export import write_graph
from svb.extract.backbones.graph import GRAPH, Graph, NoGraphError, keep_graph, read_graph
from svb.extract.decode.decoder import FrameChunk
from svb.extract.one_file import Rows, compute_rows
from svb.retrieve.model.embedder import Embedder, OneVideo
from svb.retrieve.model.media_model import head_key, may_have_graphs
from svb.train.training_data import FrameTable

logger = logging.getLogger(__name__)


class TorchMedia:
    """An index's backbones and video head in torch; the backbones are loaded with the first file.

    Args:
        embedder: The model that made the index.
        device: Where to compute.
        loading: Entered while backbones are loaded.
    """

    def __init__(
        self,
        embedder: Embedder,
        device: torch.device,
        loading: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.model = embedder.model
        self._embedder, self._device, self._loading = embedder, device, loading
        self._lock = threading.Lock()
        self._loaded: list[Backbone] | None = None

    def rows(self, chunks: Iterable[FrameChunk]) -> list[Rows]:
        """See `MediaModel`.

        Raises:
            MismatchError: A backbone's weights here are not those of the index.
        """
        return compute_rows(chunks, self._backbones(), self.model["video"]["batch_size"])

    def embed(self, rows: FrameFeatures) -> NDArray[np.float32]:
        frames = FrameTable.of(rows, self._embedder.max_frames, self._device)
        embedding: NDArray[np.float32] = self._embedder.embed_videos(frames)[0]
        return embedding

    def _backbones(self) -> list[Backbone]:
        with self._lock:
            if self._loaded is None:
                held = parts_of(self.model["video"]).items()
                with self._loading():
                    self._loaded = [load_matching_backbone(name, of, self._device) for name, of in held]
            return self._loaded

    def keep_graphs(self) -> None:
        """See `MediaModel`."""
        if self._device.type != "cpu" or not may_have_graphs(self.model):
            return
        try:
            for name, held in parts_of(self.model["video"]).items():
                prepare_graph(name, held)
            if self.model["kind"] == "run" and read_graph(head_key(self._embedder.fingerprint)) is None:
                keep_graph(
                    head_key(self._embedder.fingerprint), lambda folder: _export_head(self._embedder, folder)
                )
        except (NoGraphError, MismatchError, OSError) as error:
            logger.info(f"searches of this index with files will load PyTorch: {error}")


def _export_head(embedder: Embedder, folder: Path) -> None:
    """Write a run's video head as a graph, `(1, T, F)` to `(1, D)`, and compare it with torch."""
    network = OneVideo(embedder)
    size = embedder.model["video"]["backbone_settings"]["feature_size"]
    frames = torch.randn(1, min(5, embedder.max_frames), size, generator=torch.Generator().manual_seed(0))
    dynamic = {1: torch.export.Dim("frames", min=1, max=embedder.max_frames)} if embedder.max_frames > 1 else {}
    write_graph(network, frames, folder / GRAPH, names=("frames", "embedding"), dynamic=dynamic)
    with torch.inference_mode():
        distance = 1 - float((torch.from_numpy(Graph(folder)(frames.numpy())) * network(frames)).sum())
    if not distance <= 1e-4:
        raise NoGraphError(f"the graph of the run's video head differs from torch by a cosine of {distance:.1g}")
