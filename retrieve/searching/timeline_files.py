"""Writes a timeline for an editor: OpenTimelineIO, an EDL (CMX 3600) or Final Cut Pro's XML, by the file's suffix.

opentimelineio writes `.otio`. Its adapters for the other two are not used: they count 29.97 frames a second as 29
or give no rate at all (FCPXML), and every timecode of such a file becomes a drop-frame one (EDL).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from svb.data.publish import published_file
from svb.data.text import storable_text
from svb.errors import InputError, UsageError
from svb.retrieve.answer import VideoResult
from svb.retrieve.searching.timeline import SourceVideo, TimelineClip, timecode_of, timeline_clips

# Editors begin a sequence at the first hour, so that there is room before it.
EDL_START_SECONDS = 3600
EDL_RATES = tuple(map(Fraction, (24, 25, 30, 48, 50, 60))) + tuple(Fraction(n, 1001) for n in (24000, 30000, 60000))


def write_timeline(
    found: Sequence[tuple[str, Sequence[VideoResult]]], file: Path, handles_seconds: float = 0.0
) -> list[str]:
    """Write the moments found as a timeline.

    Args:
        found: Queries, each with the videos found for it.
        file: The file to write; the suffix tells the format, see `require_timeline`.
        handles_seconds: Time to add before and after each moment.

    Returns:
        Notes for the user: what was left out and why.

    Raises:
        UsageError: The suffix is unknown, or the handles are out of range.
        InputError: No moment can be used, `.otio` needs a package that is not installed, or the file cannot be
            written.
    """
    require_timeline(file, handles_seconds)
    clips, notes = timeline_clips(found, handles_seconds)
    if not clips:
        raise InputError("no moment was found for the timeline - search for something else")
    if file.suffix.lower() == ".edl":
        clips, more = _of_one_rate(clips)
        notes += more
    # A name in a file system may hold bytes that are not text.
    title = storable_text(f"svb: {', '.join(dict.fromkeys(clip.query for clip in clips))}"[:120])
    text = WRITERS[file.suffix.lower()](title, clips)
    try:
        with published_file(file) as aside:
            aside.write_text(text, "utf-8")
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}) - make its folder writable, or name another file"
        ) from error
    return notes


def require_timeline(file: Path, handles_seconds: float = 0.0) -> None:
    """Refuse a file that no timeline can be written to, before anything is searched.

    Raises:
        UsageError: The file's suffix is unknown, it is a folder, or the handles are out of range.
        InputError: opentimelineio is needed and not installed.
    """
    if file.suffix.lower() not in WRITERS:
        raise UsageError(f"--otio got {file} - expected a file that ends in {', '.join(WRITERS)}")
    if file.is_dir():
        raise UsageError(f"--otio got {file}, a folder - name the file to write")
    if not 0 <= handles_seconds < 1e6:
        raise UsageError(f"the handles are {handles_seconds:g} s - expected 0 or more, and less than 1e6")
    if file.suffix.lower() == ".otio":
        _opentimelineio()


def _opentimelineio() -> Any:
    try:
        import opentimelineio
    except ImportError as error:
        raise InputError(
            f".otio files need opentimelineio ({error}) - pip install 'svb-video[editor]', or write .edl or .fcpxml"
        ) from error
    return opentimelineio


# --- OpenTimelineIO


def _otio(title: str, clips: Sequence[TimelineClip]) -> str:
    otio = _opentimelineio()
    timeline = otio.schema.Timeline(name=title)
    for kind in (otio.schema.TrackKind.Video, otio.schema.TrackKind.Audio):
        track = otio.schema.Track(name=kind, kind=kind)
        for clip in clips:
            if kind == otio.schema.TrackKind.Video or clip.source.has_sound:
                track.append(_otio_clip(otio, clip))
            else:
                gap = otio.schema.Gap(source_range=_range(otio, 0, clip.end_frame - clip.begin_frame, clip.source))
                track.append(gap)
        if any(clip.source.has_sound for clip in clips) or kind == otio.schema.TrackKind.Video:
            timeline.tracks.append(track)
    return str(otio.adapters.write_to_string(timeline, "otio_json"))


def _otio_clip(otio: Any, clip: TimelineClip) -> Any:
    source, start = clip.source, clip.source.start_frame
    media = otio.schema.ExternalReference(
        target_url=source.path.as_uri(), available_range=_range(otio, start, source.num_frames, source)
    )
    media.name = storable_text(source.path.name)
    marker = otio.schema.Marker(
        name=storable_text(clip.label),
        marked_range=_range(otio, start + clip.mark_frame, 1, source),
        color=otio.schema.MarkerColor.GREEN,
        metadata={"svb": {"query": storable_text(clip.query), "score": clip.moment.score}},
    )
    return otio.schema.Clip(
        name=storable_text(clip.result.video_id),
        media_reference=media,
        source_range=_range(otio, start + clip.begin_frame, clip.end_frame - clip.begin_frame, source),
        markers=[marker],
        metadata={"svb": _exact(clip)},
    )


def _exact(clip: TimelineClip) -> dict[str, Any]:
    """Return what an editor's frames cannot hold: exact times and rates."""
    return {
        "rank": clip.result.rank,
        "confidence": clip.result.confidence,
        "begin_seconds": clip.moment.begin_seconds,
        "end_seconds": clip.moment.end_seconds,
        "best_seconds": clip.moment.best_seconds,
        "frame_rate": str(clip.source.rate),
        "is_variable_frame_rate": clip.source.is_variable,
    }


