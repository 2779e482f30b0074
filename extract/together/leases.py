"""Who works on which unit: lease files in a shared folder, renewed by a heartbeat, stolen when it stops.

Any number of processes, on one machine or on many that share a file system, cut the same list of videos into
the same units and take them by leases. Nothing goes over the network. A lease only avoids doing a unit twice:
the store's records say what is done. So take a lease, check which of the unit's videos have records, work,
publish, and only then release.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from svb.errors import StoreError, UsageError
from svb.extract.plan import PlannedVideo

# The variables in which torchrun, Slurm, Open MPI, and MPICH and its relatives tell rank and world size.
RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
# Small enough that the last processes share what is left, large enough that leases cost nothing.
UNIT_VIDEOS = 32
# A process with nothing to do looks this often for what others have finished or left.
LOOK_SECONDS = 2.0
_SUFFIX = ".lease"
# Clocks and leases on their way out; what a killed process leaves of them is swept when it is stale.
_ASIDE_PREFIX = ".lease-"
# NFS says ESTALE of an open file that another machine removed.
_GONE = (errno.ENOENT, errno.ESTALE)


@dataclass(frozen=True)
class Unit:
    """Consecutive videos that one process takes at once; `key` is the same in every process."""

    key: str
    videos: tuple[PlannedVideo, ...]


def units(videos: Sequence[PlannedVideo], size: int) -> list[Unit]:
    """Cut a list of videos into units of `size`, the last one shorter.

    Give all candidates, done or not: what is done changes while processes join. Processes that see the
    videos under different paths compute different keys, and do everything twice.

    Raises:
        UsageError: `size` is not positive.
    """
    if size < 1:
        raise UsageError(f"units of {size} videos - expected 1 or more")
    chunks = [tuple(videos[start : start + size]) for start in range(0, len(videos), size)]
    return [Unit(_hash([(video.video_id, str(video.path)) for video in chunk]), chunk) for chunk in chunks]


def start_at(units: Sequence[Unit], rank: int, world: int) -> list[Unit]:
    """Return the units in a rank's order: from `rank / world` of the list to its end, then from the start."""
    first = len(units) * rank // world
    return [*units[first:], *units[:first]]


def rank_and_world() -> tuple[int, int] | None:
    """Return this process's rank and how many there are, as its launcher says; None for a single process.

    Raises:
        UsageError: A variable that should hold one of them holds something else.
    """
    for rank_name, world_name in RANK_VARIABLES:
        rank, world = os.environ.get(rank_name), os.environ.get(world_name)
        # salloc sets SLURM_NTASKS in a shell that is not one of the tasks.
        if not rank or not world:
            continue
        if not world.isdecimal() or int(world) < 1:
            raise UsageError(
                f"{world_name} is {world!r} - expected a whole number from 1; set it right or unset it"
            )
        if not rank.isdecimal() or int(rank) >= int(world):
            raise UsageError(
                f"{rank_name} is {rank!r} - expected a whole number from 0 to {int(world) - 1}, below "
                f"{world_name}; set it right or unset both"
            )
        return (int(rank), int(world)) if int(world) > 1 else None
    return None


@dataclass
class _Lease:
    """A lease as its holder knows it; `renewed` is local time, never compared with a file's."""

    content: bytes
    renewed: float


