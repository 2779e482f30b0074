"""Timelines for editors: each clip begins with the very frame that svb found, whichever file says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import opentimelineio as otio
import pytest
from clips import X264, make_clip, make_late_clip, make_variable_rate_clip

from svb.errors import InputError, UsageError
from svb.retrieve.answer import Moment, VideoResult
from svb.retrieve.searching import timeline
from svb.retrieve.searching.pictures import frame_at
from svb.retrieve.searching.timeline import SourceVideo, timeline_clips
from svb.retrieve.searching.timeline_files import write_timeline

HANDLES = 0.5
QUERY = "a red\nboat & <b>"
SPANS = ((1.0, 2.0, 1.6), (0.33, 0.5, 0.4))
# Its name, frame rate and timecode; what that timecode is in frames, and when the first frame is shown.
FILES = (
    ("drop.mov", "30000/1001", "01:00:00;00", 107892, 0.0),
    ("non-drop.mov", "30000/1001", "01:00:00:00", 108000, 0.0),
    ("fields.mov", "60000/1001", "00:59:59;56", 215780, 0.0),
    ("film.mkv", "24000/1001", None, 0, 0.0),
    ("pal.mp4", "25", "10:00:00:00", 900000, 0.0),
    ("transport.ts", "25", None, 0, 1.4),
    ("old.avi", "30000/1001", None, 0, 0.0),
    ("odd.mp4", "10", None, 0, 0.0),
)


def found(path: Path, begin: float = 0.0, spans: Sequence[tuple[float, float, float]] = SPANS) -> VideoResult:
    moments = tuple(Moment(*(begin + seconds for seconds in span), 0.5) for span in spans)
    stat = path.stat()
    held = {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return VideoResult(1, 0.5, "strong", f"deep/{path.stem}", "0" * 16, str(path), 4.0, moments, **held)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """The files of `FILES`, one whose rate varies and one whose clock begins late, each with its first time."""
    folder = tmp_path_factory.mktemp("editor")
    held = {}
    for name, rate, timecode, _, first in FILES:
        codec = X264 if not name.endswith(".avi") else ("-c:v", "mpeg4")
        extra = ("-timecode", timecode) if timecode else ()
        options: Any = {"fps": rate, "codec": codec, "extra": extra}
        held[name] = (make_clip(folder / name, seconds=4, **options), first)
    variable, late = folder / "varies.mp4", folder / "late clip.mp4"
    make_variable_rate_clip(variable)
    make_late_clip(late)
    return {**held, "varies.mp4": (variable, 0.0), "late clip.mp4": (late, 4.7)}


def shown(path: Path, seconds: float) -> bytes:
    return frame_at(path, seconds, 48).tobytes()


def seconds_at(source: SourceVideo, frame: int) -> float:
    """Return the time of a frame on the file's own clock, as an editor counts."""
    return source.first_seconds + float(frame / source.rate)


def test_each_clip_begins_with_the_frame_that_was_found(files: dict[str, tuple[Path, float]]) -> None:
    for name, (path, first) in files.items():
        clips, notes = timeline_clips([(QUERY, [found(path, first)])], HANDLES)
        assert len(clips) == len(SPANS)
        assert len(notes) == (name == "varies.mp4") and all("varies" in note for note in notes)
        for clip in clips:
            wanted = max(clip.moment.begin_seconds - HANDLES, first)
            assert shown(path, seconds_at(clip.source, clip.begin_frame)) == shown(path, wanted), name
            assert shown(path, seconds_at(clip.source, clip.mark_frame)) == shown(path, clip.moment.best_seconds)
            assert 0 <= clip.begin_frame <= clip.mark_frame < clip.end_frame <= clip.source.num_frames
    for name, rate, timecode, start, _ in FILES:
        source = timeline_clips([(QUERY, [found(*files[name])])])[0][0].source
        assert (source.rate, source.start_frame) == (Fraction(rate), start), name
        if timecode:
            told = timeline.timecode_of(start, source.rate, is_drop_frame=source.is_drop_frame)
            assert told == timecode


def test_timecode_counts_as_the_library_does() -> None:
    for rate in (Fraction(30000, 1001), Fraction(60000, 1001)):
        for frame in (*range(1795, 1803), 17981, 17982, 17983, 35963, 35964, 107892, 2589407):
            expected = otio.opentime.RationalTime(frame, float(rate)).to_timecode(float(rate), True)
            assert timeline.timecode_of(frame, rate, is_drop_frame=True) == expected


