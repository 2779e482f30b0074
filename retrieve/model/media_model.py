"""What turns the frames of one file into its embedding: an index's backbones and video head.

`GraphMedia` runs exported graphs of the user's cache, without torch. `TorchMedia` does what a graph cannot, and
exports the graphs for the next query. Both keep what they have loaded.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svb.data.fusion import parts_of
from svb.data.rows import FrameFeatures
from svb.errors import MismatchError
from svb.extract.backbones.graph import (
    GRAPH,
    Graph,
    NoGraphError,
    backbone_key,
    graph_key,
    keep_graph,
    read_graph,
    resembles,
)
from svb.extract.backbones.transform import stored_transform
from svb.extract.compute.machine import available_cores
from svb.extract.decode.decoder import FrameChunk
from svb.extract.one_file import Rows
from svb.retrieve.stored.manifest import heads_file

if TYPE_CHECKING:
    import torch

    from svb.extract.backbones.backbone import Backbone
    from svb.retrieve.model.embedder import Embedder

logger = logging.getLogger(__name__)

# ConSE's softmax is flatter: a classifier is too sure of one class for a video that shows several things.
TEMPERATURE = 2.0
# Frames that a graph takes at once.
BATCH_SIZE = 32

# `(T, F)` float32 -> `(D,)` float32, L2-normalised.
VideoHead = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class MediaModel(Protocol):
    """What an index makes of the frames of one file.

    Attributes:
        model: The description of its model.
    """

    model: dict[str, Any]

    def rows(self, chunks: Iterable[FrameChunk]) -> list[Rows]:
        """Return the rows of one file's frames, by each backbone in order."""

    def embed(self, rows: FrameFeatures) -> NDArray[np.float32]:
        """Return the `(D,)` embedding of one file's rows."""

    def keep_graphs(self) -> None:
        """Export what `GraphMedia` needs and the cache lacks; do nothing where it cannot be had."""


