"""`svb serve`: an index -> a page and an HTTP API, kept warm until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from svb.data.publish import ASIDE_PREFIX
from svb.interrupts import deferred_interrupts
from svb.retrieve.search import Searcher
from svb.retrieve.server.access import Access, choose_token, is_loopback
from svb.retrieve.server.app import make_app
from svb.retrieve.server.kept_files import CacheFolder
from svb.retrieve.server.listening import listening, make_server
from svb.retrieve.server.options import ServeOptions
from svb.retrieve.server.state import ServerState

logger = logging.getLogger(__name__)

# In the index's cache: tells `svb search` on this machine where the server of the index answers.
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
                lambda previous: Searcher(index, options.device, previous=previous),
                options,
            )
            access = Access(token, is_loopback=is_loopback(options.host), port=port, public_url=options.public)
            server = make_server(make_app(state, access))
            for line in _greeting(url, index, token, is_new=is_new, options=options):
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

    Only this user can read the file, for it holds the token. It names its own folder: the server does not know a
    copy of its index. It replaces what a killed server left, and leaves alone what a later server has written.
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


def _greeting(url: str, index: Path, token: str | None, *, is_new: bool, options: ServeOptions) -> Iterator[str]:
    yield f"serving {index} at {url} - press Ctrl-C to stop"
    if is_new:
        yield f"token, shown only this once: {token}"
    if options.public is not None:
        yield f"through your proxy: {options.public}"
    if options.host.strip("[]") in {"0.0.0.0", "::"}:
        yield f"from other machines: http://{socket.gethostname()}:{url.rpartition(':')[2]}"
    if not is_loopback(options.host):
        yield "the connection is not encrypted: put an https proxy in front of it, or use an ssh tunnel"


def _address(host: str) -> str:
    """Return the address that a client on this machine types for an address to listen at."""
    named = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host.strip("[]"), host)
    return f"[{named}]" if ":" in named and not named.startswith("[") else named