class Leases:
    """The leases that one process holds in a folder, kept alive by a thread. Use it as a context manager.

    A lease is stale if its file's mtime is older than `stale_seconds` by the file system's clock. Machines'
    own clocks differ, so they are never asked: age is measured against a file made for the purpose.

    Where the exclusive creation of a file or a rename is not atomic, two processes may hold the same lease.

    Args:
        folder: Shared by all; made where there is none, used for nothing else.
        owner: This process's name, for people who look into a lease.
        heartbeat_seconds: Between renewals.
        stale_seconds: Give it room for several heartbeats.

    Raises:
        StoreError: The folder cannot be made or written to.
        UsageError: The heartbeat is not shorter than what makes a lease stale.
    """

    def __init__(
        self, folder: Path, owner: str, heartbeat_seconds: float = 10.0, stale_seconds: float = 60.0
    ) -> None:
        if not 0 < heartbeat_seconds < stale_seconds:
            raise UsageError(
                f"a heartbeat every {heartbeat_seconds} s - expected more than 0 and less than the "
                f"{stale_seconds} s after which a lease is stale"
            )
        self._folder = folder
        self._owner = owner
        self._stale_seconds = stale_seconds
        self._leases: dict[str, _Lease] = {}
        # A renewal must not fall between a release's look and its rename: the file would seem another's.
        self._lock = threading.Lock()
        self._closed = threading.Event()
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat_seconds,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def held(self) -> set[str]:
        """The keys that this process holds, as far as it knows.

        One that was stolen is listed until the next heartbeat; one that could not be renewed for
        `stale_seconds` is not, since it may have been stolen.
        """
        oldest = time.monotonic() - self._stale_seconds
        return {key for key, lease in list(self._leases.items()) if lease.renewed >= oldest}

    def acquire(self, key: str) -> bool:
        """Take a lease, new or stale, and tell whether this process now holds it.

        Raises:
            StoreError: The folder is gone, read-only or full.
        """
        if key in self.held:
            return True
        with self._explained():
            return self._create(key) or (self._remove_stale(self._path(key)) and self._create(key))

    def release(self, key: str) -> None:
        """Give a lease back; nothing happens if it was not held, or stolen meanwhile.

        Raises:
            StoreError: The folder is read-only.
        """
        with self._lock, self._explained():
            lease = self._leases.pop(key, None)
            seen = _read(self._path(key))
            if lease is not None and seen is not None and seen[0] == lease.content:
                self._remove(self._path(key), seen)

    def close(self) -> None:
        """Stop the heartbeat and release everything; what cannot be removed any more is left to become stale."""
        self._closed.set()
        self._thread.join(timeout=10)
        for key in list(self._leases):
            with contextlib.suppress(StoreError):
                self.release(key)
        with contextlib.suppress(OSError):
            self._sweep()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _aside(self) -> Path:
        return self._folder / f"{_ASIDE_PREFIX}{uuid.uuid4().hex}"

    def _create(self, key: str) -> bool:
        path, started = self._path(key), time.monotonic()
        who = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "nonce": uuid.uuid4().hex}
        content = f"{json.dumps(who)}\n".encode()
        try:
            # Exclusive creation is atomic on NFS too (from version 3), and needs no hard links. A kill before the
            # content is written leaves an empty lease, which becomes stale like any other.
            file = path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._leases[key] = _Lease(content, started)
        return True

    def _remove_stale(self, path: Path) -> bool:
        """Remove a lease if it is stale, and tell whether it was and nobody else was faster."""
        now_ns = self._now_ns()
        seen = _read(path)
        if seen is None:
            return True
        return self._is_stale(seen[1], now_ns) and self._remove(path, seen)

    def _remove(self, path: Path, seen: tuple[bytes, int]) -> bool:
        """Remove a lease that is still as it was seen: only one process can rename it away."""
        aside = self._aside()
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        found = _read(aside)
        if found is not None and found != seen:
            # Renewed, or stolen and taken anew, since it was seen: give it back. Where there are no hard links,
            # or a third process was quick, its holder notices at its next heartbeat.
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return found is None or found == seen

    def _is_stale(self, mtime_ns: int, now_ns: int) -> bool:
        # Its holder would have corrected an mtime in the future by now: the file system's clock was set back.
        return abs(now_ns - mtime_ns) > self._stale_seconds * 1e9

    def _now_ns(self) -> int:
        """Return the file system's time; on NFS the server's."""
        path = self._aside()
        try:
            with path.open("wb") as file:
                os.utime(file.fileno())
                return os.fstat(file.fileno()).st_mtime_ns
        finally:
            path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what the dead left: leases of units that were done, and files on their way out."""
        now_ns = self._now_ns()
        for path in self._folder.iterdir():
            if path.suffix != _SUFFIX and not path.name.startswith(_ASIDE_PREFIX):
                continue
            seen = _read(path)
            if seen is not None and self._is_stale(seen[1], now_ns):
                self._remove(path, seen)

    def _beat(self, heartbeat_seconds: float) -> None:
        while not self._closed.wait(heartbeat_seconds):
            for key in list(self._leases):
                with self._lock:
                    self._renew(key)

    def _renew(self, key: str) -> None:
        lease, started = self._leases.get(key), time.monotonic()
        if lease is None:
            return
        try:
            # Opening asks an NFS server, where stat would answer from memory. The time is set on the open file:
            # a thief that renames it now sees that it was alive.
            with self._path(key).open("rb") as file:
                if file.read() == lease.content:
                    os.utime(file.fileno())
                    lease.renewed = started
                    return
        except OSError as error:
            if error.errno not in _GONE:  # the next heartbeat tries again; `held` counts the time
                return
        self._leases.pop(key, None)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot keep leases in {self._folder} ({error.strerror or error}) - expected a folder that this "
                "process may write to: mend its permissions, mount or free space, then run again"
            ) from error


class LeasedVideos:
    """A source of videos (`svb.extract.pool.decode_pool.WorkSource`) for one of several processes.

    `take` is called from the pool's thread, `published` from the main one.

    Args:
        units: All units, in the order that this process walks them.
        undone: Returns those of some videos that the store has no record of yet.
        todo: What there is to do, as this process began.

    Attributes:
        num_by_others, bytes_by_others: Videos that were to be done here and others have done, and their size.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        leases: Leases,
        undone: Callable[[Collection[PlannedVideo]], list[PlannedVideo]],
        todo: Iterable[PlannedVideo],
    ) -> None:
        self._waiting = deque(units)
        self._leases = leases
        self._undone = undone
        self._ready: deque[PlannedVideo] = deque()
        self._unit_of: dict[str, str] = {}
        self._unpublished: dict[str, int] = {}
        self._looked = -LOOK_SECONDS
        self._lock = threading.Lock()
        self._todo = set(todo)
        self.num_by_others = self.bytes_by_others = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether every video has its record, or has been given to this process's own decoders."""
        return not self._waiting and not self._ready

    def take(self) -> PlannedVideo | None:
        """Return the next video of a unit that this process holds, taking another unit where there is one."""
        if not self._ready and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._take_unit()
        return self._ready.popleft() if self._ready else None

    def _take_unit(self) -> None:
        for _ in range(len(self._waiting)):
            unit = self._waiting.popleft()
            if not self._leases.acquire(unit.key):
                # Whoever has it may be done with it by now, or die before it is.
                self._waiting.append(unit)
                continue
            # This process has the lease, so its last holder has published all that it finished.
            undone = self._undone(unit.videos)
            by_others = [video for video in unit.videos if video in self._todo and video not in undone]
            self.num_by_others += len(by_others)
            self.bytes_by_others += sum(video.size_bytes for video in by_others)
            if not undone:
                self._leases.release(unit.key)
                continue
            with self._lock:
                self._unpublished[unit.key] = len(undone)
                self._unit_of |= {video.video_id: unit.key for video in undone}
            self._ready.extend(undone)
            return
        self._looked = time.monotonic()

    def published(self, video_ids: Iterable[str]) -> None:
        """Release the leases of units whose videos have all been published."""
        with self._lock:
            for video_id in video_ids:
                key = self._unit_of.pop(video_id, None)
                if key is None:
                    continue
                self._unpublished[key] -= 1
                if not self._unpublished[key]:
                    del self._unpublished[key]
                    self._leases.release(key)


def release_those_of(process_id: int, folder: Path) -> None:
    """Remove the leases of a process of this machine that is dead: nobody need wait until they are stale."""
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError):
            holder = json.loads(path.read_bytes())
            if (holder["host"], holder["pid"]) == (socket.gethostname(), process_id):
                path.unlink()


def _read(path: Path) -> tuple[bytes, int] | None:
    """Return a file's content and mtime in ns, or None if it is gone."""
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return None


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
