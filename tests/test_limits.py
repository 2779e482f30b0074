"""Files from strangers: what asks for too much is refused, and what points elsewhere is not followed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import clips
import pytest
from decoding import each_decoder

from svb.errors import UsageError
from svb.extract.decode.decoder import DecodeEnd, DecodeError, Decoder
from svb.extract.decode.options import DecodeOptions, Limits
from svb.extract.decode.sampling import Sampling

SAMPLINGS = [Sampling(fps=2), Sampling(frames=4), Sampling(times_seconds=(1.0,)), Sampling(scenes=0.3)]


def refusal(decoder: Decoder, path: Path, limits: Limits, sampling: Sampling = SAMPLINGS[0]) -> str:
    """Return the message of a file that is refused before anything is had of it."""
    before = clips.child_processes()
    with pytest.raises(DecodeError) as caught:
        next(iter(decoder(path, DecodeOptions(sampling, limits=limits))))
    assert caught.value.status == "over_limit"
    assert clips.child_processes() == before
    return str(caught.value)


@each_decoder
class TestLimits:
    def test_sizes(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4")
        says, advice = f"{path} has frames of 64x48 px - expected", "if you trust it raise"
        for sampling in SAMPLINGS:
            assert list(decoder(path, DecodeOptions(sampling, limits=Limits(64, 48))))[-1] == DecodeEnd("ok")
            words = refusal(decoder, path, Limits(max_width_px=63), sampling)
            assert words == f"{says} a width of at most 63; {advice} --max-width"
            words = refusal(decoder, path, Limits(max_height_px=47), sampling)
            assert words == f"{says} a height of at most 47; {advice} --max-height"
        assert list(decoder(path, DecodeOptions(SAMPLINGS[0])))[-1] == DecodeEnd("ok")  # the default

    def test_sizes_that_the_header_does_not_say(self, decoder: Decoder, tmp_path: Path) -> None:
        # libavcodec, told to allow no more, opens the file without having seen its size.
        path = clips.make_clip(tmp_path / "a.h264", size="640x480", seconds=0.3)
        assert "frames of 640x480 px" in refusal(decoder, path, Limits(64, 64))
        wide = clips.make_anamorphic_clip(tmp_path / "wide.mp4")
        assert "frames of 85x48 px" in refusal(decoder, wide, Limits(max_width_px=84))
        lying = clips.make_turned_clip(tmp_path / "lying.mp4", 90)
        assert "frames of 48x64 px" in refusal(decoder, lying, Limits(max_height_px=63))
        odd = clips.make_clip(tmp_path / "odd.mp4", size="66x50")  # its coded size is of whole blocks
        assert list(decoder(odd, DecodeOptions(SAMPLINGS[0], limits=Limits(66, 50))))[-1] == DecodeEnd("ok")

    def test_promised_durations(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", seconds=3)
        for sampling in SAMPLINGS:
            words = refusal(decoder, path, Limits(max_duration_seconds=2.9), sampling)
            too_long = "hours of video - expected at most 0.000805556; if you trust it raise --max-hours"
            assert words.startswith(f"{path} promises ") and words.endswith(too_long)
        path = clips.make_clip_with_sound(tmp_path / "a.mp4", seconds=1, sound_seconds=4)
        assert "--max-hours" in refusal(decoder, path, Limits(max_duration_seconds=3))

    def test_a_video_that_promises_nothing(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.h264", seconds=3, fps=25)
        for sampling in SAMPLINGS:
            with pytest.raises(DecodeError, match=r"has run on to 0.00 hours .* raise --max-hours") as caught:
                list(decoder(path, DecodeOptions(sampling, limits=Limits(max_duration_seconds=1))))
            assert caught.value.status == "over_limit"

    def test_streams(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip_with_sound(tmp_path / "a.mkv", seconds=1, sound_seconds=1)
        words = refusal(decoder, path, Limits(max_streams=1))
        assert words == f"{path} has 2 streams - expected at most 1; if you trust it raise --max-streams"


def test_limits_that_let_nothing_in() -> None:
    with pytest.raises(UsageError, match="a max_width_px of 0 lets no video in - give more than 0"):
        Limits(max_width_px=0)
    with pytest.raises(UsageError, match="max_duration_seconds of nan"):
        Limits(max_duration_seconds=float("nan"))


DASH = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S" minBufferTime="PT1S"
 profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>
<AdaptationSet mimeType="video/mp4" contentType="video">
<Representation id="1" bandwidth="1000" width="64" height="48" codecs="avc1.42c00a"><BaseURL>{target}</BaseURL>
</Representation></AdaptationSet></Period></MPD>
"""
PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
    "hls of playlists": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\n{target}\n",
    "dash": DASH,
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP/TCP 96\na=rtpmap:96 H264/90000\n",
}
TARGETS = ("{name}", "{path}", "file:{path}", "http://127.0.0.1:{port}/a.ts", "tcp://127.0.0.1:{port}")


@each_decoder
@pytest.mark.parametrize("playlist", PLAYLISTS)
def test_a_playlist_is_not_followed(decoder: Decoder, playlist: str, tmp_path: Path) -> None:
    other = clips.make_clip(tmp_path / "a.ts", seconds=0.5)
    with watched(other) as opened:
        other.read_bytes()
    assert opened  # the watch sees what it should
    path = tmp_path / "playlist.mp4"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.setblocking(False)
        for target in TARGETS:
            place = target.format(name=other.name, path=other, port=port)
            path.write_text(PLAYLISTS[playlist].format(target=place, port=port))
            with watched(other) as opened, pytest.raises(DecodeError) as caught:
                list(decoder(path, DecodeOptions(SAMPLINGS[0])))
            assert caught.value.status == "unreadable" and not opened
            with pytest.raises(BlockingIOError):
                server.accept()


@contextlib.contextmanager
def watched(path: Path) -> Iterator[bytearray]:
    """Gather inotify's word of every opening of a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    in_open = 0x20
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(path), in_open) >= 0
    events = bytearray()
    try:
        yield events
        with contextlib.suppress(BlockingIOError):
            events += os.read(watch, 4096)
    finally:
        os.close(watch)
