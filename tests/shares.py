"""What processes of `svb extract --devices` do in tests, in place of `svb.extract.run._extract_share`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from svb.errors import StoreError, UsageError
from svb.extract.config import ExtractConfig
from svb.extract.progress import ExtractProgress

OnProgress = Callable[[ExtractProgress], None]


def mark(out: Path, name: str, config: ExtractConfig) -> None:
    out.mkdir(exist_ok=True)
    (out / f"{name} {config.rank}").touch()


def toys(videos: Sequence[Path | str], out: Path, config: ExtractConfig, on_progress: OnProgress) -> None:
    """Do a share with toy backbones, in units of one video."""
    from svb.extract import run as run_module
    from svb.extract.backbones import FAMILIES
    from svb.extract.together import leases

    FAMILIES["toy"] = "toy_backbone"
    run_module.UNIT_VIDEOS, leases.LOOK_SECONDS = 1, 0.05
    run_module._extract_share(videos, out, config, on_progress)


def of_two_minds(videos: Sequence[Path | str], out: Path, config: ExtractConfig, on_progress: OnProgress) -> None:
    """As `toys`, but each process would find another engine to be the faster one."""
    from svb.extract.backbones import engine

    onnx_seconds = 0.1 if config.rank == 0 else 10.0
    engine._measured = lambda *arguments: {"onnx": onnx_seconds, "torch": 1.0}
    toys(videos, out, config, on_progress)


def first_dies(videos: Sequence[Path | str], out: Path, config: ExtractConfig, on_progress: OnProgress) -> None:
    """As `toys`, but the first process dies while it has a video's lease, and the second begins after that."""

    def die(progress: ExtractProgress) -> None:
        assert list((out / "leases").glob("*.lease"))
        mark(out.parent, "dies", config)
        os.kill(os.getpid(), signal.SIGKILL)

    while config.rank == 1 and not (out.parent / "dies 0").exists():
        time.sleep(0.05)
    toys(videos, out, config, die if config.rank == 0 else on_progress)


def waits(videos: Sequence[Path | str], out: Path, config: ExtractConfig, on_progress: OnProgress) -> None:
    """Wait until a signal comes, and save then."""
    try:
        mark(out, "began", config)
        time.sleep(600)
    finally:
        mark(out, "saved", config)


def first_fails(videos: Sequence[Path | str], out: Path, config: ExtractConfig, on_progress: OnProgress) -> None:
    """Fail in the first process, and have the second wait until it is told."""
    on_progress(ExtractProgress(4, videos_done=2 - (config.rank or 0), frames_done=7, num_workers=3))
    mark(out, f"{config.device} {config.workers} {os.environ.get('CUDA_VISIBLE_DEVICES')}", config)
    if config.rank == 0:
        raise StoreError("the disk is full")
    while not (out / "told").exists():
        time.sleep(0.05)


def all_fail(videos: Sequence[Path | str], out: Path, config: ExtractConfig, on_progress: OnProgress) -> None:
    raise UsageError(f"no such thing on {os.environ.get('CUDA_VISIBLE_DEVICES')}")
