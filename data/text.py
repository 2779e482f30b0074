"""Text as HDF5 can store it."""

from __future__ import annotations


def storable_text(text: str) -> str:
    """Return text as a store holds it.

    A file name may hold bytes that are not UTF-8 (Python keeps them as surrogates) or a NUL, which would end
    an HDF5 string; both are written as escapes so that the record can always be stored.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def is_storable(text: str) -> bool:
    """Tell whether HDF5 can hold a text: JSON can spell NUL and half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text))
