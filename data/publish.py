"""Files that exist only if they are whole: written aside, synced, renamed into place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from svb.errors import StoreError, SvbError

# What a killed process leaves behind begins with this; whoever holds the folder next removes it.
ASIDE_PREFIX = ".aside-"

# The file in a folder that its writer has locked.
LOCK_NAME = "writer.lock"

# How libraries say that a file could not be written to its end.
_DISK_IS_FULL = re.compile(
    r"No space left|File too large|Disk quota exceeded|requested and \d+ written|file write failed|write error|"
    r"PytorchStreamWriter failed writing|unexpected pos"
)

# How long a writer that shares waits for another that has the folder alone for a moment.
SHARED_LOCK_SECONDS = 60.0


@contextlib.contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Name `path` in the errors of a disk that takes no more: what libraries raise then names no file.

    Raises:
        OSError: The disk is full, over its quota or broken; its `filename` is `path`.
    """
    try:
        yield
    except SvbError:
        raise
    except Exception as error:  # torch, safetensors, h5py and FAISS have an error of their own each
        number = error.errno if isinstance(error, OSError) else None
        is_named = (
            isinstance(error, OSError) and error.filename is not None and ASIDE_PREFIX not in str(error.filename)
        )
        if is_named or not (number or _DISK_IS_FULL.search(str(error))):
            raise
        number = number or errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def published_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it becomes `path` in one step, on failure it is removed.

    The content is synced before the rename and the folder after it, so that a power cut leaves either
    the old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f"{ASIDE_PREFIX}{uuid.uuid4().hex}{path.suffix}"
    try:
        with disk_errors_named(path):
            yield aside
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def published_folder(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `path`, on failure it is removed.

    What was at `path` becomes `previous` where that is given, and is removed otherwise.

    A folder cannot be replaced in one step. The old one is set aside first, so a kill in between leaves
    no `path`, but `recover_folder` finds the new one, which was whole before the first rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    filling = path.parent / f"{ASIDE_PREFIX}{uuid.uuid4().hex}"
    filling.mkdir()
    try:
        with disk_errors_named(path):
            yield filling
            for file in filling.rglob("*"):
                sync(file)
            sync(filling)
        new, old = _beside(path, "new"), _beside(path, "old")
        filling.rename(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        if previous is not None and old.exists():
            shutil.rmtree(previous, ignore_errors=True)
            old.rename(previous)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Finish what a kill in `published_folder` interrupted; only the folder's one writer may call this.

    If `path` is missing, the newest whole folder becomes it; what else was left is removed.
    """
    beside = (_beside(path, "new"), _beside(path, "old"))
    for whole in beside:
        if not path.exists():
            with contextlib.suppress(FileNotFoundError):
                whole.rename(path)
    for leftover in beside:
        shutil.rmtree(leftover, ignore_errors=True)


def publish_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with published_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder; only its one writer may call this."""
    for leftover in folder.glob(f"{ASIDE_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def lock_folder(folder: Path, written: Path | None = None) -> int:
    """Make this process the folder's one writer until it closes the descriptor that is returned, or ends.

    Args:
        folder: The folder.
        written: What it serves to write, for the error; by default the folder itself.

    Raises:
        StoreError: Another process is writing to it, or the file system has no locks.
    """
    lock = FolderLock(folder, written)
    lock.take()
    return lock.descriptor


@contextlib.contextmanager
def one_writer(path: Path, role: str = "writing") -> Iterator[Path]:
    """Make this process the one writer of `path`; yields a folder beside it for files that the next run may use.

    The folder stays only if it holds something and there is no `path`.

    Args:
        path: The file or folder that is written.
        role: The end of the folder's name.

    Raises:
        StoreError: Another process is writing `path`, or the file system has no locks.
    """
    folder = _beside(path, role)
    lock = _lock_that_may_vanish(folder, path)
    try:
        remove_leftovers(folder)
        yield folder
    finally:
        if path.exists() or all(entry.name == LOCK_NAME for entry in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock_that_may_vanish(folder: Path, written: Path) -> int:
    """Make and lock a folder that its last holder may be removing: a lock counts only if its file is there."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = lock_folder(folder, written)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), (folder / LOCK_NAME).stat()):
                    return lock
            os.close(lock)


class FolderLock:
    """The right to write to a folder: one process has it alone, or several share it; it ends with them.

    Attributes:
        descriptor: The lock's open file; closing it gives the right back.
    """

    def __init__(self, folder: Path, written: Path | None = None) -> None:
        self._written = written or folder
        self.descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, *, shared_with_others: bool = False) -> bool:
        """Take the right to write; returns whether this process has it alone.

        Args:
            shared_with_others: Have it alone only until `share`, or share it at once with others. Waits while
                another process has it alone for a moment, to create the folder's content or to tidy it up.

        Raises:
            StoreError: Another process has it, or the file system has no locks.
        """
        until = time.monotonic() + (SHARED_LOCK_SECONDS if shared_with_others else 0)
        while not self.take_alone():
            if shared_with_others and self._take(fcntl.LOCK_SH):
                return False
            if time.monotonic() >= until:
                self.close()
                raise StoreError(
                    f"cannot lock {self._written} for writing - another process is writing to it: wait for it to "
                    "end, or write elsewhere with -o"
                )
            time.sleep(0.05)
        return True

    def take_alone(self) -> bool:
        """Take the right to write alone if nobody else holds any; a shared right may be lost if that fails."""
        return self._take(fcntl.LOCK_EX)

    def share(self) -> None:
        """Let others share it from now on."""
        self._take(fcntl.LOCK_SH)

    def close(self) -> None:
        """Give the right back; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            self.close()
            raise StoreError(
                f"the file system of {self._written} refuses locks ({error.strerror}) - without one, two writers "
                "could destroy each other's work: write to a local disk, or mount it with locks"
            ) from error
        return True


def hash_file(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file's bytes, in hex; `on_block` is called with every MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            on_block()
    return digest.hexdigest()


def _beside(path: Path, role: str) -> Path:
    return path.parent / f".{path.name}.{role}"


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
