"""What ends an extraction early, or a video: signals, limits, disks and locks; the store is whole after each."""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from conftest import RunSvb
from extraction import CLIPS, FRAMES, assert_same_bytes, features, num_extracted, run, statuses, toy
from messages import heard

from svb.data.feature_store import FeatureStore, verify_store
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.errors import StoreError, SvbError
from svb.extract import run as run_module
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
from svb.extract.pool.worker import SLOTS, Finished
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


def once_a_video_is_done(act: Callable[[], object]) -> Callable[[ExtractProgress], None]:
    acts = iter([act])

    def on_progress(progress: ExtractProgress) -> None:
        if progress.videos_done:
            next(acts, lambda: None)()

    return on_progress


def interrupt(*numbers: int) -> None:
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


class TestSignals:
    @pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
    def test_what_is_whole_is_published(
        self,
        folder: Path,
        tmp_path: Path,
        number: int,
        exit_code: int,
        run_svb: RunSvb,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in range(6):
            clips.make_clip(folder / f"more-{name}.mp4", filters=f"hue=h={30 * name}")
        send, out, options = once_a_video_is_done(lambda: interrupt(number)), tmp_path / "out", {"batch_size": 1}
        command = importlib.import_module("svb.cli.extract")
        monkeypatch.setattr(command, "_show", lambda meter, progress: send(progress))
        arguments = ("--backbone", FRAMES, "--backbone", CLIPS, "--engine", "torch", "--precision", "float32")
        ran = run_svb("extract", folder, "-o", out, *arguments, "--workers", 1, "--batch-size", 1)
        assert ran.exit_code == exit_code and "Traceback" not in ran.stderr
        words = rf"svb: interrupted - \d videos of this run are in {out}.*run the same command again to go on"
        assert re.fullmatch(words, ran.stderr.splitlines()[-1])
        assert verify_store(out) == []
        held = features(out, CLIPS)
        assert 1 <= len(held) < 10
        assert set(statuses(out).values()) == {"ok"}
        assert num_extracted(folder, out, FRAMES, CLIPS, **options) == 10 - len(held)
        run(folder, tmp_path / "undisturbed", FRAMES, CLIPS, **options)
        assert_same_bytes(out, tmp_path / "undisturbed", FRAMES, CLIPS)

    def test_a_second_signal_stops_at_once(self, folder: Path, tmp_path: Path) -> None:
        twice = once_a_video_is_done(lambda: interrupt(signal.SIGINT, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", batch_size=1, on_progress=twice)
        assert verify_store(tmp_path / "out") == []


class TestDisks:
    @pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
    def test_a_disk_that_takes_no_more(self, folder: Path, tmp_path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        fill = once_a_video_is_done(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1])))
        try:
            with pytest.raises(StoreError, match=r"cannot write .* \(File too large\) .* make room, and run"):
                run(folder, tmp_path / "out", batch_size=1, on_progress=fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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

    def test_two_extractions_at_once(self, folder: Path, out: Path) -> None:
        clips.make_clip(folder / "new.mp4", seconds=0.3)
        settings = FeatureStore(out).settings
        with FeatureStoreWriter(out, settings, {}), pytest.raises(StoreError, match="another process is writing"):
            run(folder, out)
        with FeatureStoreWriter(out, settings, {}, shared=True):
            run(folder, out, rank=0, world_size=2)  # those that share let each other in
        assert len(statuses(out)) == 5


@pytest.mark.usefixtures("spawned_workers")
class TestWorkersThatFail:
    @pytest.mark.parametrize(
        ("number", "status", "words"),
        [
            (signal.SIGKILL, "decoder_crash", "the decoder's process died with exit code -9"),
            (signal.SIGSTOP, "timeout", r"the decoder gave nothing for \d{5} s"),
        ],
    )
    def test_one_that_dies_or_hangs_costs_one_video(
        self, number: int, status: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        struck: list[pool_module._Worker | None] = []
        hours = [0.0]

        class Struck(pool_module._Worker):
            def send(self, thing: object) -> None:
                super().send(thing)
                if not struck:  # it has its first video
                    struck.append(self)
                    os.kill(self.process.pid, number)

            def kill(self) -> None:
                super().kill()
                struck.append(None)

        def clock() -> float:
            hours[0] += 5 * (len(struck) == 1)  # until the first worker is replaced hours fly
            return 3600 * hours[0]

        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "_Worker", Struck)
            patch.setattr(run_module, "DecodePool", partial(DecodePool, clock=clock))
            run(folder, out, stall_seconds=36_000.0)
        assert statuses(out) == {"a": status, "b": "ok", "c": "ok", "deep/d": "ok"}
        record, stat = FeatureStore(out).records["a"], (folder / "a.mp4").stat()
        assert re.fullmatch(words, record.error)
        assert (record.size_bytes, record.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert not multiprocessing.active_children()
        assert run(folder, out)[-1].startswith("nothing to do")
        run(folder, out, retry_failed="all")
        assert set(statuses(out).values()) == {"ok"}

    def test_an_error_in_the_main_process_ends_the_workers(self, folder: Path, tmp_path: Path) -> None:
        def fail(progress: object) -> None:
            raise RuntimeError("the user's own")

        with pytest.raises(RuntimeError, match="the user's own"):
            run(folder, tmp_path / "out", on_progress=fail, workers=2)
        assert not multiprocessing.active_children()


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
        now, said = [100.0], []

        class Pipe:
            send = said.append

        messenger = worker_module._Messenger(Pipe(), None, 30.0, 5, clock=lambda: now[0])
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


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def failing_at(call: Callable[..., Any], calls: list[int], error: Exception) -> Callable[..., Any]:
    """Return what fails at the calls of these numbers, and else calls."""
    number = itertools.count()

    def fails_sometimes(*arguments: Any) -> Any:
        if next(number) in calls:
            raise error
        return call(*arguments)

    return fails_sometimes


def fill(packer: Packer) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    packer.add(0, torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8, generator=generator), np.arange(11.0))
    packer.end(0)
    packer.flush()
    return packer.take(0)


def that_fits(num_inputs: int, error: Exception | None = None) -> Backbone:
    """Return a backbone that fails with batches larger than this."""
    backbone = toy()
    forward = backbone.module.forward

    def limited(images: torch.Tensor) -> torch.Tensor:
        if len(images) > num_inputs:
            raise error or out_of_memory()
        return forward(images)

    backbone.module.forward = limited
    return backbone


class TestOutOfMemory:
    def test_batches_are_halved(self) -> None:
        said = heard()
        expected, _ = fill(Packer(that_fits(8), 8))
        features, times_seconds = fill(Packer(that_fits(3), 8))
        np.testing.assert_allclose(features, expected, rtol=1e-6)
        assert times_seconds.tolist() == list(range(11))
        going_on = [message.partition(",")[2][:24] for message in said]
        assert going_on == [" going on with 4 inputs ", " going on with 2 inputs "]
        with pytest.raises(SvbError, match=r"too little memory for toy:frames even with one input at a time"):
            fill(Packer(that_fits(0), 8))

    @pytest.mark.parametrize("cores", [0, 1])
    def test_a_failed_batch_holds_no_memory_while_it_is_tried_again(self, cores: int) -> None:
        backbone = toy()
        forward, allocated = backbone.module.forward, []

        def limited(images: torch.Tensor) -> torch.Tensor:
            assert all(tensor() is None for tensor in allocated)
            activations = images * 2
            allocated.append(weakref.ref(activations))
            try:
                assert len(images) <= 2
            except AssertionError:  # so that the error has a context
                raise out_of_memory() from None
            return forward(images)

        backbone.module.forward = limited
        gc.disable()  # memory must come back at once
        try:
            with ThreadPoolExecutor(1) as executor:
                features, _ = fill(Packer(backbone, 8, executor=executor if cores else None))
        finally:
            gc.enable()
        assert len(features) == 11 and len(allocated) > 6

    def test_a_batch_that_cannot_be_begun_waits_for_those_under_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, _ = fill(Packer(that_fits(8), 8))
        real = Packer._empty_batch
        packer = Packer(that_fits(8), 8, ahead=2)
        monkeypatch.setattr(Packer, "_empty_batch", failing_at(real, [1], out_of_memory()))
        features, _ = fill(packer)
        assert features.tobytes() == expected.tobytes()
        monkeypatch.setattr(Packer, "_empty_batch", failing_at(real, [0, 1], out_of_memory()))
        with pytest.raises(SvbError, match="cpu has too little memory for frames that wait for the backbones"):
            fill(Packer(that_fits(8), 8))

    @pytest.mark.parametrize("error", [out_of_memory(), RuntimeError("Too much shared memory required: 70000")])
    @pytest.mark.parametrize(("owner", "step"), [(Uploader, "upload"), (transform_module, "to_squares")])
    def test_frames_that_the_device_cannot_scale_are_scaled_on_the_cpu(
        self, owner: Any, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backbone, said = toy(), heard()
        frames = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8)

        def rows() -> bytes:
            packer = Packer(backbone, 4)
            run_packers([packer], Uploader(torch.device("cpu")), 0, FrameChunk(frames, np.arange(3.0)))
            packer.flush()
            return packer.take(0)[0].tobytes()

        expected = rows()
        monkeypatch.setattr(owner, step, failing_at(getattr(owner, step), [0], error))
        assert rows() == expected
        assert len(said) == 1 and f"cpu cannot scale 3 frames of 30x40 ({str(error)[:24]}" in said[0]

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

    def test_other_errors_are_not_taken_for_it(self) -> None:
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            fill(Packer(that_fits(0, RuntimeError("shapes do not fit")), 8))


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
        ],
    )
    def test_samplings(
        self, options: tuple[str, ...], settings: object, clips_folder: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        arguments = (*options, "-o", tmp_path / "out", "--backbone", FRAMES, "--workers", 1, "--engine", "torch")
        ran = run_svb("extract", clips_folder / "a.mp4", *arguments)
        assert ran.exit_code == 0, ran.stderr
        store = FeatureStore(tmp_path / "out")
        assert store.settings["sampling"] == settings
        assert store.status_counts() == {"ok": 1}

    def test_frames_scaled_by_the_decoder_are_nearly_those_of_the_device(
        self, clips_folder: Path, toy_store: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        common = ("--backbone", FRAMES, "--precision", "float32", "--workers", 1, "--engine", "torch")
        for name, option in (("decoder", ("--resize", "decoder")), ("fast", ("--fast-decode",))):
            assert run_svb("extract", clips_folder, "-o", tmp_path / name, *common, *option).exit_code == 0
        scaled = features(tmp_path / "decoder")
        for video_id, rows in features(toy_store).items():
            np.testing.assert_allclose(scaled[video_id], rows, atol=0.3)
        plain, decoder, fast = (
            FeatureStore(out).settings["decoder"] for out in (toy_store, tmp_path / "decoder", tmp_path / "fast")
        )
        assert decoder == {**plain, "resize_px": 16} and fast == {**plain, "fast": True}
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "decoder", "--resize", "device")
        assert ran.exit_code == 1 and "decoder.resize_px: stored 16, wanted None" in ran.stderr
        arguments = ("-o", tmp_path / "decoder", "--backbone", FRAMES, "--resize", "decoder")
        assert "nothing to do" in run_svb("extract", clips_folder, *arguments).stderr
