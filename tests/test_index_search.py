from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from svb.cli import cli, run
from svb.config import fingerprint
from svb.data.feature_store import FeatureStore
from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.retrieve import index as index_module
from svb.retrieve.index import index, read_manifest, verify_index
from svb.retrieve.search import Searcher
from svb.retrieve.segment import Segment, read_segment
from svb.train.config import TrainConfig
from svb.train.run import train

# Tensors this small are slower on two threads than on one.
torch.set_num_threads(1)

CONFIG = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=2, learning_rate=2e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(*synthetic.make_task(folder), folder / "run", CONFIG)


@pytest.fixture(scope="module")
def built(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of all 80 videos; only to be read."""
    return index(trained, tmp_path_factory.mktemp("built") / "index", moment_seconds=3, moment_stride_seconds=1)


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "index", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "index"


@pytest.fixture(autouse=True)
def text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = synthetic.make_text_encoder()
    monkeypatch.setattr("svb.retrieve.search.load_matching_text_encoder", lambda settings, device: encoder)


def segment_of(folder: Path) -> Segment:
    return read_segment(folder / "segments" / read_manifest(folder)["segments"][0]["key"])


def make_query(seed: int = 0, size: int = 16) -> NDArray[np.float32]:
    query = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    return query / np.linalg.norm(query)


def found(folder: Path, **options: Any) -> list[tuple[str, float]]:
    return [
        (result.video_id, result.score) for result in Searcher(folder).search_embedding(make_query(), **options)
    ]


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Write other values into a manifest, with the checksum that goes with them."""
    manifest = {**read_manifest(folder), **changes}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "checksum": fingerprint(manifest)}))


