"""What commands have in common: where messages and progress go, and how tables look."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import click


def say(message: str) -> None:
    """Print a line to stderr that is not a result."""
    click.echo(message, err=True)


def print_json(value: Any) -> None:
    """Print a result for machines."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[Sequence[str]] | None = None
) -> None:
    """Print a table; columns that look like numbers are aligned right. Lines `below` each row are indented."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    is_number = [
        bool(rows) and all(row[column].replace(".", "").replace("-", "").isdigit() for row in rows)
        for column in range(len(header))
    ]
    for number, row in enumerate(table):
        cells = zip(row, widths, is_number, strict=True)
        click.echo("  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in cells).rstrip())
        for line in below[number - 1] if below and number else ():
            click.echo(f"{' ' * (widths[0] + 2)}{line}")


class Meter:
    """A progress bar on stderr: redrawn in a terminal, a new line every ten seconds elsewhere.

    Args:
        unit: What is counted in `done` and `total`.
    """

    def __init__(self, unit: str) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its thread would only redraw a bar that does not move
        tqdm.set_lock(threading.RLock())  # its own would also be a semaphore between processes
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._began = time.monotonic()
        interval = 0.2 if is_terminal else 10.0
        self._bar = tqdm(
            total=0,
            unit=f" {unit}",
            file=sys.stderr if is_terminal else _Lines(),
            dynamic_ncols=is_terminal,
            mininterval=interval,
            delay=interval,
            miniters=0,
            smoothing=0,
        )

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

        By default `eta_seconds` is computed from `done`.
        """
        bar = self._bar
        seconds = max(time.monotonic() - self._began, 1e-6)
        rates = [f"{count / seconds:.1f} {unit}/s" for unit, count in (more or {}).items()]
        left = "{remaining}" if eta_seconds is None else bar.format_interval(eta_seconds)
        bar.bar_format = "{l_bar}{bar:20}| {n_fmt}/{total_fmt}{unit} [{elapsed}<" + left + ", {rate_fmt}{postfix}]"
        bar.set_postfix_str(", ".join([*rates, *notes]), refresh=False)
        bar.total = total
        bar.update(done - bar.n)

    def close(self) -> None:
        """Show the last state, and end the line."""
        self._bar.close()


class _Lines:
    """A file that prints every new state of a bar as a line of its own on stderr."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._last = line
            say(line)

    def flush(self) -> None:
        """Do nothing: no text is held back."""
