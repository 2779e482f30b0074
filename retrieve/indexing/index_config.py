"""All options of `svb index`, checked before anything is opened."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.config import fingerprint, option
from svb.errors import UsageError

if TYPE_CHECKING:  # the command's help imports no numpy
    from svb.retrieve.stored.segment import MomentWindows

DEFAULT_MOMENT_SECONDS = 4.0
# Frames are hardly shown for less; a tiny stride would make endless moments.
MIN_STRIDE_SECONDS = 0.01
# The value of `to` for vectors that no server holds.
LOCAL = "local"
# What a new index takes for options that were never given.
DEFAULTS: dict[str, Any] = {"sidecars": True, "speech": True, "latency_budget_seconds": 0.1, "to": LOCAL}


def _seconds(text: str) -> float:
    """Return the seconds of a time with its unit, such as 100ms or 0.1s."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(ms|s)", text.strip().lower())
    if found is None:
        raise UsageError(f"--latency-budget got {text!r} - expected a time with its unit, such as 100ms or 0.1s")
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1)
    if not seconds:
        raise UsageError(f"--latency-budget got {text!r} - expected more than zero")
    return seconds


@dataclass(frozen=True)
class IndexConfig:
    """Options of an index. None keeps an index's own setting; a new index takes the default.

    Attributes:
        store: Feature store of a run, where it has moved. [default: the run's own]
        captions: Caption features that answer an image or a video. [default: the run's own]
        backbone: Backbone whose features are indexed, if a store holds several.
        text_encoder: Text encoder that reads queries, for a feature store.
        checkpoint: Checkpoint of a run. [default: best]
        moment_seconds: Length of a moment in seconds. [default: as before, or 4]
        moment_stride_seconds: Seconds from one moment to the next. [default: as before, or half a moment]
        pools: Captions that answer an image or a video: a text file with one per line, subtitles, or a table with
            the column `caption`. Repeatable. [default: as before]
        no_pools: Remove the captions that --pool added before.
        sidecars: Answer images and videos with the .srt, .vtt and .txt files beside the videos.
            [default: as before, or yes]
        speech: Search what is said: subtitles beside and inside the videos, and transcripts.
            [default: as before, or yes]
        transcripts: Folder of transcripts that `svb transcribe` made. [default: as before]
        no_transcripts: Remove the transcripts that --transcripts added before.
        metadata: Table with `video_id` and columns to show and to filter by. [default: as before]
        no_metadata: Remove the columns that --metadata added before.
        latency_budget_seconds: Longest scan for one query, e.g. 100ms, before an approximate index is made.
            [default: as before, or 100ms]
        to: Milvus server that also holds and searches the vectors, as milvus://HOST:PORT/COLLECTION; `local` for
            none. [default: as before, or local]
        prune: Remove videos that are no longer in the store.
        rebuild: Make the whole index again and replace it at the end.
        watch: Keep running and update the index when the store or the sidecars change.
        watch_seconds: Seconds between two checks for changes, with --watch. [default: 10]
        device: Device that computes: auto, cpu, cuda:0, ...

    Raises:
        UsageError: A value is out of its range, or two options exclude each other.
    """

    store: Path | None = None
    captions: Path | None = None
    backbone: str | None = None
    text_encoder: str | None = None
    checkpoint: str | None = option(None, choices=("best", "last"))
    moment_seconds: float | None = None
    moment_stride_seconds: float | None = None
    pools: tuple[Path, ...] = option((), flag="--pool")
    no_pools: bool = False
    sidecars: bool | None = option(None, both=True)
    speech: bool | None = option(None, both=True)
    transcripts: Path | None = None
    no_transcripts: bool = False
    metadata: Path | None = None
    no_metadata: bool = False
    latency_budget_seconds: float | None = option(None, flag="--latency-budget", metavar="TIME", read=_seconds)
    to: str | None = option(None, metavar="URI")
    prune: bool = False
    rebuild: bool = False
    watch: bool = False
    watch_seconds: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.no_pools and self.pools:
            raise UsageError("got --pool and --no-pools - give one of them")
        if self.no_metadata and self.metadata:
            raise UsageError("got --metadata and --no-metadata - give one of them")
        if self.no_transcripts and self.transcripts:
            raise UsageError("got --transcripts and --no-transcripts - give one of them")
        if self.watch_seconds is not None and not self.watch:
            raise UsageError(f"got --watch-seconds {self.watch_seconds:g} without --watch - give both, or neither")
        for name in ("moment_seconds", "latency_budget_seconds", "watch_seconds"):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                raise UsageError(f"{name} is {number} - expected a number above 0")
        if self.moment_seconds is not None:
            self.windows(None)
        elif self.moment_stride_seconds is not None:
            longest = max(DEFAULT_MOMENT_SECONDS, self.moment_stride_seconds)  # an index may have longer moments
            self.windows({"seconds": longest})
        if self.to not in (None, LOCAL):
            from svb.retrieve.milvus.milvus_server import Target

            Target.parse(self.to)

    def windows(self, held: Mapping[str, float] | None) -> MomentWindows:
        """Return length and stride of moments: as asked for, else as the index has them.

        Args:
            held: The manifest's `moments`; None for a new index.

        Raises:
            UsageError: Moments would leave frames out, or be endless.
        """
        from svb.retrieve.stored.segment import MomentWindows

        seconds, stride_seconds = self.moment_seconds, self.moment_stride_seconds
        if held is not None and seconds is None:
            seconds = held["seconds"]
            stride_seconds = held["stride_seconds"] if stride_seconds is None else stride_seconds
        seconds = DEFAULT_MOMENT_SECONDS if seconds is None else seconds
        stride_seconds = seconds / 2 if stride_seconds is None else stride_seconds
        if not MIN_STRIDE_SECONDS <= stride_seconds <= seconds:
            raise UsageError(
                f"moment_stride_seconds is {stride_seconds} - expected {MIN_STRIDE_SECONDS} to a moment's "
                f"{seconds:g} s: a longer one would leave frames in no moment"
            )
        return MomentWindows(float(seconds), float(stride_seconds))

    def inputs(self, identity: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of all parts, as the manifest keeps them under `inputs`.

        Args:
            identity: The identity of the source, see `svb.retrieve.indexing.index_source`.
            held: The `inputs` of the manifest so far; empty for a new index.
        """
        pools, metadata = ([Path(state[0]) for state in held.get(name, [])] for name in ("pools", "metadata"))
        if self.pools or self.no_pools:
            pools = list(self.pools)
        if self.metadata or self.no_metadata:
            metadata = [self.metadata] if self.metadata else []
        transcripts = held.get("transcripts")
        if self.transcripts or self.no_transcripts:
            transcripts = str(self.transcripts.absolute()) if self.transcripts else None
        chosen = {name: getattr(self, name) for name in DEFAULTS}
        return {
            "source": fingerprint(identity),
            "pools": [state_of(path) for path in pools],
            "metadata": [state_of(path) for path in metadata],
            "transcripts": transcripts,
            **{name: held.get(name, DEFAULTS[name]) if value is None else value for name, value in chosen.items()},
        }


def state_of(path: Path) -> list[Any]:
    """Return a file's path, size and time, which tell that it has changed; only the path if it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
