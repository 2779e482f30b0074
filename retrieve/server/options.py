"""The options of `svb serve` and `svb mcp`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from svb.config import option
from svb.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_PUBLIC_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(:(?P<port>\d{1,5}))?(?P<path>(/[\w.~-]+)*/?)",
    re.ASCII | re.IGNORECASE,
)


def num_bytes(text: str) -> int:
    """Return the number of bytes that a text such as 200MB stands for.

    Raises:
        UsageError: The text is not a size.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if match is None:
        raise UsageError(f"--max-upload is {text!r} - expected a size such as 200MB")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class PublicUrl:
    """The address at which a proxy shows the server to others.

    Attributes:
        origin: Scheme, host and port, as browsers send them in `Origin`.
        path: The path below which the server is shown: empty, or like `/svb`.
    """

    origin: str
    path: str

    @property
    def host(self) -> str:
        """The host without its port."""
        return re.sub(r":\d+$", "", self.origin.partition("://")[2])

    def __str__(self) -> str:
        return f"{self.origin}{self.path}/"

    @classmethod
    def of(cls, text: str) -> PublicUrl:
        """Read an address.

        Raises:
            UsageError: The text is not the address of a server.
        """
        match = _PUBLIC_URL.fullmatch(text.strip())
        if match is None or "/." in match["path"]:
            raise UsageError(f"public_url is {text!r} - expected an address such as https://videos.example.org/svb")
        scheme, host, port = match["scheme"].lower(), match["host"].lower(), match["port"]
        is_usual = port is None or int(port) == {"http": 80, "https": 443}[scheme]
        return cls(f"{scheme}://{host}{'' if is_usual else f':{int(port)}'}", match["path"].rstrip("/"))


@dataclass(frozen=True)
class ServeOptions:
    """How an index is served.

    Attributes:
        host: Address to listen at; any but this machine's own needs a token.
        port: Port to listen at; 0 takes a free one.
        public_url: Address at which a proxy shows the server to others, e.g. https://videos.example.org/svb.
        token_file: File with the token that clients must show; else SVB_TOKEN, else a new one for other machines.
        max_upload_bytes: Largest file accepted for upload.
        max_upload_seconds: Longest video accepted for upload, in seconds.
        max_searches: Most searches that may run or wait at once.
        device: Device that embeds uploaded images and videos.
        uploads_at_once: Most uploads that may be received or embedded at once.
        threads: Number of searches that run at once.
        picture_cache_bytes: Most disk space for posters and strips.
        preview_cache_bytes: Most disk space for previews.
        picture_seconds: Time limit for making a poster or a strip.
        upload_seconds: Time limit for embedding an upload; the first one also loads the model.
        preview_seconds: Time limit for making a preview.

    Raises:
        UsageError: A number is out of its range, or the public address is not an address.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    public_url: str | None = option(None, metavar="URL")
    token_file: Path | None = None
    max_upload_bytes: int = option(200_000_000, flag="--max-upload", metavar="SIZE", read=num_bytes, text="200MB")
    max_upload_seconds: float = 3600.0
    max_searches: int = 512
    device: str = "auto"
    uploads_at_once: int = option(4, hidden=True)
    threads: int = field(default_factory=lambda: max(2, min(os.cpu_count() or 2, 16)), metadata={"hidden": True})
    picture_cache_bytes: int = option(500_000_000, hidden=True)
    preview_cache_bytes: int = option(5_000_000_000, hidden=True)
    picture_seconds: float = option(30.0, hidden=True)
    upload_seconds: float = option(300.0, hidden=True)
    preview_seconds: float = option(1800.0, hidden=True)

    @property
    def public(self) -> PublicUrl | None:
        """Return the public address, if there is one."""
        return None if self.public_url is None else PublicUrl.of(self.public_url)

    def __post_init__(self) -> None:
        _ = self.public
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port is {self.port} - expected 0 to 65535")
        for name in ("max_upload_bytes", "uploads_at_once", "max_searches", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)} - expected at least 1")
        if not self.max_upload_seconds > 0:  # also refuses NaN, which would limit nothing
            raise UsageError(f"max_upload_seconds is {self.max_upload_seconds:g} - expected more than 0")


@dataclass(frozen=True)
class McpOptions:
    """How an index is opened to agents.

    Attributes:
        clips: Folder to cut clips into; without it, no agent can cut any.
        queries: Folder with images and videos that an agent may search with, by name.
        http: Serve over HTTP instead of standard input and output.
        host: Address to listen at; any but this machine's own needs a token.
        port: Port to listen at; 0 takes a free one.
        public_url: Address at which a proxy shows the server to others, e.g. https://videos.example.org/svb.
        token_file: File with the token that clients must show; else SVB_TOKEN, else a new one for other machines.
        device: Device that embeds images and videos.

    Raises:
        UsageError: A number is out of its range, or the public address is not an address.
    """

    clips: Path | None = None
    queries: Path | None = None
    http: bool = False
    host: str = "127.0.0.1"
    port: int = 8766
    public_url: str | None = option(None, metavar="URL")
    token_file: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        _ = self.serve

    @property
    def serve(self) -> ServeOptions:
        """Return the options that `svb serve` has too."""
        shared = {name: getattr(self, name) for name in ("host", "port", "public_url", "token_file", "device")}
        return ServeOptions(**shared)
