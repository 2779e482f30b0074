"""How the parts of `benchmarks/extract.py` take the cost of a piece of work, without that of starting it."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import free_backbone
import torch
from resources_used import cpu_seconds

from svb.data.feature_store import FeatureStore
from svb.device import choose_device, choose_precision
from svb.errors import SvbError
from svb.extract.backbones import FAMILIES
from svb.extract.config import ExtractConfig
from svb.extract.decode.sampling import Sampling
from svb.extract.run import extract

BATCH_SIZE = 32
FPS = 1.0
SAMPLING = Sampling(fps=FPS)
LITE0 = "offline:efficientnet-lite0"
FREE = "free:four-pixels"
FAMILIES["free"] = free_backbone.__name__


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: on the clock, and CPU time with that of the processes it started."""

    wall_seconds: float
    cpu_seconds: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall_seconds - other.wall_seconds, self.cpu_seconds - other.cpu_seconds)


def cost_of(work: Callable[[], object]) -> Cost:
    """Return the cost of a call whose processes have all ended when it returns."""
    began, cpu_began = time.perf_counter(), cpu_seconds()
    work()
    return Cost(time.perf_counter() - began, cpu_seconds() - cpu_began)


def cold_and_steady(
    run: Callable[[Sequence[Path]], object], lead: Sequence[Path], clips: Sequence[Path]
) -> tuple[Cost, Cost]:
    """Return the cost of a start, and that of the clips alone.

    `run` is called with the lead-in clips, then with these and the clips; the difference is the clips'. A
    lead-in clip is decoded in no time into one full batch, so the first call starts and ends everything once,
    and what overlaps at the start and the end of the second is in both.
    """
    cold = cost_of(lambda: run(lead))
    return cold, cost_of(lambda: run([*lead, *clips])) - cold


def extract_with(backbone: str, precision: str, folder: Path, workers: int) -> Callable[[Sequence[Path]], Path]:
    """Return `svb.extract.run.extract` with its settings; every call makes a store of its own."""

    def run(clips: Sequence[Path]) -> Path:
        config = ExtractConfig(
            backbones=(backbone,),
            fps=FPS,
            workers=workers,
            batch_size=BATCH_SIZE,
            precision=precision,
            device="cpu",
        )
        store = extract(clips, folder / f"store-{time.monotonic_ns()}", config)
        require_all_ok(FeatureStore(store).status_counts(), len(clips))
        return store

    return run


def require_all_ok(statuses: Mapping[str, int], num_videos: int) -> None:
    """Raise where a video failed: what it did not cost must not be counted.

    Raises:
        SvbError: Not every video is `ok`.
    """
    if dict(statuses) != {"ok": num_videos}:
        raise SvbError(f"videos ended as {dict(statuses)} - expected {num_videos} ok; see `svb info STORE`")


def precisions() -> tuple[str, ...]:
    """Return the precisions to measure: float32, and `auto` where that is another one on this machine."""
    is_float32 = choose_precision(choose_device("cpu"), "auto") == torch.float32
    return ("float32",) if is_float32 else ("float32", "auto")


def ours() -> dict[str, str]:
    """Return the precisions by the name of svb's row in a table."""
    return {f"svb, {precision}": precision for precision in precisions()}


def pin_to(num_cores: int) -> bool:
    """Keep this process, and all that it starts from here on, to the first of its cores; False where it cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    allowed = sorted(ALL_CORES)[:num_cores]
    for thread in Path("/proc/self/task").iterdir():  # a thread that runs already keeps its own cores
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread.name), allowed)
    return True


ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def spread(values: Sequence[float], spec: str) -> str:
    """Return `median (lowest to highest)`, one value by itself."""
    low, middle, high = (f"{value:{spec}}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def table_against(rounds: Sequence[dict[str, Cost]], videos: int, extra: dict[str, str] | None = None) -> str:
    """Return a Markdown table of what was measured beside svb, which is faster by so much, round by round.

    Args:
        rounds: Costs by name, those that `ours` names among them.
        videos: How many were extracted in each.
        extra: One more column by name; its title is the value of `""`.
    """
    named = [name for name in rounds[0] if name.startswith("svb, ")]
    titles = ["", "videos/s", "CPU-s a video"]
    titles += [title for name in named for title in (f"{name} is faster, times", "CPU time of its, times")]
    lines = [titles + ([extra[""]] if extra else [])]
    lines.append(["---"] * len(lines[0]))
    for name in rounds[0]:
        taken = [costs[name] for costs in rounds if name in costs]
        row = [name, spread([videos / cost.wall_seconds for cost in taken], ".3g")]
        row.append(spread([cost.cpu_seconds / videos for cost in taken], ".3g"))
        for own in named:
            pairs = [(costs[name], costs[own]) for costs in rounds if name in costs]
            row.append(spread([cost.wall_seconds / own.wall_seconds for cost, own in pairs], ".2f"))
            row.append(spread([cost.cpu_seconds / own.cpu_seconds for cost, own in pairs], ".2f"))
        lines.append(row + ([extra.get(name, "")] if extra else []))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
