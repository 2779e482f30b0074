"""Videos in which each clip is a needle in the others' footage: spliced, so that its seconds are known."""

from __future__ import annotations

import csv
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import imageio_ffmpeg


@dataclass(frozen=True)
class Needle:
    """A caption, and where what it says is to be seen: `[begin_seconds, end_seconds)` of a video."""

    video_id: str
    caption: str
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Clip:
    """A file and what is said of it."""

    path: Path
    captions: tuple[str, ...]


def splice(clips: Sequence[Clip], folder: Path, *, clips_a_video: int, frame_rate: int, seed: int) -> list[Needle]:
    """Join clips in random order into videos of `clips_a_video` each, and say where each begins and ends."""
    folder.mkdir(parents=True, exist_ok=True)
    order = random.Random(seed).sample(list(clips), len(clips))
    needles = []
    for number in range(max(1, len(order) // clips_a_video)):
        joined = order[number * clips_a_video : (number + 1) * clips_a_video]
        video_id, begin = f"spliced{number:03}", 0.0
        _join([clip.path for clip in joined], folder / f"{video_id}.mp4", frame_rate)
        for clip in joined:
            end = begin + _seconds(clip.path, frame_rate)
            needles += [Needle(video_id, caption, begin, end) for caption in clip.captions]
            begin = end
    return needles


def read_needles(table: Path) -> list[Needle]:
    """Read a table with the columns `video_id, caption, start, end`, in seconds."""
    with table.open(encoding="utf-8", newline="") as file:
        return [
            Needle(row["video_id"], row["caption"], float(row["start"]), float(row["end"]))
            for row in csv.DictReader(file)
        ]


def write_needles(needles: Sequence[Needle], table: Path) -> Path:
    """Write what `read_needles` reads."""
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("video_id", "caption", "start", "end"))
        writer.writerows((n.video_id, n.caption, n.begin_seconds, n.end_seconds) for n in needles)
    return table


def _join(paths: Sequence[Path], out: Path, frame_rate: int) -> None:
    """Encode clips one after the other, each frame shown for `1 / frame_rate` seconds."""
    inputs = [word for path in paths for word in ("-i", f"file:{path}")]
    even = f"fps={frame_rate},scale=320:240,setsar=1,format=yuv420p,setpts=N/{frame_rate}/TB"
    chains = "".join(f"[{number}:v]{even}[v{number}];" for number in range(len(paths)))
    joined = "".join(f"[v{number}]" for number in range(len(paths)))
    x264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-r", str(frame_rate)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *inputs]
    graph = f"{chains}{joined}concat=n={len(paths)}:v=1"
    subprocess.run([*command, "-filter_complex", graph, *x264, f"file:{out}"], check=True)


def _seconds(path: Path, frame_rate: int) -> float:
    """Return how long a clip is in a spliced video, which counts its frames."""
    with av.open(str(path)) as container:
        frames = sum(1 for _ in container.decode(video=0))
        rate = container.streams.video[0].average_rate
    assert rate == frame_rate, f"{path} has {rate} frames a second - expected {frame_rate}"
    return frames / frame_rate
