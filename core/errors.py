"""Every error that svb raises on purpose.

A message says what happened (with the value), what was expected, and what to do next. The command
line prints it as one line and exits with `exit_code`; a library user catches `SvbError`.
"""

from __future__ import annotations

import signal


class SvbError(Exception):
    """The root of svb's errors."""

    exit_code = 1


class InputError(SvbError):
    """A file, table or value that the user gave cannot be used."""


class UsageError(SvbError):
    """An option, or a combination of options, makes no sense."""

    exit_code = 2


class DeviceError(SvbError):
    """A device exists but fails, or has too little memory."""


class StoreError(SvbError):
    """A feature store, captions file, run or index is damaged or cannot be read."""


class MismatchError(SvbError):
    """Two things that must have been made with the same settings were not; names the fields that differ."""


class Interrupted(SvbError):  # noqa: N818 - it is not an error
    """The work was told to stop, and what was finished has been saved.

    Attributes:
        exit_code: 130 after SIGINT; 75, which asks schedulers to try again, after SIGTERM.
    """

    exit_code = 130

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 75 if signal_number == signal.SIGTERM else 130


class ModelUnavailableError(SvbError):
    """The weights of a backbone or text encoder are not available here."""


def first_line(error: object) -> str:
    """Return the first line of what an error or warning says, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
