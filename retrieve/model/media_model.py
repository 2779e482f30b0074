"""An index's backbones and video head, which turn the frames of one file into its embedding.

`GraphMedia` runs exported graphs of the user's cache, without torch. `TorchMedia` in torch_media.py does what a
graph cannot, and exports the graphs for the next query. Both keep what they have loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svb.data.fusion import parts_of
from svb.data.rows import FrameFeatures
from svb.extract.backbones.graph import (
    Graph,
    NoGraphError,
    backbone_key,
    graph_key,
    read_graph,
    resembles,
)
from svb.extract.backbones.transform import stored_transform
from svb.extract.compute.machine import available_cores
from svb.extract.decode.decoder import FrameChunk
from svb.extract.one_file import Rows
from svb.retrieve.stored.manifest import heads_file

# ConSE's softmax is flatter: a classifier is too sure of one class for a video that shows several things.
TEMPERATURE = 2.0
# Frames that a graph takes at once.
BATCH_SIZE = 32

# `(T, F)` float32 -> `(D,)` float32, L2-normalised.
FramesToEmbedding = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class MediaModel(Protocol):
    """Turns the frames of one file into its embedding, as an index did.

    Attributes:
        model: The description of its model.
    """

    model: dict[str, Any]

    def rows(self, chunks: Iterable[FrameChunk]) -> list[Rows]:
        """Return the rows of one file's frames, by each backbone in order."""

    def embed(self, rows: FrameFeatures) -> NDArray[np.float32]:
        """Return the `(D,)` embedding of one file's rows."""

    def keep_graphs(self) -> None:
        """Export the graphs that `GraphMedia` needs and the cache lacks, if they can be exported."""


class GraphMedia:
    """An index's backbones and video head without torch.

    Args:
        model: The description of the index's model.
        graphs: One for each backbone, in order.
        head: The video head.
    """

    def __init__(self, model: dict[str, Any], graphs: list[Graph], head: FramesToEmbedding) -> None:
        self.model = model
        self._graphs, self._head = graphs, head
        self._transforms = [stored_transform(held) for held in parts_of(model["video"]).values()]

    def rows(self, chunks: Iterable[FrameChunk]) -> list[Rows]:
        from svb.extract.backbones.transform import squares_by_pil

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
        """Do nothing: the cache has them."""


def open_graph_media(folder: Path, manifest: Mapping[str, Any]) -> GraphMedia | None:
    """Return what embeds files for an index without torch; None if the cache lacks a graph of it.

    Args:
        folder: The index's.
        manifest: The index's manifest.

    Raises:
        StoreError: The heads' file is damaged.
    """
    model = manifest["model"]
    if not may_have_graphs(model):
        return None
    try:
        head = _head(folder, manifest)
        graphs = [_backbone_graph(name, held) for name, held in parts_of(model["video"]).items()]
    except NoGraphError:
        return None
    return None if head is None else GraphMedia(model, graphs, head)


def may_have_graphs(model: Mapping[str, Any]) -> bool:
    """Tell whether all backbones of an index look at single frames that PIL can prepare, and were not imported."""
    return all(
        not held.get("imported", False) and held["clip_frames"] == 1 and stored_transform(held).antialias
        for held in parts_of(model["video"]).values()
    )


def _backbone_graph(name: str, settings: Mapping[str, Any]) -> Graph:
    key = backbone_key(name, settings)
    if not resembles(key, settings["precision"]):
        raise NoGraphError(f"the graph of {name} was never compared with its rows in {settings['precision']}")
    graph = read_graph(key)
    if graph is None:
        raise NoGraphError(f"the graph of {name} is not in the cache")
    return graph


def _head(folder: Path, manifest: Mapping[str, Any]) -> FramesToEmbedding | None:
    kind = manifest["model"]["kind"]
    if kind == "zero-shot CLIP":
        return _mean_of_frames
    if kind == "run":
        graph = read_graph(head_key(manifest["model_fingerprint"]))
        return None if graph is None else lambda frames: graph(frames[None])[0]
    path = heads_file(folder, manifest)
    if path is None:
        return None
    from safetensors.numpy import load_file

    weights = load_file(path)
    return lambda frames: _conse(weights, frames)


def _mean_of_frames(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Do the same as `svb.train.heads.mean_of_frames`."""
    return _normalised(_normalised(frames).mean(axis=0))


def _conse(weights: Mapping[str, NDArray[np.float32]], frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Do the same as `svb.retrieve.model.embedder.Conse`."""
    logits = (frames @ weights["weight"].T + weights["bias"]) / TEMPERATURE  # (T, C)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)
    return _normalised(probabilities @ weights["class_embeddings"])


def _normalised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return unit


def head_key(model_fingerprint: str) -> str:
    """Return the key of a run's video head in the cache of graphs."""
    return graph_key({"video_head": model_fingerprint})
