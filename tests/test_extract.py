"""The whole extraction: one decode for all backbones, resumed to the same bytes, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from conftest import RunSvb
from extraction import (
    CLIPS,
    FRAMES,
    WIDE,
    assert_same_bytes,
    features,
    num_extracted,
    run,
    shards,
    statuses,
    times,
    toy,
)

from svb.data.feature_store import FeatureStore, read_store_description, verify_store
from svb.errors import MismatchError
from svb.extract import run as run_module
from svb.extract.backbones.transform import Transform
from svb.extract.compute.packing import Packer, to_rows
from svb.extract.compute.transform import to_squares
from svb.extract.config import BATCH_SIZES, ExtractConfig
from svb.extract.decode import pyav_decoder
from svb.extract.decode.decoder import DecodeError
from svb.extract.decode.options import READER, DecodeOptions
from svb.extract.decode.sampling import Sampling
from svb.extract.one_file import extract_file
from svb.extract.pool.worker import Finished, decode_file
from svb.extract.together import devices as devices_module

pytestmark = pytest.mark.usefixtures("toy_backbones")


class TestPipeline:
    def test_a_folder(self, folder: Path, tmp_path: Path) -> None:
        (folder / "notes.txt").write_text("no video")
        (folder / "text.mp4").write_text("no video")
        done: list[int] = []
        messages = run(folder, tmp_path / "out", on_progress=lambda progress: done.append(progress.videos_done))
        assert messages[0] == f"{folder}: ignored 1 files that are not videos by their suffix (.txt 1)"
        assert done[-1] == 5
        expected = {"a": "ok", "b": "ok", "c": "ok", "deep/d": "ok", "text": "unreadable"}
        assert statuses(tmp_path / "out") == expected
        assert verify_store(tmp_path / "out") == []
        record = FeatureStore(tmp_path / "out").records["deep/d"]
        stat = (folder / "deep" / "d.avi").stat()
        assert record.source_path == str(folder / "deep" / "d.avi")
        assert (record.size_bytes, record.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert (record.width_px, record.height_px, record.rotation_degrees) == (64, 48, 0)
        assert (record.codec, record.decoder, record.frame_rate) == ("h264", "pyav", 10.0)
        assert record.duration_seconds == pytest.approx(4.0, abs=0.1) and len(record.content_hash) == 64

    @pytest.mark.parametrize("store", ["toy_store", "extracted_store"])
    def test_rows_are_the_backbones_of_the_decoders_frames(
        self, store: str, clips_folder: Path, request: pytest.FixtureRequest
    ) -> None:
        out, clip = request.getfixturevalue(store), clips_folder / "deep" / "d.avi"
        (name,) = FeatureStore(out).backbones
        backbone, options, held = toy(name), DecodeOptions(Sampling(fps=1)), features(out, name)["deep/d"]
        _, *chunks, _ = pyav_decoder.decode(clip, options)
        frames = np.concatenate([chunk.frames for chunk in chunks])
        expected = backbone(to_squares(torch.from_numpy(frames), backbone.transform)).numpy()
        np.testing.assert_allclose(held, expected, atol=2e-3)
        # Packed with others in the store, and alone.
        [(alone, alone_times)] = extract_file(clip, [backbone], options, batch_size=4)
        np.testing.assert_array_equal(held, alone.astype(np.float16))
        assert times(out, "deep/d", name) == alone_times.tolist()

    def test_backbones_share_one_decode_and_nothing_else_changes_the_bytes(
        self, clips_folder: Path, tmp_path: Path, decodes: list[int]
    ) -> None:
        sizes = {FRAMES: 8, WIDE: 12, CLIPS: 6}
        run(clips_folder, tmp_path / "all", *sizes, fps=3, workers=3)
        assert decodes == [4]
        run(clips_folder / "b.mkv", tmp_path / "b alone", *sizes, fps=3)
        for backbone, feature_size in sizes.items():
            run(clips_folder, tmp_path / backbone, backbone, fps=3)
            assert features(tmp_path / "all", backbone)["a"].shape[1] == feature_size
            assert_same_bytes(tmp_path / "all", tmp_path / backbone, backbone)
            among, alone = (features(tmp_path / name, backbone)["b"] for name in ("all", "b alone"))
            assert among.tobytes() == alone.tobytes()

    def test_a_record_says_how_its_frames_came(self, tmp_path: Path) -> None:
        clips.make_animated_webp(tmp_path / "a.webp")
        clips.make_turned_clip(tmp_path / "b.mp4", 90)
        run(tmp_path, tmp_path / "pyav")
        run(tmp_path, tmp_path / "ffmpeg", decoder="ffmpeg")
        records = FeatureStore(tmp_path / "pyav").records
        used = {video_id: (record.decoder, record.rotation_degrees) for video_id, record in records.items()}
        assert used == {"a": ("ffmpeg", 0), "b": ("pyav", 90), "upright-b": ("pyav", 0)}
        assert {record.decoder for record in FeatureStore(tmp_path / "ffmpeg").records.values()} == {"ffmpeg"}
        assert set(statuses(tmp_path / "pyav").values()) == {"ok"}
        assert (records["b"].width_px, records["b"].height_px) == (48, 64)
        rows, others = features(tmp_path / "pyav"), features(tmp_path / "ffmpeg")
        assert np.abs(rows["b"] - rows["upright-b"]).max() > 0.1
        assert np.abs(rows["b"] - others["b"]).max() < 0.05

    def test_values_beyond_float16_are_a_failure(self, clips_folder: Path, tmp_path: Path) -> None:
        run(clips_folder / "a.mp4", tmp_path / "out", FRAMES, "toy:overflow")
        record = FeatureStore(tmp_path / "out").records["a"]
        assert record.status == "nonfinite_features"
        assert "toy:overflow gave a value of" in record.error and "up to 65504" in record.error
        assert verify_store(tmp_path / "out") == []
        fits = to_rows(np.array([[65504.0]], np.float32), np.zeros(1))
        assert fits is not None and fits.features.dtype == np.float16
        for value in (65520.0, np.nan):
            assert to_rows(np.array([[value]], np.float32), np.zeros(1)) is None

    def test_a_finished_video_is_not_held_back_by_a_long_one(
        self, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.data.feature_store_writer.SHARD_SECONDS", 0.0)
        seen: list[int] = []

        def on_progress(progress: object) -> None:
            seen.append(len(list((tmp_path / "out" / "shards").glob("[0-9]*.h5"))))

        # The first video's rows wait in the batch; the message that completes it is not its own last one.
        run(clips_folder, tmp_path / "out", batch_size=1, on_progress=on_progress)
        assert seen[-1] >= 3


class TestResume:
    def test_nothing_to_do(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "text.mp4").write_text("no video")
        run(folder, tmp_path / "out")
        before = shards(tmp_path / "out")
        monkeypatch.setattr(run_module, "DecodePool", None)
        monkeypatch.setattr("svb.extract.backbones.engine.load_backbones", None)
        messages = run(folder, tmp_path / "out")
        assert messages == [f"nothing to do: all 5 videos are in {tmp_path / 'out'}, unchanged"]
        assert shards(tmp_path / "out") == before

    def test_only_what_is_new_is_decoded(self, folder: Path, toy_store: Path, tmp_path: Path) -> None:
        run([folder / "a.mp4", folder / "c.webm"], tmp_path / "out")
        assert num_extracted(folder, tmp_path / "out") == 2
        assert_same_bytes(tmp_path / "out", toy_store)

    def test_a_changed_file_is_extracted_again(self, folder: Path, out: Path) -> None:
        before, old = features(out), FeatureStore(out).records["a"]
        clips.make_clip(folder / "a.mp4", seconds=3, filters="hflip")
        assert num_extracted(folder, out) == 1
        after, new = features(out), FeatureStore(out).records["a"]
        assert len(after["a"]) == 3 and new.content_hash != old.content_hash
        np.testing.assert_array_equal(before["b"], after["b"])
        (shard,) = FeatureStore(out).shards
        assert len(shard.records) == 4

    def test_a_folder_is_known_by_another_path_and_name(
        self, folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        (tmp_path / "link").symlink_to(folder)
        for name in (Path("../clips"), tmp_path / "link"):
            assert run(name, out)[-1].startswith("nothing to do: all 4")
        assert run(folder.rename(tmp_path / "moved"), out)[-1].startswith("nothing to do: all 4")

    def test_other_settings_are_refused_before_a_network_is_loaded(
        self, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = shards(out)
        monkeypatch.setattr("svb.extract.backbones.engine.load_backbones", None)
        for backbone, options, words in (
            (FRAMES, {"fps": 2.0}, "sampling.fps: stored 1.0, wanted 2.0"),
            (FRAMES, {"frames": 2}, "sampling.frames: stored None, wanted 2"),
            (FRAMES, {"decoder": "ffmpeg"}, "decoder.name: stored 'pyav', wanted 'ffmpeg'"),
            (FRAMES, {"precision": "bfloat16"}, r"precision: stored 'float32', wanted 'bfloat16'"),
            (WIDE, {}, r"backbones: stored \['toy:frames'\], wanted \['toy:wide'\]"),
        ):
            with pytest.raises(MismatchError, match=words):
                run(folder, out, backbone, **options)
        assert shards(out) == before


class TestAdding:
    def test_a_store_keeps_its_settings(self, folder: Path, tmp_path: Path, run_svb: RunSvb) -> None:
        out, more = tmp_path / "out", tmp_path / "more"
        more.mkdir()
        (folder / "c.webm").rename(more / "c.webm")
        settings = {"frames": 2, "batch_size": 3, "resize": "decoder", "decoder": "ffmpeg"}
        run(folder, out, WIDE, FRAMES, **settings)
        ran = run_svb("extract", more, "-o", out, "--workers", "1")
        assert (
            f"{out} was made with --backbone toy:wide --backbone toy:frames --frames 2 --decoder ffmpeg --resize "
            "decoder --precision float32 --engine torch --batch-size 3: new videos are treated alike\n"
        ) in ran.stderr
        assert f"extracting into {out} with toy:wide, toy:frames, --frames 2\n" in ran.stderr
        assert ran.exit_code == 0 and statuses(out)["c"] == "ok" and len(features(out)["c"]) == 2
        refused = run_svb("extract", more, "-o", out, "--frames", "3")
        assert refused.exit_code == 1 and "sampling.frames: stored 2, wanted 3" in refused.stderr
        # A wrong path is told before anything about settings.
        wrong = run_svb("extract", tmp_path / "gone", "-o", out, "--frames", "3")
        assert wrong.stderr.count("\n") == 1 and "no such file or folder" in wrong.stderr

    def test_times_of_a_table_are_kept(self, folder: Path, tmp_path: Path) -> None:
        table = tmp_path / "times.csv"
        table.write_text("video_id,time_seconds\na,0.5\nb,0.5\n")
        run(folder / "a.mp4", tmp_path / "out", times=table)
        run(folder / "b.mkv", tmp_path / "out")
        assert times(tmp_path / "out", "b") == [0.5]

    def test_a_store_that_was_made_on_the_cpu_stays_there(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        config = ExtractConfig()
        assert devices_module.own_device(config, out) == "cpu"
        assert devices_module.own_device(config, out / "new") == "auto"
        assert devices_module.own_device(replace(config, device="cuda"), out) == "cuda"

    def test_the_batch_size_follows_the_device_where_no_store_settles_it(
        self, folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new, given, stored = ExtractConfig().settled(None), ExtractConfig(batch_size=7), read_store_description(out)
        sizes = [config.on(device).batch_size for config in (new, given) for device in ("cpu", "cuda:1")]
        assert sizes == [32, 256, 7, 7]
        assert ExtractConfig().settled(stored).on("cuda").batch_size == 4  # of the store
        monkeypatch.setitem(BATCH_SIZES, "cpu", 5)
        made = tmp_path / "made"
        said = [message for name in ("a.mp4", "b.mkv") for message in run(folder / name, made, batch_size=None)]
        assert FeatureStore(made).settings["batch_size"] == 5
        assert not any("batch-size" in message for message in said)

    def test_a_store_of_an_older_reader_is_told_so(
        self, folder: Path, out: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for says in (False, True):
            monkeypatch.setattr("svb.extract.decode.options.READER", READER + says)
            words = f"{out} was begun by an older svb, which read HDR"
            assert any(words in message for message in run(folder, out)) == says
            verified = run_svb("verify", out)
            assert verified.exit_code == 0 and (words in verified.stderr) == says


class TestClips:
    @pytest.mark.parametrize(
        ("num_frames", "windows"),
        [
            *((number, [(0, number - 1)]) for number in (1, 3, 4)),
            *((5, [(0, 3), (1, 4)]), (8, [(0, 3), (4, 7)]), (10, [(0, 3), (4, 7), (6, 9)])),
        ],
    )
    @pytest.mark.parametrize("chunk", [1, 3, 16])
    def test_windows(self, num_frames: int, windows: list[tuple[int, int]], chunk: int) -> None:
        squares = torch.randint(0, 256, (num_frames, 3, 16, 16), dtype=torch.uint8)
        frame_times, backbone = 5 + np.arange(num_frames) / 2, toy(CLIPS)
        packer = Packer(backbone, 4)
        for begin in range(0, num_frames, chunk):
            packer.add(7, squares[begin : begin + chunk], frame_times[begin : begin + chunk])
        packer.end(7)
        packer.flush()
        assert packer.is_complete(7)
        rows, middles = packer.take(7)
        np.testing.assert_allclose(middles, [5 + (first + last) / 4 for first, last in windows])
        for row, (first, last) in zip(rows, windows, strict=True):
            positions = [min(position, last) for position in range(first, first + 4)]
            clip = torch.stack([squares[position] for position in positions], dim=1)
            np.testing.assert_allclose(row, backbone(clip[None])[0].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (ZeroDivisionError("0 frames a second"), ("decoder_crash", "ZeroDivisionError: 0 frames a second", "pyav")),
        (DecodeError("unreadable", "first"), ("unreadable", "first", "ffmpeg")),  # ffmpeg's are another's words
    ],
)
def test_a_decoder_that_fails_keeps_the_first_words(
    error: Exception, ended: tuple[str, str, str], clips_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, raised in (("pyav_decoder", error), ("ffmpeg_decoder", DecodeError("unreadable", "second"))):

        def decode(path: Path, options: DecodeOptions, raised: Exception = raised) -> Iterator[object]:
            raise raised

        monkeypatch.setattr(f"svb.extract.decode.{module}.decode", decode)
    (finished,) = decode_file(clips_folder / "a.mp4", DecodeOptions(Sampling(fps=1)))
    assert isinstance(finished, Finished)
    assert (finished.status, finished.error, finished.decoder) == ended


def test_a_strip_is_scaled_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (5, 16, 1024, 3), dtype=torch.uint8)
    transform = Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    at_once = to_squares(frames, transform)
    monkeypatch.setattr("svb.extract.compute.transform.SCALED_BYTES", 1)
    one_by_one = to_squares(frames, transform)
    assert torch.equal(one_by_one, at_once)
    assert one_by_one.untyped_storage().nbytes() == 5 * 3 * 32 * 32
