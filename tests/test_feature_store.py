"""What is at rest: its layout for others, and that a kill or damage never passes for data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from svb.data.feature_store import FeatureStore, read_store_description, verify_store
from svb.data.feature_store_writer import FeatureStoreWriter, export_store
from svb.data.publish import ASIDE_PREFIX, published_file
from svb.data.rows import VideoRecord, VideoRows
from svb.errors import InputError, MismatchError, StoreError

BACKBONE = "toy:frames/some/weights.pth"
GROUP = "toy:frames@some@weights.pth"
OTHER = "toy:wide"
SETTINGS = {
    "sampling": {"fps": 1.0},
    "decoder": {"name": "pyav", "version": "1"},
    "batch_size": 32,
    "backbones": {BACKBONE: {"feature_size": 3}, OTHER: {"feature_size": 2}},
}
STRINGS = ("video_id", "source_path", "content_hash", "codec", "decoder", "status", "error")
INTEGERS = ("size_bytes", "mtime_ns", "width_px", "height_px", "rotation_degrees", "tries")
FLOATS = ("duration_seconds", "frame_rate", "elapsed_seconds")


def record(video_id: str, status: str = "ok") -> VideoRecord:
    return VideoRecord(
        video_id, f"/clips/{video_id}.mp4", 1000, 17, "ab" * 32, 2.0, 25.0, 64, 48, 90, "h264", "pyav", status, ""
    )


def rows(value: float, count: int = 2) -> dict[str, VideoRows]:
    times = np.arange(count, dtype=np.float64)
    return {
        BACKBONE: VideoRows(np.full((count, 3), value, np.float16), times),
        OTHER: VideoRows(np.full((count, 2), -value, np.float16), times + 0.5),
    }


def write(path: Path, *shards: dict[str, float | None], compact: bool = False) -> Path:
    """Write shards of videos; a video's value fills its rows, None is a failed video."""
    with FeatureStoreWriter(path, SETTINGS, {}) as writer:
        for shard in shards:
            for video_id, value in shard.items():
                failed = value is None
                writer.add(record(video_id, "unreadable" if failed else "ok"), {} if value is None else rows(value))
            writer.publish()
        if compact:
            writer.compact()
    return path


def values(path: Path) -> dict[str, float]:
    store = FeatureStore(path)
    loaded = store.load(BACKBONE)
    begins = loaded.offsets[:-1]
    return {v: float(loaded.features[b, 0]) for v, b in zip(loaded.video_ids, begins, strict=True)}


def shard_files(path: Path) -> list[Path]:
    return sorted((path / "shards").glob("*.h5"))


class TestLayout:
    @pytest.fixture
    def shard(self, tmp_path: Path) -> Path:
        return shard_files(write(tmp_path / "store", {"a/x": 1.0, "failed": None, "b": 2.0}))[0]

    def test_it_is_plain_hdf5_that_stands_alone(self, shard: Path) -> None:
        with h5py.File(shard) as file:
            assert set(file) == {"videos", GROUP, OTHER}
            assert {h5py.check_string_dtype(file["videos"][name].dtype).encoding for name in STRINGS} == {"utf-8"}
            assert {str(file["videos"][name].dtype) for name in INTEGERS} == {"int64"}
            assert {str(file["videos"][name].dtype) for name in FLOATS} == {"float64"}
            assert set(file["videos"]) == {*STRINGS, *INTEGERS, *FLOATS}
            assert all(dataset.shape == (3,) for dataset in file["videos"].values())
            for group, feature_size in ((GROUP, 3), (OTHER, 2)):
                assert set(file[group]) == {"features", "times_seconds", "offsets"}
                features, times, offsets = (file[group][n] for n in ("features", "times_seconds", "offsets"))
                assert (features.shape, features.dtype) == ((4, feature_size), np.float16)
                assert (times.shape, times.dtype) == ((4,), np.float64)
                assert (offsets.shape, offsets.dtype) == ((4,), np.int64)
                assert list(offsets) == [0, 2, 2, 4]
            np.testing.assert_array_equal(file[GROUP]["features"][offsets[2] : offsets[3]], np.full((2, 3), 2.0))
            assert list(file["videos/video_id"].asstr()) == ["a/x", "failed", "b"]
            assert json.loads(file.attrs["store"]) == read_store_description(shard.parents[1])
            assert file.libver[0] == "earliest"
            assert all(d.chunks is d.compression is None for d in (*file["videos"].values(), *file[GROUP].values()))


