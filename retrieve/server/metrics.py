"""What the server counts, as Prometheus reads it; a few lines need no library."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

# Seconds; a search takes a few of the first, a preview one of the last.
BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class Metrics:
    """Counts of requests, by route and status, and how long they took; for one event loop."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS_SECONDS) + 1))
        self._seconds: Counter[str] = Counter()

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; `route` is one of the server's few, never a client's path."""
        self._requests[method, route, status] += 1
        self._seconds[route] += seconds  # type: ignore[assignment]  # a Counter adds floats as well
        bucket = sum(seconds > limit for limit in BUCKETS_SECONDS)
        self._buckets[route][bucket] += 1

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all as Prometheus text; `gauges` are numbers of the moment: name to help and value."""
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
