"""Vectors in Milvus: the server's part is played by Milvus Lite, which is embedded, and answers as segments do."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import indexes as made
import numpy as np
import pytest
from indexes import files_of, remove
from messages import heard
from numpy.typing import NDArray

from svb.errors import MismatchError, ModelUnavailableError, StoreError, UsageError
from svb.retrieve.answer import Answer, SearchRequest
from svb.retrieve.indexing.index_parts import IndexParts
from svb.retrieve.milvus import milvus_mirror, milvus_server
from svb.retrieve.milvus import milvus_vectors as milvus
from svb.retrieve.milvus.milvus_mirror import mirror, remove_gone
from svb.retrieve.milvus.milvus_server import Target, connect, moment_ids, video_keys
from svb.retrieve.milvus.milvus_vectors import MilvusVectors
from svb.retrieve.search import open_searcher
from svb.retrieve.searching.vectors import SegmentVectors
from svb.retrieve.stored.manifest import commit
from svb.retrieve.stored.segment import Segment, StringColumn, open_segments

milvus_lite = pytest.importorskip(
    "milvus_lite", reason="pip install '.[milvus]': Milvus Lite stands for the server"
)
server_manager_instance = milvus_lite.server_manager_instance

SIZE = 16
BY = ("moment", "video")


def publish(out: Path, *segments: Segment) -> dict[str, Any]:
    return made.index_manifest(out, segments)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server for all tests that neither stop it nor look at its file."""
    file = tmp_path_factory.mktemp("shared") / "vectors.db"
    yield f"milvus://{file}"
    server_manager_instance.release_server(str(file))


@pytest.fixture
def uri(shared: str) -> str:
    """Return the address of a server that holds nothing."""
    client = connect(Target.parse(shared), create=True).client
    for name in client.list_collections():
        if not name.startswith("mirrored"):
            client.drop_collection(name)
    return shared