class TestReading:
    def test_one_file_is_taken_like_the_folder(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "store", {"a": 1.0, "b": None}, {"a": 3.0, "c": 2.0})
        one = export_store(FeatureStore(folder), tmp_path / "store.h5")
        a, b = FeatureStore(folder), FeatureStore(one)
        assert (a.records, a.settings, a.fingerprint) == (b.records, b.settings, b.fingerprint)
        for backbone in (BACKBONE, OTHER):
            x, y = a.load(backbone), b.load(backbone)
            assert x.video_ids == y.video_ids == ["a", "c"]
            np.testing.assert_array_equal(x.features, y.features)
            np.testing.assert_array_equal(x.times_seconds, y.times_seconds)
            np.testing.assert_array_equal(x.offsets, y.offsets)
        assert verify_store(one) == []

    def test_the_newest_record_wins_and_videos_come_in_the_order_asked_for(self, tmp_path: Path) -> None:
        path = write(tmp_path / "store", {"a": None, "b": 1.0}, {"a": 2.0}, {"b": None, "c": 3.0})
        store = FeatureStore(path)
        assert {v: r.status for v, r in store.records.items()} == {"a": "ok", "b": "unreadable", "c": "ok"}
        assert values(path) == {"a": 2.0, "c": 3.0} and store.status_counts() == {"ok": 2, "unreadable": 1}
        loaded = store.load(BACKBONE, ["c", "a"])
        assert loaded.video_ids == ["c", "a"] and loaded.features[:, 0].tolist() == [3, 3, 2, 2]
        with pytest.raises(InputError, match=r"'b' ended as 'unreadable' in .* - extract it"):
            store.load(BACKBONE, ["b"])
        with pytest.raises(InputError, match="'z' is not in"):
            store.load(BACKBONE, ["z"])

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "text.h5").write_text("text")
        for path, error, words in (
            (tmp_path / "nowhere", InputError, r"no feature store at .* make one with `svb extract"),
            (tmp_path, InputError, "it has no store\\.json"),
            (tmp_path / "text.h5", StoreError, "not a whole shard"),
        ):
            with pytest.raises(error, match=words):
                FeatureStore(path)
        store = FeatureStore(write(tmp_path / "store", {"a": 1.0}))
        with pytest.raises(InputError, match=r"several backbones .* choose one with --backbone"):
            store.only_backbone()
        with pytest.raises(InputError, match="holds no features of 'x', only"):
            store.only_backbone("x")


class TestCompaction:
    def test_small_shards_become_one_that_what_comes_later_supersedes(self, tmp_path: Path) -> None:
        path = write(tmp_path / "store", {"a": 1.0}, {"b": None}, {"a": 2.0, "c": 3.0}, compact=True)
        assert len(shard_files(path)) == 1
        store = FeatureStore(path)
        assert len(store.shards[0].records) == 3
        assert values(path) == {"a": 2.0, "c": 3.0} and store.records["b"].status == "unreadable"
        assert verify_store(path) == []
        assert values(write(path, {"a": 5.0})) == {"a": 5.0, "c": 3.0}
        assert values(write(path, {"b": 6.0}, compact=True)) == {"a": 5.0, "b": 6.0, "c": 3.0}

    def test_killed_before_the_small_shards_are_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / "store", {"a": 1.0, "b": 2.0}, {"a": 3.0}, {"c": 4.0})
        expected = values(path)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with FeatureStoreWriter(path, SETTINGS, {}) as writer:
                writer.compact()
        assert len(shard_files(path)) == 4
        store = FeatureStore(path)
        assert values(path) == expected
        assert sum(len(shard.records) for shard in store.shards) == 3
        assert verify_store(path) == []
        # The next writer clears up, and nothing changes.
        write(path)
        assert len(shard_files(path)) == 1 and values(path) == expected

    def test_a_reader_beside_a_compacting_writer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "store", {"a": 1.0}, {"b": 2.0}, {"c": 3.0})
        listed = shard_files(path)
        write(path, compact=True)
        answers = iter([listed, shard_files(path)])
        monkeypatch.setattr("svb.data.feature_store._shard_paths", lambda _: next(answers))
        assert values(path) == {"a": 1.0, "b": 2.0, "c": 3.0}

    def test_large_shards_are_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("svb.data.feature_store_writer.SHARD_VIDEOS", 2)
        path = write(tmp_path / "store", {"a": 1.0, "b": 2.0}, {"c": 3.0}, {"d": 4.0}, {"e": 5.0})
        large = shard_files(path)[0].name
        write(path, compact=True)
        assert [len(shard.records) for shard in FeatureStore(path).shards] == [2, 2, 1]
        assert shard_files(path)[0].name == large


