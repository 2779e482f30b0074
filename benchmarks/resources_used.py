"""What a piece of work takes of the machine: CPU-seconds, and memory in a process of its own.

As a program, `python benchmarks/resources_used.py STORE`, it prints what loading a feature store takes. Linux only.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MiB = 2**20


def cpu_seconds() -> float:
    """Return the CPU time, user and system, of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def cpu_seconds_of(work: Callable[[], object]) -> float:
    """Return the CPU time that a call takes."""
    began = cpu_seconds()
    work()
    return cpu_seconds() - began


def memory_of_cache(store: Path) -> dict[str, float]:
    """Return what a store's features take on disk and, loaded as training loads them, of a new process's memory.

    Returns:
        `disk_mib`; `resident_mib` that are held afterwards and `peak_mib` while loading, both beyond what the
        process took before.
    """
    done = subprocess.run([sys.executable, __file__, str(store)], capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _load_and_measure(store: Path) -> dict[str, float]:
    import torch

    from svb.data.feature_store import FeatureStore
    from svb.train.training_data import FrameTable

    def load(num_videos: int | None) -> FrameTable:
        opened = FeatureStore(store)
        (backbone,) = opened.backbones
        loaded = opened.load(backbone, opened.video_ids[:num_videos])
        return FrameTable.of(loaded, 32, torch.device("cpu"))

    load(1)  # what the first use of a library takes is not the cache's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see proc(5)
    before = _status_mib("VmRSS")
    table = load(None)
    disk_mib = sum(path.stat().st_size for path in (store / "shards").iterdir()) / MiB
    assert table.features.nbytes / MiB < disk_mib
    return {
        "disk_mib": disk_mib,
        "resident_mib": _status_mib("VmRSS") - before,
        "peak_mib": _status_mib("VmHWM") - before,
    }


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(_load_and_measure(Path(sys.argv[1]))))
