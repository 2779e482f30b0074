"""Whether the server is well, and what it counts for Prometheus; a few lines need no library."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from svb import __version__
from svb.retrieve.server.http import json_response
from svb.retrieve.server.state import ServerState

# Seconds; a search takes a few of the first, a preview one of the last.
BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class RequestCounts:
    """Counts requests by route and status, and the time they take; for one event loop."""

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
        """`degraded` while what is on disk is damaged, and the last whole generation is still served."""
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