class TorchMedia:
    """An index's backbones and video head in torch; the backbones are loaded with the first file.

    Args:
        embedder: What made the index.
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
        from svb.extract.one_file import compute_rows

        return compute_rows(chunks, self._backbones(), self.model["video"]["batch_size"])

    def embed(self, rows: FrameFeatures) -> NDArray[np.float32]:
        from svb.train.training_data import FrameTable

        frames = FrameTable.of(rows, self._embedder.max_frames, self._device)
        embedding: NDArray[np.float32] = self._embedder.embed_videos(frames)[0]
        return embedding

    def _backbones(self) -> list[Backbone]:
        from svb.extract.backbones import load_matching_backbone

        with self._lock:
            if self._loaded is None:
                held = parts_of(self.model["video"]).items()
                with self._loading():
                    self._loaded = [load_matching_backbone(name, of, self._device) for name, of in held]
            return self._loaded

    def keep_graphs(self) -> None:
        """See `MediaModel`."""
        from svb.extract.backbones.engine import prepare_graph

        if self._device.type != "cpu" or not _may_have_graphs(self.model):
            return
        try:
            for name, held in parts_of(self.model["video"]).items():
                prepare_graph(name, held)
            if self.model["kind"] == "run" and read_graph(_head_key(self._embedder.fingerprint)) is None:
                keep_graph(
                    _head_key(self._embedder.fingerprint), lambda folder: _export_head(self._embedder, folder)
                )
        except (NoGraphError, MismatchError, OSError) as error:
            logger.info(f"files as queries of this index load PyTorch: {error}")


class GraphMedia:
    """An index's backbones and video head without torch.

    Args:
        model: The description of the index's model.
        graphs: One for each backbone, in order.
        head: The video head.
    """

    def __init__(self, model: dict[str, Any], graphs: list[Graph], head: VideoHead) -> None:
        self.model = model
        self._graphs, self._head = graphs, head
        self._transforms = [stored_transform(held) for held in parts_of(model["video"]).values()]

    def rows(self, chunks: Iterable[FrameChunk]) -> list[Rows]:
        from svb.extract.compute.squares import squares_by_pil

        times: list[NDArray[np.float64]] = []
        features: list[list[NDArray[np.float32]]] = [[] for _ in self._graphs]
        running: deque[tuple[int, Future[NDArray[np.float32]]]] = deque()

        def fetch() -> None:
            number, future = running.popleft()
            features[number].append(future.result())

        with ThreadPoolExecutor(available_cores()) as executor:
            for chunk in chunks:
                times.append(chunk.frame_times_seconds.astype(np.float64))  # a copy, as are the squares
                for begin in range(0, len(chunk.frames), BATCH_SIZE):
                    frames = chunk.frames[begin : begin + BATCH_SIZE]
                    for number, (graph, transform) in enumerate(zip(self._graphs, self._transforms, strict=True)):
                        running.append((number, executor.submit(graph, squares_by_pil(frames, transform))))
                while len(running) > 2 * available_cores():  # what waits takes memory
                    fetch()
            while running:
                fetch()
        return [(np.concatenate(rows), np.concatenate(times)) for rows in features]

    def embed(self, rows: FrameFeatures) -> NDArray[np.float32]:
        # The frames that `FrameTable.gather` takes: the middle of each of equal parts.
        length = len(rows.features)
        kept = min(length, self.model["max_frames"])
        places = np.minimum((2 * np.arange(kept) + 1) * length // (2 * kept), length - 1)
        return self._head(rows.features[places].astype(np.float32))

    def keep_graphs(self) -> None:
        """Do nothing: they are there."""


def open_graph_media(folder: Path, manifest: Mapping[str, Any]) -> GraphMedia | None:
    """Return what embeds files for an index without torch; None if the cache lacks a graph of it.

    Args:
        folder: The index's.
        manifest: As `svb.retrieve.stored.manifest.read_manifest` gives it.

    Raises:
        StoreError: The heads' file is damaged.
    """
    model = manifest["model"]
    if not _may_have_graphs(model):
        return None
    try:
        head = _head(folder, manifest)
        graphs = [_backbone_graph(name, held) for name, held in parts_of(model["video"]).items()]
    except NoGraphError:
        return None
    return None if head is None else GraphMedia(model, graphs, head)


def _may_have_graphs(model: Mapping[str, Any]) -> bool:
    """Tell whether all backbones of an index look at single frames that PIL can prepare, and were not imported."""
    return all(
        not held.get("imported", False) and held["clip_frames"] == 1 and stored_transform(held).antialias
        for held in parts_of(model["video"]).values()
    )


def _backbone_graph(name: str, settings: Mapping[str, Any]) -> Graph:
    key = backbone_key(name, settings)
    if not resembles(key, settings["precision"]):
        raise NoGraphError(f"nobody has compared the graph of {name} with its rows in {settings['precision']}")
    graph = read_graph(key)
    if graph is None:
        raise NoGraphError(f"the graph of {name} is not in the cache")
    return graph


def _head(folder: Path, manifest: Mapping[str, Any]) -> VideoHead | None:
    kind = manifest["model"]["kind"]
    if kind == "zero-shot CLIP":
        return _mean_of_frames
    if kind == "run":
        graph = read_graph(_head_key(manifest["model_fingerprint"]))
        return None if graph is None else lambda frames: graph(frames[None])[0]
    path = heads_file(folder, manifest)
    if path is None:
        return None
    from safetensors.numpy import load_file

    weights = load_file(path)
    return lambda frames: _conse(weights, frames)


def _mean_of_frames(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """As `svb.train.heads.mean_of_frames`."""
    return _normalised(_normalised(frames).mean(axis=0))


def _conse(weights: Mapping[str, NDArray[np.float32]], frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """As `svb.retrieve.model.embedder.Conse`."""
    logits = (frames @ weights["weight"].T + weights["bias"]) / TEMPERATURE  # (T, C)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)
    return _normalised(probabilities @ weights["class_embeddings"])


def _normalised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return unit


def _head_key(model_fingerprint: str) -> str:
    return graph_key({"video_head": model_fingerprint})


def _export_head(embedder: Embedder, folder: Path) -> None:
    """Write a run's video head as a graph, `(1, T, F)` to `(1, D)`, and compare it with torch."""
    import torch

    from svb.extract.backbones.export import write_graph
    from svb.retrieve.model.embedder import OneVideo

    network = OneVideo(embedder)
    size = embedder.model["video"]["backbone_settings"]["feature_size"]
    frames = torch.randn(1, min(5, embedder.max_frames), size, generator=torch.Generator().manual_seed(0))
    dynamic = {1: torch.export.Dim("frames", min=1, max=embedder.max_frames)} if embedder.max_frames > 1 else {}
    write_graph(network, frames, folder / GRAPH, names=("frames", "embedding"), dynamic=dynamic)
    with torch.inference_mode():
        distance = 1 - float((torch.from_numpy(Graph(folder)(frames.numpy())) * network(frames)).sum())
    if not distance <= 1e-4:
        raise NoGraphError(f"the graph of the run's video head differs from torch by a cosine of {distance:.1g}")