@pytest.mark.parametrize("suffix", [".otio", ".edl", ".fcpxml"])
def test_what_is_written_is_read_back(files: dict[str, tuple[Path, float]], tmp_path: Path, suffix: str) -> None:
    """By the library's readers; FCPXML also by its text, as that reader takes 29.97 frames a second for 29."""
    names = ("non-drop.mov", "drop.mov", "pal.mp4", "late clip.mp4")
    results = [found(*files[name]) for name in names]
    clips, _ = timeline_clips([(QUERY, results)], HANDLES)
    file = tmp_path / f"found{suffix}"
    notes = write_timeline([(QUERY, results)], file, HANDLES)
    assert len(notes) == (suffix == ".edl")
    if suffix == ".edl":  # one rate
        clips = [clip for clip in clips if clip.source.rate == clips[0].source.rate]
        assert notes[0].startswith("left out of the timeline: 4 of 8 moments")
    read = otio.adapters.read_from_file(str(file), **({"rate": 30000 / 1001} if suffix == ".edl" else {}))
    if suffix == ".fcpxml":
        read = read[0]
    track = read.video_tracks()[0].find_clips()  # 29 also leaves gaps between them
    assert len(track) == len(clips)
    for clip, held in zip(clips, track, strict=True):
        source = clip.source
        assert held.name == clip.result.video_id
        assert Path(unquote(urlparse(held.media_reference.target_url).path)) == source.path
        if suffix == ".fcpxml":
            continue
        start = held.source_range.start_time
        assert start.rate == float(source.rate) and start.value == source.start_frame + clip.begin_frame
        assert held.source_range.duration.value == clip.end_frame - clip.begin_frame
        seconds = source.first_seconds + (start.value - source.start_frame) / start.rate
        wanted = max(clip.moment.begin_seconds - HANDLES, source.first_seconds)
        assert shown(source.path, seconds) == shown(source.path, wanted)
        if not source.is_drop_frame:  # the EDL's reader knows no drop-frame markers
            (marker,) = held.markers
            assert marker.marked_range.start_time.value == source.start_frame + clip.mark_frame
            assert marker.name.endswith("(0.500, strong)") and marker.name.startswith("a red")
    if suffix == ".fcpxml":
        placed = ElementTree.fromstring(file.read_text()).findall(".//asset-clip")
        for clip, element in zip(clips, placed, strict=True):
            start = Fraction(element.attrib["start"].rstrip("s"))
            assert start * clip.source.rate == clip.source.start_frame + clip.begin_frame
            mark = element.find("marker")
            assert mark is not None and mark.attrib["value"] == "a red boat & <b> (0.500, strong)"
            assert Fraction(mark.attrib["start"].rstrip("s")) * clip.source.rate == (
                clip.source.start_frame + clip.mark_frame
            )


def test_what_cannot_be_written_is_said(
    files: dict[str, tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pal, odd = found(*files["pal.mp4"]), found(*files["odd.mp4"])
    (tmp_path / "file").write_bytes(b"")
    gone = VideoResult(1, 0.5, "fair", "gone", "0" * 16, str(tmp_path / "gone.mp4"), 4.0, pal.moments)
    refused: list[tuple[type[Exception], str, list[VideoResult], str]] = [
        (UsageError, "x.aaf", [pal], r"ends in \.otio, \.edl, \.fcpxml"),
        (UsageError, "", [pal], "ends in"),
        (InputError, "file/x.edl", [pal], "cannot be written .* name another file"),
        (InputError, "x.edl", [gone], "gone.mp4 is no longer there"),
        (InputError, "x.edl", [odd], "10 frames a second, for which an EDL has no timecode"),
        (InputError, "x.edl", [], "no moment"),
    ]
    for error, name, results, words in refused:
        with pytest.raises(error, match=words):
            write_timeline([("boat", results)], tmp_path / name)
    assert write_timeline([("boat", [gone, pal])], tmp_path / "x.edl")[0].startswith("left out of the timeline: ")
    monkeypatch.setitem(sys.modules, "opentimelineio", None)
    with pytest.raises(InputError, match=r"pip install 'svb-video\[editor\]'"):
        write_timeline([("boat", [pal])], tmp_path / "x.otio")
    stream = SimpleNamespace(average_rate=None, base_rate=None)
    monkeypatch.setattr(timeline, "_rate", lambda path, real, asked=timeline._rate: asked(path, stream))
    with pytest.raises(InputError, match=r"frame rate of .*pal.mp4 is not known.*ffmpeg -i"):
        write_timeline([("boat", [pal])], tmp_path / "x.fcpxml")
