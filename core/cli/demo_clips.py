"""Short synthetic clips with captions, drawn by ffmpeg's own generators: svb ships no footage.

Each clip shows one object of one colour that moves in one way over one background. `make_demo_clips`
is the whole stage: plan from the seed, render what is missing, write the caption table last.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ffmpeg
import imageio_ffmpeg

from svb.errors import MismatchError, SvbError, UsageError

WIDTH, HEIGHT, FPS = 192, 144, 10
CAPTIONS_PER_VIDEO = 5
VAL_FRACTION = 1 / 6
# Stored beside the clips; raise it when the same plan would draw or say something else.
DEMO_VERSION = 1

# Each attribute, with the words that captions use for it.
OBJECTS: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("circle", "disc", "ball"),
    "crescent": ("crescent", "crescent moon", "moon"),
    "cross": ("cross", "plus sign"),
    "heart": ("heart", "heart shape"),
    "ring": ("ring", "hoop", "doughnut"),
    "square": ("square", "box", "block"),
    "star": ("star", "five-pointed star"),
    "triangle": ("triangle", "three-sided shape"),
}
COLOURS: Final[dict[str, tuple[str, ...]]] = {
    "blue": ("blue", "azure", "bright blue"),
    "green": ("green", "emerald", "bright green"),
    "orange": ("orange", "tangerine"),
    "pink": ("pink", "rosy pink"),
    "purple": ("purple", "violet"),
    "red": ("red", "crimson", "scarlet"),
    "yellow": ("yellow", "golden"),
}
# Two forms of each wording, because a sentence may need either.
MOTIONS: Final[dict[str, tuple[str, ...]]] = {
    "blink": ("blinks on and off / blinking on and off", "flashes / flashing"),
    "down": ("moves down / moving down", "falls slowly / falling slowly", "sinks / sinking"),
    "grow": ("grows / growing", "gets bigger / getting bigger", "comes closer / coming closer"),
    "left": ("moves left / moving left", "drifts to the left / drifting to the left"),
    "right": ("moves right / moving right", "drifts to the right / drifting to the right"),
    "still": ("stays still / staying still", "does not move / sitting motionless"),
    "up": ("moves up / moving up", "rises slowly / rising slowly", "floats upwards / floating upwards"),
}
BACKGROUNDS: Final[dict[str, tuple[str, ...]]] = {
    "cells": ("a game of life", "swarming white cells", "a field of living cells"),
    "checkerboard": ("a checkerboard", "a chessboard pattern", "a black and white checked pattern"),
    "clouds": ("drifting clouds", "a cloudy background", "soft grey mist"),
    "dark": ("a plain dark background", "a black backdrop", "an empty black screen"),
    "fractal": ("a fractal", "a Mandelbrot fractal", "a swirling fractal pattern"),
    "gradient": ("a smooth gradient", "a background that fades from dark to light", "a soft grey gradient"),
    "light": ("a plain light background", "a white backdrop", "an empty white screen"),
    "noise": ("television static", "grainy noise", "a noisy, flickering screen"),
    "stripes": ("vertical stripes", "a striped background", "a pattern of grey stripes"),
}

_RGB = {
    "blue": "0x1f4fff",
    "green": "0x12b024",
    "orange": "0xff7f00",
    "pink": "0xff6fc0",
    "purple": "0x8a1fc8",
    "red": "0xe01010",
    "yellow": "0xffe000",
}
# True inside the object; ld(0) and ld(1) are x and y from -1 to 1, y down.
_INSIDE = {
    "circle": "lt(hypot(ld(0),ld(1)),.95)",
    "crescent": "lt(hypot(ld(0),ld(1)),.98)*gt(hypot(ld(0)-.45,ld(1)),.78)",
    "cross": "lt(max(abs(ld(0)),abs(ld(1))),.95)*lt(min(abs(ld(0)),abs(ld(1))),.3)",
    "heart": "st(2,1.2*ld(0));st(3,.13-1.2*ld(1));lt(pow(ld(2)*ld(2)+ld(3)*ld(3)-1,3)-ld(2)*ld(2)*pow(ld(3),3),0)",
    "ring": "between(hypot(ld(0),ld(1)),.55,.95)",
    "square": "lt(max(abs(ld(0)),abs(ld(1))),.85)",
    # Folded onto half a point of the star: below the line from its tip to the notch beside it.
    "star": "st(2,hypot(ld(0),ld(1)));st(3,abs(mod(atan2(ld(0),-ld(1))+2.2*PI,.4*PI)-.2*PI));"
    "lt((ld(2)*cos(ld(3))-1)*.247+ld(2)*sin(ld(3))*.66,0)",
    "triangle": "lt(ld(1),.8)*lt(abs(ld(0)),.55*(ld(1)+.95))",
}


@dataclass(frozen=True)
class DemoClip:
    """What one clip shows, and what it is called."""

    video_id: str
    split: str
    object: str
    colour: str
    motion: str
    background: str
    num_frames: int
    # Seeds the size, the place and the background's pattern.
    draw_seed: int
    captions: tuple[str, ...]


def make_demo_clips(
    folder: Path, *, num_videos: int = 300, seed: int = 0, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Render the demo's clips and write their caption table.

    A clip is written aside and renamed, and one that is already there is kept: after a kill, a second
    run does what is missing. The same arguments give the same bytes.

    Args:
        folder: Gets `videos/<object>/clip-0001.mp4` and so on, `demo.json` and `captions.csv`.
        num_videos: Number of clips; from about 180 on, both splits hold every object, colour, motion
            and background.
        seed: Seed of all random choices.
        on_progress: Called with (clips done, all clips) after each clip.

    Returns:
        The path of the caption table (video_id, split, caption), which is written last.

    Raises:
        UsageError: `num_videos` is out of range.
        MismatchError: The folder holds a demo that was made with other settings.
        SvbError: ffmpeg cannot be found or fails.
    """
    clips = plan_demo_clips(num_videos, seed)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"version": DEMO_VERSION, "num_videos": num_videos, "seed": seed})
    _render_missing(clips, folder / "videos", on_progress or (lambda done, total: None))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("video_id", "split", "caption"))
    writer.writerows((clip.video_id, clip.split, caption) for clip in clips for caption in clip.captions)
    return _write_whole(folder / "captions.csv", table.getvalue())


