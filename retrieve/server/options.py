"""What `svb serve` can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from svb.errors import UsageError


@dataclass(frozen=True)
class ServeOptions:
    """How an index is served.

    Attributes:
        host: The address to listen at.
        port: Its port; 0 for a free one.
        token_file: A file with the token that clients must show.
        device: Where images and videos are embedded.
        max_upload_bytes: Of an image or a video to search with.
        max_upload_seconds: Of such a video, or of the span of it that counts.
        uploads_at_once: How many may be on their way or looked at; they are embedded one after the other.
        max_searches: How many may run or wait at once.
        threads: How many searches run at once.
        picture_cache_bytes: How much the posters and strips may take on disk.
        preview_cache_bytes: How much the previews may take.
        picture_seconds: Time limit of a poster or a strip.
        upload_seconds: Time limit of an upload's embedding; the first one loads the model as well.
        preview_seconds: Time limit of a preview.

    Raises:
        UsageError: A number is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token_file: Path | None = None
    device: str = "auto"
    max_upload_bytes: int = 200_000_000
    max_upload_seconds: float = 3600.0
    uploads_at_once: int = 4
    max_searches: int = 512
    threads: int = field(default_factory=lambda: max(2, min(os.cpu_count() or 2, 16)))
    picture_cache_bytes: int = 500_000_000
    preview_cache_bytes: int = 5_000_000_000
    picture_seconds: float = 30.0
    upload_seconds: float = 300.0
    preview_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port is {self.port} - expected 0 to 65535")
        for name in ("max_upload_bytes", "uploads_at_once", "max_searches", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)} - expected at least 1")
        if not self.max_upload_seconds > 0:  # True of NaN as well, which would limit nothing
            raise UsageError(f"max_upload_seconds is {self.max_upload_seconds:g} - expected more than 0")
