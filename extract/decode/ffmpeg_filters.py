"""Builds ffmpeg's filters and expressions: which frames pass, at which size, and how their times are printed."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from svb.extract.decode.choice import earliest, scene_expression
from svb.extract.decode.decoder import MAX_ASPECT_RATIO, MIN_ASPECT_RATIO
from svb.extract.decode.sampling import TIME_TOLERANCE_SECONDS, Sampling

# Linux takes no argument longer than 128 KiB. Above this many positions every frame is converted, and
# the unwanted ones are dropped here.
MAX_SELECTED_POSITIONS = 5000

# A time takes more characters than a position.
MAX_SELECTED_TARGETS = 2000


@dataclass(frozen=True)
class Choice:
    """The wanted frames if they were listed before, as `FrameChooser` takes them."""

    positions: Collection[int] | None = None
    targets_seconds: Sequence[float] | None = None
    seen_seconds: array[float] | None = None

    @property
    def is_listed(self) -> bool:
        return self.positions is not None


def select_expression(sampling: Sampling, choice: Choice) -> str:
    """Return the choice as an ffmpeg expression with the same operations as `FrameChooser`."""
    if choice.positions is not None:
        return "1" if len(choice.positions) > MAX_SELECTED_POSITIONS else _any_of(sorted(choice.positions))
    if choice.targets_seconds is not None:
        if len(choice.targets_seconds) > MAX_SELECTED_TARGETS:
            return "1"
        return f"if(gt(st(0,{_num_passed(earliest(choice.targets_seconds))}),ld(1)),st(1,ld(0)),0)"
    if sampling.every_nth is not None:
        return f"not(mod(n,{sampling.every_nth}))"
    if sampling.scenes is not None:
        return scene_expression(sampling.scenes)
    if sampling.keyframes:
        return "key"
    assert sampling.fps is not None
    fps = float(sampling.fps)

    def grid_point(time: str) -> str:
        return f"floor(({time}-start_t+{TIME_TOLERANCE_SECONDS!r})*{fps!r})"

    return f"if(isnan(prev_selected_t),1,gt({grid_point('t')},{grid_point('prev_selected_t')}))"


def _any_of(positions: list[int]) -> str:
    """Return an expression for `n` being one of these: a shallow tree, because each frame walks down it."""
    if len(positions) <= 8:
        return "+".join(f"eq(n,{position})" for position in positions)
    middle = len(positions) // 2
    return f"if(lt(n,{positions[middle]}),{_any_of(positions[:middle])},{_any_of(positions[middle:])})"


def _num_passed(times_seconds: list[float], before: int = 0) -> str:
    """Return an expression for how many of these ascending times have passed, as a shallow tree."""
    if not times_seconds:
        return str(before)
    middle = len(times_seconds) // 2
    earlier = _num_passed(times_seconds[:middle], before)
    later = _num_passed(times_seconds[middle + 1 :], before + middle + 1)
    return f"if(lt(t,{times_seconds[middle]!r}),{earlier},{later})"


def scaled_size(resize_px: int | tuple[int, int] | None) -> tuple[str, str]:
    """Return width and height as ffmpeg expressions, equal to `square_pixels_width` and `resized`."""
    if isinstance(resize_px, tuple):
        return str(resize_px[1]), str(resize_px[0])
    sane = f"between(sar,{MIN_ASPECT_RATIO!r},{MAX_ASPECT_RATIO!r})"
    width = f"if({sane},max(1,floor(iw*sar+0.5)),iw)"
    if resize_px is None:
        return width, "ih"
    # ld(0) is the width with square pixels, ld(1) the short side, ld(2) the long one.
    sides = f"st(0,{width})*0+st(1,min(ld(0),ih))*0+st(2,max(ld(0),ih))*0"
    is_strip = f"gt(ld(2),{MAX_ASPECT_RATIO!r}*ld(1))"
    long_side = f"trunc({resize_px}*ld(2)/ld(1))"
    return (
        f"{sides}+if({is_strip},ld(0),if(gt(ld(0),ih),{long_side},{resize_px}))",
        f"{sides}+if({is_strip},ih,if(gt(ld(0),ih),{resize_px},{long_side}))",
    )


def print_time(stream: Any, key: str, times_fd: int) -> Any:
    # The filter prints only frames that carry its key, so a first filter adds it.
    marked = stream.filter("metadata", mode="add", key=key, value=1)
    return marked.filter("metadata", mode="print", key=key, direct=1, file=f"pipe:{times_fd}")
