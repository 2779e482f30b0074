"""Columns of strings at rest that open without being read: all bytes one after the other, and where each ends.

<name>_utf8.npy      (B,) uint8, the strings' UTF-8 one after the other
<name>_offsets.npy   (N + 1,) int64, string i is bytes offsets[i]:offsets[i + 1]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StringColumn:
    """N strings, mapped from their files or in memory; see the layout above."""

    utf8: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringColumn:
        """Return a column in memory."""
        encoded = [string.encode() for string in strings]
        offsets = np.concatenate([[0], np.cumsum([len(string) for string in encoded])]).astype(np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a column of {len(self)} strings")
        return self.utf8[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def tolist(self) -> list[str]:
        """Return all strings; many times faster than row by row."""
        held, ends = self.utf8.tobytes(), self.offsets.tolist()
        return [held[begin:end].decode() for begin, end in pairwise(ends)]

    def write(self, folder: Path, name: str) -> None:
        """Write the column's two files into a folder."""
        np.save(folder / f"{name}_utf8.npy", self.utf8)
        np.save(folder / f"{name}_offsets.npy", self.offsets)

    @classmethod
    def open(cls, folder: Path, name: str) -> StringColumn:
        """Map a column's files; nothing but their ends is read.

        Raises:
            OSError: A file is missing.
            ValueError, EOFError: A file is damaged, or the two do not belong together.
        """
        utf8, offsets = (open_array(folder / f"{name}_{kind}.npy") for kind in ("utf8", "offsets"))
        if utf8.dtype != np.uint8 or offsets.dtype != np.int64 or utf8.ndim != 1 or offsets.ndim != 1:
            raise ValueError(f"{name} is of {utf8.dtype} and {offsets.dtype}, expected uint8 and int64")
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(utf8):
            raise ValueError(f"{name}'s offsets do not cover its {len(utf8)} bytes")
        return cls(utf8, offsets)


def open_array(path: Path) -> NDArray[Any]:
    """Map a .npy file; nothing but its header is read.

    Raises:
        OSError: It is missing.
        ValueError, EOFError: It is damaged.
    """
    # A plain view: numpy's own memmap class makes every single index many times slower.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
