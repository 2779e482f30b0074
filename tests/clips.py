"""Small clips, ordinary and odd, drawn by ffmpeg's own generators: tests need no footage."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg

VIDEO_ZOO = Path(__file__).resolve().parents[2] / "shared" / "video-zoo"

X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")


def run_ffmpeg(*arguments: str) -> None:
    """Run ffmpeg; what it says becomes the test's failure message."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@functools.cache
def _drawn(suffix: str, arguments: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"drawn{suffix}"
        run_ffmpeg(*arguments, f"file:{path}")
        return path.read_bytes()


def draw(path: Path, *arguments: str) -> Path:
    """Write what ffmpeg makes of its own generators; the same is drawn once a process."""
    path.write_bytes(_drawn(path.suffix, arguments))
    return path


def make_clip(
    path: Path,
    *,
    seconds: float = 2.0,
    fps: float = 10,
    size: str = "64x48",
    source: str = "testsrc2",
    filters: str = "null",
    codec: Sequence[str] = X264,
    extra: Sequence[str] = (),
) -> Path:
    """Write a clip whose every frame differs; `extra` are further output options."""
    pattern = f"{source}{':' if '=' in source else '='}size={size}:rate={fps}:duration={seconds}"
    return draw(path, "-f", "lavfi", "-i", pattern, "-vf", filters, *codec, *extra)


def make_odd_size_clip(path: Path) -> Path:
    """Write a clip of 67x51: chroma planes have half a pixel too many."""
    return make_clip(path, filters="scale=67:51", codec=("-c:v", "ffv1", "-pix_fmt", "yuv420p"))


def make_one_frame_clip(path: Path) -> Path:
    return make_clip(path, seconds=0.1, fps=10)


def make_anamorphic_clip(path: Path, sample_aspect_ratio: str = "4/3") -> Path:
    """Write a clip whose pixels are not square: 64x48 is shown as 85x48."""
    return make_clip(path, filters=f"setsar={sample_aspect_ratio}")


def make_turned_clip(path: Path, degrees: int, **mirrored: bool) -> Path:
    """Write a clip as a phone held otherwise does: the picture lies, the header says how to turn it."""
    upright = make_clip(path.with_name(f"upright-{path.name}"))
    flags = [f"-display_{name}" for name, is_on in mirrored.items() if is_on]
    copy = ("-c", "copy", f"file:{path}")
    run_ffmpeg("-display_rotation", str(degrees), *flags, "-i", f"file:{upright}", *copy)
    return path


def make_variable_rate_clip(path: Path) -> Path:
    """Write a clip that drops frames unevenly, as phones and screen recordings do."""
    options = ("-fps_mode", "vfr", "-enc_time_base", "1/1000")
    return make_clip(path, seconds=3, fps=30, filters="select='lt(mod(n,7),2)+gt(n,60)'", extra=options)


def make_late_clip(path: Path, start_seconds: float = 4.7) -> Path:
    """Write a clip whose first frame has a time other than 0."""
    return make_clip(path, filters=f"setpts=PTS+{start_seconds}/TB", extra=("-copyts",))


def make_resized_clip(path: Path) -> Path:
    """Write an MPEG-TS whose resolution halves after 2 of its 4 seconds."""
    codec = ("-c:v", "mpeg2video")
    first = make_clip(path.with_name("first.ts"), codec=codec)
    second = make_clip(path.with_name("second.ts"), size="32x24", codec=codec, extra=("-output_ts_offset", "2"))
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


def make_truncated_clip(path: Path, *, keeps_index: bool) -> Path:
    """Write the first part of an mp4: with its index in front it plays partly, without it not at all."""
    flags = ("-movflags", "+faststart") if keeps_index else ()
    whole = make_clip(path.with_name(f"whole-{path.name}"), seconds=3, extra=(*flags, "-g", "10"))
    data = whole.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def make_rotten_clip(path: Path) -> Path:
    """Write a clip with its index whole and some of its pictures' bytes overwritten."""
    make_clip(path, seconds=3, extra=("-movflags", "+faststart", "-g", "10"))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(range(100)) * 6
    path.write_bytes(data)
    return path


def make_sound(path: Path, seconds: float = 1.0) -> Path:
    return draw(path, "-f", "lavfi", "-i", f"sine=duration={seconds}")


def make_clip_with_sound(path: Path, *, seconds: float, sound_seconds: float) -> Path:
    pattern = f"testsrc2=size=64x48:rate=10:duration={seconds}"
    sound = f"sine=duration={sound_seconds}"
    return draw(path, "-f", "lavfi", "-i", pattern, "-f", "lavfi", "-i", sound, *X264)


def make_song_with_cover(path: Path) -> Path:
    """Write an mp3 whose cover art is its only video stream."""
    cover = draw(path.with_suffix(".png"), "-f", "lavfi", "-i", "testsrc2=size=64x64", "-frames:v", "1")
    sound = make_sound(path.with_name(f"sound-{path.name}"))
    inputs = ("-i", f"file:{sound}", "-i", f"file:{cover}", "-map", "0", "-map", "1")
    run_ffmpeg(*inputs, "-c", "copy", "-disposition:v:0", "attached_pic", f"file:{path}")
    return path


def make_transparent_clip(path: Path, codec: Sequence[str] = ("-c:v", "qtrle", "-pix_fmt", "argb")) -> Path:
    """Write a clip whose left half hides its colours under full transparency, and the right half half of them."""
    alpha = "geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='if(lt(X,32),0,128)'"
    return make_clip(path, filters=f"format=rgba,{alpha}", codec=codec)


def make_animated_webp(path: Path) -> Path:
    return make_clip(path, seconds=2, fps=5, codec=("-c:v", "libwebp_anim", "-lossless", "1"))


def make_scenes(path: Path, *, num_scenes: int, scene_seconds: float) -> Path:
    """Write a clip of still scenes that have nothing in common."""
    patterns = ("testsrc2", "mandelbrot", "color=c=white", "smptebars", "color=c=black")
    inputs: list[str] = []
    for number in range(num_scenes):
        pattern = patterns[number % len(patterns)]
        sized = f"{pattern}{':' if '=' in pattern else '='}size=64x48:rate=10"
        inputs += ["-f", "lavfi", "-t", str(scene_seconds), "-i", sized]
    freeze = f"select='eq(n,0)',loop=loop={round(scene_seconds * 10) - 1}:size=1,setpts=N/10/TB"
    still = "".join(f"[{number}]format=yuv420p,{freeze}[s{number}];" for number in range(num_scenes))
    joined = "".join(f"[s{number}]" for number in range(num_scenes)) + f"concat=n={num_scenes}:v=1"
    return draw(path, *inputs, "-filter_complex", still + joined, "-r", "10", *X264, "-bf", "2")


def count_frames(path: Path) -> int:
    """Return how many frames of its video the ffmpeg program decodes, told nothing."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-map", "0:v:0"]
    printed = subprocess.run([*command, "-f", "framecrc", "-"], capture_output=True, text=True, check=False).stdout
    return sum(not line.startswith("#") for line in printed.splitlines())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - /proc is not a folder of files


def child_processes() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()
