"""The whole extraction: one decode for all backbones, resumed to the same bytes, whatever goes wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import clips
import h5py
import numpy as np
import pytest
import torch
import torchvision
from conftest import RunSvb
from extraction import CLIPS, FRAMES, WIDE, assert_same_bytes, features, num_extracted, run, shards, statuses, times

from svb.config import described
from svb.data.feature_store import FeatureStore, read_store_description, verify_store
from svb.errors import InputError, MismatchError
from svb.extract import run as run_module
from svb.extract.backbones import DEFAULT_BACKBONE, load_backbone
from svb.extract.backbones.transform import Transform
from svb.extract.compute.packing import Packer, to_rows
from svb.extract.compute.transform import to_squares
from svb.extract.config import BATCH_SIZES, ExtractConfig
from svb.extract.decode import pyav_decoder
from svb.extract.decode.decoder import DecodeError, FrameChunk
from svb.extract.decode.options import READER, DecodeOptions
from svb.extract.decode.sampling import Sampling
from svb.extract.one_file import extract_file
from svb.extract.plan import plan_videos
from svb.extract.pool.decode_pool import DecodePool
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

    def test_rows_are_the_backbones_of_the_decoders_frames(self, clips_folder: Path, tmp_path: Path) -> None:
        run(clips_folder, tmp_path / "out", FRAMES)
        backbone = load_backbone(FRAMES, torch.device("cpu"), torch.float32)
        sampling = Sampling(fps=1)
        _, *chunks, _ = pyav_decoder.decode(clips_folder / "deep" / "d.avi", DecodeOptions(sampling))
        frames = np.concatenate([chunk.frames for chunk in chunks])  # type: ignore[union-attr]
        expected = backbone(to_squares(torch.from_numpy(frames), backbone.transform)).numpy()
        np.testing.assert_allclose(features(tmp_path / "out")["deep/d"], expected, atol=2e-3)
        [(alone, alone_times)] = extract_file(
            clips_folder / "deep" / "d.avi", [backbone], DecodeOptions(sampling), batch_size=4
        )
        np.testing.assert_array_equal(features(tmp_path / "out")["deep/d"], alone.astype(np.float16))
        assert times(tmp_path / "out", "deep/d") == alone_times.tolist()

    def test_several_backbones_share_one_decode(
        self, clips_folder: Path, tmp_path: Path, decodes: list[int]
    ) -> None:
        run(clips_folder, tmp_path / "all", FRAMES, WIDE, CLIPS)
        assert decodes == [4]
        for backbone, feature_size in ((FRAMES, 8), (WIDE, 12), (CLIPS, 6)):
            run(clips_folder, tmp_path / backbone, backbone)
            assert features(tmp_path / "all", backbone)["a"].shape[1] == feature_size
            assert_same_bytes(tmp_path / "all", tmp_path / backbone, backbone)

    def test_neighbours_and_workers_leave_the_bytes_alone(self, clips_folder: Path, tmp_path: Path) -> None:
        run(clips_folder, tmp_path / "one", FRAMES, CLIPS, fps=3)
        run(clips_folder, tmp_path / "three", FRAMES, CLIPS, fps=3, workers=3)
        run(clips_folder / "b.mkv", tmp_path / "alone", FRAMES, CLIPS, fps=3)
        assert_same_bytes(tmp_path / "one", tmp_path / "three", FRAMES, CLIPS)
        for backbone in (FRAMES, CLIPS):
            one, alone = (features(tmp_path / name, backbone)["b"] for name in ("one", "alone"))
            assert one.tobytes() == alone.tobytes()

    def test_a_real_network_gives_the_same_bytes_packed_and_alone(
        self, clips_folder: Path, extracted_store: Path
    ) -> None:
        backbone = load_backbone("offline:efficientnet-lite0", torch.device("cpu"), torch.float32)
        [(alone, _)] = extract_file(
            clips_folder / "b.mkv", [backbone], DecodeOptions(Sampling(fps=1)), batch_size=4
        )
        packed = features(extracted_store, "offline:efficientnet-lite0")["b"]
        assert packed.tobytes() == alone.astype(np.float16).tobytes()

    def test_rotation_is_applied_and_recorded(self, tmp_path: Path) -> None:
        clip = clips.make_turned_clip(tmp_path / "turned.mp4", 90)
        run([clip, tmp_path / "upright-turned.mp4"], tmp_path / "out")
        turned = FeatureStore(tmp_path / "out").records["turned"]
        assert (turned.width_px, turned.height_px, turned.rotation_degrees) == (48, 64, 90)
        rows = features(tmp_path / "out")
        assert np.abs(rows["turned"] - rows["upright-turned"]).max() > 0.1

    def test_the_decoder_that_gave_the_frames_is_recorded(self, tmp_path: Path) -> None:
        clips.make_animated_webp(tmp_path / "a.webp")
        clips.make_clip(tmp_path / "b.mp4")
        run(tmp_path, tmp_path / "pyav")
        run(tmp_path, tmp_path / "ffmpeg", decoder="ffmpeg")
        used = {v: r.decoder for v, r in FeatureStore(tmp_path / "pyav").records.items()}
        assert used == {"a": "ffmpeg", "b": "pyav"}
        assert {r.decoder for r in FeatureStore(tmp_path / "ffmpeg").records.values()} == {"ffmpeg"}
        assert set(statuses(tmp_path / "pyav").values()) == {"ok"}
        difference = features(tmp_path / "pyav")["b"] - features(tmp_path / "ffmpeg")["b"]
        assert np.abs(difference).max() < 0.05

    def test_values_beyond_float16_are_a_failure(self, clips_folder: Path, tmp_path: Path) -> None:
        run(clips_folder / "a.mp4", tmp_path / "out", FRAMES, "toy:overflow")
        record = FeatureStore(tmp_path / "out").records["a"]
        assert record.status == "nonfinite_features"
        assert "toy:overflow gave a value of" in record.error and "up to 65504" in record.error
        assert verify_store(tmp_path / "out") == []

    def test_a_finished_video_is_not_held_back_by_a_long_one(
        self, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.data.feature_store_writer.SHARD_SECONDS", 0.2)
        seen: list[int] = []

        def on_progress(progress: object) -> None:
            time.sleep(0.25)
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

    def test_only_what_is_new_is_decoded(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        run([folder / "a.mp4", folder / "c.webm"], out)
        assert num_extracted(folder, out) == 2
        run(folder, tmp_path / "at-once")
        assert_same_bytes(out, tmp_path / "at-once")

    def test_a_changed_file_is_extracted_again(self, folder: Path, out: Path) -> None:
        before = features(out)
        old = FeatureStore(out).records["a"]
        clips.make_clip(folder / "a.mp4", seconds=3, filters="hflip")
        assert num_extracted(folder, out) == 1
        after, new = features(out), FeatureStore(out).records["a"]
        assert len(after["a"]) == 3
        assert new.content_hash != old.content_hash
        np.testing.assert_array_equal(before["b"], after["b"])
        assert len(FeatureStore(out).shards) == 1
        assert len(FeatureStore(out).shards[0].records) == 4

    def test_failed_videos_are_taken_up_only_when_asked(self, folder: Path, tmp_path: Path) -> None:
        shutil.copy(folder / "a.mp4", folder / "aside")
        os.truncate(folder / "a.mp4", 300)
        run(folder, tmp_path / "out")
        assert statuses(tmp_path / "out")["a"] == "truncated"
        assert run(folder, tmp_path / "out")[-1].startswith("nothing to do")
        assert num_extracted(folder, tmp_path / "out", retry_failed="all") == 1
        assert statuses(tmp_path / "out")["a"] == "truncated"
        (folder / "aside").rename(folder / "a.mp4")
        run(folder, tmp_path / "out", retry_failed="all")
        assert set(statuses(tmp_path / "out").values()) == {"ok"}
        assert len(FeatureStore(tmp_path / "out").records) == 4

    def test_a_folder_is_known_by_another_path_and_name(
        self, folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        (tmp_path / "link").symlink_to(folder)
        for name in (Path("../clips"), tmp_path / "link"):
            assert run(name, out)[-1].startswith("nothing to do: all 4")
        folder.rename(tmp_path / "moved")
        assert run(tmp_path / "moved", out)[-1].startswith("nothing to do: all 4")

    def test_other_settings_are_refused_before_a_network_is_loaded(
        self, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = shards(out)
        monkeypatch.setattr("svb.extract.backbones.engine.load_backbones", None)
        for options, words in (
            ({"fps": 2.0}, "sampling.fps: stored 1.0, wanted 2.0"),
            ({"frames": 2}, "sampling.frames: stored None, wanted 2"),
            ({"decoder": "ffmpeg"}, "decoder.name: stored 'pyav', wanted 'ffmpeg'"),
            ({"precision": "bfloat16"}, r"precision: stored 'float32', wanted 'bfloat16'"),
        ):
            with pytest.raises(MismatchError, match=words):
                run(folder, out, **options)
        with pytest.raises(MismatchError, match=r"backbones: stored \['toy:frames'\], wanted \['toy:wide'\]"):
            run(folder, out, WIDE)
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

    def test_the_help_names_the_default_backbone(self) -> None:
        assert f"or {DEFAULT_BACKBONE}]" in described(ExtractConfig, "backbones")

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
        made, said = tmp_path / "made", run(folder / "a.mp4", tmp_path / "made", batch_size=None)
        assert FeatureStore(made).settings["batch_size"] == 5
        assert not any(
            "batch-size" in message for message in [*said, *run(folder / "b.mkv", made, batch_size=None)]
        )

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
        backbone = load_backbone(CLIPS, torch.device("cpu"), torch.float32)
        squares = torch.randint(0, 256, (num_frames, 3, 16, 16), dtype=torch.uint8)
        frame_times = 5 + np.arange(num_frames) / 2
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

    @pytest.mark.slow
    def test_r2plus1d_from_a_local_file(self, clips_folder: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        module = torchvision.models.get_model("r2plus1d_18", weights=None)
        torch.save(module.state_dict(), tmp_path / "weights.pth")
        name = f"torchvision:r2plus1d_18/{tmp_path / 'weights.pth'}"
        # 30 frames: two windows of 16 that overlap by two.
        run(clips_folder / "c.webm", tmp_path / "out", name, FRAMES, fps=20, batch_size=1)
        store = FeatureStore(tmp_path / "out")
        assert store.settings["backbones"][name]["clip_frames"] == 16
        assert features(tmp_path / "out", name)["c"].shape == (2, 512)
        assert len(times(tmp_path / "out", "c")) == 30
        np.testing.assert_allclose(times(tmp_path / "out", "c", name), [0.75, 2.15], atol=2e-3)
        with h5py.File(next((tmp_path / "out" / "shards").glob("*.h5"))) as file:
            assert name.replace("/", "@") in file


def test_to_rows_keeps_the_largest_value_that_fits() -> None:
    fits = to_rows(np.array([[65504.0]], np.float32), np.zeros(1))
    assert fits is not None and fits.features.dtype == np.float16
    assert to_rows(np.array([[65520.0]], np.float32), np.zeros(1)) is None
    assert to_rows(np.array([[np.nan]], np.float32), np.zeros(1)) is None


def spawned_children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


@pytest.fixture
def signal_first_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[signal.Signals], None]]:
    """Send a signal to the first decode worker as soon as there is one; from then on, while it lives, hours fly."""
    threads: list[threading.Thread] = []
    hours = [0.0]
    monkeypatch.setattr(run_module, "DecodePool", partial(DecodePool, clock=lambda: 3600 * hours[0]))

    def send(number: signal.Signals) -> None:
        before = set(spawned_children())

        def wait_and_send() -> None:
            until = time.monotonic() + 300
            while not (found := [*set(spawned_children()) - before]) and time.monotonic() < until:
                time.sleep(0.002)
            os.kill(found[0], number)
            while found[0] in spawned_children():
                hours[0] += 1
                time.sleep(0.02)

        threads.append(threading.Thread(target=wait_and_send))
        threads[-1].start()

    yield send
    for thread in threads:
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds worker processes in Linux's /proc")
@pytest.mark.usefixtures("spawned_workers")
class TestWorkersThatFail:
    # A worker that is not the first may see an hour go by, but no ten of them.
    @pytest.mark.parametrize(
        ("number", "status", "words"),
        [
            (signal.SIGKILL, "decoder_crash", "the decoder's process died with exit code -9"),
            (signal.SIGSTOP, "timeout", r"the decoder gave nothing for \d{5} s"),
        ],
    )
    def test_one_that_dies_or_hangs_costs_one_video(
        self,
        number: signal.Signals,
        status: str,
        words: str,
        folder: Path,
        tmp_path: Path,
        signal_first_worker: Callable[[signal.Signals], None],
    ) -> None:
        out = tmp_path / "out"
        signal_first_worker(number)
        run(folder, out, stall_seconds=36_000.0)
        assert statuses(out) == {"a": status, "b": "ok", "c": "ok", "deep/d": "ok"}
        record, stat = FeatureStore(out).records["a"], (folder / "a.mp4").stat()
        assert re.fullmatch(words, record.error)
        assert (record.size_bytes, record.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert not spawned_children()
        assert run(folder, out)[-1].startswith("nothing to do")
        run(folder, out, retry_failed="all")
        assert set(statuses(out).values()) == {"ok"}

    def test_an_error_in_the_main_process_ends_the_workers(self, folder: Path, tmp_path: Path) -> None:
        def fail(progress: object) -> None:
            raise RuntimeError("the user's own")

        with pytest.raises(RuntimeError, match="the user's own"):
            run(folder, tmp_path / "out", on_progress=fail, workers=2)
        assert not spawned_children()


@pytest.mark.parametrize("decoder", ["pyav", "ffmpeg"])
def test_tiny_frames_come_in_bounded_chunks(decoder: str, tmp_path: Path) -> None:
    # By bytes 1,200 frames of 16x16 fit into one chunk; scaled up to a backbone's size they are 180 MB.
    path = clips.make_clip(tmp_path / "a.mp4", seconds=12, fps=100, size="16x16")
    chunks = [m for m in decode_file(path, DecodeOptions(Sampling(fps=100), decoder)) if isinstance(m, FrameChunk)]
    assert [len(chunk.frames) for chunk in chunks] == [512, 512, 176]


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
    def failing(error: Exception) -> object:
        def decode(path: Path, options: DecodeOptions) -> Iterator[object]:
            raise error

        return decode

    monkeypatch.setattr(pyav_decoder, "decode", failing(error))
    monkeypatch.setattr("svb.extract.decode.ffmpeg_decoder.decode", failing(DecodeError("unreadable", "second")))
    (finished,) = decode_file(clips_folder / "a.mp4", DecodeOptions(Sampling(fps=1)))
    assert isinstance(finished, Finished)
    assert (finished.status, finished.error, finished.decoder) == ended


class TestPlan:
    def ids(self, *inputs: Path) -> list[str]:
        return [video.video_id for video in plan_videos(list(inputs), {}).todo]

    def test_lists(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("clips/a.mp4\r\n\n/abs/b.c.mp4\nnew\u2028line.mp4\n", "utf-8")
        plan = plan_videos([tmp_path / "list.txt"], {})
        assert [(video.video_id, str(video.path)) for video in plan.todo] == [
            ("clips/a", f"{tmp_path}/clips/a.mp4"),
            ("abs/b.c", "/abs/b.c.mp4"),
            ("new\u2028line", f"{tmp_path}/new\u2028line.mp4"),
        ]

    def test_comments_and_quotes(self, tmp_path: Path) -> None:
        (tmp_path / "#1.mp4").touch()
        (tmp_path / "'q'").touch()
        lines = ("# clips", "#1.mp4", "  #2.mp4", '"a b.mp4"', "'c.mp4'", "'q'", " d.mp4")
        (tmp_path / "list.txt").write_text("\n".join(lines))
        assert self.ids(tmp_path / "list.txt") == ["#1", "a b", "c", "'q'", " d"]

    def test_names_that_no_file_can_have(self, tmp_path: Path) -> None:
        long = "a" * 300
        (tmp_path / "list.txt").write_text(f"{long}.mp4\n")
        for _ in range(2):
            run(tmp_path / "list.txt", tmp_path / "out")
            assert statuses(tmp_path / "out") == {long: "missing"}
        for name, words in ((f"{long}.mp4", "no such file or folder"), ("a.m3u8", "is a playlist")):
            with contextlib.suppress(OSError):
                (tmp_path / name).touch()
            with pytest.raises(InputError, match=words):
                self.ids(tmp_path / name)

    def test_tables_name_the_id(self, tmp_path: Path) -> None:
        import pandas as pd

        (tmp_path / "list.csv").write_text("video_id,path\nx,a.mp4\n,b.mp4\n")
        assert self.ids(tmp_path / "list.csv") == ["x", "b"]
        pd.DataFrame({"path": ["a.mp4", "b.mp4"], "video_id": ["x", None]}).to_parquet(tmp_path / "list.parquet")
        assert self.ids(tmp_path / "list.parquet") == ["x", "b"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("l.csv", b"file\na.mp4\n", "no column path - expected the header path"),
            ("l.csv", b"path,video_id\n,x\n", r"row 1: the path is '' - expected a video's"),
            ("l.csv", b"path\n\xff.mp4\n", "is not UTF-8 - save the list as UTF-8"),
            ("l.parquet", b"text", "not a readable list of videos"),
            ("l.txt", b"..\n/\n", "row 2: the path is '/'"),
        ],
    )
    def test_lists_that_cannot_be_used(self, name: str, content: bytes, words: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            self.ids(tmp_path / name)

    def test_a_listed_file_that_is_missing_is_recorded_once(self, clips_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text(f"{clips_folder}/a.mp4\ngone.mp4\n")
        run(tmp_path / "list.txt", tmp_path / "out")
        assert list(statuses(tmp_path / "out").values()).count("missing") == 1
        assert run(tmp_path / "list.txt", tmp_path / "out")[-1].startswith("nothing to do")

    def test_two_files_that_would_share_an_id(self, tmp_path: Path) -> None:
        for name in ("x/a.mkv", "x/a.mp4", "y/a.mp4"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        plan = plan_videos([tmp_path / "x", tmp_path / "y"], {})
        assert [video.video_id for video in plan.todo] == ["a", "a.mp4", "a.mp4~2"]
        assert len(plan.messages) == 2
        assert f"another video is already called 'a': {tmp_path}/x/a.mp4 becomes 'a.mp4'" in plan.messages

    def test_an_id_stays_with_its_file(self, tmp_path: Path) -> None:
        for name in ("a.mp4", "b.mp4"):
            clips.make_clip(tmp_path / name, seconds=0.3)
        run(tmp_path, tmp_path / "out")
        before = features(tmp_path / "out")
        clips.make_clip(tmp_path / "a.avi", seconds=0.3, filters="hflip")  # sorts before a.mp4
        run(tmp_path, tmp_path / "out")
        after = features(tmp_path / "out")
        assert set(after) == {"a", "b", "a.avi"}
        np.testing.assert_array_equal(after["a"], before["a"])

    def test_what_a_folder_holds_beside_videos(self, tmp_path: Path) -> None:
        names = [
            *("a.mp4", "a.webp", "still.webp", "old.gif", ".hidden.mp4", ".Trash-1000/files/b.mp4", "@eaDir/a.mp4"),
            *("$RECYCLE.BIN/c.mp4", "lost+found/d.mp4", "raw/.stversions/e.mp4", "raw/f.mp4", "raw/keep/g.mp4"),
            *("raw/proxy-h.mp4", "app.ts", "app.mts", "empty.ts", "i.dav", "j.xyz", "k.wtv"),
        ]
        for name in names:
            (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "v" / name).touch()
        for name in ("app.ts", "app.mts"):
            (tmp_path / "v" / name).write_text("export const größe: number = 1;\n" * 200, "utf-8")
        clips.make_clip(tmp_path / "v" / "stream.ts", seconds=0.3)
        folder = tmp_path / "v"

        def planned(**rules: object) -> tuple[set[str], list[str]]:
            plan = plan_videos([folder], {}, rules=ExtractConfig(**rules).folder_rules)  # type: ignore[arg-type]
            return {str(video.path.relative_to(folder)) for video in plan.todo}, plan.messages

        shown = {"a.mp4", "still.webp", "old.gif", "empty.ts", "stream.ts", "i.dav", "k.wtv"}
        raw = {"raw/f.mp4", "raw/keep/g.mp4", "raw/proxy-h.mp4"}
        videos, messages = planned()
        assert videos == shown | raw
        assert messages == [
            f"{folder}: ignored 4 files that are not videos by their suffix (.xyz 1, .webp of a video's name 1, "
            ".mts of text 1, .ts of text 1)",
            f"{folder}: left out 6 hidden files and folders ($RECYCLE.BIN, .Trash-1000, @eaDir, lost+found, "
            ".hidden.mp4, ...); --hidden takes them",
        ]
        hidden = {name for name in names if name.endswith(".mp4")}
        assert planned(hidden=True)[0] == shown | raw | hidden
        assert planned(suffixes=("xyz",))[0] == shown | raw | {"j.xyz"}
        videos, messages = planned(exclude=("raw/*", "!raw/keep", "*.webp", "/i.*"))
        assert videos == (shown - {"still.webp", "i.dav"}) | {"raw/keep/g.mp4"}
        assert messages[-1] == f"{folder}: left out 5 files and folders by --exclude"
        assert planned(exclude=("raw/",))[0] == shown

    def test_a_closed_folder_does_not_end_the_run(self, folder: Path, out: Path) -> None:
        scandir, stat = os.scandir, Path.stat

        def closed(path: str | Path = ".") -> object:  # root may look into everything
            if str(path).endswith("deep"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        def refused(path: Path, **options: bool) -> os.stat_result:
            if path.parent.name == "deep":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return stat(path, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "scandir", closed)
            patch.setattr(Path, "stat", refused)
            messages = run(folder, out, prune=True)
            assert any(f"cannot look into 1 folders ({folder}/deep): Permission denied" in m for m in messages)
            with pytest.raises(InputError, match="cannot read the folder"):
                self.ids(folder / "deep")
        assert statuses(out)["deep/d"] == "ok"  # it may well be there

    def test_a_table_of_times_may_spell_accents_otherwise(self, tmp_path: Path) -> None:
        (tmp_path / "cafe\u0301.mp4").touch()
        table = {"caf\u00e9": (1.0,)}
        (video,) = plan_videos([tmp_path], {}, times_seconds=table).todo
        assert video.times_seconds == (1.0,)

    def test_the_same_file_twice_is_one_video(self, clips_folder: Path) -> None:
        assert self.ids(clips_folder / "a.mp4", clips_folder, clips_folder / "deep" / ".." / "a.mp4") == [
            *("a", "b", "c", "deep/d")
        ]


class TestNothingGoodIsLost:
    def test_a_listed_file_that_is_gone_keeps_its_features_and_its_id(self, tmp_path: Path) -> None:
        clips.make_clip(tmp_path / "a.mp4", seconds=0.3)
        (tmp_path / "list.txt").write_text("a.mp4\n")
        run(tmp_path / "list.txt", tmp_path / "out")
        (tmp_path / "new").mkdir()
        (tmp_path / "a.mp4").rename(tmp_path / "new" / "a.mp4")
        messages = run(tmp_path / "list.txt", tmp_path / "out")
        assert FeatureStore(tmp_path / "out").video_ids == ["a"]
        assert any("files are gone" in message and "kept" in message for message in messages)
        plan = plan_videos([tmp_path / "new", tmp_path / "list.txt"], FeatureStore(tmp_path / "out").records)
        assert [video.video_id for video in plan.todo] == ["a.mp4"]

    def test_a_newcomer_does_not_take_the_id_of_a_video_whose_disk_is_away(self, tmp_path: Path) -> None:
        for folder, source in (("d1", "testsrc2"), ("d2", "smptebars")):
            (tmp_path / folder).mkdir()
            clips.make_clip(tmp_path / folder / "a.mp4", seconds=0.3, source=source)
        run(tmp_path / "d1", tmp_path / "out")
        (tmp_path / "d1").rename(tmp_path / "away")
        run(tmp_path / "d2", tmp_path / "out")
        assert FeatureStore(tmp_path / "out").video_ids == ["a", "a.mp4"]
        # What was moved, and is the same to the byte, keeps its id.
        run(tmp_path / "away", tmp_path / "out")
        assert FeatureStore(tmp_path / "out").video_ids == ["a", "a.mp4"]

    def test_a_strip_is_scaled_in_little_memory(self) -> None:
        frames = torch.randint(0, 256, (5, 16, 1024, 3), dtype=torch.uint8)
        transform = Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("svb.extract.compute.transform.SCALED_BYTES", 1)
            one_by_one = to_squares(frames, transform)
        assert torch.equal(one_by_one, to_squares(frames, transform))
        assert one_by_one.untyped_storage().nbytes() == 5 * 3 * 32 * 32
