"""An index over clips that says of each second what it shows, answers without a model, and a server of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import make_clip
from numpy.typing import NDArray
from serving import serving
from watching import EVIL

from svb.retrieve.indexing.index_writer import IndexWriter, writing
from svb.retrieve.model.query_embedder import QueryEmbedder
from svb.retrieve.search import Searcher
from svb.retrieve.server.child_processes import WorkerPool
from svb.retrieve.stored.metadata import publish_metadata
from svb.retrieve.stored.pools import Pool, publish_pool
from svb.retrieve.stored.segment import Segment, StringColumn

TOPICS = ("boat", "onion", "gull", "film")
NOISE = 12
D = len(TOPICS) + NOISE
MOMENT_SECONDS = 3.0


@dataclass(frozen=True)
class Shown:
    """A video and what it shows: by topic, when, and how clearly from 0 to 1.

    Attributes:
        path: Its file, which may be missing.
        topics: `{topic: (when, how clearly)}`.
        metadata: For the index's metadata table.
        begin: What its own clock shows at its first frame.
    """

    path: Path
    seconds: float
    topics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    begin: float = 0.0


def make_shown(folder: Path) -> dict[str, Shown]:
    """Draw clips that browsers play, one that they do not, and name one that is gone."""
    (folder / "harbour").mkdir(parents=True)
    # Key frames a second apart, so that every seek is quick.
    keyed = {"fps": 10, "size": "160x120", "extra": ("-g", "10", "-movflags", "+faststart")}
    long = make_clip(folder / "harbour" / "boat.mp4", seconds=20, **keyed)  # type: ignore[arg-type]
    evil = make_clip(folder / f"{EVIL}.mp4", seconds=9, source="smptebars", **keyed)  # type: ignore[arg-type]
    tall = make_clip(folder / "tall.mp4", seconds=14, filters="scale=90:160", **keyed)  # type: ignore[arg-type]
    old = make_clip(folder / "old.avi", seconds=8, codec=("-c:v", "mpeg4"))
    return {
        "harbour/boat": Shown(
            long, 20, {"boat": (13.5, 0.8), "gull": (4.5, 0.6)}, {"camera": "X100", "stars": "5"}
        ),
        EVIL: Shown(evil, 9, {"boat": (4.5, 0.7)}, {"camera": EVIL, "stars": "2"}),
        "tall": Shown(tall, 14, {"onion": (5.5, 0.8), "boat": (9.5, 0.5)}),
        "old": Shown(old, 8, {"film": (3.5, 0.8)}),
        "gone": Shown(folder / "gone.mp4", 12, {"boat": (6.5, 0.6)}),
    }


def make_index(folder: Path, shown: Mapping[str, Shown], num_others: int = 40) -> Path:
    """Write an index of the videos, and of others that show nothing and are gone: what scores stand out from."""
    random = np.random.default_rng(0)
    others = {f"other/{n:02}": Shown(folder / f"other{n:02}.mp4", 10) for n in range(num_others)}
    held = {**shown, **others}
    moments = [_moments_of(video, random) for video in held.values()]
    counts = [len(embeddings) for embeddings, _ in moments]
    segment = Segment(
        key="",
        video_embeddings=np.stack([_unit(embeddings.mean(axis=0)) for embeddings, _ in moments]),
        moment_embeddings=np.concatenate([embeddings for embeddings, _ in moments]),
        moment_offsets=np.cumsum([0, *counts]),
        moment_seconds=np.concatenate([seconds for _, seconds in moments]),
        duration_seconds=np.array([video.seconds for video in held.values()]),
        size_bytes=np.array([_state(video.path)[0] for video in held.values()]),
        mtime_ns=np.array([_state(video.path)[1] for video in held.values()]),
        video_ids=StringColumn.of(held),
        source_paths=StringColumn.of(str(video.path) for video in held.values()),
        content_hashes=StringColumn.of(f"{n:064}" for n in range(len(held))),
        deleted=np.empty(0, np.int64),
    )
    with writing(folder):
        writer = IndexWriter(folder)
        writer.draft |= {"model": {"kind": "made up"}, "model_fingerprint": "made up", "store": "features"}
        writer.draft["moments"] = {"seconds": MOMENT_SECONDS, "stride_seconds": 1.0}
        writer.add(segment)
        writer.draft["captions"] = [publish_pool(folder, _captions())]
        table = folder / "metadata.csv"
        rows = (
            f'"{name}",{",".join(video.metadata.values())}\n' for name, video in shown.items() if video.metadata
        )
        table.write_text("".join(("video_id,camera,stars\n", *rows)))
        writer.draft["metadata"] = [publish_metadata(folder, table, list(held))]
        writer.commit()
    return folder


def embed(text: str) -> NDArray[np.float32]:
    """Return the direction of the topics that a text names; one that no video shows where it names none."""
    embedding = np.zeros(D, np.float32)
    embedding[[n for n, topic in enumerate(TOPICS) if topic in text]] = 1
    return _unit(embedding) if embedding.any() else _unit(np.random.default_rng(1).normal(size=D))


@contextlib.contextmanager
def made_up_model(slow: threading.Event) -> Iterator[None]:
    """Let searches know texts by `embed` and files by their names; a text with `slow` waits for the event."""

    def embed_text(self: QueryEmbedder, text: str, what: str = "the query") -> NDArray[np.float32]:
        if "slow" in text:
            assert slow.wait(600)
        return embed(text)

    do = WorkerPool.do

    async def embed_file(self: WorkerPool, name: str, **arguments: Any) -> Any:
        if name == "embed":
            took = {"embed": 0.0, "load": 0.0}
            return {"embedding": embed("boat").tolist(), "model_fingerprint": "made up", "elapsed_seconds": took}
        return await do(self, name, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QueryEmbedder, "embed_text", embed_text)
        patch.setattr(WorkerPool, "do", embed_file)
        yield


@contextlib.contextmanager
def served(index: Path, token: str | None = None) -> Iterator[str]:
    """Yield the address of a server of the index."""
    with serving(index, token=token, open_searcher=lambda previous: Searcher(index, previous=previous)) as served:
        yield f"http://127.0.0.1:{served.port}/"


def _moments_of(video: Shown, random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    begins = np.arange(0, max(video.seconds - MOMENT_SECONDS, 0) + 0.5)
    seconds = np.stack([begins, np.minimum(begins + MOMENT_SECONDS, video.seconds)], axis=1)
    own = _unit(random.normal(size=NOISE))
    embeddings = np.zeros((len(begins), D))
    for topic, (when, clearly) in video.topics.items():
        embeddings[:, TOPICS.index(topic)] = clearly * np.exp(-(((seconds.mean(axis=1) - when) / 1.6) ** 2))
    rest = np.sqrt(np.maximum(1 - (embeddings**2).sum(axis=1, keepdims=True), 0))
    embeddings[:, len(TOPICS) :] = rest * _unit(own + random.normal(scale=0.05, size=(len(begins), NOISE)))
    return _unit(embeddings + random.normal(scale=0.005, size=embeddings.shape)), seconds + video.begin


def _captions() -> Pool:
    said = ("a boat leaves the harbour", "an onion is cut", EVIL)
    embeddings = np.stack([embed("boat"), embed("onion"), embed("gull")]).astype(np.float16)
    seconds = np.array([[np.nan, np.nan], [5.0, 7.0], [np.nan, np.nan]])
    videos = StringColumn.of(("harbour/boat", "tall", EVIL))
    return Pool("training", "training", "made up", StringColumn.of(said), videos, seconds, embeddings)


def _unit(vectors: NDArray[Any]) -> NDArray[Any]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _state(path: Path) -> tuple[int, int]:
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (1, 1)


if __name__ == "__main__":  # a process that is `svb`, without the model of the index
    from svb.cli import main

    with made_up_model(threading.Event()):
        main()
