"""What commands have in common: where messages and progress go, and how tables look."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import click


def say(message: str) -> None:
    """Print a line that is no result to stderr."""
    click.echo(message, err=True)


def print_json(value: Any) -> None:
    """Print a result for machines."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns that look like numbers are aligned right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    is_number = [
        bool(rows) and all(row[column].replace(".", "").replace("-", "").isdigit() for row in rows)
        for column in range(len(header))
    ]
    for row in table:
        cells = zip(row, widths, is_number, strict=True)
        click.echo("  ".join(c.rjust(width) if number else c.ljust(width) for c, width, number in cells).rstrip())


class Meter:
    """A progress line on stderr: redrawn in a terminal, a new line every ten seconds elsewhere.

    Args:
        unit: What is counted in `done` and `total`.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._is_terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._drawn = self._began if not self._is_terminal else 0.0
        self._width = 0
        self._finished = False

    def update(
        self,
        done: int,
        total: int,
        more: dict[str, int] | None = None,
        *,
        eta_seconds: float | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Show `done` of `total`, the rates of it and of `more` counts, the time it will take, and notes.

        `eta_seconds` is reckoned from `done` where it is not given.
        """
        now = time.monotonic()
        if self._finished:
            return
        self._finished = done == total
        if not self._finished and now - self._drawn < (0.2 if self._is_terminal else 10.0):
            return
        self._drawn = now
        seconds = max(now - self._began, 1e-6)
        if eta_seconds is None and done:
            eta_seconds = seconds / done * (total - done)
        filled = 20 * done // max(total, 1)
        rates = {self._unit: done, **(more or {})}
        parts = [
            f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{total} {self._unit}",
            *(f"{count / seconds:.1f} {unit}/s" for unit, count in rates.items()),
            f"ETA {'?' if eta_seconds is None else _clock(eta_seconds)}",
            *notes,
        ]
        line = "  ".join(parts)
        if self._is_terminal:
            click.echo(f"\r{line.ljust(self._width)}", err=True, nl=False)
            self._width = len(line)
        else:
            say(line)

    def close(self) -> None:
        """End the line."""
        if self._is_terminal and self._width:
            say("")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
