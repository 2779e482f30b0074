"""Work that is done again whenever what it depends on has changed, until the process is told to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from svb.errors import InputError, Interrupted, StoreError
from svb.interrupts import deferred_interrupts

logger = logging.getLogger(__name__)

# After a failure that may pass, such as a full disk, work is tried again though nothing has changed.
RETRY_SECONDS = 60.0
# How long a signal waits to be seen.
SLICE_SECONDS = 0.2


def watch(
    work: Callable[[], None],
    watched: Callable[[], object],
    seconds: float,
) -> None:
    """Do work, and do it again after every change, until SIGINT or SIGTERM.

    What fails the first time has failed. Later a damaged or missing file, a full disk or another writer is told of,
    and the work is tried again with the next change or after a minute; what the user must decide upon, such as
    another model than before, ends it.

    Args:
        work: What to do.
        watched: Returns something that is another after a change.
        seconds: How long to wait between two looks.

    Raises:
        Interrupted: It was told to stop, which is how it ends; nothing is left half-done.
    """
    seen = watched()
    work()
    retry_at: float | None = None
    with deferred_interrupts() as interrupted:
        logger.info(f"watching: looking for changes every {seconds:g} s")
        while _wait(seconds, interrupted):
            try:
                now = watched()
                if now == seen and (retry_at is None or time.monotonic() < retry_at):
                    continue
                seen, retry_at = now, None
                work()
            except (StoreError, InputError, OSError) as error:
                if retry_at is not None and time.monotonic() < retry_at:
                    continue  # said already
                retry_at = time.monotonic() + RETRY_SECONDS
                logger.info(f"{error} - trying again when something changes, or in {RETRY_SECONDS:g} s")
        raise Interrupted(interrupted(), "told to stop watching; run the same command again to go on")


def _wait(seconds: float, interrupted: Callable[[], int]) -> bool:
    """Wait, and return whether to go on: False as soon as a signal has come."""
    until = time.monotonic() + seconds
    while not interrupted() and time.monotonic() < until:
        time.sleep(min(SLICE_SECONDS, max(until - time.monotonic(), 0)))
    return not interrupted()
