"""What svb could reach at best: the slower of decoding alone and the backbone alone, on the cores svb has.

Decoding has one worker, which keeps one core busy, and the backbone one thread: no time is lost where both run
for as long as the slower of them takes by itself.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extract_clips import ClipSet
from extract_measure import (
    ALL_CORES,
    BATCH_SIZE,
    FREE,
    LITE0,
    SAMPLING,
    Cost,
    cold_and_steady,
    cost_of,
    extract_with,
    pin_to,
    precisions,
    require_all_ok,
    spread,
)
from numpy.typing import NDArray

from svb.device import choose_device, choose_precision
from svb.extract.backbones import load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.compute.transform import to_squares
from svb.extract.decode.decoder import FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.plan import PlannedVideo
from svb.extract.pool.decode_pool import DecodePool

# Frames of a long video are held up to this much, and the held ones repeated.
HELD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Frames:
    """Decoded chunks `(T, H, W, 3)` in memory, and how many frames the clips have in all."""

    chunks: list[NDArray[np.uint8]]
    num_frames: int


def measure_bound(
    clip_sets: Sequence[ClipSet], lead: Sequence[Path], folder: Path, rounds: int, workers: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of cores, set of clips and backbone."""
    torch.set_num_threads(1)
    # svb changes how its process asks for memory, which speeds up the backbone alone as well: from the start, then.
    extract_with(FREE, "float32", folder, workers)(lead[:1])
    for num_cores in sorted({min(len(ALL_CORES), cores) for cores in (2, 3)}):
        pinned = pin_to(num_cores)
        for clips in clip_sets:
            rows = [
                {"cores": num_cores, "pinned": pinned, "clips": clips.name, "videos": len(clips.paths)}
                | {"backbone": name, "precision": precision, "rounds": []}
                for name, precision in [(FREE, "float32"), *((LITE0, precision) for precision in precisions())]
            ]
            held = hold_frames(clips.paths)
            for number in range(rounds):
                print(f"bound, {num_cores} cores, {clips.name}: round {number + 1} of {rounds}", file=sys.stderr)
                measure_round(rows, held, lead, clips.paths, folder, workers)
            yield from rows


def measure_round(
    rows: list[dict[str, Any]],
    held: Frames,
    lead: Sequence[Path],
    clips: Sequence[Path],
    folder: Path,
    workers: int,
) -> None:
    """Measure everything once, side by side, and add it to the rows."""
    lead = lead[:workers]
    _, decoding = cold_and_steady(lambda paths: decode(paths, workers), lead, clips)
    for row in rows:
        network = load(row["backbone"], row["precision"])
        row["computed_in"] = network.settings()["precision"]
        alone = cost_of_backbone(network, held)
        svb = extract_with(row["backbone"], row["precision"], folder, workers)
        cold, ours = cold_and_steady(svb, lead, clips)
        costs = {"decode": decoding, "backbone": alone, "svb": ours, "start": cold}
        row["rounds"].append({name: asdict(cost) for name, cost in costs.items()})


def decode(paths: Sequence[Path], workers: int) -> None:
    """Read the frames that svb reads, into nothing."""
    ended = [message.status for _, message in messages_of(paths, workers) if hasattr(message, "status")]
    require_all_ok(Counter(ended), len(paths))


def messages_of(paths: Sequence[Path], workers: int) -> Iterator[tuple[int, Any]]:
    planned = [PlannedVideo(f"video{number}", path) for number, path in enumerate(paths)]
    return DecodePool(workers, DecodeOptions(SAMPLING, "pyav"), 120.0).run(planned)


def hold_frames(paths: Sequence[Path]) -> Frames:
    chunks: list[NDArray[np.uint8]] = []
    num_frames = held_bytes = 0
    for _, message in messages_of(paths, 1):
        if isinstance(message, FrameChunk):
            num_frames += len(message.frames)
            if held_bytes < HELD_BYTES:
                chunks.append(message.frames.copy())
                held_bytes += message.frames.nbytes
    return Frames(chunks, num_frames)


def load(name: str, precision: str) -> Backbone:
    device = choose_device("cpu")
    return load_backbone(name, device, choose_precision(device, precision))


def cost_of_backbone(network: Backbone, held: Frames) -> Cost:
    """Return the cost of all the clips' batches, the last one padded, after one that warms up."""
    next(iter(run_backbone(network, held)))
    return cost_of(lambda: sum(1 for _ in run_backbone(network, held)))


def run_backbone(network: Backbone, held: Frames) -> Iterator[torch.Tensor]:
    """Yield the features of every batch: frames from memory, resized chunk by chunk as svb does."""
    batch = torch.zeros(BATCH_SIZE, 3, network.image_size, network.image_size, dtype=torch.uint8)
    filled = done = 0
    while done < held.num_frames:
        for chunk in held.chunks:
            if done == held.num_frames:
                break
            squares = to_squares(torch.from_numpy(chunk[: held.num_frames - done]), network.image_size)
            done += len(squares)
            for part in squares.split(1):
                batch[filled : filled + 1] = part
                filled += 1
                if filled == BATCH_SIZE:
                    yield network(batch)
                    filled = 0
    if filled:
        yield network(batch)


def table_of_bound(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: videos per second and CPU-seconds a video, alone and together."""
    lines = [
        "| cores | clips | backbone | svb, videos/s | decoding alone | backbone alone "
        "| svb's share of the slower, % | svb, CPU-s a video | both alone | start of svb, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        videos, rounds = row["videos"], row["rounds"]
        rates = {
            name: spread([videos / taken[name]["wall_seconds"] for taken in rounds], ".3g")
            for name in ("svb", "decode", "backbone")
        }
        cpu = [taken["svb"]["cpu_seconds"] / videos for taken in rounds]
        both = [(taken["decode"]["cpu_seconds"] + taken["backbone"]["cpu_seconds"]) / videos for taken in rounds]
        lines.append(
            f"| {row['cores']} | {videos} of {row['clips']} | `{row['backbone']}`, {row['computed_in']} "
            f"| {rates['svb']} | {rates['decode']} | {rates['backbone']} | {spread(shares(rounds), '.0f')} "
            f"| {spread(cpu, '.3g')} | {spread(both, '.3g')} "
            f"| {spread([taken['start']['wall_seconds'] for taken in rounds], '.2g')} |"
        )
    return "\n".join(lines)


def shares(rounds: Sequence[dict[str, dict[str, float]]]) -> list[float]:
    """Return each round's percentage of the bound that was measured beside it."""
    return [
        100 * max(taken["decode"]["wall_seconds"], taken["backbone"]["wall_seconds"]) / taken["svb"]["wall_seconds"]
        for taken in rounds
    ]
