"""Many clients while the index changes: no error, and no row of another generation than the answer names.

`SVB_LOAD_SECONDS=60 pytest -m slow -s tests/test_serve_load.py -k many` is a minute of it, and tells times.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import synthetic
from indexes import index
from numpy.typing import NDArray
from serving import Server, running

from svb.retrieve.indexing import index_writer
from svb.retrieve.search import Searcher
from svb.retrieve.stored.manifest import read_manifest
from svb.retrieve.stored.segment import open_segments
from svb.train.config import TrainConfig
from svb.train.run import train

pytestmark = pytest.mark.slow

CLIENTS = 200
LOAD_SECONDS = float(os.environ.get("SVB_LOAD_SECONDS", "20"))
QUERIES = tuple(f"a {first} and a {second}" for first in synthetic.WORDS[:6] for second in synthetic.WORDS[6:10])
K = 5

# By query, the score of every video, best first.
State = dict[str, list[tuple[str, float]]]


@dataclasses.dataclass
class World:
    """A run, stores that differ in their videos, an index of the first, and what each generation must answer."""

    run: Path
    stores: list[Path]
    index: Path
    embeddings: dict[str, NDArray[np.float32]]
    states: dict[int, State]

    def update(self, number: int) -> None:
        index(self.run, self.index, store=self.stores[number % len(self.stores)], prune=True)

    def record(self) -> None:
        """Score every live video by its best moment, the slow and obvious way."""
        manifest = read_manifest(self.index)
        state: State = {query: [] for query in self.embeddings}
        for segment in open_segments(self.index, manifest):
            moments = np.asarray(segment.moment_embeddings, np.float32)
            for row in sorted({*range(segment.num_videos)} - {*segment.deleted.tolist()}):
                begin, end = segment.moment_offsets[row : row + 2]
                for query, embedding in self.embeddings.items():
                    state[query].append((segment.video_ids[row], float((moments[begin:end] @ embedding).max())))
        ranked = {query: sorted(scores, key=lambda scored: -scored[1]) for query, scores in state.items()}
        self.states[manifest["generation"]] = ranked


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        encoder = synthetic.make_text_encoder()
        patch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", lambda settings, device: encoder)
        store, captions = synthetic.make_task(tmp_path, num_train=50, num_val=14)
        config = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=1, learning_rate=2e-3)
        run = train(store, captions, tmp_path / "run", config)
        stores = [_store_of(tmp_path / f"store{number}", number, patch) for number in range(5)]
        out = index(run, tmp_path / "index", store=stores[0])
        searcher = Searcher(out)
        world = World(run, stores, out, {query: searcher.embed_text(query) for query in QUERIES}, {})
        world.record()
        real = index_writer.commit

        def commit_and_record(folder: Path, manifest: dict[str, Any]) -> None:
            real(folder, manifest)
            world.record()

        patch.setattr(index_writer, "commit", commit_and_record)
        yield world


def _store_of(path: Path, number: int, patch: pytest.MonkeyPatch) -> Path:
    """Write a store: some videos are in all, some come and go, and some have another content each time."""
    real = synthetic.make_record
    random = np.random.default_rng(number)
    names = [f"stays{n:02}" for n in range(20)] + [f"store{number}/own{n:02}" for n in range(15)]
    names += [f"changes{n:02}" for n in range(10)] + [f"often{n:02}" for n in range(20) if (n + number) % 3]
    content = {name: f"{name} {number if 'changes' in name else ''}" for name in names}

    def record(video_id: str, **options: Any) -> Any:
        digest = hashlib.sha256(content[video_id].encode()).hexdigest()
        changed = {"content_hash": digest, "mtime_ns": 1 + int(digest[:8], 16)}
        return dataclasses.replace(real(video_id, **options), **changed)

    def frames(name: str) -> NDArray[np.floating]:
        seed = int(hashlib.sha256(content[name].encode()).hexdigest()[:8], 16)
        own = np.random.default_rng(seed)
        return own.normal(size=(int(own.integers(2, 30)), 24))

    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(synthetic, "make_record", record)
        random.shuffle(names)
        return synthetic.make_store(path, {name: frames(name) for name in names})


def check(world: World, query: str, answer: dict[str, Any]) -> None:
    """Compare an answer with what its generation must answer; equal scores may come in any order."""
    expected = world.states[answer["generation"]][query]
    found = [(result["video_id"], result["score"]) for result in answer["results"]]
    scores = dict(expected)
    assert len(found) == min(K, len(expected))
    assert answer["num_videos"] == len(expected)
    for (video_id, score), (_, best) in zip(found, expected, strict=False):
        assert video_id in scores, f"{video_id} is not in generation {answer['generation']}"
        assert score == pytest.approx(scores[video_id], abs=2e-4)
        assert score == pytest.approx(best, abs=2e-4)


async def ask_on(
    client: httpx2.AsyncClient, number: int, enough: asyncio.Event
) -> list[tuple[str, float, dict[str, Any]]]:
    """Ask until it is enough, one question after the other; return each with its answer."""
    answers = []
    while not enough.is_set():
        query = QUERIES[(number + len(answers)) % len(QUERIES)]
        response = await client.post("/api/search", json={"text": query, "k": K, "fold": False})
        assert response.status_code == 200, response.text
        answers.append((query, response.elapsed.total_seconds(), response.json()))
    return answers


async def ask_during_updates(server: Server, world: World) -> list[list[tuple[str, float, dict[str, Any]]]]:
    """Ask as many clients while the index changes; return what each asked, with the answers."""
    limits = httpx2.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx2.AsyncClient(base_url=server.url, limits=limits, timeout=None) as client:
        enough, end, updates = asyncio.Event(), time.monotonic() + LOAD_SECONDS, 0
        asking = asyncio.gather(*(ask_on(client, number, enough) for number in range(CLIENTS)))
        while not asking.done() and (updates < 3 or time.monotonic() < end):
            updates += 1
            await asyncio.to_thread(world.update, updates)
            await asyncio.sleep(0.1)
        enough.set()
        return await asking


def test_many_clients_while_the_index_is_updated(world: World) -> None:
    with running(world.index) as server:
        asked = asyncio.run(ask_during_updates(server, world))
        with httpx2.Client(base_url=server.url) as client:
            health, metrics = client.get("/healthz").json(), client.get("/metrics").text
        assert health["status"] == "ok"
        assert server.stop() == (0, "")
    for answers in asked:
        generations = [answer["generation"] for _, _, answer in answers]
        assert generations == sorted(generations)
        for query, _, answer in answers:
            check(world, query, answer)
    assert f'status="200"}} {sum(map(len, asked))}' in metrics
    seen = {answer["generation"] for answers in asked for _, _, answer in answers}
    assert len(seen) >= 2, "the index did not change while it was searched"
    seconds = [seconds for answers in asked for _, seconds, _ in answers]
    p50, p99 = np.percentile(seconds, [50, 99])
    print(f"{len(seconds)} answers, p50 {p50:.2f} s, p99 {p99:.2f} s, {len(seen)} generations")


def kill_at(write: int) -> None:
    """Have this process killed before its n-th change of a file's name, or removal of a folder."""
    left = write

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for holder, name in ((Path, "replace"), (Path, "rename"), (shutil, "rmtree")):
        setattr(holder, name, counted(getattr(holder, name)))


def test_an_indexer_killed_at_every_write_leaves_the_server_a_whole_index(world: World) -> None:
    def ask(client: httpx2.Client) -> None:
        for query in QUERIES[:3]:
            response = client.post("/api/search", json={"text": query, "k": K, "fold": False})
            assert response.status_code == 200, response.text
            check(world, query, response.json())
        assert client.get("/healthz").json()["status"] == "ok"

    with running(world.index) as server, httpx2.Client(base_url=server.url) as client:
        kills = 0
        for write in range(200):
            child = os.fork()
            if not child:
                kill_at(write)
                world.update(1)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            world.record()
            ask(client)
            if not os.WIFSIGNALED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                break
            kills += 1
        assert kills > 5
        world.update(2)
        ask(client)
        assert server.stop() == (0, "")
    assert json.loads((world.index / "manifest.json").read_text())["generation"] == max(world.states)