@pytest.fixture
def own_uri(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a server that was not started yet."""
    yield f"milvus://{tmp_path}/server/vectors.db"
    server_manager_instance.release_server(str(tmp_path / "server/vectors.db"))


def both(out: Path, manifest: dict[str, Any], uri: str) -> tuple[SegmentVectors, MilvusVectors]:
    manifest = {**manifest, "vectors": mirror(out, manifest, uri)}
    remove_gone(out, manifest)
    return SegmentVectors(open_segments(out, manifest)), MilvusVectors.open(out, manifest)


def copy_of(remote: MilvusVectors, cache: Path) -> MilvusVectors:
    """Return the same vectors, not connected yet and with another cache."""
    how = (remote.catalog, remote._keys, remote._target, remote._made_with, None, cache)
    return MilvusVectors(*how, remote._fresh, remote._is_fresh)


def queries(number: int, seed: int = 5) -> NDArray[np.float32]:
    return made.clustered(number, SIZE, seed)


def assert_nearest_agree(
    local: SegmentVectors, remote: MilvusVectors, k: int, by: str, allowed: NDArray[np.bool_] | None
) -> None:
    for query in queries(3):
        expected, found = (each.nearest(query, k, by=by, allowed=allowed) for each in (local, remote))
        assert len(found[0]) == len(expected[0]), (by, k)
        np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
        # Only rows that score the same may stand in another order.
        changed = found[1] != expected[1]
        own = local.embeddings(found[1][changed], by=by) @ query
        np.testing.assert_allclose(own, expected[0][changed], atol=2e-6)


@pytest.fixture(scope="module")
def mirrored(shared: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentVectors, MilvusVectors]:
    """Two segments with deleted videos; only to be read."""
    first = made.random_segment(60, size=SIZE, seed=1, deleted=[3, 17])
    second = made.random_segment(30, size=SIZE, seed=2, first=100, deleted=[0])
    out = tmp_path_factory.mktemp("mirrored")
    return both(out, publish(out, first, second), f"{shared}?collection=mirrored")


Pair = tuple[SegmentVectors, MilvusVectors]


class TestAnswers:
    @pytest.mark.parametrize(
        ("max_keys", "max_rows", "first_rows"),
        [(10_000, milvus_server.MAX_ROWS, milvus.FIRST_ROWS), (40, 32, milvus.FIRST_ROWS), (3, 32, 10)],
    )
    def test_the_nearest_are_those_of_an_exact_scan(
        self, mirrored: Pair, max_keys: int, max_rows: int, first_rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where a server gives fewer rows at once, and takes fewer keys."""
        monkeypatch.setattr(milvus, "MAX_KEYS", max_keys)
        monkeypatch.setattr(milvus, "FIRST_ROWS", first_rows)
        monkeypatch.setattr(milvus_server, "MAX_ROWS", max_rows)
        for by, share, k in itertools.product(BY, (None, 0.0, 0.1, 0.9, 1.0), (1, 32, 33, 1000)):
            allowed = None if share is None else np.random.default_rng(7).random(90) < share
            assert_nearest_agree(*mirrored, k, by, allowed)

    def test_rows_that_score_the_same(self, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(milvus_server, "MAX_ROWS", 8)
        moments = [np.repeat(made.clustered(1, SIZE, 3), 5, axis=0) for _ in range(6)]
        pair = both(tmp_path, publish(tmp_path, made.make_segment([*moments, made.clustered(30, SIZE, 4)])), uri)
        for k in (8, 20, 30, 60):
            scores, rows = pair[1].nearest(moments[0][0], k, by="moment", allowed=None)
            expected, _ = pair[0].nearest(moments[0][0], k, by="moment", allowed=None)
            assert len(np.unique(rows)) == len(rows)
            if k <= 30:
                np.testing.assert_allclose(scores, expected, atol=2e-6)

    def test_rows_come_in_the_order_asked_for_and_one_that_is_lacking_is_named(self, mirrored: Pair) -> None:
        local, remote = mirrored
        rows = np.array([5, 0, 77, 5])
        for by in BY:
            np.testing.assert_array_equal(remote.embeddings(rows, by=by), local.embeddings(rows, by=by))
        with pytest.raises(StoreError, match="mirrored_videos lacks 1 of 2 vectors of this index - fill it"):
            remote.embeddings(np.array([2, 3]), by="video")  # 3 was deleted

    def test_the_background_is_fetched_once(
        self, mirrored: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        local, remote = mirrored

        def check(by: str) -> None:
            found = copy_of(remote, tmp_path / "cache").background(by)
            np.testing.assert_array_equal(found, local.background(by))

        for by in BY:
            check(by)
        with monkeypatch.context() as patch:
            patch.setattr(milvus, "connect", lambda target: pytest.fail("connected"))
            for by in BY:
                check(by)
        moments, videos = sorted((tmp_path / "cache").iterdir())
        assert moments.name.startswith("milvus-moments-") and videos.name.startswith("milvus-videos-")
        moments.write_bytes(moments.read_bytes()[:-9])
        check("moment")

    def test_a_search_answers_the_same_through_it(self, tmp_path: Path, uri: str) -> None:
        first = made.random_segment(40, size=SIZE, seed=1, deleted=[3, 17])
        manifest = publish(tmp_path, first)
        query = queries(1)[0]
        requests = [
            SearchRequest(text="not read", num_captions=0, with_curves=True),
            SearchRequest(like="v5", by="video", k=100, min_duration_seconds=9.0),
            SearchRequest(text="not read", folders=("/videos",), fold=False, k=3),
        ]
        answers = []
        for vectors in (None, mirror(tmp_path, manifest, uri)):
            commit(tmp_path, {**manifest, "vectors": vectors})
            searcher = open_searcher(tmp_path)
            answers.append([searcher.search_embedding(query, request) for request in requests])
        for expected, found in zip(*answers, strict=True):
            assert [each.video_id for each in found.results] == [each.video_id for each in expected.results]
            assert found.results and found.exact and found.num_windows == expected.num_windows
            for one, other in zip(found.results, expected.results, strict=True):
                assert (one.confidence, one.duplicates) == (other.confidence, other.duplicates)
                assert one.score == pytest.approx(other.score, abs=2e-6)
                seconds = [(moment.begin_seconds, moment.end_seconds) for moment in one.moments]
                assert seconds == [(moment.begin_seconds, moment.end_seconds) for moment in other.moments]


class TestMirror:
    def held(self, uri: str, by: str) -> list[int]:
        with connect(Target.parse(uri)).calling() as client:
            return sorted(each["id"] for each in client.query(f"svb_{by}s", filter="id >= 0", output_fields=["id"]))

    def sent(self, out: Path, manifest: dict[str, Any], uri: str) -> list[str]:
        messages = heard()
        progress: list[tuple[int, int]] = []
        where = mirror(out, manifest, uri, on_progress=lambda *now: progress.append(now))
        assert not progress or progress[-1][0] == progress[-1][1] > 0
        remove_gone(out, {**manifest, "vectors": where})
        return [message.removeprefix(f"{uri}: ") for message in messages]

    def test_only_what_has_changed_is_sent(self, tmp_path: Path, uri: str) -> None:
        manifest = publish(tmp_path, made.random_segment(12, size=SIZE, seed=1))
        assert self.sent(tmp_path, manifest, uri) == ["+12 =0 videos, searched by FLAT"]
        assert self.sent(tmp_path, manifest, uri) == ["+0 =12 videos, searched by FLAT"]
        second = made.random_segment(5, size=SIZE, seed=2, first=50)
        manifest = publish(tmp_path, made.random_segment(12, size=SIZE, seed=1, deleted=[2, 5]), second)
        assert self.sent(tmp_path, manifest, uri) == ["+5 =10 videos, searched by FLAT", "-2 videos"]
        catalog = SegmentVectors(segments := open_segments(tmp_path, manifest)).catalog
        keys = video_keys(segments)
        assert self.held(uri, "video") == sorted(keys[catalog.alive].tolist())
        numbers = np.concatenate([np.arange(count) for count in catalog.moment_counts])
        ids = moment_ids(np.repeat(keys, catalog.moment_counts), numbers)
        assert self.held(uri, "moment") == sorted(ids[np.repeat(catalog.alive, catalog.moment_counts)].tolist())
        assert_nearest_agree(*both(tmp_path, manifest, uri), 20, "moment", None)

    def test_a_server_that_was_started_again_goes_on(self, tmp_path: Path, own_uri: str) -> None:
        self.sent(tmp_path, publish(tmp_path, made.random_segment(6, size=SIZE, seed=1)), own_uri)
        second = publish(tmp_path, made.random_segment(4, size=SIZE, seed=2, first=20))
        server_manager_instance.release_server(str(tmp_path / "server/vectors.db"))
        assert self.sent(tmp_path, second, own_uri) == ["+4 =0 videos, searched by FLAT", "-6 videos"]
        server_manager_instance.release_server(str(tmp_path / "server/vectors.db"))
        # A process that has nothing to send finds the collections as they are after a start: not loaded.
        third = publish(tmp_path, made.random_segment(4, size=SIZE, seed=2, first=20, deleted=[0]))
        remove_gone(tmp_path, {**third, "vectors": {"uri": own_uri}})
        assert len(self.held(own_uri, "video")) == 3
        server_manager_instance.release_server(str(tmp_path / "server/vectors.db"))
        local = SegmentVectors(open_segments(tmp_path, third))
        where = {"kind": "milvus", "uri": own_uri, "index": "FLAT", "recall": None}
        assert_nearest_agree(local, MilvusVectors.open(tmp_path, {**third, "vectors": where}), 9, "moment", None)

    def test_changed_content_takes_the_place_of_the_old(self, tmp_path: Path, uri: str) -> None:
        old = made.random_segment(6, size=SIZE, seed=1)
        self.sent(tmp_path, publish(tmp_path, old), uri)
        hashes = StringColumn.of([*old.content_hashes.tolist()[:5], "another"])
        changed = publish(tmp_path, replace(old, content_hashes=hashes))
        assert self.sent(tmp_path, changed, uri) == ["+1 =5 videos, searched by FLAT", "-1 videos"]
        assert_nearest_agree(*both(tmp_path, changed, uri), 100, "moment", None)
        # Without a hash, size and time tell.
        blank = replace(old, content_hashes=StringColumn.of([""] * 6))
        later = replace(blank, mtime_ns=blank.mtime_ns + 1)
        assert not {*video_keys([blank]).tolist()} & {*video_keys([later]).tolist()}

    @pytest.mark.parametrize(
        "calls", [pytest.param(calls, marks=[] if calls in (2, 5) else pytest.mark.slow) for calls in range(1, 9)]
    )
    def test_a_killed_run_is_gone_on_with(
        self, calls: int, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pymilvus import MilvusClient

        self.sent(tmp_path, publish(tmp_path, made.random_segment(12, size=SIZE, seed=1)), uri)
        second = made.random_segment(5, size=SIZE, seed=2, first=50)
        manifest = publish(tmp_path, made.random_segment(12, size=SIZE, seed=1, deleted=[0, 1, 2]), second)
        left = calls
        with monkeypatch.context() as patch:
            patch.setattr(milvus_mirror, "BYTES_A_CALL", 4 * SIZE * 4)
            patch.setattr(milvus_mirror, "MAX_DELETED", 2)

            def counted(real: Any) -> Any:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise KeyboardInterrupt
                    return real(*args, **options)

                return call

            for name in ("upsert", "delete"):
                patch.setattr(MilvusClient, name, counted(getattr(MilvusClient, name)))
            with pytest.raises(KeyboardInterrupt):
                both(tmp_path, manifest, uri)
        # In the meantime a search finds what is there, and nothing wrong.
        local = SegmentVectors(open_segments(tmp_path, manifest))
        where = {"kind": "milvus", "uri": uri, "index": "FLAT", "recall": None}
        half = MilvusVectors.open(tmp_path, {**manifest, "vectors": where})
        query = queries(1)[0]
        scores, rows = half.nearest(query, 1000, by="moment", allowed=None)
        np.testing.assert_allclose(scores, local.embeddings(rows, by="moment") @ query, atol=2e-6)
        assert local.catalog.alive[local.catalog.videos_of(rows)].all()
        # A video that came only half comes whole, one that goes again leaves nothing.
        local, remote = both(tmp_path, manifest, uri)
        for by in BY:
            assert_nearest_agree(local, remote, 1000, by, None)
        assert len(self.held(uri, "video")) == local.catalog.alive.sum()
        assert len(self.held(uri, "moment")) == local.catalog.moment_counts[local.catalog.alive].sum()

    def test_half_a_video_that_is_not_wanted_any_more_is_removed(
        self, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(milvus_mirror, "_send_videos", lambda *args: (_ for _ in ()).throw(RuntimeError))
            mirror(tmp_path, publish(tmp_path, made.random_segment(3, size=SIZE, seed=1)), uri)
        assert self.held(uri, "moment") and not self.held(uri, "video")
        local, _ = both(tmp_path, publish(tmp_path, made.random_segment(4, size=SIZE, seed=2, first=9)), uri)
        assert len(self.held(uri, "moment")) == local.catalog.num_moments

    @pytest.mark.parametrize("by", BY)
    def test_segments_that_were_not_sent_yet_are_compared_here(self, tmp_path: Path, uri: str, by: str) -> None:
        first = made.random_segment(20, size=SIZE, seed=1, deleted=[4])
        second = made.random_segment(5, size=SIZE, seed=2, first=20, deleted=[0])
        third = made.random_segment(10, size=SIZE, seed=3, first=40)
        where = mirror(tmp_path, publish(tmp_path, first, third), uri)
        assert len(self.held(uri, "video")) == 29
        manifest = {**publish(tmp_path, first, second, third), "vectors": where}
        local = SegmentVectors(open_segments(tmp_path, manifest))
        # Of those a run that was killed has sent some.
        for held in (where, mirror(tmp_path, manifest, uri)):
            remote = MilvusVectors.open(tmp_path, {**manifest, "vectors": held})
            for allowed, k in itertools.product((None, np.arange(35) % 2 == 0), (10, 1000)):
                assert_nearest_agree(local, remote, k, by, allowed)
            rows = np.random.default_rng(0).permutation(np.flatnonzero(local.catalog.alive))
            np.testing.assert_array_equal(remote.embeddings(rows, by="video"), local.embeddings(rows, by="video"))
        # Where embeddings do not lie, what was not sent is not found yet, and that is said.
        remove_gone(tmp_path, {**publish(tmp_path, first, third), "vectors": where})
        for path in tmp_path.glob("segments/*/*_embeddings.npy"):
            path.unlink()
        remote = MilvusVectors.open(tmp_path, {**manifest, "vectors": where})
        assert remote.num_missing == 5
        sent = np.flatnonzero(local.catalog.alive & ((np.arange(35) < 20) | (np.arange(35) >= 25)))
        rows = remote.nearest(queries(1)[0], 1000, by=by, allowed=None)[1]
        assert set(remote.catalog.videos_of(rows) if by == "moment" else rows) == set(sent)

    def test_an_approximate_collection_is_measured(self, tmp_path: Path, uri: str) -> None:
        manifest = publish(tmp_path, made.random_segment(120, size=SIZE))
        messages = heard()
        where = mirror(tmp_path, manifest, f"{uri}?index=hnsw")
        assert where["index"] == "HNSW" and 0.5 < where["recall"] <= 1
        assert messages[-1] == f"{uri}?index=hnsw: recall@10 {where['recall']:.3f} against exact search"
        query, asked = queries(1)[0], SearchRequest(text="not read", num_captions=0)

        def search(vectors: Any, **changes: Any) -> Answer:
            commit(tmp_path, {**manifest, "vectors": vectors})
            return open_searcher(tmp_path).search_embedding(query, replace(asked, **changes))

        found, exact, expected = search(where), search(where, exact=True), search(None)
        assert (found.exact, found.recall) == (False, where["recall"])
        assert (exact.exact, exact.recall, exact.results) == (True, None, expected.results)
        with pytest.raises(MismatchError, match=r"are searched by HNSW, not FLAT - name another collection"):
            mirror(tmp_path, manifest, f"{uri}?index=FLAT")
        for path in tmp_path.glob("segments/*/*_embeddings.npy"):
            path.unlink()
        assert search(where).results
        with pytest.raises(StoreError, match=r"an exact search needs all vectors, and .* does not hold them"):
            search(where, exact=True)


class TestRefusals:
    def test_another_model(self, tmp_path: Path, uri: str) -> None:
        manifest = publish(tmp_path, made.random_segment(5, size=SIZE))
        manifest["vectors"] = mirror(tmp_path, manifest, uri)
        for change in (
            {"model_fingerprint": "another"},
            {"moments": {"seconds": 8.0, "stride_seconds": 2.0}},
            {"embedding_size": SIZE // 2, "segments": []},
        ):
            words = r"svb_moments at .* was made with .*0123456789abcdef.* - name another"
            with pytest.raises(MismatchError, match=words):
                mirror(tmp_path, {**manifest, **change}, uri)
        other = MilvusVectors.open(tmp_path, {**manifest, "model_fingerprint": "another"})
        with pytest.raises(MismatchError, match=r"0123456789abcdef.*another"):
            other.nearest(queries(1)[0], 3, by="moment", allowed=None)
        with connect(Target.parse(f"{uri}?collection=other"), create=True).calling() as client:
            client.create_collection("other_moments", dimension=SIZE)
        with pytest.raises(MismatchError, match="was made with another program"):
            mirror(tmp_path, manifest, f"{uri}?collection=other")

    def test_what_is_not_there(self, tmp_path: Path, own_uri: str) -> None:
        manifest = publish(tmp_path, made.random_segment(5, size=SIZE))
        manifest["vectors"] = {"kind": "milvus", "uri": own_uri, "index": "FLAT", "recall": None}
        vectors = MilvusVectors.open(tmp_path, manifest)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"no file at .*vectors\.db - restore it, or fill it with `svb"):
                vectors.nearest(queries(1)[0], 3, by="moment", allowed=None)
        assert not (tmp_path / "server").exists()
        connect(Target.parse(own_uri), create=True)
        with pytest.raises(StoreError, match="no collection svb_moments and no collection svb_videos at"):
            vectors.nearest(queries(1)[0], 3, by="moment", allowed=None)

    def test_a_server_that_does_not_answer_and_no_client(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(milvus_server, "CONNECT_SECONDS", 0.2)
        manifest = publish(tmp_path, made.random_segment(5, size=SIZE))
        for error, words in (
            (StoreError, r"cannot open Milvus at http://127\.0\.0\.1:9 .* - is it running, an"),
            (ModelUnavailableError, r"run `pip install '.\[milvus\]'`"),
        ):
            with pytest.raises(error, match=words):
                mirror(tmp_path, manifest, "milvus://127.0.0.1:9/videos")
            monkeypatch.setitem(sys.modules, "pymilvus", None)

    def test_a_file_that_another_process_has_open_which_prints_nothing(self, tmp_path: Path, own_uri: str) -> None:
        manifest = publish(tmp_path, made.random_segment(5, size=SIZE))
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        code = f"""
import json, pathlib
from svb.errors import MismatchError
from svb.retrieve.milvus.milvus_mirror import mirror
folder = pathlib.Path({str(tmp_path)!r})
manifest = json.loads((folder / "manifest.json").read_text())
mirror(folder, manifest, {own_uri!r})
try:
    mirror(folder, {{**manifest, "model_fingerprint": "another"}}, {own_uri!r})
except MismatchError:
    print("open", flush=True)
input()
"""
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "open\n"
            with pytest.raises(StoreError, match="another process has it open"):
                connect(Target.parse(own_uri))
            assert holder.communicate("\n") == ("", "")

    def test_calls_that_fail_are_said(self, tmp_path: Path, uri: str) -> None:
        pair = both(tmp_path, publish(tmp_path, made.random_segment(5, size=SIZE)), f"{uri}?collection=one")
        other = both(tmp_path / "two", publish(tmp_path / "two", made.random_segment(5, size=SIZE, seed=2)), uri)
        assert_nearest_agree(*pair, 10, "video", None)
        assert_nearest_agree(*other, 10, "moment", None)  # collections share a server
        with connect(Target.parse(uri)).calling() as client:
            client.drop_collection("one_videos")
        with pytest.raises(StoreError, match=r"Milvus at .*vectors\.db failed .*one_videos"):
            pair[1].nearest(queries(1)[0], 3, by="video", allowed=None)


class TestUris:
    def test_addresses(self) -> None:
        for uri, expected in (
            ("milvus://host:19530/videos", ("http://host:19530", "videos", "", False)),
            ("milvus+tls://host/videos?index=autoindex", ("https://host", "videos", "AUTOINDEX", False)),
            ("milvus:///data/v.db", ("/data/v.db", "svb", "", True)),
            ("milvus:///data/v.db?collection=x&index=HNSW", ("/data/v.db", "x", "HNSW", True)),
        ):
            target = Target.parse(uri)
            assert (target.address, target.collection, target.index_type, target.is_file) == expected
            assert (target.uri, target.name_of("video")) == (uri, f"{target.collection}_videos")

    def test_what_is_no_address_or_holds_a_secret(self) -> None:
        for uri in (
            *("", "videos", "http://host/videos", "milvus://host:1", "milvus://host/a-b", "milvus://host/a/b"),
            *("milvus:///data/v", "milvus://host/a?secret=1", "milvus:///v.db?collection="),
            *("milvus://root:hunter2@host/videos", "https://root:hunter2@host/videos", "root:hunter2@host/videos"),
            *("milvus://host/videos?token=hunter2", "milvus:///v.db?password=hunter2"),
        ):
            words = "put `user:password` or a token into SVB_MILVUS_TOKEN" if "hunter2" in uri else "expected"
            with pytest.raises(UsageError, match=words) as caught:
                Target.parse(uri)
            assert "hunter2" not in str(caught.value)

    def test_the_token_comes_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import pymilvus

        asked: dict[str, Any] = {}
        monkeypatch.setattr(pymilvus, "MilvusClient", lambda address, **options: asked.update(options))
        monkeypatch.setenv("SVB_MILVUS_TOKEN", "root:Milvus")
        connect(Target.parse("milvus://host/videos"))
        assert asked["token"] == "root:Milvus"


@pytest.mark.usefixtures("words_encoder")
class TestIndex:
    """`svb index --to`: whatever became of the collections, the next run fills them."""

    def test_what_a_server_has_lost_is_sent_again(self, kept: made.Kept, uri: str) -> None:
        kept.update(to=uri)
        before, server = files_of(kept.out), connect(Target.parse(uri))
        kept.update()
        assert files_of(kept.out) == before and any("+0 =80 videos" in line for line in kept.said)
        for by in BY:
            server.client.drop_collection(server.target.name_of(by))
        kept.update()
        assert any("+80 =0 videos" in line for line in kept.said) and files_of(kept.out) == before
        keys = [row["id"] for row in server.client.query("svb_videos", filter="id >= 0", output_fields=["id"])]
        server.client.delete("svb_videos", filter=f"id in {keys[:7]}")
        kept.update()
        assert any("+7 =73 videos" in line for line in kept.said)

    def test_what_a_kill_left_on_the_server_goes_with_the_next_run(
        self, kept: made.Kept, uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept.update(to=uri)
        remove(kept.store, "clip000", "clip079")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(IndexParts, "remove_gone", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            kept.update(prune=True)
        client = connect(Target.parse(uri)).client
        for number in (80, 78):
            held = client.query("svb_videos", filter="id >= 0", output_fields=["id"], limit=1000)
            assert len(held) == number
            kept.update()


def splitmix64(state: int) -> int:
    """As in Steele, Lea and Flood, "Fast splittable pseudorandom number generators", figure 13."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_ids_are_stable_and_distinct() -> None:
    keys = video_keys([made.random_segment(50, size=SIZE)])
    ids = moment_ids(np.repeat(keys, 200), np.tile(np.arange(200), 50))
    assert (keys >= 0).all() and (ids >= 0).all() and len(np.unique(keys)) == 50 and len(np.unique(ids)) == 10_000
    for place in (0, 1, 7777):
        expected = splitmix64((int(keys[place // 200]) + (place % 200 + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert ids[place] == expected >> 1
    # Collections stay: another key would have the video sent again.
    segment = made.make_segment([made.clustered(3, SIZE, 1)])
    said = hashlib.blake2b(b"v0\0hash of v0\0" + b"3", digest_size=8).digest()
    assert video_keys([segment]).tolist() == [int.from_bytes(said, "big") // 2]


def test_threads_share_a_connection(mirrored: Pair) -> None:
    fresh, asked = copy_of(mirrored[1], Path("/nowhere")), queries(24)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: fresh.nearest(query, 5, by="moment", allowed=None), asked))
    for query, (scores, _) in zip(asked, found, strict=True):
        np.testing.assert_allclose(scores, mirrored[0].nearest(query, 5, by="moment", allowed=None)[0], atol=2e-6)
