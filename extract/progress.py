"""How far an extraction is, what it waits for, and the log of both."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOG_SECONDS = 10.0

# If both sides wait for less than this share of the time, neither holds up the other.
MUCH_WAITING = 0.25


@dataclass
class ExtractProgress:
    """How far an extraction is; handed to `on_progress` after every message from a decoder.

    Attributes:
        num_videos: Videos to do.
        num_bytes: The size of their files.
        videos_done: Videos that have their record.
        bytes_done: The size of their files.
        frames_done: Frames that have gone to the backbones.
        seconds: Time since the first message of a decoder.
        decode_wait_share: Share of the time that the backbones had nothing to do.
        device_wait_share: Share of the decoders' time that they waited for the backbones; known per whole video.
        queue_depth: Messages from decoders that wait for the backbones.
        num_workers: Decode processes.
        device: Where the backbones run.
    """

    num_videos: int
    num_bytes: int = 0
    videos_done: int = 0
    bytes_done: int = 0
    frames_done: int = 0
    seconds: float = 0.0
    decode_wait_share: float = 0.0
    device_wait_share: float = 0.0
    queue_depth: int = 0
    num_workers: int = 1
    device: str = "cpu"

    @property
    def eta_seconds(self) -> float | None:
        """The time left at the rate so far, by bytes; None while nothing is done."""
        if not self.bytes_done or not self.num_bytes:
            return None
        return self.seconds * max(0, self.num_bytes - self.bytes_done) / self.bytes_done


def progress_of_all(
    told: Sequence[ExtractProgress], num_videos: int, num_bytes: int, device: str
) -> ExtractProgress:
    """Return the joint progress of several processes.

    Videos of a process that died count twice if another process repeats them.
    """
    several = max(1, len(told))
    return ExtractProgress(
        num_videos=num_videos,
        num_bytes=num_bytes,
        videos_done=min(num_videos, sum(one.videos_done for one in told)),
        bytes_done=min(num_bytes, sum(one.bytes_done for one in told)),
        frames_done=sum(one.frames_done for one in told),
        seconds=max((one.seconds for one in told), default=0.0),
        decode_wait_share=sum(one.decode_wait_share for one in told) / several,
        device_wait_share=sum(one.device_wait_share for one in told) / several,
        queue_depth=sum(one.queue_depth for one in told),
        num_workers=max(1, sum(one.num_workers for one in told)),
        device=device,
    )


def what_limited(progress: ExtractProgress) -> str:
    """Return one sentence: what an extraction waited for, and what would help."""
    cores = os.cpu_count() or 1
    decode, device = progress.decode_wait_share, progress.device_wait_share
    if decode >= max(device, MUCH_WAITING):
        more = (
            f"--workers above {progress.num_workers} (this machine has {cores} cores)"
            if progress.num_workers < cores
            else "more cores"
        )
        return (
            f"decoding limited this run: the backbones waited for frames {decode:.0%} of the time; {more}, "
            "--fast-decode, --resize decoder or --hwaccel would help"
        )
    if device >= MUCH_WAITING:
        help_ = "a GPU" if progress.device == "cpu" else "a larger --batch-size, --compile or a second GPU"
        return (
            f"the backbones on {progress.device} limited this run: decoders waited for them {device:.0%} of the "
            f"time; {help_}, --precision bfloat16 where the device has it, or a smaller backbone would help"
        )
    return (
        f"decoding and backbones kept pace: they waited {decode:.0%} and {device:.0%} of the time; only more of "
        "both would help"
    )


class RunLog:
    """A run's JSON lines: `start`, `progress` every ten seconds, `end`. A line that cannot be written is left out.

    Args:
        folder: The store's; the log is `log/<time>-<host>-<process>.jsonl` in it.
    """

    def __init__(self, folder: Path) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S")
        self.path = folder / "log" / f"{stamp}-{socket.gethostname()}-{os.getpid()}.jsonl"
        self._logged = time.monotonic()

    def add(self, event: str, **values: Any) -> None:
        """Add a line."""
        line = json.dumps({"event": event, "unix_seconds": round(time.time(), 3), **values}, ensure_ascii=False)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

    def add_progress(self, progress: ExtractProgress) -> None:
        """Add how far the run is, unless a line of the last ten seconds says it."""
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            self.add("progress", **asdict(progress), eta_seconds=progress.eta_seconds)

    def add_end(self, progress: ExtractProgress, status: str, sentence: str) -> None:
        """Add how the run ended."""
        self.add("end", status=status, sentence=sentence, **asdict(progress))