def _range(otio: Any, begin: int, count: int, source: SourceVideo) -> Any:
    rate = float(source.rate)
    return otio.opentime.TimeRange(otio.opentime.RationalTime(begin, rate), otio.opentime.RationalTime(count, rate))


# --- EDL


def _of_one_rate(clips: Sequence[TimelineClip]) -> tuple[list[TimelineClip], list[str]]:
    """Return the clips of the first one's rate, and a note about the others: an EDL has one rate.

    Raises:
        InputError: There is no timecode at that rate.
    """
    rate = clips[0].source.rate
    if rate not in EDL_RATES:
        raise InputError(
            f"{clips[0].source.path} has {rate} frames a second, for which an EDL has no timecode - write .otio or "
            ".fcpxml"
        )
    kept = [clip for clip in clips if clip.source.rate == rate]
    if len(kept) == len(clips):
        return kept, []
    return kept, [
        f"left out of the timeline: {len(clips) - len(kept)} of {len(clips)} moments, whose videos do not have "
        f"{rate} frames a second: an EDL has one rate - write .otio or .fcpxml for all"
    ]


def _edl(title: str, clips: Sequence[TimelineClip]) -> str:
    rate = clips[0].source.rate
    # The record side counts as the first source does; each source keeps its own way of counting.
    is_drop = clips[0].source.is_drop_frame
    at = round(EDL_START_SECONDS * (rate if is_drop else round(rate)))
    lines = [f"TITLE: {_line(title)}", f"FCM: {'' if is_drop else 'NON-'}DROP FRAME", ""]
    for number, clip in enumerate(clips, start=1):
        source, count = clip.source, clip.end_frame - clip.begin_frame
        begin, end = (source.start_frame + frame for frame in (clip.begin_frame, clip.end_frame))
        times = [timecode_of(frame, rate, is_drop_frame=source.is_drop_frame) for frame in (begin, end)]
        times += [timecode_of(frame, rate, is_drop_frame=is_drop) for frame in (at, at + count)]
        reel = re.sub(r"[^A-Za-z0-9]", "", source.path.stem)[:8] or "AX"
        channels = "AA/V" if source.has_sound else "V"
        lines.append(f"{number:03}  {reel:8} {channels:5} C        {' '.join(times)}")
        lines.append(f"* FROM CLIP NAME:  {_line(clip.result.video_id)}")
        lines.append(f"* FROM CLIP: {_line(str(source.path))}")
        mark = timecode_of(source.start_frame + clip.mark_frame, rate, is_drop_frame=source.is_drop_frame)
        lines += [f"* LOC: {mark} GREEN   {_line(clip.label)}", ""]
        at += count
    return "\n".join(lines)


