"""What the steps of gpu.py work on and measure with: clips, images, something to train on, rates."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from shared import make_store

from svb.data.caption_features import CaptionFeatures, write_caption_features
from svb.data.caption_table import CaptionTable
from svb.data.feature_store import FeatureStore
from svb.extract.backbones.backbone import Backbone, RunningBatch


def noise(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Return frames with edges and grain, which a mistake in scaling would change."""
    random = np.random.default_rng(0)
    rough = random.integers(0, 256, (count, -(-height // 16), -(-width // 16), 3))
    frames = rough.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return np.clip(frames + random.integers(-20, 20, frames.shape), 0, 255).astype(np.uint8)


def make_images(backbone: Backbone, count: int) -> torch.Tensor:
    """Return `(count, 3, S, S)` uint8 images of the size that a backbone takes, on its device."""
    frames = torch.from_numpy(noise(count, backbone.image_size, backbone.image_size))
    return frames.permute(0, 3, 1, 2).contiguous().to(backbone.device)


def make_clip(
    path: Path, seconds: int, width: int, height: int, seed: int, codec: str = "libx264", pixels: str = "yuv420p"
) -> None:
    """Write a clip of 10 frames a second that moves; of 0 seconds one frame."""
    picture = np.roll(noise(1, height, width)[0], 37 * seed, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.options = {"preset": "ultrafast"} if codec == "libx264" else {}
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for number in range(max(1, 10 * seconds)):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 5 * number, axis=0), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def content(store: Path) -> dict[str, bytes]:
    opened = FeatureStore(store)
    loaded = opened.load(opened.backbones[0])
    spans = zip(loaded.video_ids, loaded.offsets[:-1], loaded.offsets[1:], strict=True)
    return {video_id: loaded.features[begin:end].tobytes() for video_id, begin, end in spans}


@contextlib.contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if is_allowed else "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def listed_waits(lines: list[str]) -> Iterator[None]:
    """Put the places into `lines`, anew each time, where torch says that the host waited for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            lines[:] = [f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message)]


def rate(start: Callable[[torch.Tensor], RunningBatch], images: torch.Tensor, seconds: float) -> float:
    """Return images a second, with one batch under way while the next is started."""
    start(images).fetch()
    number, began, running = 0, time.monotonic(), start(images)
    while time.monotonic() - began < seconds or number < 2:
        following = start(images)
        running.fetch()
        running, number = following, number + 1
    running.fetch()
    return (number + 1) * len(images) / (time.monotonic() - began)


def rate_of_graph(backbone: Backbone, images: torch.Tensor) -> float:
    """Return images a second of the network alone, replayed as a CUDA graph."""
    pixels = images.to(backbone.dtype).contiguous(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            backbone.module(pixels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        backbone.module(pixels)
    number, began = 0, time.monotonic()
    while time.monotonic() - began < 2:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        number += 10
    return number * len(images) / (time.monotonic() - began)


def milliseconds(work: Callable[[], object], times: int = 5) -> float:
    work()
    began = time.monotonic()
    for _ in range(times):
        work()
    return (time.monotonic() - began) / times * 1000


def make_task(folder: Path, videos: int, size: int) -> tuple[Path, Path]:
    """Return a made-up store and captions to train on; `size` numbers a row."""
    store, captions = folder / "task", folder / "captions.h5"
    if not captions.exists():
        settings = {"weights_hash": "none", "feature_size": size, "precision": "float32"}
        make_store(store, "made_up:frames", settings, videos=videos, frames=12)
        words, video_ids = np.array(["a", "dog", "runs", "over", "snow"]), FeatureStore(store).video_ids
        random = np.random.default_rng(0)
        texts = [" ".join(words[random.integers(0, len(words), 6)]) for _ in range(4 * videos)]
        ids, owners = [str(number) for number in range(len(texts))], [v for v in video_ids for _ in range(4)]
        table = CaptionTable(ids, owners, texts, ["train"] * len(texts), has_split=True)
        rows = random.standard_normal((len(texts), size), np.float32).astype(np.float16)
        encoder = {"name": "made_up:captions", "weights_hash": "none", "feature_size": size, "max_tokens": 64}
        write_caption_features(
            captions, CaptionFeatures(table, rows, {"text_encoder": encoder, "table_hash": "none"})
        )
    return store, captions


def stop(metrics: Mapping[str, float]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