@pytest.mark.parametrize("k", [1, 10, 80, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_videos_are_found_exactly(built: Path, seed: int, k: int) -> None:
    segment, query = segment_of(built), make_query(seed)
    scores = segment.video_embeddings.astype(np.float32) @ query
    order = np.argsort(-scores)[:k]
    results = Searcher(built).search_embedding(query, k)
    assert [result.video_id for result in results] == [segment.videos[video]["video_id"] for video in order]
    assert [result.score for result in results] == pytest.approx(scores[order].tolist(), abs=1e-6)
    assert [result.rank for result in results] == list(range(1, min(k, 80) + 1))
    moment_scores = segment.moment_embeddings.astype(np.float32) @ query
    for result, video in zip(results, order, strict=True):
        own = slice(segment.moment_offsets[video], segment.moment_offsets[video + 1])
        best = int(own.start + moment_scores[own].argmax())
        assert result.moment.score == pytest.approx(moment_scores[best], abs=1e-6)
        assert (result.moment.begin_seconds, result.moment.end_seconds) == tuple(segment.moment_seconds[best])
        assert result.source_path == f"/videos/{result.video_id}.mp4"


@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_moments_are_found_exactly(built: Path, k: int) -> None:
    segment, query = segment_of(built), make_query()
    scores = segment.moment_embeddings.astype(np.float32) @ query
    results = Searcher(built).search_embedding(query, k, by="moment")
    assert len(results) == min(k, len(scores))
    assert [result.score for result in results] == pytest.approx(np.sort(scores)[::-1][:k].tolist(), abs=1e-6)
    best = int(scores.argmax())
    video = int(np.flatnonzero(segment.moment_offsets <= best)[-1])
    assert results[0].video_id == segment.videos[video]["video_id"]
    assert results[0].moment.begin_seconds == segment.moment_seconds[best, 0]


def test_embeddings_are_of_unit_length_and_videos_are_all_there(built: Path, trained: Path) -> None:
    segment = segment_of(built)
    assert [video["video_id"] for video in segment.videos] == FeatureStore(trained.parent / "features").video_ids
    for embeddings in (segment.video_embeddings, segment.moment_embeddings):
        np.testing.assert_allclose(np.linalg.norm(embeddings.astype(np.float64), axis=1), 1, atol=1e-3)


@pytest.mark.parametrize(("seconds", "stride"), [(4.0, 2.0), (1.0, 1.0), (2.5, 0.7), (100.0, 3.0)])
@pytest.mark.parametrize("gap", [1.0, 0.37])
def test_moments_lie_within_the_video_and_cover_every_frame(
    trained: Path, tmp_path: Path, seconds: float, stride: float, gap: float
) -> None:
    random = np.random.default_rng(0)
    lengths = [1, 2, 3, 9, 30]
    videos = {f"v{length:02}": random.normal(size=(length, 24)) for length in lengths}
    durations = {"v01": 0.2, "v02": 1.5 * gap, "v09": float("nan"), "v30": 29.2 * gap}
    store = synthetic.make_store(
        tmp_path / "features", videos, seconds_between_frames=gap, durations_seconds=durations
    )
    if gap == 1.0:
        folder = index(
            trained, tmp_path / "index", store=store, moment_seconds=seconds, moment_stride_seconds=stride
        )
    else:  # trained on features of another sampling: a run of its own
        rows = [(video_id, "a dog and a dog", "train") for video_id in videos]
        captions = synthetic.make_captions(tmp_path / "captions.h5", rows, random.normal(size=(5, 20)))
        own = train(store, captions, tmp_path / "run", CONFIG)
        folder = index(own, tmp_path / "index", moment_seconds=seconds, moment_stride_seconds=stride)
    segment = segment_of(folder)
    for video, length in enumerate(lengths):
        own_moments = segment.moment_seconds[segment.moment_offsets[video] : segment.moment_offsets[video + 1]]
        duration = durations.get(f"v{length:02}", length * gap)
        end = length * gap if np.isnan(duration) else duration
        begins, ends = own_moments.T
        assert (begins < ends).all() and (ends - begins <= seconds + 1e-9).all()
        assert begins[0] == 0 and (begins >= 0).all() and (ends <= end + 1e-6).all()
        assert np.diff(begins) == pytest.approx(stride)
        for time_seconds in np.arange(length) * gap:
            assert any(begin - 1e-6 <= time_seconds < end for begin, end in own_moments), (length, time_seconds)


def test_one_moment_as_long_as_the_video_is_the_video(trained: Path, tmp_path: Path) -> None:
    segment = segment_of(index(trained, tmp_path / "index", moment_seconds=1000))
    np.testing.assert_allclose(segment.moment_embeddings, segment.video_embeddings, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"moment_seconds": 0.0},
        {"moment_seconds": float("nan")},
        {"moment_stride_seconds": float("nan")},
        {"moment_stride_seconds": 0.0},
        {"moment_seconds": 2.0, "moment_stride_seconds": 3.0},
    ],
)
def test_moments_need_a_length_and_cover_the_video(
    trained: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    with pytest.raises(UsageError, match="expected"):
        index(trained, tmp_path / "index", **options)
    assert not (tmp_path / "index").exists()


def test_the_same_run_gives_the_same_index(trained: Path, built: Path, tmp_path: Path) -> None:
    again = index(trained, tmp_path / "index", moment_seconds=3, moment_stride_seconds=1)
    assert (again / "manifest.json").read_bytes() == (built / "manifest.json").read_bytes()


def test_a_build_that_fails_leaves_the_old_index(
    copied: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = found(copied)

    def fail(path: Path, value: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(index_module, "publish_description", fail)
    with pytest.raises(OSError, match="the disk is full"):
        index(trained, copied, moment_seconds=1, moment_stride_seconds=1)
    monkeypatch.undo()
    assert found(copied) == before
    assert verify_index(copied) == []


def test_the_manifest_is_written_when_all_it_names_is_there(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, checked = index_module.publish_description, []

    def check(path: Path, manifest: Any) -> None:
        real(path, manifest)
        checked.append(verify_index(path.parent))

    monkeypatch.setattr(index_module, "publish_description", check)
    index(trained, tmp_path / "index")
    assert checked == [[]]


def test_a_new_build_replaces_the_old_one_whole(copied: Path, trained: Path) -> None:
    old = Searcher(copied)
    before = old.search_embedding(make_query(), 5, by="moment")
    index(trained, copied, moment_seconds=1, moment_stride_seconds=1)
    # A search that was opened before still answers from what it opened.
    assert old.search_embedding(make_query(), 5, by="moment") == before
    assert verify_index(copied) == []
    assert len(list((copied / "segments").iterdir())) == 1
    new = Searcher(copied).search_embedding(make_query(), 5, by="moment")
    assert max(result.moment.end_seconds - result.moment.begin_seconds for result in new) <= 1


def test_building_into_a_folder_removes_nothing_of_others(trained: Path, tmp_path: Path) -> None:
    mine = tmp_path / "captions" / "mine"
    mine.mkdir(parents=True)
    (tmp_path / "captions" / "notes.txt").write_text("keep")
    index(trained, tmp_path)
    assert mine.is_dir() and (tmp_path / "captions" / "notes.txt").read_text() == "keep"


def test_the_faiss_files_are_a_cache(copied: Path) -> None:
    expected = found(copied)
    (cache,) = (copied / "cache").glob("*.faiss")
    data = cache.read_bytes()
    cache.unlink()
    assert found(copied) == expected
    (again,) = (copied / "cache").glob("*.faiss")
    assert (again.name, again.read_bytes()) == (cache.name, data)
    shutil.rmtree(copied / "cache")
    assert found(copied) == expected


@pytest.mark.parametrize("damage", ["empty", "half", "header", "codes", "longer"])
def test_a_damaged_faiss_file_is_made_anew(copied: Path, damage: str) -> None:
    expected = found(copied)
    (cache,) = (copied / "cache").glob("*.faiss")
    data = bytearray(cache.read_bytes())
    whole = bytes(data)
    if damage == "empty":
        data = bytearray()
    elif damage == "half":
        data = data[: len(data) // 2]
    elif damage == "longer":
        data += b"more"
    else:
        data[69 if damage == "header" else len(data) - 20] ^= 0x41
    cache.write_bytes(data)
    assert found(copied) == expected
    assert cache.read_bytes() == whole


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_index_can_be_searched(copied: Path) -> None:
    expected = found(copied)
    shutil.rmtree(copied / "cache")
    copied.chmod(0o555)
    try:
        assert found(copied) == expected
    finally:
        copied.chmod(0o755)


def test_a_cache_that_cannot_be_written_is_done_without(copied: Path) -> None:
    expected = found(copied)
    shutil.rmtree(copied / "cache", ignore_errors=True)
    (copied / "cache").write_text("no folder")
    assert found(copied) == expected


def test_verify_finds_a_flipped_byte_in_every_file(copied: Path) -> None:
    found(copied)
    assert run(["verify", str(copied)]) == 0
    for path in sorted(copied.rglob("*")):
        if not path.is_file() or path.parent.name == "cache":
            continue
        data = path.read_bytes()
        for position in (0, len(data) // 2, len(data) - 3):
            damaged = bytearray(data)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            assert run(["verify", str(copied)]) == 1, path
        path.write_bytes(data)
    assert run(["verify", str(copied)]) == 0


def test_a_damaged_manifest_is_never_believed(copied: Path) -> None:
    path = copied / "manifest.json"
    data, expected = path.read_bytes(), read_manifest(copied)
    for position in range(0, len(data) - 1, 7):
        damaged = bytearray(data)
        damaged[position] ^= 2
        path.write_bytes(damaged)
        try:
            assert read_manifest(copied) == expected
        except StoreError:
            continue
        assert data[position : position + 1].isspace()


@pytest.mark.parametrize(
    "name",
    ["videos.json", "video_embeddings.npy", "moment_embeddings.npy", "moment_offsets.npy", "moment_seconds.npy"],
)
@pytest.mark.parametrize("kept", [0.0, 0.5, None])
def test_a_damaged_segment_is_a_clear_error(copied: Path, name: str, kept: float | None) -> None:
    (path,) = copied.glob(f"segments/*/{name}")
    data = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(StoreError, match=r"is damaged .* make the index again"):
        Searcher(copied)


def test_damaged_heads_are_refused(copied: Path) -> None:
    (path,) = copied.glob("heads/*/heads.safetensors")
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-4])
    with pytest.raises(StoreError, match=r"heads\.safetensors is damaged"):
        Searcher(copied).search_text("a dog")
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(MismatchError, match="was made with model"):
        Searcher(copied).search_text("a dog")


def test_another_model_is_refused_naming_both(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_manifest(copied, model_fingerprint="0123456789abcdef")
    with pytest.raises(MismatchError, match=r"made with model 0123456789abcdef, here it is [0-9a-f]{16}"):
        Searcher(copied).search_text("a dog")


def test_another_text_encoder_is_refused_naming_both(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    encoder = synthetic.make_text_encoder()
    encoder.weights_hash = "others"
    monkeypatch.setattr("svb.retrieve.embedder.load_text_encoder", lambda name, device: encoder)
    with pytest.raises(MismatchError, match="synthetic:words has weights others here, but of synthetic:words when"):
        Searcher(copied).search_text("a dog")


def test_a_newer_format_is_refused(copied: Path) -> None:
    edit_manifest(copied, format_version=2)
    with pytest.raises(StoreError, match="has format 2 - this svb reads up to 1; upgrade svb"):
        Searcher(copied)


def test_no_index_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not an index .* make one with `svb index"):
        Searcher(tmp_path)


def test_a_store_without_usable_videos_makes_no_index(trained: Path, tmp_path: Path) -> None:
    store = synthetic.make_store(tmp_path / "features", {"v": np.empty((0, 24))})
    with pytest.raises(InputError, match="has no video with features"):
        index(trained, tmp_path / "index", store=store)


@pytest.mark.parametrize("query", ["", "   ", "\n\t"])
def test_an_empty_query_is_refused(built: Path, query: str) -> None:
    with pytest.raises(InputError, match="the query is empty"):
        Searcher(built).search_text(query)


def test_odd_queries_are_refused_or_answered(built: Path) -> None:
    searcher = Searcher(built)
    with pytest.raises(InputError, match="the query has 1002 tokens, synthetic:words reads 12 - make it shorter"):
        searcher.search_text("dog " * 1000)
    with pytest.raises(InputError, match="is not UTF-8"):
        searcher.search_text("a dog \udcff")
    assert len(searcher.search_text("猫 🐈 -- 'quoted'", 3)) == 3


@pytest.mark.parametrize("k", [0, -3])
def test_k_must_be_positive(built: Path, k: int) -> None:
    searcher = Searcher(built)
    for ask in (
        lambda: searcher.search_text("a dog", k),
        lambda: searcher.search_video(Path("no.mp4"), k),
        lambda: searcher.search_embedding(make_query(), k),
    ):
        with pytest.raises(UsageError, match=f"k is {k} - expected at least 1"):
            ask()


def test_wrong_requests_are_usage_errors(built: Path) -> None:
    with pytest.raises(UsageError, match="expected video or moment"):
        Searcher(built).search_embedding(make_query(), by="frame")
    with pytest.raises(UsageError, match=r"the embedding is \(8,\) - expected \(16,\)"):
        Searcher(built).search_embedding(make_query(size=8))


@pytest.mark.parametrize("arguments", [[], ["a dog", "--video", "x.mp4"], ["--video", "x.mp4", "--by", "moment"]])
def test_one_kind_of_query_is_asked_for(built: Path, arguments: list[str]) -> None:
    assert run(["search", *arguments, "--index", str(built)]) == 2
    assert run(["search", "a dog", "-k", "0", "--index", str(built)]) == 2


@pytest.mark.parametrize("by", ["video", "moment"])
def test_json_schema(built: Path, by: str) -> None:
    arguments = ["search", "a dog", "-k", "4", "--by", by, "--json", "--index", str(built)]
    held = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert (held["query"], held["by"], len(held["results"])) == ("a dog", by, 4)
    for rank, result in enumerate(held["results"], start=1):
        assert set(result) == {"rank", "score", "video_id", "source_path", "moment"}
        assert set(result["moment"]) == {"begin_seconds", "end_seconds", "score"}
        assert result["rank"] == rank and -1.01 <= result["score"] <= 1.01
    assert held["results"] == sorted(held["results"], key=lambda result: -result["score"])


def test_the_table_has_a_line_a_result(built: Path) -> None:
    result = CliRunner().invoke(cli, ["search", "a dog", "-k", "3", "--index", str(built)])
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["rank", "score", "moment", "video"] and len(rows) == 3


def test_captions_of_an_index_are_distinct(built: Path) -> None:
    manifest = read_manifest(built)
    folder = built / "captions" / manifest["captions"][0]["key"]
    captions = [row["caption"] for row in json.loads((folder / "captions.json").read_text())]
    assert len(captions) == len(set(captions)) == len(np.load(folder / "caption_embeddings.npy"))
