"""Text and times as HDF5 can store them, and names as people mean them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable


def storable_text(text: str) -> str:
    """Return text as a store holds it.

    A file name may hold bytes that are not UTF-8 (Python keeps them as surrogates) or a NUL, which would end
    an HDF5 string; both are written as escapes so that the record can always be stored.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def is_storable(text: str) -> bool:
    """Tell whether HDF5 can hold a text: JSON can spell NUL and half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text))


def plain_name(name: str) -> str:
    """Return a name with composed accents (NFC): some file systems take them apart (NFD), most tables do not."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def spelled_as(names: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """Return how `stored` spells those of `names` that it holds in another spelling, if it holds only one."""
    held = set(stored)
    by_plain: dict[str, list[str]] = {}
    for name in held:
        if not name.isascii():
            by_plain.setdefault(plain_name(name), []).append(name)
    found = {name: by_plain.get(plain_name(name), []) for name in set(names) - held if not name.isascii()}
    return {name: spellings[0] for name, spellings in found.items() if len(spellings) == 1}


def mtime_ns_of(stat: os.stat_result) -> int:
    """Return a file's time of change in ns as a record holds it: the nearest int64, which ends in the year 2262."""
    return max(-(2**63), min(stat.st_mtime_ns, 2**63 - 1))
