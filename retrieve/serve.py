"""`svb serve`: an index -> a page and an HTTP API, until the process is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from svb.data.publish import ASIDE_PREFIX
from svb.errors import InputError
from svb.interrupts import deferred_interrupts
from svb.retrieve.search import open_searcher
from svb.retrieve.server import http
from svb.retrieve.server.access import Access, choose_token, is_loopback
from svb.retrieve.server.app import make_app
from svb.retrieve.server.kept_files import CacheFolder
from svb.retrieve.server.options import ServeOptions
from svb.retrieve.server.state import ServerState

logger = logging.getLogger(__name__)

# This file in the index's cache tells `svb search` on this machine where the server of the index answers.
ANNOUNCEMENT = "server.json"


def serve(index: Path | str, options: ServeOptions | None = None) -> Path:
    """Serve an index until SIGINT or SIGTERM.

    Returns:
        The index's folder, when the server was told to stop.

    Raises:
        InputError: There is no index, the port is in use, the address is not one of this machine, or the token is
            not valid.
        StoreError: The index is damaged or has a newer format.
    """
    index, options = Path(index), options or ServeOptions()
    token, is_new = choose_token(options.host, options.token_file, options.public)
    with listening(options.host, options.port) as listener, deferred_interrupts() as interrupted:
        port = listener.getsockname()[1]
        url = f"http://{_address(options.host)}:{port}"
        cache = CacheFolder(index)
        try:
            state = ServerState(
                index,
                cache.path,
                lambda previous: open_searcher(index, options.device, previous=previous),
                options,
            )
            access = Access(token, is_loopback=is_loopback(options.host), port=port, public_url=options.public)
            server = make_server(make_app(state, access))
            for line in greeting(port, index, token, is_new=is_new, options=options):
                logger.info(line)
            with announced(cache.path, url, token):
                if not interrupted():
                    asyncio.run(_run(server, listener, state))
        finally:
            cache.close()
    return index


async def _run(server: uvicorn.Server, listener: socket.socket, state: ServerState) -> None:
    try:
        # uvicorn raises the signal that ended it again: `deferred_interrupts` takes it.
        await server.serve(sockets=[listener])
    finally:
        await state.close()


@contextlib.contextmanager
def announced(cache: Path, url: str, token: str | None) -> Iterator[None]:
    """Announce in the cache, while the `with` lasts, that a server of the index answers at a URL.

    Only this user can read the file, because it holds the token. It names its own folder, so that this server is
    not asked about a copy of its index. It replaces the file of a killed server, but never that of a later server.
    """
    path = cache / ANNOUNCEMENT
    announcement = {"url": url, "pid": os.getpid(), "token": token, "folder": str(cache.resolve())}
    # mkstemp's files can be read by this user alone from the start.
    descriptor, aside = tempfile.mkstemp(prefix=ASIDE_PREFIX, dir=cache)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(announcement, file)
    Path(aside).replace(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text("utf-8"))["pid"] == os.getpid():
                path.unlink()


def greeting(
    port: int, index: Path, token: str | None, *, is_new: bool, options: ServeOptions, path: str = ""
) -> Iterator[str]:
    """Yield the lines that a server shows when it starts.

    Args:
        port: The port that it listens at.
        index: The index's folder.
        token: The token that clients must show, if any.
        is_new: Whether the token was made just now.
        options: How the index is served.
        path: The path of the first request.
    """
    yield f"serving {index} at http://{_address(options.host)}:{port}{path} - press Ctrl-C to stop"
    if is_new:
        yield f"token, shown only this once: {token}"
    if options.public is not None:
        yield f"through your proxy: {options.public}{path.lstrip('/')}"
    if options.host.strip("[]") in {"0.0.0.0", "::"}:
        yield f"from other machines: http://{socket.gethostname()}:{port}{path}"
    if not is_loopback(options.host):
        yield "the connection is not encrypted: put an https proxy in front of it, or use an ssh tunnel"


def _address(host: str) -> str:
    """Return the address that a client on this machine types for an address to listen at."""
    named = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host.strip("[]"), host)
    return f"[{named}]" if ":" in named and not named.startswith("[") else named


# --- the socket, and HTTP whose clients cannot keep a connection open with half a head


# How long running answers may take when the server is told to stop; a film that is playing would take hours.
LAST_SECONDS = 3
BACKLOG = 2048


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket: clients that connect from now on are answered once the index is open.

    Raises:
        InputError: The port is in use, or the address is not one of this machine.
    """
    bare = host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only on sockets that name TCP: otherwise every answer takes 40 ms more.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise InputError(f"cannot listen at {host} ({error}) - expected an address of this machine") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"port {port} of {host} is in use - end what uses it (another `svb serve`?), or take another "
                    f"with --port {port + 1}"
                ) from error
            raise InputError(f"cannot listen at {host}:{port} ({error.strerror}) - try another --port") from error
        yield listener


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Return uvicorn around an application, silent about its own start."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        http=TimedProtocol,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return uvicorn.Server(config)


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, with a time limit for a request's head; uvicorn limits only the time between requests.

    It is based on h11, because the protocol on httptools, uvicorn's choice if that is installed, reads headers of
    any length.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take the data; a head that has begun must end in time."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_deadline()
        elif self._deadline is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(http.RECEIVE_SECONDS, self.transport.close)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