def _line(text: str) -> str:
    """Return text as a part of a line: a name or a query may hold line breaks."""
    return " ".join("".join(each if each.isprintable() else " " for each in storable_text(text)).split())


# --- Final Cut Pro's XML


def _fcpxml(title: str, clips: Sequence[TimelineClip]) -> str:
    root = ElementTree.Element("fcpxml", version="1.8")
    resources = ElementTree.SubElement(root, "resources")
    ids: dict[Any, str] = {}
    for clip in clips:
        source = clip.source
        shape = (source.rate, source.width_px, source.height_px)
        if shape not in ids:
            ids[shape] = f"r{len(ids) + 1}"
            size = {"width": str(source.width_px), "height": str(source.height_px)}
            frame = {"frameDuration": _seconds(1 / source.rate)}
            ElementTree.SubElement(resources, "format", {"id": ids[shape], **frame, **size})
        if source.path not in ids:
            ids[source.path] = f"r{len(ids) + 1}"
            held = {"id": ids[source.path], "name": _line(clip.result.video_id), "src": source.path.as_uri()}
            held |= {"start": _seconds(source.start_frame / source.rate), "format": ids[shape], "hasVideo": "1"}
            held |= {"duration": _seconds(source.num_frames / source.rate)}
            ElementTree.SubElement(resources, "asset", held | ({"hasAudio": "1"} if source.has_sound else {}))
    event = ElementTree.SubElement(ElementTree.SubElement(root, "library"), "event", name=_line(title))
    project = ElementTree.SubElement(event, "project", name=_line(title))
    first = clips[0].source
    rate = first.rate
    of_sequence = {"format": ids[rate, first.width_px, first.height_px], "tcStart": "0s"}
    of_sequence |= {"tcFormat": "DF" if first.is_drop_frame else "NDF"}
    sequence = ElementTree.SubElement(project, "sequence", of_sequence)
    spine, at = ElementTree.SubElement(sequence, "spine"), 0
    for clip in clips:
        # A clip lasts whole frames of the sequence that it is on.
        count = max(1, round((clip.end_frame - clip.begin_frame) / clip.source.rate * rate))
        _add_fcpxml_clip(spine, clip, ids[clip.source.path], (at / rate, count / rate))
        at += count
    sequence.set("duration", _seconds(at / rate))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, "unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n{text}\n'


def _add_fcpxml_clip(
    spine: ElementTree.Element, clip: TimelineClip, asset: str, place: tuple[Fraction, Fraction]
) -> None:
    source = clip.source
    held = {"ref": asset, "name": _line(clip.result.video_id), "tcFormat": "DF" if source.is_drop_frame else "NDF"}
    held |= {"offset": _seconds(place[0]), "duration": _seconds(place[1])}
    held |= {"start": _seconds((source.start_frame + clip.begin_frame) / source.rate)}
    element = ElementTree.SubElement(spine, "asset-clip", held)
    mark = {"start": _seconds((source.start_frame + clip.mark_frame) / source.rate), "value": _line(clip.label)}
    ElementTree.SubElement(element, "marker", {**mark, "duration": _seconds(1 / source.rate)})


def _seconds(time: Fraction) -> str:
    return f"{time.numerator}/{time.denominator}s" if time.denominator > 1 else f"{time.numerator}s"


WRITERS: dict[str, Callable[[str, Sequence[TimelineClip]], str]] = {
    ".otio": _otio,
    ".edl": _edl,
    ".fcpxml": _fcpxml,
}