def plan_demo_clips(num_videos: int, seed: int) -> list[DemoClip]:
    """Choose what every clip shows and says, with no combination of attributes twice.

    Raises:
        UsageError: `num_videos` is below 2, or so large that combinations run out.
    """
    most = len(OBJECTS) * len(COLOURS) * len(MOTIONS) * len(BACKGROUNDS)
    if not 2 <= num_videos <= most:
        raise UsageError(f"cannot make {num_videos} demo clips - give a number from 2 to {most}")
    rng = random.Random(seed)
    looks = list(itertools.product(OBJECTS, COLOURS, MOTIONS, BACKGROUNDS))
    looks = rng.sample(looks, num_videos)
    val = _choose_val(looks, rng)
    return [
        DemoClip(
            video_id=f"{look[0]}/clip-{number + 1:04d}",
            split="val" if number in val else "train",
            object=look[0],
            colour=look[1],
            motion=look[2],
            background=look[3],
            num_frames=rng.randint(2 * FPS, 4 * FPS),
            draw_seed=rng.randrange(2**31),
            captions=_write_captions(look, rng),
        )
        for number, look in enumerate(looks)
    ]


def _choose_val(looks: Sequence[tuple[str, str, str, str]], rng: random.Random) -> set[int]:
    """Return the positions of the validation clips, which show every value where there are enough of them."""
    num_val = max(1, round(len(looks) * VAL_FRACTION))
    order = rng.sample(range(len(looks)), len(looks))
    in_train = Counter((place, value) for look in looks for place, value in enumerate(look))
    in_val: set[tuple[int, str]] = set()
    val: set[int] = set()
    # First the clips that bring a value val lacks, then any; never a value's last clip in train, unless
    # there are so few clips that nothing else is left.
    for wants_new, keeps_train in ((True, True), (False, True), (False, False)):
        for number in order:
            values = set(enumerate(looks[number]))
            if len(val) == num_val or number in val or (wants_new and values <= in_val):
                continue
            if keeps_train and min(in_train[value] for value in values) == 1:
                continue
            val.add(number)
            in_val |= values
            in_train.subtract(values)
    return val


