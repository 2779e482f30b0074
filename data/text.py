"""Text as it can be stored."""

from __future__ import annotations


def storable_text(text: str) -> str:
    """Return text as a store holds it.

    A file name may hold bytes that are no UTF-8 (Python keeps them as surrogates) or a NUL, which would end
    an HDF5 string; both are written as escapes so that the record can always be stored.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
