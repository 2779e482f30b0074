"""What `svb index` is asked for, checked before anything is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svb.config import fingerprint
from svb.errors import UsageError
from svb.retrieve.indexing.index_source import state_of
from svb.retrieve.stored.segment import MomentWindows

DEFAULT_MOMENT_SECONDS = 4.0
# A frame is hardly shown shorter; a stride of next to nothing would make moments without end.
MIN_STRIDE_SECONDS = 0.01
TEXT_PRECISIONS = ("auto", "float32", "int8")
DEFAULT_LATENCY_BUDGET_SECONDS = 0.1
# Where vectors are searched that no server has.
LOCAL = "local"


@dataclass(frozen=True)
class PartOptions:
    """What the parts are made from; None is as the index was made before, or the default for a new one.

    Attributes:
        pools: Files of captions, a pool each; none where it is empty.
        sidecars: Whether subtitles and notes beside the videos are a pool.
        metadata: A table with a row a video; False for none.
        text_precision: Of the text tower: `float32`, `int8`, or `auto`, int8 where it ranks val about as well.
        latency_budget_seconds: What the scan for one query may take before an approximate index is made.
        to: `milvus://...`, a server that is to hold the vectors too and to search them, or `local`.
    """

    pools: tuple[Path, ...] | None = None
    sidecars: bool | None = None
    metadata: Path | Literal[False] | None = None
    text_precision: str | None = None
    latency_budget_seconds: float | None = None
    to: str | None = None

    def __post_init__(self) -> None:
        if self.text_precision not in (None, *TEXT_PRECISIONS):
            raise UsageError(f"text_precision is {self.text_precision!r} - expected {', '.join(TEXT_PRECISIONS)}")
        if self.latency_budget_seconds is not None:
            require_positive("latency_budget_seconds", self.latency_budget_seconds)
        if self.to not in (None, LOCAL):
            from svb.retrieve.milvus.milvus_server import Target

            Target.parse(self.to)

    def inputs(self, identity: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
        """Return what all parts are made from, as the manifest remembers it under `inputs`.

        Args:
            identity: Of the source, see `svb.retrieve.indexing.index_source`.
            held: What the manifest remembers from before; empty for a new index.
        """
        pools = [Path(state[0]) for state in held.get("pools", [])] if self.pools is None else self.pools
        metadata = [Path(state[0]) for state in held.get("metadata", [])]
        if self.metadata is not None:
            metadata = [self.metadata] if self.metadata else []
        defaults = {
            "sidecars": True,
            "text_precision": "auto",
            "latency_budget_seconds": DEFAULT_LATENCY_BUDGET_SECONDS,
            "to": LOCAL,
        }
        chosen = {name: getattr(self, name) for name in defaults}
        return {
            "source": fingerprint(identity),
            "pools": [state_of(path) for path in pools],
            "metadata": [state_of(path) for path in metadata],
            **{name: held.get(name, defaults[name]) if value is None else value for name, value in chosen.items()},
        }


@dataclass(frozen=True)
class IndexOptions:
    """What becomes of an index; what is None is as the index was made before.

    Attributes:
        out: The index's folder.
        moment_seconds: Length of a moment; 4 for a new index.
        moment_stride_seconds: From one moment to the next; half a moment for a new index.
        parts: What is made beside embeddings.
        prune: Take videos out that the store does not have any more.
        rebuild: Make all of it again.
    """

    out: Path
    moment_seconds: float | None
    moment_stride_seconds: float | None
    parts: PartOptions
    prune: bool
    rebuild: bool

    def __post_init__(self) -> None:
        if self.moment_seconds is not None:
            require_positive("moment_seconds", self.moment_seconds)
            self.windows(None)
        elif self.moment_stride_seconds is not None:
            longest = max(DEFAULT_MOMENT_SECONDS, self.moment_stride_seconds)  # an index may have longer moments
            self.windows({"seconds": longest})

    def windows(self, held: Mapping[str, float] | None) -> MomentWindows:
        """Return what a moment is: as asked for, else as the index has it.

        Args:
            held: The manifest's `moments`; None for a new index.

        Raises:
            UsageError: Moments would leave frames out, or be without end.
        """
        seconds, stride_seconds = self.moment_seconds, self.moment_stride_seconds
        if held is not None and seconds is None:
            seconds = held["seconds"]
            stride_seconds = held["stride_seconds"] if stride_seconds is None else stride_seconds
        seconds = DEFAULT_MOMENT_SECONDS if seconds is None else seconds
        stride_seconds = seconds / 2 if stride_seconds is None else stride_seconds
        if not MIN_STRIDE_SECONDS <= stride_seconds <= seconds:
            raise UsageError(
                f"moment_stride_seconds is {stride_seconds} - expected {MIN_STRIDE_SECONDS} to a moment's "
                f"{seconds:g} s: more would leave frames in no moment"
            )
        return MomentWindows(float(seconds), float(stride_seconds))


def require_positive(name: str, number: float) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        UsageError: It is none.
    """
    if not (math.isfinite(number) and number > 0):
        raise UsageError(f"{name} is {number} - expected a number above 0")
