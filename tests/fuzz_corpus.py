"""Three hundred files that a stranger might send: clips that are cut, rotten, joined, mislabelled and lied about.

python fuzz_corpus.py OUT '{"videos": [...], "decoder": "pyav", ...}'

extracts them in a process of its own, with toy backbones, and says in JSON how that process fared.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import clips
from messages import heard

NUM_FILES = 300

# Nothing of the day, and no numbers drawn by the muxer: the same corpus every time.
EXACT = ("-fflags", "+bitexact", "-flags", "+bitexact", "-threads", "1")
XVID = ("-c:v", "libxvid")
VP8 = ("-c:v", "libvpx", "-deadline", "realtime")
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
B_FRAMES = ("-c:v", "libx264", "-preset", "medium", "-bf", "3", "-pix_fmt", "yuv420p")
GOP = ("-g", "10")

# Name, codec, output options; each with a pattern of its own: files of the same content are decoded once.
CLIPS: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
    ("faststart.mp4", clips.X264, (*GOP, "-movflags", "+faststart")),
    ("index-at-end.mp4", clips.X264, GOP),
    ("fragments.mp4", clips.X264, (*GOP, "-movflags", "frag_keyframe+empty_moov")),
    ("b-frames.mkv", B_FRAMES, GOP),
    ("hevc.mkv", ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none"), GOP),
    ("vp8.webm", VP8, GOP),
    ("vp9.webm", VP9, GOP),
    ("xvid.avi", XVID, GOP),
    ("mpeg2.ts", ("-c:v", "mpeg2video"), GOP),
    ("h264.ts", B_FRAMES, GOP),
    ("animation.mov", ("-c:v", "qtrle", "-pix_fmt", "rgb24"), GOP),
    ("mjpeg.mov", ("-c:v", "mjpeg"), ()),
    ("sorenson.flv", ("-c:v", "flv"), GOP),
    ("windows.wmv", ("-c:v", "wmv2"), GOP),
    ("theora.ogv", ("-c:v", "libtheora"), GOP),
    ("pictures.gif", ("-c:v", "gif"), ()),
)


def make_clips(folder: Path) -> dict[str, bytes]:
    """Return good clips by name: of every container and codec above, one with sound, one turned."""
    for number, (name, codec, extra) in enumerate(CLIPS):
        # More than 255 wide, so that Matroska spends two bytes on a size.
        size = "272x260" if name.endswith("mkv") else "80x60"
        filters = f"hue=h={22 * number}"
        clips.make_clip(folder / name, seconds=2.4, size=size, filters=filters, codec=codec, extra=(*extra, *EXACT))
    sources = ("testsrc2=size=80x60:rate=10:duration=2.4", "sine=duration=2.4")
    inputs = [argument for source in sources for argument in ("-f", "lavfi", "-i", source)]
    clips.run_ffmpeg(*inputs, *clips.X264, *GOP, *EXACT, f"file:{folder / 'sound.mp4'}")
    copy = ("-i", f"file:{folder / 'index-at-end.mp4'}", "-c", "copy", *EXACT)
    clips.run_ffmpeg("-display_rotation", "90", *copy, f"file:{folder / 'turned.mp4'}")
    names = [name for name, _, _ in CLIPS] + ["sound.mp4", "turned.mp4"]
    return {name: (folder / name).read_bytes() for name in names}


Damage = Callable[[bytes, bytes, random.Random], bytes]


def _flipped(num_bits: int, begin: float, end: float) -> Damage:
    """Return what flips bits between two shares of the length."""

    def flip(data: bytes, other: bytes, chance: random.Random) -> bytes:
        changed = bytearray(data)
        for _ in range(num_bits):
            at = chance.randrange(int(begin * len(data)), int(end * len(data)))
            changed[at] ^= 1 << chance.randrange(8)
        return bytes(changed)

    return flip


def _in_block(change: Callable[[bytes, random.Random], bytes]) -> Damage:
    """Return what puts something else in the place of a block."""

    def damage(data: bytes, other: bytes, chance: random.Random) -> bytes:
        begin = chance.randrange(len(data) - 16)
        end = min(len(data), begin + chance.randrange(16, 3000))
        return data[:begin] + change(data[begin:end], chance) + data[end:]

    return damage


def _extreme(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Overwrite numbers of the header, wherever they are, by those at which integers end."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        number = chance.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0" * 4, b"\xff" * 8])
        # Of an MP4 without its index in front the header lies behind.
        at = chance.randrange(1000)
        at = len(data) - 1000 + at if chance.random() < 0.5 else at
        changed[at : at + len(number)] = number
    return bytes(changed[: len(data)])


DAMAGES: dict[str, Damage] = {
    "truncated": lambda data, other, chance: data[: chance.randrange(1, len(data))],
    "few-bits": _flipped(4, 0, 1),
    "many-bits": _flipped(200, 0.05, 1),
    "few-bits-in-header": _flipped(4, 0, 0.04),
    "many-bits-in-header": _flipped(30, 0, 0.04),
    "few-bits-at-end": _flipped(6, 0.9, 1),
    "zeroed": _in_block(lambda block, chance: bytes(len(block))),
    "repeated": _in_block(lambda block, chance: block * chance.randrange(2, 20)),
    "holed": _in_block(lambda block, chance: b""),
    "noisy": _in_block(lambda block, chance: chance.randbytes(len(block))),
    "extreme": _extreme,
    "swapped-header": lambda data, other, chance: other[:4096] + data[4096:],
    "joined": lambda data, other, chance: data + other,
    "beheaded": lambda data, other, chance: data[chance.randrange(1, len(data) // 2) :],
}


@dataclass(frozen=True)
class Lie:
    """A field of a header, found by what stands before it, and absurd values for it.

    `format` is the field's in the language of `struct`; what does not fit into it is given as bytes.
    """

    clip: str
    mark: bytes
    offset: int
    format: str
    values: tuple[float | bytes, ...]


_ENDS = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)
_ONE, _MOST = b"\0\0\0\1", b"\x7f\xff\xff\xff"
LIES = (
    Lie("faststart.mp4", b"tkhd", 80, ">I", (0, 0xFFFFFFFF)),
    Lie("turned.mp4", b"tkhd", 44, ">9i", (b"\0" * 36, b"\x7f\xff\xff\xff" * 9)),
    Lie("index-at-end.mp4", b"mvhd", 16, ">I", _ENDS),
    Lie("index-at-end.mp4", b"mdhd", 16, ">I", _ENDS),
    Lie("faststart.mp4", b"mdhd", 20, ">I", _ENDS),
    Lie("faststart.mp4", b"stsd", 8, ">I", (0, 0xFFFFFFFF)),
    Lie("faststart.mp4", b"stsd", 44, ">HH", (b"\xff\xff\xff\xff", b"\0\0\0\0")),
    Lie("animation.mov", b"stsd", 44, ">HH", (b"\xff" * 4, b"\0\1\0\1", b"\x0f\xa0\x0f\xa0", b"\xff\xff\0\1")),
    Lie("mjpeg.mov", b"stsd", 44, ">HH", (b"\xff\xff\xff\xff", b"\0\1\0\1")),
    Lie("faststart.mp4", b"stsz", 8, ">I", _ENDS[1:]),
    Lie("faststart.mp4", b"stsz", 12, ">I", _ENDS),
    Lie("index-at-end.mp4", b"stsz", 16, ">I", _ENDS),
    Lie("faststart.mp4", b"stts", 8, ">I", _ENDS),
    Lie("faststart.mp4", b"stts", 12, ">I", _ENDS),
    Lie("index-at-end.mp4", b"stts", 16, ">I", _ENDS),
    Lie("faststart.mp4", b"stsc", 16, ">I", _ENDS),
    Lie("faststart.mp4", b"stco", 12, ">I", _ENDS),
    Lie("index-at-end.mp4", b"stss", 8, ">I", _ENDS),
    Lie("faststart.mp4", b"elst", 12, ">I", _ENDS),
    Lie("index-at-end.mp4", b"elst", 16, ">I", _ENDS),
    Lie("index-at-end.mp4", b"pasp", 4, ">II", (_ONE + _MOST, _MOST + _ONE, b"\0" * 8)),
    Lie("index-at-end.mp4", b"moov", -4, ">I", _ENDS),
    Lie("faststart.mp4", b"mdat", -4, ">I", (0, 1, 0xFFFFFFFF)),
    Lie("b-frames.mkv", b"\xb0\x82", 2, ">H", (0, 1, 0xFFFF)),
    Lie("b-frames.mkv", b"\xba\x82", 2, ">H", (0, 0xFFFF)),
    Lie("b-frames.mkv", b"\x44\x89\x88", 3, ">d", (0.0, -1.0, 1e300, float("inf"), float("nan"))),
    Lie("vp8.webm", b"\x44\x89\x88", 3, ">d", (5e7, 1e12)),
    Lie("hevc.mkv", b"\x2a\xd7\xb1\x83", 4, ">3s", (b"\0\0\0", b"\0\0\1", b"\xff\xff\xff")),
    Lie("vp9.webm", b"\x2a\xd7\xb1\x83", 4, ">3s", (b"\0\0\0", b"\xff\xff\xff")),
    Lie("xvid.avi", b"avih", 8, "<I", (0, 1, 0xFFFFFFFF)),
    Lie("xvid.avi", b"strh", 28, "<II", (b"\0" * 8, b"\xff" * 8, b"\1\0\0\0\xff\xff\xff\x7f")),
    Lie("xvid.avi", b"strf", 12, "<II", (b"\xff\xff\xff\x7f" * 2, b"\0" * 8)),
    Lie("pictures.gif", b"GIF89a", 6, "<HH", (b"\xff" * 4, b"\xa0\x0f\xa0\x0f", b"\1\0\1\0", b"\xff\xff\1\0")),
)


def _told(lie: Lie, data: bytes, value: float | bytes) -> bytes:
    at = data.index(lie.mark) + lie.offset
    size = struct.calcsize(lie.format)
    written = value if isinstance(value, bytes) else struct.pack(lie.format, value)
    return data[:at] + written.ljust(size, b"\0")[:size] + data[at + size :]


def _oddities(folder: Path, good: dict[str, bytes]) -> dict[str, bytes]:
    """Return what is no damaged clip: wrong names, texts, playlists, sound, pictures, subtitles alone."""
    (folder / "words.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nNothing to see\n")
    words = ("-i", f"file:{folder / 'words.srt'}")
    clips.make_song_with_cover(folder / "cover.mp3")
    sound, still = ("-f", "lavfi", "-i", "sine=duration=1"), ("-f", "lavfi", "-i", "testsrc2", "-frames:v", "1")
    made = {
        **{"sound-only.mp4": sound, "sound-only.mkv": sound, "still.png": still},
        **{"words-only.mp4": (*words, "-c:s", "mov_text"), "words-only.mkv": words},
    }
    for name, arguments in made.items():
        clips.run_ffmpeg(*arguments, *EXACT, f"file:{folder / name}")
    segments = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
    return {
        **{name: (folder / name).read_bytes() for name in made if name != "still.png"},
        "cover-art.mp4": (folder / "cover.mp3").read_bytes(),
        "still.avi": (folder / "still.png").read_bytes(),
        "really-mp4.avi": good["faststart.mp4"] + bytes(8),
        "really-mkv.mp4": good["b-frames.mkv"] + bytes(8),
        "really-gif.webm": good["pictures.gif"] + b";",
        "really-ts.mov": good["mpeg2.ts"] + bytes(8),
        "empty.mp4": b"",
        "one-byte.mkv": b"\x1a",
        "text.mp4": b"This is no video.\n",
        "page.webm": b"<!doctype html><title>404 Not Found</title>\n",
        "zeros.ts": bytes(50_000),
        "sync-bytes.ts": (b"\x47" + bytes(187)) * 200,
        "playlist-of-a-file.mp4": segments.format("000-faststart.mp4").encode(),
        "playlist-of-a-host.mkv": segments.format("http://127.0.0.1:9/a.ts").encode(),
        "playlist-of-passwords.mkv": segments.format("file:///etc/passwd").encode(),
        "script.mp4": b"ffconcat version 1.0\nfile 000-faststart.mp4\n",
        "manifest.mp4": b'<?xml version="1.0"?><MPD><Period><BaseURL>http://127.0.0.1:9/</BaseURL></Period></MPD>',
        "session.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "%03d.mp4": good["faststart.mp4"] + bytes(9),
        "two\nlines & 'quotes'.mp4": good["faststart.mp4"] + bytes(10),
        "-i file:concat:a|b.mkv": good["b-frames.mkv"] + bytes(9),
        os.fsdecode(b"not-utf8-\xff.gif"): good["pictures.gif"] + b";;",
    }


def make_corpus(folder: Path, seed: int = 0) -> list[Path]:
    """Write `NUM_FILES` files of a seed; the first ones are whole and called `NNN-good-...`."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as aside:
        good = make_clips(Path(aside))
        contents = [(f"good-{name}", data) for name, data in good.items()]
        contents += _oddities(Path(aside), good).items()
    for number, lie in enumerate(LIES):
        told = [_told(lie, good[lie.clip], value) for value in lie.values]
        contents += [(f"lie-{number:02}-{value}-{lie.clip}", data) for value, data in enumerate(told)]
    special = _make_special(folder, good)
    damages = list(DAMAGES.items())
    for number in range(NUM_FILES - len(contents) - len(special)):
        kind, damage = damages[number % len(damages)]
        name, other = chance.sample(sorted(good), 2)
        contents.append((f"{kind}-{name}", damage(good[name], good[other], chance)))
    paths = [folder / f"{number:03}-{name}" for number, (name, _) in enumerate(contents)]
    for path, (_, data) in zip(paths, contents, strict=True):
        path.write_bytes(data)
    return sorted([*paths, *special])


