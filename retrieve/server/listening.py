"""The socket that the server listens on, and HTTP whose clients cannot keep a connection open with half a head."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from svb.errors import InputError
from svb.retrieve.server import http

# How long answers under way may take when the server is told to stop; a film that is playing would take hours.
LAST_SECONDS = 3
BACKLOG = 2048


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket: whoever connects from now on is answered when the index is open.

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

    It is the one on h11: the one on httptools, uvicorn's choice where that is installed, reads a header of any
    length.
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
