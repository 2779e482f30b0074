"""Subtitles beside a video, as tools and people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from messages import heard

from svb.errors import InputError
from svb.retrieve.indexing.sidecars import find_sidecars, read_sidecar
from svb.retrieve.stored.cues import Cue

SRT = """1
00:00:01,000 --> 00:00:02,500
A dog runs.

2
00:01:03,040 --> 01:00:04,000
- Where?
- There!
"""
TIMES = "00:00:01,000 --> 00:00:02,000"
DOG = Cue("A dog runs.", 1.0, 2.5)
CUES = [DOG, Cue("- Where? - There!", 63.04, 3604.0)]
# What yt-dlp saves of automatic captions: a line of one space, words with times, and every line shown twice.
ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.000 --> 00:00:02.000 align:start position:0%
_
hello<00:00:00.500><c> there</c>

00:00:02.000 --> 00:00:02.010 align:start position:0%
hello there
_

00:00:02.010 --> 00:00:04.000 align:start position:0%
hello there
how<00:00:02.500><c> are you</c>

00:00:04.000 --> 00:00:04.010 align:start position:0%
how are you
_
""".replace("_", " ")


def read(folder: Path, content: str | bytes, name: str = "a.srt") -> tuple[list[Cue], list[str]]:
    messages = heard()
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_sidecar(folder / name), messages


class TestCues:
    @pytest.mark.parametrize(
        "content",
        [
            SRT,
            SRT.replace("\n", "\r\n"),
            SRT.replace("\n", "\r"),
            "\ufeff" + SRT,
            "\n\n" + SRT.replace("\n\n", "\n\n\n"),
            SRT.replace("2.500", "2.5"),
            SRT.replace(",", "."),
            SRT.replace("\n\n", "\n"),  # no empty line between cues
            SRT.replace("\n\n", "\n  \n"),
            SRT.replace("A dog", r"{\an8}<i>A</i> <font color='#fff'>dog</font>"),
            SRT.replace("A dog runs", r"A\Ndog\hruns"),
            SRT.replace("A dog", "\u200eA&nbsp;dog"),
            "".join(reversed(SRT.partition("\n\n"))).replace("There!", "There!\n"),  # not in order of time
            SRT.encode("utf-16"),
        ],
    )
    def test_subrip(self, content: str | bytes, tmp_path: Path) -> None:
        assert read(tmp_path, content) == (CUES, [])

    def test_webvtt(self, tmp_path: Path) -> None:
        content = """WEBVTT - a title
X-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:0

STYLE
::cue { color: white }

REGION
id:left

NOTE
A remark
of two lines

name of the cue
00:01.000 --> 00:02.500 align:start line:0
<v Roger>A <b.loud>dog</b.loud> runs.</v>

NOTE Another remark

123:00:05.000 --> 123:00:06.000
1 &lt; 2 and 3 < 4 &amp; 5
"""
        assert read(tmp_path, content, "a.vtt") == ([DOG, Cue("1 < 2 and 3 < 4 & 5", 442805.0, 442806.0)], [])

    def test_lines_that_roll_are_said_once(self, tmp_path: Path) -> None:
        assert read(tmp_path, ROLLING, "a.en.vtt") == (
            [Cue("hello there", 0.0, 2.01), Cue("how are you", 2.01, 4.01)],
            [],
        )

    def test_words_said_again_later_count_again_and_overlaps_stay(self, tmp_path: Path) -> None:
        cues = [Cue("No.", 1, 2), Cue("Yes.", 2, 4), Cue("Ha!", 3, 5), Cue("Ha!", 9, 10)]
        lines = [f"1\n00:00:{c.begin_seconds:02},000 --> 00:00:{c.end_seconds:02},000\n{c.text}\n" for c in cues]
        assert read(tmp_path, "\n".join(lines))[0] == cues

    @pytest.mark.parametrize(
        "readings",
        [
            '<font size="28">SrtCnt : 51, DiffTime : 16ms\n2023-08-27 12:52:16.000\n[iso : 100] [fnum : 280] '
            "[ev : 0] [ct : 5500] [latitude: 0.608553] [longitude: 0.0] [rel_alt: 1.2 abs_alt: 30] </font>",
            "HOME(149.0251,-20.2532) 2017.08.05 14:11:51\nGPS(149.0251,-20.2533,16) BAROMETER:1.9\n"
            "ISO:100 Shutter:60 EV: Fnum:2.2",
            "F/2.8, SS 206.14, ISO 150, EV 0, GPS (-0.02, 51.5, 15), D 1.1m, H 0.5m, H.S 0.00m/s, V.S 0.00m/s",
        ],
    )
    def test_a_drone_s_readings_are_no_captions(self, readings: str, tmp_path: Path) -> None:
        flown = "".join(f"{n}\n00:00:{n:02},000 --> 00:00:{n:02},033\n{readings}\n\n" for n in range(5, 9))
        for spoken, cues in (("", []), (SRT, CUES)):
            found, messages = read(tmp_path, f"{spoken}\n{flown}")
            of = f"4 of {4 + len(cues)} cues"
            assert found == cues
            assert messages == [f"{tmp_path}/a.srt: {of} are a drone's readings, not speech, and were left out"]
        words = SRT.replace("A dog runs.", "We are at latitude 41: set ISO 100, shutter 1/50, f/2.8.")
        cues, messages = read(tmp_path, words)
        assert "shutter" in cues[0].text and not messages

    def test_a_text_file_is_a_caption_a_line(self, tmp_path: Path) -> None:
        assert read(tmp_path, "\ufeffa dog runs \r\n\r\n<i>a cat</i>\n", "a.txt") == (
            [Cue("a dog runs"), Cue("a cat")],
            [],
        )

    @pytest.mark.parametrize("name", ["a.srt", "a.vtt", "a.txt"])
    def test_nothing_in_it(self, name: str, tmp_path: Path) -> None:
        for content in ("", "\n\n", "\ufeff"):
            assert read(tmp_path, content, name) == ([], [])


