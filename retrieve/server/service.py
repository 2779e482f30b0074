"""All that the server keeps warm, in one place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from svb.errors import StoreError
from svb.retrieve.server.crew import Crew
from svb.retrieve.server.kept_files import KeptFiles
from svb.retrieve.server.media import Probes
from svb.retrieve.server.metrics import Metrics
from svb.retrieve.server.options import ServeOptions
from svb.retrieve.server.picture_cache import PictureCache
from svb.retrieve.server.previews import Previews
from svb.retrieve.server.search_pool import SearchPool
from svb.retrieve.server.snapshots import Snapshots
from svb.retrieve.server.uploads import Uploads

if TYPE_CHECKING:
    from svb.retrieve.searching.searcher import Searcher

T = TypeVar("T")

PICTURES_AT_ONCE, PICTURES_WAITING = 2, 500
PREVIEWS_AT_ONCE = 1


class Service:
    """What the routes work with.

    Args:
        index: The index's folder.
        cache: Where files that can be made again are kept.
        open_searcher: Opens the index as it is on disk, see `Snapshots`.
        options: See `ServeOptions`.
    """

    def __init__(
        self,
        index: Path,
        cache: Path,
        open_searcher: Callable[[Searcher | None], Searcher],
        options: ServeOptions,
    ) -> None:
        self.index, self.options = index, options
        self.snapshots = Snapshots(open_searcher, index)
        self.metrics = Metrics()
        self.searches = SearchPool(options.threads, options.max_searches)
        self.uploads = Uploads(options.max_upload_bytes, options.uploads_at_once)
        # Two crews: a video that takes minutes to embed must not hold up the posters, nor the other way round.
        self.embedders = Crew(1, options.uploads_at_once, options.upload_seconds)
        self.decoders = Crew(PICTURES_AT_ONCE, PICTURES_WAITING, options.picture_seconds)
        self.probes = Probes(self.decoders)
        self.pictures = PictureCache(KeptFiles(cache / "pictures", options.picture_cache_bytes), self.decoders)
        previews = KeptFiles(cache / "previews", options.preview_cache_bytes)
        self.previews = Previews(previews, PREVIEWS_AT_ONCE, options.preview_seconds)

    async def search(self, function: Callable[[Searcher], T]) -> T:
        """Return what a function makes of the newest snapshot, on a thread for searches.

        A generation's files may go while it is searched, once the next is committed: then that one is searched.
        """
        searcher = await self.snapshots.newest()
        try:
            return await self.searches.run(lambda: function(searcher))
        except (StoreError, FileNotFoundError):
            newer = await self.snapshots.newest()
            if newer is searcher:
                raise
            return await self.searches.run(lambda: function(newer))

    async def close(self) -> None:
        """End all work and every process."""
        await self.previews.close()
        await asyncio.gather(self.embedders.close(), self.decoders.close())
        await self.pictures.close()
        self.snapshots.close()
        await asyncio.to_thread(self.searches.close)
