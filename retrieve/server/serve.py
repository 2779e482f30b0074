"""`svb serve`: an index -> a page and an HTTP API, kept warm until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from svb.errors import InputError
from svb.interrupts import deferred_interrupts
from svb.retrieve.searching.searcher import Searcher
from svb.retrieve.server.access import Access, choose_token, is_loopback
from svb.retrieve.server.announcement import announced
from svb.retrieve.server.app import make_app
from svb.retrieve.server.kept_files import CacheFolder
from svb.retrieve.server.options import ServeOptions
from svb.retrieve.server.service import Service
from svb.retrieve.server.timed_protocol import TimedProtocol

logger = logging.getLogger(__name__)

# How long answers under way may take when the server is told to stop; a film that is played would take hours.
LAST_SECONDS = 3
BACKLOG = 2048


def serve(
    index: Path | str,
    options: ServeOptions | None = None,
) -> Path:
    """Serve an index until SIGINT or SIGTERM.

    Args:
        index: The index's folder.
        options: See `ServeOptions`.

    Returns:
        The index's folder, when the server was told to stop.

    Raises:
        InputError: There is no index, the port is in use, the address is none of this machine, or the token is
            no good.
        StoreError: The index is damaged or of a newer format.
    """
    index, options = Path(index), options or ServeOptions()
    token, is_new = choose_token(options.host, options.token_file)
    with _listening(options.host, options.port) as listener, deferred_interrupts() as interrupted:
        port = listener.getsockname()[1]
        url = f"http://{_address(options.host)}:{port}"
        cache = CacheFolder(index)
        try:
            service = Service(
                index,
                cache.path,
                lambda previous: Searcher(index, options.device, previous=previous),
                options,
            )
            access = Access(token, is_loopback=is_loopback(options.host), port=port)
            server = uvicorn.Server(_config(make_app(service, access)))
            for line in _greeting(url, index, token, is_new=is_new, options=options):
                logger.info(line)
            with announced(cache.path, url, token):
                if not interrupted():
                    asyncio.run(_run(server, listener, service))
        finally:
            cache.close()
    return index


async def _run(server: uvicorn.Server, listener: socket.socket, service: Service) -> None:
    try:
        # uvicorn raises the signal that ended it again: `deferred_interrupts` takes it.
        await server.serve(sockets=[listener])
    finally:
        await service.close()


def _config(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # any ASGI application
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


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket: whoever connects from now on is answered when the index is open.

    Raises:
        InputError: The port is in use, or the address is none of this machine.
    """
    bare = host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns Nagle's waiting off for sockets that name TCP only: 40 ms of every answer.
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


def _greeting(url: str, index: Path, token: str | None, *, is_new: bool, options: ServeOptions) -> Iterator[str]:
    yield f"{index} is served at {url} - Ctrl-C ends it"
    if is_new:
        yield f"token, shown this once: {token}"
    if options.host.strip("[]") in {"0.0.0.0", "::"}:
        yield f"from other machines: http://{socket.gethostname()}:{url.rpartition(':')[2]}"
    if not is_loopback(options.host):
        yield "others on the network can read along: put a proxy with https before it, or use an ssh tunnel"


def _address(host: str) -> str:
    """Return what a client on this machine types for an address to listen at."""
    named = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host.strip("[]"), host)
    return f"[{named}]" if ":" in named and not named.startswith("[") else named
