"""Every error that svb raises on purpose.

A message says what happened (with the value), what was expected, and what to do next. The command
line prints it as one line and exits with `exit_code`; a library user catches `SvbError`.
"""

from __future__ import annotations


class SvbError(Exception):
    """The root of svb's errors."""

    exit_code = 1


class InputError(SvbError):
    """A file, table or value that the user gave cannot be used."""


class UsageError(SvbError):
    """An option or a combination of options that means nothing."""

    exit_code = 2


class StoreError(SvbError):
    """What is at rest (a feature store, captions file, run or index) is not whole, or not readable."""


class MismatchError(SvbError):
    """Two things that must have been made with the same settings were not; names the fields that differ."""


class ModelUnavailableError(SvbError):
    """A backbone's or text encoder's weights cannot be had here."""