class TestWriting:
    def test_foreign_settings_are_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "store", {"a": 1.0})
        other = {**SETTINGS, "sampling": {"frames": 8}, "decoder": {"name": "pyav", "version": "2"}}
        with pytest.raises(MismatchError) as caught:
            FeatureStoreWriter(path, other, {})
        message = str(caught.value)
        assert "decoder.version: stored '1', wanted '2'" in message
        assert "sampling.fps: stored 1.0, wanted None; sampling.frames: stored None, wanted 8" in message
        assert "backbones" not in message and "with -o" in message
        write(path, {"b": 1.0})  # the refused writer has let go of the lock
        with FeatureStoreWriter(tmp_path / "other", other, {}) as writer:
            writer.add(record("b"), rows(2.0))
        shutil.copy(shard_files(tmp_path / "other")[0], path / "shards" / "000002-foreign.h5")
        with pytest.raises(StoreError, match=r"000002-foreign.h5 was made with other settings .* move it out"):
            FeatureStore(path)

    def test_two_writers_at_once_and_what_a_killed_one_leaves(self, tmp_path: Path) -> None:
        path = tmp_path / "store"
        first = FeatureStoreWriter(path, SETTINGS, {})
        with first, pytest.raises(StoreError, match=r"another process is writing to it"):
            FeatureStoreWriter(path, SETTINGS, {})
        write(path, {"a": 1.0})
        for leftover in (path / f"{ASIDE_PREFIX}1.json", path / "shards" / f"{ASIDE_PREFIX}2.h5"):
            leftover.write_bytes(b"half")
        assert values(path) == {"a": 1.0}
        write(path)
        assert not list(path.rglob(f"{ASIDE_PREFIX}*"))

    def test_published_when_due(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for limit in ("SHARD_VIDEOS", "SHARD_BYTES", "SHARD_SECONDS"):
            with monkeypatch.context() as patch, FeatureStoreWriter(tmp_path / limit, SETTINGS, {}) as writer:
                patch.setattr(f"svb.data.feature_store_writer.{limit}", 0)
                writer.add(record("a"), rows(1.0))
                assert values(tmp_path / limit) == {"a": 1.0}

    def test_lost_store_json(self, tmp_path: Path) -> None:
        (tmp_path / "store" / "shards").mkdir(parents=True)  # killed before there was one
        path = write(tmp_path / "store", {"a": 1.0})
        (path / "store.json").unlink()
        with pytest.raises(StoreError, match=r"shards but no store.json - restore it"):
            write(path)

    def test_an_error_publishes_what_was_added_and_text_that_is_no_unicode(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError), FeatureStoreWriter(tmp_path / "store", SETTINGS, {}) as writer:
            writer.add(replace(record("a"), error="\udcff\0é\n"), rows(1.0))
            raise RuntimeError
        assert FeatureStore(tmp_path / "store").records["a"].error == "\\udcff\\x00é\n"

    def test_equal_content_gives_equal_bytes(self, tmp_path: Path) -> None:
        stores = [write(tmp_path / name, {"a": 1.0}, {"b": 2.0}, compact=True) for name in "ab"]
        first, second = ({file.name: file.read_bytes() for file in shard_files(path)} for path in stores)
        assert first == second


class TestDamage:
    def test_a_cut_or_moved_shard_is_extracted_again(self, tmp_path: Path) -> None:
        path = write(tmp_path / "store", {"a": 1.0}, {"b": 2.0})
        shard = shard_files(path)[1]
        whole = shard.read_bytes()
        for keep in (0.0, 0.3, 0.9):
            shard.write_bytes(whole[: int(keep * len(whole))])
            with pytest.raises(StoreError, match=rf"{shard.name} is not a whole shard .* run `svb extract` again"):
                FeatureStore(path)
        shard.unlink()
        assert values(path) == {"a": 1.0}
        assert values(write(path, {"b": 3.0})) == {"a": 1.0, "b": 3.0}

    def test_flipped_bytes_never_escape_as_another_error(self, tmp_path: Path) -> None:
        path = write(tmp_path / "store", {"a": 1.0, "failed": None})
        shard = shard_files(path)[0]
        whole = shard.read_bytes()
        random = np.random.default_rng(0)
        for position in random.integers(0, len(whole), 60):
            damaged = bytearray(whole)
            damaged[position] ^= 0xFF
            shard.write_bytes(damaged)
            try:
                verify_store(path)
                FeatureStore(path).load(BACKBONE)
            except StoreError:
                continue

    def test_a_damaged_edited_or_newer_description(self, tmp_path: Path) -> None:
        path = write(tmp_path / "store", {"a": 1.0})
        whole = (path / "store.json").read_text()
        newer = json.dumps({**json.loads(whole), "format_version": 2})
        for text, words in (
            *((text, r"store.json is damaged .* restore it") for text in ("", "{", "[]", '{"format_version": 1}')),
            (whole.replace('"pyav"', '"ffmpeg"'), r"was edited or damaged: .* - undo the edit"),
            (newer, "store.json has format 2 - this svb reads up to 1; upgrade svb"),
        ):
            (path / "store.json").write_text(text)
            with pytest.raises(StoreError, match=words):
                FeatureStore(path)
        (path / "store.json").write_text(whole)
        with h5py.File(shard_files(path)[0], "r+") as file:
            file.attrs["format_version"] = 2
        with pytest.raises(StoreError, match="has format 2 - this svb reads up to 1; upgrade svb"):
            FeatureStore(path)


Damage = Callable[[h5py.File], object]


def set_value(dataset: str, place: object, value: object) -> Damage:
    return lambda file: file[dataset].__setitem__(place, value)


def replaced(dataset: str, value: np.ndarray) -> Damage:
    return lambda file: (file.__delitem__(dataset), file.__setitem__(dataset, value))


def without(name: str) -> Damage:
    return lambda file: file.__delitem__(name)


class TestVerify:
    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (set_value(f"{GROUP}/features", (2, 1), np.nan), "video 'b' holds NaN or infinity"),
            (set_value(f"{GROUP}/features", (0, 0), np.inf), "video 'a' holds NaN or infinity"),
            (set_value(f"{OTHER}/times_seconds", 3, np.nan), "video 'b' holds NaN or infinity"),
            *(
                (set_value(f"{GROUP}/offsets", place, row), "offsets (they do not divide 4 rows among 3 videos)")
                for place, row in ((0, 1), (1, 3), (3, 9))
            ),
            (set_value(f"{GROUP}/offsets", 2, 3), "'failed' is unreadable and has 1 rows"),
            (set_value("videos/status", 1, "ok"), "'failed' is ok and has 0 rows"),
            (set_value("videos/status", 2, "empty"), "'b' is empty and has 2 rows"),
            (replaced(f"{GROUP}/offsets", np.array([0, 4])), "offsets (they do not divide 4 rows among 3 videos)"),
            (replaced(f"{GROUP}/features", np.zeros((4, 2), np.float16)), "features of shape (4, 2), expected"),
            (replaced(f"{GROUP}/features", np.zeros((3, 3), np.float16)), "do not divide 3 rows among 3 videos"),
            (replaced(f"{GROUP}/features", np.zeros(4, np.float16)), "features of shape (4,), expected rows of 3"),
            (replaced(f"{GROUP}/times_seconds", np.zeros(3)), "there are 3 for 4 rows"),
            (without(GROUP), "cannot give"),
            (without(f"{OTHER}/times_seconds"), "cannot give"),
            (without("videos/codec"), "not a whole shard"),
            (replaced("videos/codec", np.array([1, 2])), "not a whole shard"),
        ],
    )
    def test_finds(self, damage: Damage, words: str, tmp_path: Path) -> None:
        path = write(tmp_path / "store", {"a": 1.0, "failed": None, "b": 2.0}, {"c": 1.0})
        assert verify_store(path) == []
        with h5py.File(shard_files(path)[0], "r+") as file:
            damage(file)
        problems = verify_store(path)
        assert problems and any(words in problem for problem in problems)
        assert all(shard_files(path)[0].name in problem for problem in problems)


class TestPublishedFile:
    def test_failure_leaves_the_old_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("old")
        with pytest.raises(RuntimeError), published_file(tmp_path / "x.txt") as aside:
            aside.write_text("half")
            assert (tmp_path / "x.txt").read_text() == "old"
            raise RuntimeError
        with pytest.raises(FileNotFoundError), published_file(tmp_path / "x.txt"):
            pass  # nothing was written
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.txt", "old")]
