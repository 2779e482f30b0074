"""How close does `svb extract` come to what it could reach at best? `python benchmarks/extract_bound.py`.

svb, with one worker and one thread on two cores, beside the slower of its halves: decoding alone (the same worker,
frames thrown away) and the backbone alone (the same batches from memory, resized and normalised). No time is lost
where both run for as long as the slower of them takes by itself. A backbone that costs nothing leaves decoding to
decide; EfficientNet-lite0 decides itself.

Starting (imports, loading the model, starting and ending workers, the first batch) is not counted but given. It
takes about 15 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shared

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from svb.extract.backbones.backbone import Backbone

# Frames of a long video are held up to this much, and the held ones repeated.
HELD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Frames:
    """Decoded chunks `(T, H, W, 3)` in memory, and how many frames the clips have in all."""

    chunks: list[NDArray[np.uint8]]
    num_frames: int


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each set of clips and backbone, and their table."""
    import torch

    shared.pin_to(2)
    torch.set_num_threads(1)
    lead = shared.make_clips(folder / "lead", shared.LEAD_IN, 1)
    # svb changes how its process asks for memory, which speeds up the backbone alone as well: from the start, then.
    shared.extract_with(shared.FREE, folder, workers=1)(lead)
    rows = []
    for name, clips, rounds in shared.clip_sets(folder, options):
        held = hold_frames(clips)
        of_set = [
            {"clips": name, "videos": len(clips), "backbone": backbone, "rounds": []}
            for backbone in (shared.FREE, shared.LITE0)
        ]
        for number in range(rounds):
            print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr)
            measure_round(of_set, held, lead, clips, folder, options)
        rows += of_set
    return rows, table_of(rows)


def measure_round(
    rows: list[dict[str, Any]],
    held: Frames,
    lead: Sequence[Path],
    clips: Sequence[Path],
    folder: Path,
    options: argparse.Namespace,
) -> None:
    """Measure everything once, side by side, and add it to the rows."""
    from svb.device import choose_device
    from svb.extract.backbones.engine import load_backbones

    _, decoding = shared.cold_and_steady(decode, lead, clips)
    device = choose_device("cpu")
    for row in rows:
        how = {"precision": options.precision, "engine": options.engine}
        (network,) = load_backbones([row["backbone"]], device, **how, compile=False, batch_size=shared.BATCH_SIZE)
        row["precision"] = network.settings()["precision"]
        row["engine"] = network.settings().get("engine", "torch")
        next(run_backbone(network, held))  # warms up
        alone = shared.cost_of(lambda: sum(1 for _ in run_backbone(network, held)))  # noqa: B023 - called at once
        svb = shared.extract_with(row["backbone"], folder, workers=1, **how)
        start, ours = shared.cold_and_steady(svb, lead, clips)
        row["rounds"].append({"decode": decoding, "backbone": alone, "svb": ours, "start": start})


def decode(paths: Sequence[Path]) -> None:
    """Read the frames that svb reads, into nothing."""
    ended = Counter(message.status for message in messages_of(paths) if hasattr(message, "status"))
    shared.require_all_ok(ended, len(paths))


def messages_of(paths: Sequence[Path]) -> Iterator[Any]:
    """Yield what a decode worker says of some videos."""
    from svb.extract.decode.options import DecodeOptions
    from svb.extract.decode.sampling import Sampling
    from svb.extract.plan import PlannedVideo
    from svb.extract.pool.decode_pool import DecodePool

    planned = [PlannedVideo(f"video{number}", path) for number, path in enumerate(paths)]
    for _, message in DecodePool(1, DecodeOptions(Sampling(fps=1.0), "pyav"), 120.0).run(planned):
        yield message


def hold_frames(paths: Sequence[Path]) -> Frames:
    """Decode the clips into memory."""
    chunks: list[NDArray[np.uint8]] = []
    num_frames = 0
    for message in messages_of(paths):
        if hasattr(message, "frames"):
            num_frames += len(message.frames)
            if sum(chunk.nbytes for chunk in chunks) < HELD_BYTES:
                chunks.append(message.frames.copy())
    return Frames(chunks, num_frames)


def run_backbone(network: Backbone, held: Frames) -> Iterator[torch.Tensor]:
    """Yield the features of every batch, the last padded: frames from memory, resized chunk by chunk as in svb."""
    import torch

    from svb.extract.compute.transform import to_squares

    batch = torch.zeros(shared.BATCH_SIZE, 3, network.image_size, network.image_size, dtype=torch.uint8)
    filled = done = 0
    while done < held.num_frames:
        for chunk in held.chunks:
            squares = to_squares(torch.from_numpy(chunk[: held.num_frames - done]), network.transform)
            done += len(squares)
            for square in squares:
                batch[filled] = square
                filled += 1
                if filled == shared.BATCH_SIZE:
                    yield network(batch)
                    filled = 0
            if done == held.num_frames:
                break
    if filled:
        yield network(batch)


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: videos per second and CPU-seconds a video, alone and together."""
    titles = ["clips", "backbone", "svb, videos/s", "decoding alone", "backbone alone", "svb's share of the slower"]
    titles += ["svb, CPU-s a video", "both alone, CPU-s", "start of svb, s"]
    lines = []
    for row in rows:
        videos, rounds = row["videos"], row["rounds"]
        wall = {name: [taken[name].wall_seconds for taken in rounds] for name in rounds[0]}
        cpu = {name: [taken[name].cpu_seconds / videos for taken in rounds] for name in rounds[0]}
        slower = [max(halves) for halves in zip(wall["decode"], wall["backbone"], strict=True)]
        shares = [100 * bound / taken for bound, taken in zip(slower, wall["svb"], strict=True)]
        both = [sum(halves) for halves in zip(cpu["decode"], cpu["backbone"], strict=True)]
        rates = [shared.spread([videos / s for s in wall[name]]) for name in ("svb", "decode", "backbone")]
        how = f"`{row['backbone']}`, {row['engine']}, {row['precision']}"
        lines.append([f"{videos} of {row['clips']}", how, *rates])
        lines[-1] += [f"{shared.spread(shares, '.0f')} %", shared.spread(cpu["svb"]), shared.spread(both)]
        lines[-1].append(shared.spread(wall["start"], ".2g"))
    return shared.table(titles, lines)


if __name__ == "__main__":
    shared.run_benchmark(
        __doc__,
        measure,
        rounds=(3, "how often everything is measured, in turn"),
        **shared.CLIP_SETS,
        precision=("float32", "of the backbone"),
        engine=("auto", "of the backbone: auto, torch or onnx"),
    )
