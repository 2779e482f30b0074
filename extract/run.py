"""`svb extract`: videos -> frames -> frozen backbones -> a feature store."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svb.config import require_same
from svb.data.feature_store import FeatureStore, read_store_description
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.shard import USABLE, VideoRecord, VideoRows
from svb.device import choose_device, choose_precision
from svb.errors import InputError, UsageError
from svb.extract.backbones import DEFAULT_BACKBONE, load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.decode import FrameChunk, VideoProperties
from svb.extract.decode_options import DecodeOptions
from svb.extract.packing import Packer, to_rows
from svb.extract.plan import Plan, PlannedVideo, plan_videos
from svb.extract.pool import DecodePool, Finished, Message
from svb.extract.sampling import Sampling
from svb.extract.transform import to_squares
from svb.extract.weights import absolute_name

DECODERS = ("pyav", "ffmpeg")
MAX_BATCH_SIZE = 4096


@dataclass
class ExtractProgress:
    """How far an extraction is; handed to `on_progress` after every message from a decoder."""

    num_videos: int
    videos_done: int = 0
    frames_done: int = 0


def extract(
    videos: Sequence[Path | str],
    out: Path | str,
    *,
    backbones: Sequence[str] = (DEFAULT_BACKBONE,),
    sampling: Sampling | None = None,
    decoder: str = "pyav",
    device: str = "auto",
    precision: str = "auto",
    num_workers: int = 2,
    batch_size: int = 32,
    stall_seconds: float = 120.0,
    retry_failed: bool = False,
    on_progress: Callable[[ExtractProgress], None] = lambda progress: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Path:
    """Extract frozen features of videos into a store; continue where an earlier run stopped.

    Decode workers are spawned processes: a script that calls this needs the usual
    `if __name__ == "__main__":`.

    Args:
        videos: Folders (walked recursively), video files, or lists of them (.txt, .csv, .parquet).
        out: The store's folder; made where there is none.
        backbones: Names, `family:model[/weights]`; one decode feeds all of them.
        sampling: Which frames; 1 a second where not given.
        decoder: `pyav`, which hands over to ffmpeg what it cannot read, or `ffmpeg`.
        device: `auto`, `cpu`, `cuda:0`, ...
        precision: `auto`, `float32`, `bfloat16` or `float16`.
        num_workers: Decode processes.
        batch_size: B, frames (or clips of frames) in a batch.
        stall_seconds: A video whose decoder gives nothing for this long is recorded as `timeout`.
        retry_failed: Take up again videos that failed.
        on_progress: Called often.
        on_message: Called with a line that the user should see.

    Returns:
        `out`.

    Raises:
        InputError: No such file, or no videos.
        MismatchError: The store was made with other settings.
        ModelUnavailableError: A backbone's weights cannot be had.
        StoreError: The store is damaged or being written by another process.
        UsageError: An option means nothing.
    """
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r} - expected one of {', '.join(DECODERS)}")
    if not backbones or num_workers < 1:
        raise UsageError("nothing to run - give at least one backbone and one worker")
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise UsageError(f"batch size {batch_size} - expected 1 to {MAX_BATCH_SIZE}")
    if not stall_seconds > 0:
        raise UsageError(f"cannot wait {stall_seconds} s for a decoder - give a positive number of seconds")
    out, sampling = Path(out), sampling or Sampling(fps=1.0)
    options = DecodeOptions(sampling, decoder)
    backbones = [absolute_name(name) for name in dict.fromkeys(backbones)]
    # In bfloat16 a row's last bits depend on the size of the batch it is computed in.
    request = {"sampling": sampling.settings(), "decoder": decoder_settings(decoder), "batch_size": batch_size}
    plan = _plan(videos, out, backbones, request, precision, retry_failed)
    for line in plan.messages:
        on_message(line)
    if not plan.todo:
        on_message(f"nothing to do: all {plan.num_done} videos are in {out}, unchanged")
        return out

    torch_device = choose_device(device)
    dtype = choose_precision(torch_device, precision)
    networks = [load_backbone(name, torch_device, dtype) for name in backbones]
    settings = {**request, "backbones": {network.name: network.settings() for network in networks}}
    provenance = {"device": str(torch_device), "versions": _versions()}

    with FeatureStoreWriter(out, settings, provenance) as writer:
        pool = DecodePool(num_workers, options, stall_seconds)
        pipeline = _Pipeline(plan.todo, networks, batch_size, writer)
        for position, message in pool.run(plan.todo):
            pipeline.take(position, message)
            writer.publish_if_due()  # a long video must not hold back those that are finished
            on_progress(pipeline.progress)
        pipeline.finish()
        on_progress(pipeline.progress)
        writer.publish()
        writer.compact()
    return out


@dataclass
class _InFlight:
    """A video between its first message and its record."""

    properties: VideoProperties | None = None
    finished: Finished | None = None
    has_frames: bool = field(default=False)


class _Pipeline:
    """Frames in, records and rows out: every message of the pool passes here, in the main process."""

    def __init__(
        self,
        videos: Sequence[PlannedVideo],
        networks: Sequence[Backbone],
        batch_size: int,
        writer: FeatureStoreWriter,
    ) -> None:
        self.progress = ExtractProgress(num_videos=len(videos))
        self._videos = videos
        self._packers = [Packer(network, batch_size) for network in networks]
        self._writer = writer
        self._in_flight: dict[int, _InFlight] = {}

    def take(self, position: int, message: Message) -> None:
        video = self._in_flight.setdefault(position, _InFlight())
        if isinstance(message, VideoProperties):
            video.properties = message
        elif isinstance(message, FrameChunk):
            video.has_frames = True
            _run_packers(self._packers, position, message)
            self.progress.frames_done += len(message.frames)
        elif isinstance(message, Finished):
            video.finished = message
            for packer in self._packers:
                if video.has_frames:
                    packer.end(position)
            self._write_complete()

    def finish(self) -> None:
        """Run the padded last batches and write what waited for them."""
        for packer in self._packers:
            packer.flush()
        self._write_complete()

    def _write_complete(self) -> None:
        for position, video in list(self._in_flight.items()):
            if video.finished is None:
                continue
            failed = not video.has_frames or video.finished.status not in USABLE
            if not failed and not all(packer.is_complete(position) for packer in self._packers):
                continue
            self._write(position, video, video.finished, failed)
            del self._in_flight[position]
            self.progress.videos_done += 1

    def _write(self, position: int, video: _InFlight, finished: Finished, failed: bool) -> None:
        rows: dict[str, VideoRows] = {}
        status, error = finished.status, finished.error
        for packer in self._packers:
            if failed:
                packer.forget(position)
                continue
            features, times_seconds = packer.take(position)
            stored = to_rows(features, times_seconds)
            if stored is None:
                status, error = "nonfinite_features", _worst(packer.backbone.name, features)
            else:
                rows[packer.backbone.name] = stored
        if status not in USABLE:
            rows = {}
        self._writer.add(_record(self._videos[position], video.properties, finished, status, error), rows)


def extract_file(
    file: Path, backbones: Sequence[Backbone], options: DecodeOptions, batch_size: int
) -> list[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """Return one file's `(T, F)` float32 features and `(T,)` times by each backbone, decoded once in a worker.

    Raises:
        InputError: The file gives no frame.
    """
    packers = [Packer(backbone, batch_size) for backbone in backbones]
    for _, message in DecodePool(1, options).run([PlannedVideo(str(file), file)]):
        if isinstance(message, FrameChunk):
            _run_packers(packers, 0, message)
        elif isinstance(message, Finished) and message.status not in USABLE:
            raise InputError(f"{file} cannot be used as a video ({message.status}): {message.error}")
    for packer in packers:
        packer.end(0)
        packer.flush()
    return [packer.take(0) for packer in packers]


def _run_packers(packers: Sequence[Packer], position: int, chunk: FrameChunk) -> None:
    frames = torch.from_numpy(chunk.frames).to(packers[0].backbone.device)
    squares: dict[int, torch.Tensor] = {}
    for packer in packers:
        size = packer.backbone.image_size
        if size not in squares:
            squares[size] = to_squares(frames, size)
        packer.add(position, squares[size], chunk.frame_times_seconds)


def _record(
    planned: PlannedVideo, properties: VideoProperties | None, finished: Finished, status: str, error: str
) -> VideoRecord:
    known = properties or VideoProperties(math.nan, math.nan, 0, 0, 0, "")
    return VideoRecord(
        video_id=planned.video_id,
        source_path=str(planned.path),
        size_bytes=finished.size_bytes,
        mtime_ns=finished.mtime_ns,
        content_hash=finished.content_hash,
        duration_seconds=known.duration_seconds,
        frame_rate=known.frame_rate,
        width_px=known.width_px,
        height_px=known.height_px,
        rotation_degrees=known.rotation_degrees,
        codec=known.codec,
        decoder=finished.decoder,
        status=status,
        error=error,
    )


def _worst(backbone: str, features: NDArray[np.float32]) -> str:
    largest = np.abs(features).max()
    return f"{backbone} gave a value of {largest:g} - float16 holds finite values up to 65504"


def _plan(
    videos: Sequence[Path | str],
    out: Path,
    backbones: Sequence[str],
    request: dict[str, Any],
    precision: str,
    retry_failed: bool,
) -> Plan:
    records: dict[str, VideoRecord] = {}
    if (out / "store.json").exists():
        # What needs no network to be known is compared before one is loaded: a run with nothing to do
        # takes a second, a mistaken option not much longer.
        settings = read_store_description(out)["settings"]
        require_same(
            {**settings, "backbones": sorted(settings["backbones"])},
            {**request, "backbones": sorted(set(backbones))},
            what=f"the feature store {out}",
            do_next="Give the options (and package versions) it was made with, or write to another folder with -o.",
        )
        if precision != "auto":
            held = settings["backbones"].items()
            stored = {name: {"precision": backbone["precision"]} for name, backbone in held}
            wanted = {name: {"precision": precision} for name in stored}
            require_same(stored, wanted, what=f"the feature store {out}", do_next="Leave out --precision.")
        records = FeatureStore(out).records
    return plan_videos([Path(video) for video in videos], records, retry_failed=retry_failed)


def decoder_settings(decoder: str) -> dict[str, str]:
    """Return a decoder and its version as stored and fingerprinted."""
    if decoder == "pyav":
        import av

        return {
            "name": "pyav",
            "version": f"{av.__version__}, libavcodec {av.library_versions['libavcodec'][0]}",
        }
    import imageio_ffmpeg

    return {"name": "ffmpeg", "version": imageio_ffmpeg.get_ffmpeg_version()}


def _versions() -> dict[str, str]:
    names = (
        "svb",
        "torch",
        "torchvision",
        "timm",
        "open_clip_torch",
        "av",
        "imageio-ffmpeg",
        "h5py",
        "numpy",
    )
    return {name: version(name) for name in names}
