"""`svb search --otio`: the moments found as a timeline for an editor, on the frames and timecode of their files.

An editor counts frames. Frame n of a file of constant rate r is the one that begins n / r seconds after the first.
Where the rate varies, editors lay the file out on a constant one: there a moment begins with the first place at
which its frame is shown. Either way the frame at a clip's start, decoded at that time, is the frame that svb found.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av.error
from av.container import InputContainer
from av.video.stream import VideoStream

from svb.errors import InputError
from svb.extract.decode.decoder import DecodeError, check_file
from svb.extract.decode.options import Limits
from svb.extract.decode.pyav_file import opened, promised_seconds
from svb.extract.decode.sampling import TIME_TOLERANCE_SECONDS
from svb.retrieve.answer import Moment, VideoResult
from svb.retrieve.searching.pictures import TIME_LIMIT_SECONDS, FrameReader
from svb.retrieve.searching.source_file import problem_of

_NTSC = (Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001), Fraction(120000, 1001))
_WHOLE = tuple(map(Fraction, (15, 24, 25, 30, 48, 50, 60, 100, 120, 240)))
# A header's rate may be off by so much: it is a number of frames over a duration in whole units of time.
RATE_TOLERANCE = Fraction(1, 5000)
# Above this, the least common rate of a file's frame times is its unit of time, not the rate of the recording.
MAX_RATE = 240
_TIMECODE = re.compile(r"(\d{2}):(\d{2}):(\d{2})([:;.])(\d{2,3})")


@dataclass(frozen=True)
class SourceVideo:
    """The facts about a video's file that an editor needs.

    Attributes:
        path: The file.
        rate: Frames a second, exact; where it varies, the one that editors lay it out on.
        is_variable: Whether the rate varies.
        first_seconds: Time of the first frame, on the file's own clock.
        num_frames: How many frames the video has at its rate.
        start_frame: The frame number that its start timecode stands for; 0 without one.
        is_drop_frame: Whether its timecode leaves numbers out to keep up with the clock.
        has_sound: Whether it has an audio stream.
    """

    path: Path
    rate: Fraction
    is_variable: bool
    first_seconds: float
    num_frames: int
    start_frame: int
    is_drop_frame: bool
    width_px: int
    height_px: int
    has_sound: bool


@dataclass(frozen=True)
class TimelineClip:
    """A moment on a timeline: frames `[begin_frame, end_frame)` of its file, counted from 0, with a mark.

    Attributes:
        mark_frame: The frame with the highest score.
        query: What was searched for.
        result: The video that was found.
        moment: The moment that was found, in exact seconds.
    """

    source: SourceVideo
    begin_frame: int
    end_frame: int
    mark_frame: int
    query: str
    result: VideoResult
    moment: Moment

    @property
    def label(self) -> str:
        """Return the query and the score, for the marker."""
        return f"{self.query} ({self.moment.score:.3f}, {self.result.confidence})"


def timeline_clips(
    found: Sequence[tuple[str, Sequence[VideoResult]]], handles_seconds: float = 0.0
) -> tuple[list[TimelineClip], list[str]]:
    """Return the moments found as clips of their files, and notes for the user.

    Args:
        found: Queries, each with the videos found for it.
        handles_seconds: Time to add before and after each moment, as far as the file has it.

    Returns:
        The clips in the order of the results, and notes: which videos were left out and why, and whose frame rate
        varies.

    Raises:
        InputError: There are moments, and none could be used.
    """
    clips, notes = list[TimelineClip](), list[str]()
    for query, results in found:
        for result in results:
            try:
                clips += _clips_of(query, result, handles_seconds)
            except InputError as error:
                notes.append(f"left out of the timeline: {error}")
    if notes and not clips:
        raise InputError(notes[0] if len(notes) == 1 else f"{notes[0]}; and so are {len(notes) - 1} more")
    variable = {clip.source.path: clip.source for clip in clips if clip.source.is_variable}
    notes += [
        f"the frame rate of {path} varies: the timeline counts {source.rate} frames a second of it"
        for path, source in variable.items()
    ]
    return clips, notes


def _clips_of(query: str, result: VideoResult, handles_seconds: float) -> Iterator[TimelineClip]:
    problem = problem_of(result)
    if problem is not None:
        raise InputError(f"{problem} - `svb extract` and `svb index` its folder again")
    path = Path(result.source_path).absolute()
    moments = result.moments
    try:
        check_file(path)
        with opened(path, Limits()) as (container, stream):
            source = _source(path, container, stream)
            reader = FrameReader(path, container, stream, time.monotonic() + TIME_LIMIT_SECONDS)
            begins = [max(moment.begin_seconds - handles_seconds, source.first_seconds) for moment in moments]
            asked = {*begins, *(moment.best_seconds for moment in moments)}
            shown = {seconds: reader.shown(seconds)[1] for seconds in sorted(asked)}
    except (DecodeError, OSError) as error:
        raise InputError(str(error)) from error
    except av.error.FFmpegError as error:
        raise InputError(f"{path} cannot be decoded ({error.strerror}) - play it: it may be damaged") from error
    for moment, begin in zip(moments, begins, strict=True):
        first = _frame_of(shown[begin], source)
        end = math.ceil((moment.end_seconds + handles_seconds - source.first_seconds) * source.rate - 1e-6)
        last = max(min(end, source.num_frames), first + 1)
        mark = min(max(_frame_of(shown[moment.best_seconds], source), first), last - 1)
        yield TimelineClip(source, first, last, mark, query, result, moment)


def _frame_of(shown_seconds: float, source: SourceVideo) -> int:
    """Return the number of the frame that begins at a time; the first that shows it where the rate varies."""
    exact = (shown_seconds - source.first_seconds) * source.rate
    nearest = round(exact)
    if abs(float((exact - nearest) / source.rate)) <= TIME_TOLERANCE_SECONDS:
        return max(nearest, 0)
    return max(math.ceil(exact), 0)


def _source(path: Path, container: InputContainer, stream: VideoStream) -> SourceVideo:
    rate, is_variable = _rate(path, stream)
    first = 0.0
    if stream.start_time is not None and stream.time_base is not None:
        first = float(stream.start_time * stream.time_base)
    seconds = promised_seconds(container, stream, path)
    start, is_drop = _start_frame(_timecode(container, stream), rate)
    return SourceVideo(
        path=path,
        rate=rate,
        is_variable=is_variable,
        first_seconds=first,
        num_frames=max(1, round(seconds * rate)) if seconds > 0 else 2**31,
        start_frame=start,
        is_drop_frame=is_drop,
        width_px=stream.codec_context.width,
        height_px=stream.codec_context.height,
        has_sound=bool(container.streams.audio),
    )


def _rate(path: Path, stream: VideoStream) -> tuple[Fraction, bool]:
    """Return a stream's exact frame rate, and whether it varies.

    Raises:
        InputError: The file does not say.
    """
    average, least_common = stream.average_rate, stream.base_rate
    if not average:
        raise InputError(
            f"the frame rate of {path} is not known, and an editor counts frames - encode it again at a rate of "
            "your choice: `ffmpeg -i FILE -r 25 NEW.mp4`"
        )
    # The least common rate of interlaced video may be that of its fields.
    if not least_common or any(_alike(average * times, least_common) for times in (1, 2)):
        return _standard(average), False
    if least_common <= MAX_RATE:
        return _standard(least_common), True
    return next(
        (rate for rate in sorted((*_NTSC, *_WHOLE)) if rate >= average * (1 - RATE_TOLERANCE)), average
    ), True


def _alike(one: Fraction, other: Fraction) -> bool:
    return abs(one - other) <= other * RATE_TOLERANCE


def _standard(rate: Fraction) -> Fraction:
    """Return the rate that a header's means: 29.97 is 30000/1001."""
    return next((named for named in (*_NTSC, *_WHOLE) if _alike(rate, named)), rate.limit_denominator(1001))


