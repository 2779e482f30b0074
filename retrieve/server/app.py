"""The application: routes over a `Service`, behind the gate."""

from __future__ import annotations

import secrets

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from svb._version import __version__
from svb.errors import SvbError
from svb.retrieve.page.page import page_with_nonce
from svb.retrieve.server.access import Access
from svb.retrieve.server.gate import HUNG_UP, Gate
from svb.retrieve.server.http import error_response, json_response, response_to
from svb.retrieve.server.login import login_routes
from svb.retrieve.server.media_routes import media_routes
from svb.retrieve.server.policy import content_security_policy
from svb.retrieve.server.search_routes import search_routes
from svb.retrieve.server.service import Service


def make_app(service: Service, access: Access) -> ASGIApp:
    """Return the application."""
    # The pages of documentation that FastAPI offers load scripts from elsewhere.
    app = FastAPI(title="svb", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(search_routes(service))
    app.include_router(media_routes(service))
    app.include_router(login_routes(access))
    _add_page(app)
    _add_health(app, service)
    _add_errors(app)
    return Gate(app, access, service.metrics)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(page_with_nonce(nonce), headers={"content-security-policy": content_security_policy(nonce)})


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"], summary="Whether the server lives, and the newest index is served")
    async def health(request: Request) -> Response:
        """`degraded` where what is on disk is damaged, and the last whole generation is served on."""
        searcher = await service.snapshots.newest()
        problem = service.snapshots.problem
        held: dict[str, object] = {"status": "degraded" if problem else "ok"}
        if request.state.is_known:
            held |= {"generation": searcher.generation, "problem": problem, "version": __version__}
        return json_response(held)

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse, summary="For Prometheus")
    async def metrics() -> Response:
        snapshots = service.snapshots
        manifest = snapshots.current.manifest
        gauges = {
            "searches_in_flight": ("Searches that run or wait.", float(service.searches.in_flight)),
            "index_generation": ("Generation of the index that is served.", float(snapshots.current.generation)),
            "index_videos": ("Videos of the index.", float(manifest["videos"])),
            "index_moments": ("Moments of the index.", float(manifest["moments_total"])),
            "index_degraded": ("1 while what is on disk cannot be served.", float(snapshots.problem is not None)),
        }
        return PlainTextResponse(service.metrics.render(gauges), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(SvbError)
    async def refuse(request: Request, error: SvbError) -> Response:
        return response_to(error)

    @app.exception_handler(HTTPException)
    async def answer_error(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def give_up(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=HUNG_UP)  # nobody reads it: it is counted

    @app.exception_handler(Exception)
    async def own_up(request: Request, error: Exception) -> Response:
        return error_response(500, "the server made a mistake - its log tells")  # the gate logs it

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return error_response(400, f"{first['loc'][-1]}: {first['msg']}")