class TestDamage:
    @pytest.mark.parametrize(
        "broken",
        [
            "00:00:03,000 --> soon\nlost",
            "00:00:03,000 ->\n00:00:04,000\nlost",
            "-00:00:03,000 --> 00:00:04,000\nlost",
            "00:00:05,000 --> 00:00:04,000\nlost",
            "00:00:05,000 --> 00:00:05,000\nlost",
            "lost words",
        ],
    )
    def test_a_broken_cue_takes_no_other_with_it(self, broken: str, tmp_path: Path) -> None:
        content = SRT.replace("\n\n2\n", f"\n\n7\n{broken}\n\n2\n")
        assert read(tmp_path, content) == (
            CUES,
            [f"{tmp_path}/a.srt: 1 of 3 cues have no readable times and were left out"],
        )

    def test_other_encodings_are_said_once(self, tmp_path: Path) -> None:
        content = (SRT * 3).replace("A dog", "Ein Dogge, größer").encode("cp1252")
        cues, (message,) = read(tmp_path, content)
        assert cues[0].text == "Ein Dogge, größer runs."
        assert message.startswith(f"{tmp_path}/a.srt is not UTF-8: reading it as Windows-1252 - ")

    def test_hostile_files_are_read_to_their_end(self, tmp_path: Path) -> None:
        # Two cues of many lines, alike but for the first: comparing all ends with all begins would take hours.
        lines = "x\n" * 200_000
        for text in (f"1\n{TIMES}\ny\n{lines}\n2\n{TIMES}\nz\n{lines}", "<" * 1_000_000, "{\\" * 400_000):
            read(tmp_path, text)

    def test_what_is_no_sidecar_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"a\.txt is not text: it holds a NUL - save it as UTF-8"):
            read(tmp_path, b"\x7fELF\0\0", "a.txt")
        with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\)"):
            read_sidecar(tmp_path / "gone.srt")
        with (tmp_path / "a.srt").open("wb") as file:
            file.truncate(2**30)
        with pytest.raises(InputError, match=r"a\.srt has more than 4 MiB, too many for captions - cut it"):
            read_sidecar(tmp_path / "a.srt")


def test_sidecars_are_found_by_name(tmp_path: Path) -> None:
    names = ["a.srt", "a.en.srt", "a.pt-BR.vtt", "a.en.forced.srt", "A.TXT", "a.b.srt", "a.b.c.srt", "a.en.json"]
    for name in [*names, "a.part1.srt", "other.srt", "c.SRT"]:
        (tmp_path / name).touch()
    (tmp_path / "a.vtt").mkdir()
    videos = [tmp_path / name for name in ("a.mp4", "a.mkv", "a.b.mp4", "c.mp4", "gone/a.mp4", "none.mp4")]
    found = find_sidecars(videos)
    own = [tmp_path / name for name in ("a.en.forced.srt", "a.en.srt", "a.pt-BR.vtt", "a.srt")]
    assert found == {
        videos[0]: own,
        videos[1]: own,
        videos[2]: [tmp_path / "a.b.srt"],
        videos[3]: [tmp_path / "c.SRT"],
    }
