"""What the server refuses though nothing is wrong with the question."""

from __future__ import annotations

from svb.errors import SvbError


class BusyError(SvbError):
    """More is asked at once than the server takes; the same later is fine."""


class TookTooLongError(SvbError):
    """A time limit was reached, and the work was ended."""