def _make_special(folder: Path, good: dict[str, bytes]) -> list[Path]:
    """Make what is found in a folder and is no file, or only like one."""
    (folder / "folder.mp4").mkdir(parents=True)
    (folder / "folder.mp4" / "inside.mp4").write_bytes(good["faststart.mp4"] + bytes(11))
    os.mkfifo(folder / "pipe.mp4")
    (folder / "to-nowhere.mp4").symlink_to("nowhere.mp4")
    (folder / "to-itself.mp4").symlink_to("to-itself.mp4")
    return [
        folder / "folder.mp4" / "inside.mp4",
        *(folder / name for name in ("pipe.mp4", "to-nowhere.mp4", "to-itself.mp4")),
    ]


def main() -> None:
    """Extract, and watch this process while it does."""
    import gc
    import json
    from functools import partial

    from svb.extract import run as run_module
    from svb.extract.backbones import FAMILIES
    from svb.extract.config import ExtractConfig
    from svb.extract.pool.decode_pool import DecodePool
    from svb.extract.progress import ExtractProgress

    # Replaced that often, workers show what each one costs.
    run_module.DecodePool = partial(DecodePool, videos_a_worker=20)  # type: ignore[assignment,misc]
    FAMILIES["toy"] = "toy_backbone"
    options = json.loads(sys.argv[2])
    open_before = clips.open_files()
    open_files: list[int] = []
    messages = heard()

    def on_progress(progress: ExtractProgress) -> None:
        open_files.append(clips.open_files())

    videos = [Path(path) for path in options.pop("videos")]
    config = ExtractConfig(
        ("toy:frames", "toy:clips"), precision="float32", engine="torch", workers=2, batch_size=4, **options
    )
    run_module.extract(videos, Path(sys.argv[1]), config, on_progress=on_progress)
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    fared = {
        "open_files": open_files,
        "open_files_before": open_before,
        "open_files_after": clips.open_files(),
        "frame_memories": maps.count("memfd:svb"),
        "children": [Path(f"/proc/{child}/cmdline").read_text() for child in clips.child_processes().split()],
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "messages": messages,
    }
    print(json.dumps(fared))


if __name__ == "__main__":
    main()
