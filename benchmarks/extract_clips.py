"""Makes the clips that `benchmarks/extract.py` reads, with the ffmpeg that imageio-ffmpeg brings.

A moving test pattern with noise on every pixel of every frame, H.264 by x264's `medium`, 30 frames a second. The
bit rate is that of such footage on the web: it, and the preset's tools, are what decoding costs. Noise alone
would fill any bit rate, a test pattern alone none.
"""

from __future__ import annotations

import itertools
import math
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

MSRVTT_MINI = Path(__file__).resolve().parents[2] / "shared" / "msrvtt-mini" / "clips"
FRAME_RATE = 30
# Longer clips repeat a piece: encoding ten minutes would take longer than measuring them.
ENCODED_FRAMES = 900


@dataclass(frozen=True)
class Footage:
    """What a set of clips is made as."""

    size: str
    bit_rate: str
    seconds: int


SHORT, MEDIUM, LONG = (
    Footage("426x240", "300k", 15),
    Footage("854x480", "1000k", 60),
    Footage("1280x720", "2500k", 600),
)


@dataclass(frozen=True)
class ClipSet:
    """Clips that are measured together; all files differ, as svb would notice a second copy."""

    name: str
    paths: list[Path]


def make_clip_sets(folder: Path, counts: dict[str, int], long_seconds: int) -> Iterator[ClipSet]:
    """Yield the sets, made in `folder`; none for a count of 0 or where MSR-VTT's clips are missing."""
    long = Footage(LONG.size, LONG.bit_rate, long_seconds)
    for name, footage in (("short", SHORT), ("medium", MEDIUM), ("long", long)):
        if counts[name]:
            title = f"{footage.seconds} s, {footage.size.partition('x')[2]}p"
            yield ClipSet(title, make_clips(folder / name, footage, counts[name]))
    if counts["msrvtt"] and MSRVTT_MINI.is_dir():
        yield ClipSet("msrvtt-mini", sorted(MSRVTT_MINI.glob("*.mp4"))[: counts["msrvtt"]])


def make_clips(folder: Path, footage: Footage, count: int, distinct: int = 2) -> list[Path]:
    """Encode a few distinct clips and copy them to `count` files."""
    folder.mkdir()
    encoded = [
        encode(folder / f"encoded{number}.mp4", footage, seed=number + 1) for number in range(min(count, distinct))
    ]
    return copies(encoded, folder / "clips", count)


def encode(path: Path, footage: Footage, *, seed: int, rate: int = FRAME_RATE) -> Path:
    """Encode one clip; one of more than `ENCODED_FRAMES` repeats a piece."""
    repeats = math.ceil(footage.seconds * rate / ENCODED_FRAMES)
    pattern = f"testsrc2=size={footage.size}:rate={rate}:duration={footage.seconds / repeats}"
    x264 = ["-c:v", "libx264", "-preset", "medium", "-b:v", footage.bit_rate, "-pix_fmt", "yuv420p"]
    piece = path if repeats == 1 else path.with_suffix(".piece.mp4")
    _ffmpeg("-f", "lavfi", "-i", f"{pattern},noise=alls=12:allf=t+u:all_seed={seed}", *x264, piece)
    if piece != path:
        _ffmpeg("-stream_loop", repeats - 1, "-i", piece, "-c", "copy", path)
        piece.unlink()
    return path


def make_lead_ins(folder: Path, count: int, frames: int) -> list[Path]:
    """Make clips that are decoded in no time, of `frames` frames at one frame a second: a full batch each."""
    folder.mkdir()
    encoded = encode(folder / "encoded.mp4", Footage("64x64", "30k", frames), seed=1, rate=1)
    return copies([encoded], folder / "clips", count)


def copies(sources: list[Path], folder: Path, count: int) -> list[Path]:
    """Write `count` copies, in turn of each source, that differ by a counter in a box which decoders skip."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [source.read_bytes() for source in sources]
    paths = [folder / f"clip{number:05d}.mp4" for number in range(count)]
    for number, (path, content) in enumerate(zip(paths, itertools.cycle(contents), strict=False)):
        path.write_bytes(content + struct.pack(">I4sQ", 16, b"free", number))
    return paths


def _ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)
