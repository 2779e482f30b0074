"""What every request passes: who may ask, the headers that protect the page, counting, and errors of our own."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svb.retrieve.server.access import Access
from svb.retrieve.server.http import error_response
from svb.retrieve.server.login import login_page
from svb.retrieve.server.metrics import Metrics
from svb.retrieve.server.policy import HEADERS

_log = logging.getLogger("svb.server")

# What may be had without a token: the way in, and whether the server lives.
OPEN_PATHS = ("/login", "/healthz")
# As nginx counts a client that hung up before its answer.
HUNG_UP = 499


class Gate:
    """Wraps the application.

    Args:
        app: The application.
        access: Who may ask.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 0

        async def send_protected(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            await self._answer(scope, receive, send_protected)
        except (ClientDisconnect, ConnectionError):
            status = status or HUNG_UP
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not status:
                await error_response(503, "the server ends")(scope, receive, send_protected)
        except Exception:
            _log.exception("%s %s failed", scope["method"], _route(scope))
            if not status:
                await error_response(500, "the server made a mistake - its log tells")(
                    scope, receive, send_protected
                )
        finally:
            self._metrics.observe(_method(scope), _route(scope), status or HUNG_UP, time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        refused = self._access.refuses(scope["method"], request.headers)
        if refused is not None:
            return await error_response(403, refused)(scope, receive, send)
        known = self._access.is_known(request.headers, request.cookies)
        scope.setdefault("state", {})["is_known"] = known
        if known or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        if scope["path"] == "/" and scope["method"] == "GET":
            return await login_page(401, request.url.query)(scope, receive, send)
        headers = {"WWW-Authenticate": "Bearer"}
        return await error_response(401, "this server asks for its token - send it as Bearer", headers)(
            scope, receive, send
        )


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "other"))


def _method(scope: Scope) -> str:
    # A client may make methods up without end.
    return scope["method"] if scope["method"] in {"GET", "HEAD", "POST"} else "other"
