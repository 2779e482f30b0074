"""What ends an extraction early, or a video: signals, limits, disks and locks; the store is whole after each."""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import itertools
import os
import resource
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from conftest import RunSvb
from extraction import CLIPS, FRAMES, assert_same_bytes, features, num_extracted, run, statuses
from messages import heard

from svb.data.feature_store import FeatureStore, verify_store
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.errors import Interrupted, StoreError, SvbError
from svb.extract.backbones import load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.transform import Transform
from svb.extract.compute import transform as transform_module
from svb.extract.compute.packing import Packer
from svb.extract.compute.pipeline import run_packers
from svb.extract.compute.transform import Uploader
from svb.extract.decode.decoder import DecodeError, FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.sampling import Sampling
from svb.extract.plan import PlannedVideo
from svb.extract.pool import decode_pool as pool_module
from svb.extract.pool import worker as worker_module
from svb.extract.pool.decode_pool import DecodePool
from svb.extract.pool.worker import SLOTS, Finished, Started
from svb.extract.progress import ExtractProgress, what_limited

pytestmark = pytest.mark.usefixtures("toy_backbones")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[pool_module._Worker]:
    """Return a list that gets every decode worker that is started."""
    started: list[pool_module._Worker] = []

    class Noted(pool_module._Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(pool_module, "_Worker", Noted)
    return started


def once_a_video_is_done(act: Callable[[], object], times: int = 1) -> Callable[[ExtractProgress], None]:
    left = [times]

    def on_progress(progress: ExtractProgress) -> None:
        if progress.videos_done and left[0]:
            left[0] -= 1
            act()

    return on_progress


class TestSignals:
    @pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
    def test_what_is_whole_is_published(
        self, folder: Path, tmp_path: Path, number: signal.Signals, exit_code: int
    ) -> None:
        for name in range(6):
            clips.make_clip(folder / f"more-{name}.mp4", filters=f"hue=h={30 * name}")
        send = once_a_video_is_done(lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=r"interrupted - \d videos of this run are in") as caught:
            run(folder, tmp_path / "out", FRAMES, CLIPS, batch_size=1, on_progress=send)
        assert caught.value.exit_code == exit_code
        assert verify_store(tmp_path / "out") == []
        held = features(tmp_path / "out", CLIPS)
        assert 1 <= len(held) < 10
        assert set(statuses(tmp_path / "out").values()) == {"ok"}
        assert num_extracted(folder, tmp_path / "out", FRAMES, CLIPS, batch_size=1) == 10 - len(held)
        run(folder, tmp_path / "undisturbed", FRAMES, CLIPS, batch_size=1)
        assert_same_bytes(tmp_path / "out", tmp_path / "undisturbed", FRAMES, CLIPS)

    def test_a_second_signal_stops_at_once(self, folder: Path, tmp_path: Path) -> None:
        def twice() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", batch_size=1, on_progress=once_a_video_is_done(twice))
        assert verify_store(tmp_path / "out") == []

    def test_the_command_says_how_to_go_on(
        self, folder: Path, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        send = once_a_video_is_done(lambda: os.kill(os.getpid(), signal.SIGTERM))
        monkeypatch.setattr(
            importlib.import_module("svb.cli.extract"), "_show", lambda meter, progress: send(progress)
        )
        options = ("--backbone", FRAMES, "--workers", 1, "--batch-size", 1)
        ran = run_svb("extract", folder, "-o", tmp_path / "out", *options)
        assert ran.exit_code == 75 and "Traceback" not in ran.stderr
        last = ran.stderr.splitlines()[-1]
        assert last.startswith("svb: interrupted - ") and last.endswith("run the same command again to go on")


class TestDisks:
    @pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
    def test_a_disk_that_takes_no_more(self, folder: Path, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))

        try:
            with pytest.raises(StoreError, match=r"cannot write .* \(File too large\) .* make room, and run"):
                run(folder, tmp_path / "out", batch_size=1, on_progress=once_a_video_is_done(fill))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert verify_store(tmp_path / "out") == [] and not list((tmp_path / "out").rglob(".aside-*"))
        run(folder, tmp_path / "out", batch_size=1)
        assert set(statuses(tmp_path / "out").values()) == {"ok"}

    def test_a_store_that_vanishes(self, folder: Path, tmp_path: Path) -> None:
        vanish = once_a_video_is_done(lambda: shutil.rmtree(tmp_path / "out"))
        with pytest.raises(StoreError, match=r"out is gone or was emptied while it was written to - bring it back"):
            run(folder, tmp_path / "out", batch_size=1, on_progress=vanish)
        assert not (tmp_path / "out" / "shards").exists()

    def test_a_file_system_without_locks(
        self, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(StoreError, match=r"refuses locks \(No locks available\) .* mount it with locks"):
            run(clips_folder, tmp_path / "out")

    def test_two_extractions_at_once(self, clips_folder: Path, tmp_path: Path) -> None:
        run(clips_folder / "a.mp4", tmp_path / "out")
        settings = FeatureStore(tmp_path / "out").settings
        with (
            FeatureStoreWriter(tmp_path / "out", settings, {}),
            pytest.raises(StoreError, match=r"another process is writing to it: wait for it to end"),
        ):
            run(clips_folder, tmp_path / "out")
        with FeatureStoreWriter(tmp_path / "out", settings, {}, shared=True):
            run(clips_folder, tmp_path / "out", rank=0, world_size=2)  # those that share let each other in
        assert len(statuses(tmp_path / "out")) == 4


class TestOneVideo:
    def test_partial_videos_fail_where_they_are_not_wanted(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        clips.make_truncated_clip(tmp_path / "in" / "cut.mp4", keeps_index=True)
        clips.make_rotten_clip(tmp_path / "in" / "rotten.mp4")
        run(tmp_path / "in", tmp_path / "kept")
        run(tmp_path / "in", tmp_path / "failed", on_partial="fail")
        assert statuses(tmp_path / "kept") == {"cut": "partial", "rotten": "partial", "whole-cut": "ok"}
        expected = {"cut": "truncated", "rotten": "concealed_errors", "whole-cut": "ok"}
        assert statuses(tmp_path / "failed") == expected
        assert verify_store(tmp_path / "failed") == []
        record = FeatureStore(tmp_path / "failed").records["rotten"]
        assert record.error.startswith("decoded ") and record.elapsed_seconds > 0

    def test_one_that_takes_too_long_ends(self) -> None:
        now = [100.0]
        said: list[object] = []

        class Pipe:
            send = said.append

        messenger = worker_module._Messenger(
            Pipe(),  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            time_limit_seconds=30,
            num_videos=5,
            clock=lambda: now[0],
        )
        messenger.heartbeat()
        assert not said
        now[0] += 29
        messenger.heartbeat()
        assert said == [worker_module.Alive()]
        now[0] += 2
        with pytest.raises(DecodeError, match="has taken 31 s - a video may take 30 s; raise") as caught:
            messenger.heartbeat()
        assert caught.value.status == "timeout"

    def test_workers_are_replaced_after_some_videos(
        self, clips_folder: Path, workers: list[pool_module._Worker]
    ) -> None:
        videos = [PlannedVideo(path.stem, path) for path in sorted(clips_folder.glob("*.*"))]
        pool = DecodePool(1, DecodeOptions(Sampling(frames=1)), videos_a_worker=2)
        ends = [message.status for _, message in pool.run(videos) if isinstance(message, Finished)]
        assert ends == ["ok"] * 3 and len(workers) == 2

    def test_a_consumer_that_is_slow_is_no_stall(self, tmp_path: Path, workers: list[pool_module._Worker]) -> None:
        # More chunks than there are slots: the worker waits for them for longer than it may be silent.
        clip = clips.make_clip(tmp_path / "a.mp4", seconds=1, fps=60, size="1280x720", extra=("-g", "1"))
        hours, consumer, asked_again = [0.0], threading.get_ident(), threading.Event()

        def clock() -> float:
            if hours[0] and threading.get_ident() != consumer:
                asked_again.set()
            return 3600 * hours[0]

        pool = DecodePool(1, DecodeOptions(Sampling(fps=60)), stall_seconds=600.0, clock=clock)
        messages = []
        for _, message in pool.run([PlannedVideo("a", clip)]):
            messages.append(message)
            if isinstance(message, FrameChunk) and not hours[0]:
                while workers[0].slots_out < SLOTS:
                    time.sleep(0.01)
                hours[0] = 1.0
                assert asked_again.wait(600)
        assert isinstance(messages[-1], Finished) and messages[-1].status == "ok"
        assert pool.workers_waiting_seconds > 0

    def test_a_worker_that_is_silent_for_long_is_a_stall(
        self, tmp_path: Path, workers: list[pool_module._Worker]
    ) -> None:
        hours = [0.0]
        pool = DecodePool(1, DecodeOptions(Sampling(fps=1)), stall_seconds=600.0, clock=lambda: 3600 * hours[0])
        messages = []
        for _, message in pool.run([PlannedVideo("a", clips.make_clip(tmp_path / "a.mp4"))]):
            messages.append(message)
            if isinstance(message, Started):
                assert workers[0].process.pid is not None
                os.kill(workers[0].process.pid, signal.SIGSTOP)
                hours[0] = 1.0
        assert isinstance(messages[-1], Finished) and messages[-1].status == "timeout"


def failing_at(
    call: Callable[..., Any], calls: list[int], words: str = "CUDA out of memory."
) -> Callable[..., Any]:
    """Return what fails at the calls of these numbers, and else calls."""
    number = itertools.count()

    def fails_sometimes(*arguments: Any) -> Any:
        if next(number) in calls:
            raise (torch.OutOfMemoryError if "out of memory" in words else RuntimeError)(words)
        return call(*arguments)

    return fails_sometimes


class TestOutOfMemory:
    def fill(self, packer: Packer) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        squares = torch.randint(
            0, 256, (11, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        packer.add(0, squares, np.arange(11.0))
        packer.end(0)
        packer.flush()
        return packer.take(0)

    def backbone(self, fits: int) -> Backbone:
        backbone = load_backbone(FRAMES, torch.device("cpu"), torch.float32)
        forward = backbone.module.forward

        def limited(images: torch.Tensor) -> torch.Tensor:
            if len(images) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            result: torch.Tensor = forward(images)
            return result

        backbone.module.forward = limited  # type: ignore[method-assign]
        return backbone

    def test_batches_are_halved(self) -> None:
        said = heard()
        expected, _ = self.fill(Packer(self.backbone(fits=8), 8))
        features, times_seconds = self.fill(Packer(self.backbone(fits=3), 8))
        np.testing.assert_allclose(features, expected, rtol=1e-6)
        assert times_seconds.tolist() == list(range(11))
        assert [message.partition(",")[2][:24] for message in said] == [
            *(" going on with 4 inputs ", " going on with 2 inputs ")
        ]

    @pytest.mark.parametrize("cores", [0, 1])
    def test_a_failed_batch_holds_no_memory_while_it_is_tried_again(self, cores: int) -> None:
        backbone = load_backbone(FRAMES, torch.device("cpu"), torch.float32)
        forward, allocated = backbone.module.forward, []

        def limited(images: torch.Tensor) -> torch.Tensor:
            assert all(tensor() is None for tensor in allocated)
            activations = images * 2
            allocated.append(weakref.ref(activations))
            try:
                assert len(images) <= 2
            except AssertionError:  # so that the error has a context
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB") from None
            result: torch.Tensor = forward(images)
            return result

        backbone.module.forward = limited  # type: ignore[method-assign]
        gc.disable()  # memory must come back at once
        try:
            if cores:
                with ThreadPoolExecutor(cores) as executor:
                    features, _ = self.fill(Packer(backbone, 8, executor=executor))
            else:
                features, _ = self.fill(Packer(backbone, 8))
        finally:
            gc.enable()
        assert len(features) == 11 and len(allocated) > 6

    def test_a_batch_that_cannot_be_begun_waits_for_those_under_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, _ = self.fill(Packer(self.backbone(fits=8), 8))
        real = Packer._empty_batch
        packer = Packer(self.backbone(fits=8), 8, ahead=2)
        monkeypatch.setattr(Packer, "_empty_batch", failing_at(real, [1]))
        features, _ = self.fill(packer)
        assert features.tobytes() == expected.tobytes()
        monkeypatch.setattr(Packer, "_empty_batch", failing_at(real, [0, 1]))
        with pytest.raises(SvbError, match="cpu has too little memory for frames that wait for the backbones"):
            self.fill(Packer(self.backbone(fits=8), 8))

    @pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "Too much shared memory required: 70000"])
    @pytest.mark.parametrize("step", ["upload", "to_squares"])
    def test_frames_that_the_device_cannot_scale_are_scaled_on_the_cpu(
        self, step: str, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backbone, said = load_backbone(FRAMES, torch.device("cpu"), torch.float32), heard()
        frames = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8)

        def rows() -> bytes:
            packer = Packer(backbone, 4)
            run_packers([packer], Uploader(torch.device("cpu")), 0, FrameChunk(frames, np.arange(3.0)))
            packer.flush()
            return packer.take(0)[0].tobytes()

        expected = rows()
        owner = Uploader if step == "upload" else transform_module
        monkeypatch.setattr(owner, step, failing_at(getattr(owner, step), [0], words))
        assert rows() == expected
        assert len(said) == 1 and f"cpu cannot scale 3 frames of 30x40 ({words}" in said[0]

    def test_a_huge_still_never_reaches_the_kernel_that_refuses_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        still = np.zeros((1, 12_000, 12_000, 3), np.uint8)  # what is never written to takes no memory
        still[0, :, :200] = 255
        uploader = Uploader(torch.device("cpu"))
        uploader._device = torch.device("cuda")  # up to the upload of squares, all is as on a GPU
        uploaded: list[np.ndarray[Any, Any]] = []

        def upload(uploader: Uploader, frames: np.ndarray[Any, Any]) -> torch.Tensor:
            uploaded.append(frames)
            return torch.from_numpy(frames)

        monkeypatch.setattr(Uploader, "upload", upload)
        transform = Transform(224, (0.5,) * 3, (0.5,) * 3)
        (square,) = uploader.squares(still, [transform])[transform.geometry]
        assert [frames.shape for frames in uploaded] == [(1, 3, 224, 224)]
        assert (square[:, :, :3] > 250).all() and (square[:, :, 6:] < 5).all()

    def test_one_input_that_does_not_fit_is_the_end(self) -> None:
        with pytest.raises(SvbError, match=r"too little memory for toy:frames even with one input at a time"):
            self.fill(Packer(self.backbone(fits=0), 8))

    def test_other_errors_are_not_taken_for_it(self) -> None:
        backbone = load_backbone(FRAMES, torch.device("cpu"), torch.float32)

        def fail(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not fit")

        backbone.module.forward = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            self.fill(Packer(backbone, 8))


@pytest.mark.parametrize(
    ("decode", "device", "words"),
    [
        (0.7, 0.0, "decoding limited this run: the backbones waited for frames 70% of the time"),
        (0.0, 0.8, "the backbones on cpu limited this run: decoders waited for them 80% of the time; a GPU"),
        (0.1, 0.1, "decoding and backbones kept pace: they waited 10% and 10% of the time"),
    ],
)
def test_a_run_says_what_limited_it(decode: float, device: float, words: str) -> None:
    assert what_limited(ExtractProgress(1, decode_wait_share=decode, device_wait_share=device)).startswith(words)


def test_the_time_left_goes_by_bytes() -> None:
    progress = ExtractProgress(num_videos=4, num_bytes=1000, videos_done=3, bytes_done=250, seconds=10.0)
    assert progress.eta_seconds == 30.0
    assert ExtractProgress(num_videos=4, num_bytes=1000).eta_seconds is None


class TestCommand:
    @pytest.mark.parametrize(
        ("options", "settings"),
        [
            (("--every-nth", "5"), {"every_nth": 5}),
            (("--keyframes",), {"keyframes": True}),
            (("--scenes",), {"scenes": 0.3}),
            (("--scenes", "0.5"), {"scenes": 0.5}),
        ],
    )
    def test_samplings(
        self, options: tuple[str, ...], settings: object, clips_folder: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        arguments = (*options, "-o", tmp_path / "out", "--backbone", FRAMES, "--workers", 1)
        ran = run_svb("extract", clips_folder, *arguments)
        assert ran.exit_code == 0, ran.stderr
        store = FeatureStore(tmp_path / "out")
        assert store.settings["sampling"] == settings
        assert store.status_counts() == {"ok": 4}

    def test_frames_scaled_by_the_decoder_are_nearly_those_of_the_device(
        self, clips_folder: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        for name, options in (("device", ()), ("decoder", ("--resize", "decoder")), ("fast", ("--fast-decode",))):
            arguments = (
                "-o",
                tmp_path / name,
                "--backbone",
                FRAMES,
                "--precision",
                "float32",
                "--workers",
                1,
                *options,
            )
            assert run_svb("extract", clips_folder, *arguments).exit_code == 0
        device, decoder = features(tmp_path / "device"), features(tmp_path / "decoder")
        for video_id, rows in device.items():
            np.testing.assert_allclose(decoder[video_id], rows, atol=0.3)
        held = {name: FeatureStore(tmp_path / name).settings["decoder"] for name in ("device", "decoder", "fast")}
        assert held["decoder"] == {**held["device"], "resize_px": 16}
        assert held["fast"] == {**held["device"], "fast": True}
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "decoder", "--resize", "device")
        assert ran.exit_code == 1 and "decoder.resize_px: stored 16, wanted None" in ran.stderr
        arguments = ("-o", tmp_path / "decoder", "--backbone", FRAMES, "--resize", "decoder")
        assert "nothing to do" in run_svb("extract", clips_folder, *arguments).stderr
