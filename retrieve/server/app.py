"""The application: the routes, and the guard that every request passes first."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Mapping

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svb import __version__
from svb.errors import SvbError
from svb.retrieve.page.page import page_with_nonce
from svb.retrieve.server.access import Access, login_page, login_routes, no_token_response
from svb.retrieve.server.http import (
    SECURITY_HEADERS,
    content_security_policy,
    error_response,
    json_response,
    response_to,
)
from svb.retrieve.server.media_routes import media_routes
from svb.retrieve.server.search_routes import search_routes, timeline_routes
from svb.retrieve.server.state import ServerState

logger = logging.getLogger(__name__)

# Paths that need no token: the login form, and the health check.
OPEN_PATHS = ("/login", "/healthz")
# The status that nginx counts for a client that hung up before its answer.
HUNG_UP = 499
INTERNAL_ERROR = "internal error; see the server's log"


def make_app(state: ServerState, access: Access) -> ASGIApp:
    """Return the application."""
    # FastAPI's own pages of documentation load scripts from other hosts, and its redirects name a proxy's Host.
    shown_at = [{"url": str(access.public_url).rstrip("/")}] if access.public_url else None
    app = FastAPI(
        title="svb",
        version=__version__,
        servers=shown_at,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    counts = RequestCounts()
    app.include_router(search_routes(state))
    app.include_router(media_routes(state))
    app.include_router(timeline_routes(state))
    app.include_router(login_routes(access))
    app.include_router(health_routes(state, counts))
    _add_page(app)
    _add_errors(app)
    return Guard(app, access, counts)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        headers = {"content-security-policy": content_security_policy(nonce)}
        return HTMLResponse(page_with_nonce(nonce), headers=headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(SvbError)
    async def answer_svb_error(request: Request, error: SvbError) -> Response:
        return response_to(error)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def count_hang_up(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=HUNG_UP)  # nobody reads it, but it is counted

    @app.exception_handler(Exception)
    async def answer_internal_error(request: Request, error: Exception) -> Response:
        return error_response(500, INTERNAL_ERROR)  # the guard logs it

    @app.exception_handler(RequestValidationError)
    async def answer_wrong_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return error_response(400, f"{first['loc'][-1]}: {first['msg']}")


class Guard:
    """Wraps the application: refuses clients, adds protective headers, counts requests and logs internal errors.

    Args:
        app: The application.
        access: Decides who may ask.
        counts: Counts the requests.
    """

    def __init__(self, app: ASGIApp, access: Access, counts: RequestCounts) -> None:
        self._app, self._access, self._counts = app, access, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status, scope = time.perf_counter(), 0, {**scope, "path": self._access.known_path(scope["path"])}

        async def send_protected(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            await self._answer(scope, receive, send_protected)
        except (ClientDisconnect, ConnectionError):
            status = status or HUNG_UP
        except asyncio.CancelledError:  # the server is told to stop, and has waited long enough
            if not status:
                await error_response(503, "the server is shutting down")(scope, receive, send_protected)
        except Exception:
            logger.exception("%s %s failed", scope["method"], _route(scope))
            if not status:
                await error_response(500, INTERNAL_ERROR)(scope, receive, send_protected)
        finally:
            self._counts.observe(_method(scope), _route(scope), status or HUNG_UP, time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, public = Request(scope), self._access.public_url
        problem = self._access.problem_with(scope["method"], request.headers)
        if problem is not None:
            return await error_response(403, problem)(scope, receive, send)
        if public is not None and public.path and scope["path"] == public.path:
            query = request.url.query
            return await RedirectResponse(f"{public}{query and '?'}{query}", 308)(scope, receive, send)
        known = self._access.is_known(request.headers, request.cookies)
        scope.setdefault("state", {})["is_known"] = known
        if known or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        if scope["path"] == "/" and scope["method"] == "GET":
            return await login_page(401, request.url.query)(scope, receive, send)
        return await no_token_response()(scope, receive, send)


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "other"))


def _method(scope: Scope) -> str:
    # A client may invent any number of methods.
    return scope["method"] if scope["method"] in {"GET", "HEAD", "POST"} else "other"


# --- health


# A search falls into one of the first buckets, a preview into one of the last.
BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class RequestCounts:
    """Counts requests by route and status, and measures their time; for one event loop."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS_SECONDS) + 1))
        self._seconds: dict[str, float] = defaultdict(float)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; `route` is one of the server's few, never a client's path."""
        self._requests[method, route, status] += 1
        self._seconds[route] += seconds
        bucket = sum(seconds > limit for limit in BUCKETS_SECONDS)
        self._buckets[route][bucket] += 1

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all counts as Prometheus text; `gauges` maps a name to its help and its present value."""
        lines = ["# HELP svb_requests_total Requests answered.", "# TYPE svb_requests_total counter"]
        lines += [
            f'svb_requests_total{{method="{method}",route="{route}",status="{status}"}} {count}'
            for (method, route, status), count in sorted(self._requests.items())
        ]
        lines += [
            "# HELP svb_request_seconds Time from a request's head to the end of its answer.",
            "# TYPE svb_request_seconds histogram",
        ]
        for route, buckets in sorted(self._buckets.items()):
            lines += self._histogram(route, buckets)
        for name, (meaning, value) in gauges.items():
            lines += [f"# HELP svb_{name} {meaning}", f"# TYPE svb_{name} gauge", f"svb_{name} {value:.10g}"]
        return "\n".join(lines) + "\n"

    def _histogram(self, route: str, buckets: list[int]) -> list[str]:
        limits = [*(f"{limit:g}" for limit in BUCKETS_SECONDS), "+Inf"]
        total, lines = 0, []
        for limit, count in zip(limits, buckets, strict=True):
            total += count
            lines.append(f'svb_request_seconds_bucket{{route="{route}",le="{limit}"}} {total}')
        lines.append(f'svb_request_seconds_sum{{route="{route}"}} {self._seconds[route]:.6f}')
        return [*lines, f'svb_request_seconds_count{{route="{route}"}} {total}']


def health_routes(state: ServerState, counts: RequestCounts) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz", summary="Whether the server is alive and serves the newest index")
    async def health(request: Request) -> Response:
        """The status is `degraded` while the index on disk is damaged and the last whole generation is served."""
        searcher = await state.snapshots.newest()
        problem = state.snapshots.problem
        told: dict[str, object] = {"status": "degraded" if problem else "ok"}
        if request.state.is_known:
            told |= {"generation": searcher.generation, "problem": problem, "version": __version__}
        return json_response(told)

    @router.get("/metrics", response_class=PlainTextResponse, summary="Counts for Prometheus")
    async def metrics() -> Response:
        snapshots = state.snapshots
        manifest = snapshots.current.manifest
        gauges = {
            "searches_in_flight": ("Searches that run or wait.", float(state.searches.in_flight)),
            "index_generation": ("Generation of the served index.", float(snapshots.current.generation)),
            "index_videos": ("Videos in the index.", float(manifest["videos"])),
            "index_moments": ("Moments in the index.", float(manifest["moments_total"])),
            "index_degraded": (
                "1 while the index on disk cannot be served.",
                float(snapshots.problem is not None),
            ),
        }
        return PlainTextResponse(counts.render(gauges), media_type="text/plain; version=0.0.4")

    return router