def _write_captions(look: tuple[str, str, str, str], rng: random.Random) -> tuple[str, ...]:
    """Describe the clip in full twice, then leave something out: such captions fit other clips too."""
    full = (
        "{a_colour_object} {moves} {over} {background}",
        "there is {a_colour_object} {moving} {over} {background}",
        "{over} {background}, {a_colour_object} {moves}",
        "{a_colour_object} is shown {moving}, and behind it is {background}",
    )
    partial = (
        ("{a_colour_object} {moves}", "{a_colour_object} {moving}"),
        ("{a_colour_object} {over} {background}", "{background} with {a_colour_object}"),
        ("{an_object} {moves} {over} {background}", "{an_object} {moving}, {over} {background}"),
        ("something {colour} {moves} {over} {background}", "{a_colour} shape {moving} {over} {background}"),
        ("an animation of {a_colour_object}", "we see {a_colour_object}"),
    )
    shape, colour, motion, background = look
    templates = rng.sample(full, 2)
    templates += [rng.choice(kind) for kind in rng.sample(partial, CAPTIONS_PER_VIDEO - 2)]
    captions = []
    for template in templates:
        object_word, colour_word = rng.choice(OBJECTS[shape]), rng.choice(COLOURS[colour])
        moves, moving = rng.choice(MOTIONS[motion]).split(" / ")
        text = template.format(
            a_colour_object=_with_article(f"{colour_word} {object_word}"),
            a_colour=_with_article(colour_word),
            an_object=_with_article(object_word),
            colour=colour_word,
            moves=moves,
            moving=moving,
            over=rng.choice(("over", "in front of", "against")),
            background=rng.choice(BACKGROUNDS[background]),
        )
        captions.append(f"{text[0].upper()}{text[1:]}.")
    return tuple(captions)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _claim(folder: Path, settings: dict[str, int]) -> None:
    """Note the settings before the first clip: with another seed, the same names show other things."""
    path = folder / "demo.json"
    if not path.exists():
        _write_whole(path, json.dumps(settings) + "\n")
    elif (found := path.read_text(encoding="utf-8").strip()) != json.dumps(settings):
        raise MismatchError(
            f"{folder} holds a demo made with {found}, not with {json.dumps(settings)} - "
            "remove that folder, or give another one"
        )


def _write_whole(path: Path, text: str) -> Path:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)
    return path


def _render_missing(clips: Sequence[DemoClip], videos: Path, on_progress: Callable[[int, int], None]) -> None:
    try:
        command = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise SvbError(f"no ffmpeg to draw with ({error}) - reinstall imageio-ffmpeg") from error
    missing = [clip for clip in clips if not _path_of(clip, videos).exists()]
    done = len(clips) - len(missing)
    on_progress(done, len(clips))
    # Each ffmpeg runs on one thread, for the sake of the same bytes, so the processes fill the machine.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 2))
    try:
        for future in as_completed([pool.submit(_render, clip, videos, command) for clip in missing]):
            future.result()
            done += 1
            on_progress(done, len(clips))
    finally:
        pool.shutdown(cancel_futures=True)


def _path_of(clip: DemoClip, videos: Path) -> Path:
    return videos / f"{clip.video_id}.mp4"


