"""Hearing what the library says through `logging`."""

from __future__ import annotations

import logging
from collections.abc import Callable

_heard: list[logging.Handler] = []


class _Hearer(logging.Handler):
    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(self.format(record))


def heard(tell: Callable[[str], object] | None = None) -> list[str]:
    """Return a list that gets every message from here to the end of the test, or have `tell` called with each."""
    messages: list[str] = []
    handler = _Hearer(tell or messages.append)
    logger = logging.getLogger("svb")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    _heard.append(handler)
    return messages


def stop_hearing() -> None:
    """End all hearing."""
    logger = logging.getLogger("svb")
    for handler in _heard:
        logger.removeHandler(handler)
    _heard.clear()
