"""The videos of one process among several that fill one store: units taken by leases, also from dead processes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from svb.extract.plan import PlannedVideo
from svb.extract.together.leases import Leases, Unit

# Small enough that the last processes share what is left, large enough that leases cost nothing.
UNIT_VIDEOS = 32
# A process with nothing to do looks this often for what others have finished or left.
LOOK_SECONDS = 2.0


class LeasedVideos:
    """A source of videos (`svb.extract.pool.decode_pool.WorkSource`) for one of several processes.

    `take` is called from the pool's thread, `published` from the main one.

    Args:
        units: All units, in the order that this process walks them.
        leases: To take them by.
        undone: Returns those of some videos that the store has no record of yet.
        todo: What there is to do, as this process began.

    Attributes:
        by_others: Videos that were to be done here, and others have done.
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
        self.by_others: list[PlannedVideo] = []

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
            self.by_others += [video for video in unit.videos if video in self._todo and video not in undone]
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
