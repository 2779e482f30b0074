"""A program that test_chaos kills: `svb extract` with a shard after every two videos.

It loads torch once and then makes a run, in a process of its own, of every line of its input: in JSON its videos
and out, rank and world_size where several fill the store, and before which of its changes of the disk it waits to
be killed, counted in the whole run or in its compaction. It says the run's process id, when it begins to compact
the store, when it waits, and its exit code when it has ended.

Decode workers import this file, too: what takes long to load is only loaded by the runs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

SHARD_VIDEOS = 2
# Small shards become larger ones in many steps.
MERGED_VIDEOS = 8
# Others take over what a killed process held after this long. A live one must get to renew its leases.
HEARTBEAT_SECONDS, STALE_SECONDS = 0.3, 3.0


def wait_at(change: int) -> None:
    """Wait to be killed before the disk is changed for the n-th time from here on."""
    changes = itertools.count(1)

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def call(*arguments: Any, **options: Any) -> Any:
            if next(changes) == change:
                print("waiting", flush=True)
                threading.Event().wait()
            return step(*arguments, **options)

        return call

    for name in ("fsync", "rename", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def run(videos: str, out: str, change: int = 0, change_in_compaction: int = 0, **place: int) -> None:
    from svb.data import feature_store_writer
    from svb.data.feature_store_writer import FeatureStoreWriter
    from svb.extract import run as run_module
    from svb.extract.backbones import FAMILIES
    from svb.extract.config import ExtractConfig
    from svb.extract.together import leases
    from svb.extract.together.leases import Leases

    compact = FeatureStoreWriter.compact

    def say_and_compact(writer: FeatureStoreWriter) -> None:
        feature_store_writer.SHARD_VIDEOS = MERGED_VIDEOS
        print("compacting", flush=True)
        wait_at(change_in_compaction)
        compact(writer)

    FeatureStoreWriter.compact = say_and_compact  # type: ignore[method-assign]
    feature_store_writer.SHARD_VIDEOS = SHARD_VIDEOS
    run_module.UNIT_VIDEOS, leases.LOOK_SECONDS = 4, 0.1
    Leases.__init__.__defaults__ = (HEARTBEAT_SECONDS, STALE_SECONDS)
    FAMILIES["toy"] = "toy_backbone"
    wait_at(change)
    config = ExtractConfig(
        ("toy:frames", "toy:clips"), precision="float32", engine="torch", workers=2, batch_size=4, **place
    )
    run_module.extract([Path(videos)], Path(out), config)


def main() -> None:
    import toy_backbone  # noqa: F401 - torch with it

    from svb.extract import run as run_module  # noqa: F401

    for line in sys.stdin:
        process_id = os.fork()
        if process_id == 0:
            try:
                run(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(process_id, flush=True)
        _, status = os.waitpid(process_id, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