# --- timecode


def _timecode(container: InputContainer, stream: VideoStream) -> str | None:
    """Return the start timecode in a file: of its video stream, its timecode track, or its header."""
    for held in (stream, *container.streams, container):
        if held.metadata.get("timecode"):
            return str(held.metadata["timecode"])
    return None


def _start_frame(timecode: str | None, rate: Fraction) -> tuple[int, bool]:
    """Return the number of frames that a timecode stands for, and whether it is a drop-frame one; 0 without one."""
    match = _TIMECODE.fullmatch(timecode or "")
    if match is None:
        return 0, False
    hours, minutes, seconds = (int(match[number]) for number in (1, 2, 3))
    count = round(rate)
    frame = ((hours * 60 + minutes) * 60 + seconds) * count + int(match[5])
    is_drop = match[4] != ":" and _dropped_a_minute(rate) > 0
    if is_drop:
        total = hours * 60 + minutes
        frame -= _dropped_a_minute(rate) * (total - total // 10)
    return frame, is_drop


def timecode_of(frame: int, rate: Fraction, *, is_drop_frame: bool) -> str:
    """Return the timecode of a frame, `hh:mm:ss:ff`, with `;` before the frames where numbers are dropped."""
    count, dropped = round(rate), _dropped_a_minute(rate) if is_drop_frame else 0
    if dropped:
        # Two numbers are left out at the start of each minute but every tenth (four at 59.94).
        ten_minutes, minute = count * 600 - 9 * dropped, count * 60 - dropped
        tens, rest = divmod(frame, ten_minutes)
        frame += 9 * dropped * tens + (dropped * ((rest - dropped) // minute) if rest > dropped else 0)
    seconds, frames = divmod(frame, count)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours % 24:02}:{minutes:02}:{seconds:02}{';' if dropped else ':'}{frames:02}"


def _dropped_a_minute(rate: Fraction) -> int:
    return {Fraction(30000, 1001): 2, Fraction(60000, 1001): 4}.get(rate, 0)