def _render(clip: DemoClip, videos: Path, command: str) -> None:
    """Draw one clip beside its place and move it there whole."""
    path = _path_of(clip, videos)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name does not end in .mp4, so that programs skip what a killed run leaves in the folder.
    part = path.with_name(path.name + ".part")
    # A killed run's ffmpeg may outlive it by a moment: let it write into a file that has no name.
    part.unlink(missing_ok=True)
    output = _draw(clip).output(
        str(part.absolute()),
        **{"frames:v": clip.num_frames, "c:v": "libx264", "preset": "veryfast", "crf": 28, "threads": 1},
        **{"pix_fmt": "yuv420p", "flags": "+bitexact", "fflags": "+bitexact", "f": "mp4"},
    )
    output = output.global_args("-nostdin", "-v", "error", "-filter_complex_threads", "1")
    done = subprocess.run(
        ffmpeg.compile(output, cmd=command, overwrite_output=True),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        words = " / ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
        raise SvbError(
            f"ffmpeg ended with {done.returncode} on {path} ({words}) - expected a clip; "
            "check the space left on the disk, or name another ffmpeg in IMAGEIO_FFMPEG_EXE"
        )
    part.replace(path)


def _draw(clip: DemoClip) -> Any:
    """Return the stream of the clip's frames: its background with the object laid over it."""
    rng = random.Random(clip.draw_seed)
    size = rng.randrange(60, 77, 2)
    seconds = clip.num_frames / FPS
    canvas = _draw_background(clip.background, rng)
    sprite = _draw_object(clip.object, clip.colour, size)
    gone = f"t/{seconds}"  # from 0 to 1 over the clip
    x, y = str(rng.randint(4, WIDTH - size - 4)), str(rng.randint(4, HEIGHT - size - 4))
    if clip.motion == "grow":
        side = f"trunc({size}*(0.4+1.3*{gone})/2)*2"
        sprite = sprite.filter("scale", w=side, h=side, eval="frame")
        return canvas.overlay(sprite, x="(W-w)/2", y="(H-h)/2")
    if clip.motion == "blink":
        return canvas.overlay(sprite, x=x, y=y, enable="lt(mod(t,0.8),0.45)")
    if clip.motion == "still":
        return canvas.overlay(sprite, x=x, y=y)
    across = {"left": f"1-{gone}", "right": gone, "up": f"1-{gone}", "down": gone}[clip.motion]
    sideways = clip.motion in ("left", "right")
    step = 14 if clip.motion in ("left", "up") else -14
    # A fading trail tells left from right within one frame: pooled features know no order in time.
    copies = sprite.filter_multi_output("split", 3)
    for lag, alpha in ((2, 0.25), (1, 0.5), (0, 1.0)):
        ghost = copies[lag].filter("colorchannelmixer", aa=alpha)
        if sideways:
            canvas = canvas.overlay(ghost, x=f"(W-w)*({across})+{lag * step}", y=y)
        else:
            canvas = canvas.overlay(ghost, x=x, y=f"(H-h)*({across})+{lag * step}")
    return canvas


def _source(name: str, **options: object) -> Any:
    """Return a stream of one of ffmpeg's generators."""
    arguments = ":".join(f"{key}={value}" for key, value in options.items())
    return ffmpeg.input(f"{name}={arguments}", f="lavfi")


def _still(width: int, height: int, luma: str) -> Any:
    """Return an endless grey stream whose one frame is a formula: `geq` is too slow to draw them all."""
    frame = _source("color", c="black", s=f"{width}x{height}", r=FPS, d=1 / FPS).filter("format", "gray")
    return frame.filter("geq", lum=luma).filter("loop", loop=-1, size=1)


def _draw_object(shape: str, colour: str, size: int) -> Any:
    """Return RGBA frames of the object, drawn at three times its size and shrunk for smooth edges."""
    drawn = 3 * size
    formula = f"st(0,2*(X+.5)/W-1);st(1,2*(Y+.5)/H-1);255*({_INSIDE[shape]})"
    mask = _still(drawn, drawn, formula).filter("scale", w=size, h=size, flags="area")
    paint = _source("color", c=_RGB[colour], s=f"{size}x{size}", r=FPS).filter("format", "rgba")
    return ffmpeg.filter([paint, mask], "alphamerge")


def _draw_background(background: str, rng: random.Random) -> Any:
    """Return endless frames of a background, which is grey so that the colour is the object's alone."""
    grey, period, phase = rng.randrange(24), rng.randrange(20, 33, 2), rng.randrange(32)
    pattern_seed = rng.randrange(2**31)
    if background in _FORMULAS:
        formula = _FORMULAS[background].format(
            dark=grey,
            light=255 - grey,
            column=f"floor((X+{phase})/{period})",
            row=f"floor((Y+{phase})/{period})",
            slope=f"{rng.choice((-1, 1))}*(X/W-.5)+{rng.choice((-1, 1))}*(Y/H-.5)",
        )
        return _still(WIDTH, HEIGHT, formula)
    stream = _MOVING[background](pattern_seed)
    return stream.filter("scale", w=WIDTH, h=HEIGHT, flags="neighbor" if background == "cells" else "bicubic")


# The luma of a background that stands still.
_FORMULAS = {
    "checkerboard": "if(mod({column}+{row},2),{light},{dark})",
    "dark": "{dark}",
    "gradient": "128+120*({slope})",
    "light": "{light}",
    "stripes": "if(mod({column},2),195,70+{dark})",
}


def _cells(pattern_seed: int) -> Any:
    rule = {"ratio": 0.3, "mold": 20, "life_color": "white", "death_color": "0x606060", "mold_color": "black"}
    life = _source("life", s="32x24", r=FPS / 2, seed=pattern_seed, **rule)
    # Its first generations are noise.
    return life.filter("trim", start_frame=12).filter("setpts", "PTS-STARTPTS").filter("fps", FPS)


def _clouds(pattern_seed: int) -> Any:
    noise = {"octaves": 4, "persistence": 0.5, "xscale": 5, "yscale": 5, "tscale": 0.5}
    clouds = _source("perlin", s="96x72", r=FPS, random_mode="seed", random_seed=pattern_seed, **noise)
    return clouds.filter("format", "gray").filter("lutyuv", y="clip(2.2*(val-128)+140,0,255)")


def _fractal(pattern_seed: int) -> Any:
    # Zooms by a third in every four seconds, from a start that differs.
    start = random.Random(pattern_seed).uniform(0.35, 1.2)
    zoom = {"start_scale": round(start, 4), "end_scale": round(start / 1.5, 4), "end_pts": 4 * FPS}
    fractal = _source("mandelbrot", s=f"{WIDTH}x{HEIGHT}", r=FPS, maxiter=200, **zoom)
    return fractal.filter("format", "gray")


def _noise(pattern_seed: int) -> Any:
    snow = _source("color", c="gray", s="96x72", r=FPS / 2)
    # It works on luma alone; the filter does not take grey frames.
    return snow.filter("noise", c0s=100, c0f="t", c0_seed=pattern_seed).filter("fps", FPS)


# Make the frames of a background that moves by itself, from a seed.
_MOVING: Final[dict[str, Callable[[int], Any]]] = {
    "cells": _cells,
    "clouds": _clouds,
    "fractal": _fractal,
    "noise": _noise,
}
