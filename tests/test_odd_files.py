"""Odd files that people have: both decoders give what an independent one gives, or say in the record what is wrong.

The right frames come from plain PyAV or the plain ffmpeg program, or from how the test made the file.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import av
import clips
import field_coded
import numpy as np
import pytest
from decoding import B_FRAMES, DECODERS, EVERY_FRAME, each_decoder, failure, run

from svb.data.rows import VideoRecord
from svb.extract.decode import choice, pyav_decoder
from svb.extract.decode.containers import ogg_parts
from svb.extract.decode.decoder import DecodeEnd, Decoder, FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.sampling import Sampling
from svb.extract.plan import plan_videos
from svb.retrieve.model.query_media import _within

FRAGMENTS = ("-movflags", "frag_keyframe+empty_moov+default_base_moof", "-g", "10")
NAMED_BT709 = ("-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709")
VORBIS = ("-f", "lavfi", "-i", "sine=duration=2", "-c:a", "libvorbis")
FFV1 = ("-c:v", "ffv1", "-pix_fmt", "yuv444p")


def plain_times(path: Path) -> list[float]:
    """Return the time of every frame, by PyAV alone, in the order of its decoder."""
    with av.open(str(path)) as container:
        return [float(frame.time) for frame in container.decode(video=0) if frame.time is not None]


def join(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def make_greys(folder: Path, name: str, *greys: int, **options: object) -> list[Path]:
    """Write clips of 20 frames, each of a grey of its own."""
    sources = {grey: f"color=c=0x{grey:02x}{grey:02x}{grey:02x}" for grey in greys}
    return [
        clips.make_clip(folder / f"{grey}-{name}", source=source, **options) for grey, source in sources.items()
    ]


def put_element(data: bytearray, at: int, size: int, element: bytes) -> None:
    """Put an element of Matroska in the place of others; a Void element fills the rest."""
    rest = size - len(element) - 2
    assert rest >= 0
    data[at : at + size] = element + b"\xec" + bytes([0x80 | rest]) + bytes(rest)


@each_decoder
class TestColours:
    @pytest.mark.parametrize("colours", [(3, 3, 6), (3, 1, 2), (1, 0, 2), (2, 2, 3), (2, 2, 13), (12, 17, 255)])
    def test_numbers_that_mean_nothing(
        self, decoder: Decoder, colours: tuple[int, int, int], tmp_path: Path
    ) -> None:
        """The container, unlike the bitstream, names colours: any numbers, as some phones do."""
        plain, path = clips.make_clip(tmp_path / "plain.mp4", seconds=0.3), tmp_path / "a.mp4"
        copy = ("-c", "copy", *NAMED_BT709, "-movflags", "write_colr")
        clips.run_ffmpeg("-i", f"file:{plain}", *copy, f"file:{path}")
        data = bytearray(path.read_bytes())
        at = data.index(b"colrnclx") + 8
        data[at : at + 6] = struct.pack(">3H", *colours)
        path.write_bytes(data)
        decoded = run(decoder, path, EVERY_FRAME)
        assert decoded.end == DecodeEnd("ok")
        # 6 and unknown are both BT.601, the matrix of the clip that names none.
        np.testing.assert_array_equal(decoded.frames, run(decoder, plain, EVERY_FRAME).frames)

    @pytest.mark.slow  # swscale takes seconds to prepare
    @pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
    def test_hdr_is_mapped(self, decoder: Decoder, transfer: str, tmp_path: Path) -> None:
        # Eight greys and colours of SDR, put into HDR by zscale, which no decoder here uses.
        to_hdr = (
            "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p,"
            "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv,"
            f"zscale=t=linear:npl=203,format=gbrpf32le,"
            f"zscale=p=bt2020:t={transfer}:m=bt2020nc:r=tv:npl=203,format=yuv420p10le"
        )
        named = ("-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc")
        bars = {"source": "smptebars", "seconds": 0.3, "codec": ("-c:v", "ffv1")}
        path = clips.make_clip(tmp_path / "a.mkv", filters=to_hdr, extra=named, **bars)
        sdr = clips.make_clip(tmp_path / "sdr.mkv", **bars)
        decoded, expected = (run(decoder, file, Sampling(frames=1)) for file in (path, sdr))
        assert decoded.end == DecodeEnd("ok", f"HDR ({transfer}) was mapped to SDR")
        # Not the same numbers, as the two standards differ in how bright white is; the same picture.
        ours, theirs = (item.frames.reshape(-1).astype(float) for item in (decoded, expected))
        assert np.corrcoef(ours, theirs)[0, 1] > 0.95


@each_decoder
@pytest.mark.parametrize(
    ("name", "streams", "flagged", "expected"),
    [
        # A phone's still before its clip, small and large.
        ("a.mp4", [("64x48", 0.1), ("160x120", 2)], None, (160, 2, 20)),
        ("a.mp4", [("320x240", 0.1), ("160x120", 2)], None, (160, 2, 20)),
        # A small proxy before the film, which has the default flag or more pixels.
        ("a.mkv", [("64x48", 1), ("160x120", 2)], -1, (160, 2, 20)),
        ("a.mkv", [("160x120", 2), ("64x48", 1)], 1, (64, 2, 10)),
        ("a.mkv", [("160x120", 2), ("64x48", 1)], 0, (160, 1, 20)),
        ("a.ts", [("64x48", 1), ("160x120", 1), ("160x120", 2)], None, (160, 2, 10)),
    ],
)
def test_of_several_streams_the_one_that_ffmpeg_takes(
    decoder: Decoder,
    name: str,
    streams: list[tuple[str, float]],
    flagged: int | None,
    expected: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    inputs, output = [], list(clips.X264)
    for number, (size, seconds) in enumerate(streams):
        inputs += ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate=10:duration={seconds}"]
        output += ["-map", str(number)]
        if flagged is not None:
            output += [f"-disposition:v:{number}", "default" if number == flagged else "0"]
    clips.run_ffmpeg(*inputs, *output, f"file:{tmp_path / name}")
    width, place, num_frames = expected
    for sampling, count in ((EVERY_FRAME, num_frames), (Sampling(frames=4), 4)):
        decoded = run(decoder, tmp_path / name, sampling)
        assert decoded.properties.width_px == width
        assert decoded.end == DecodeEnd("ok", f"used video stream {place} of {len(streams)}")
        assert len(decoded.times_seconds) == count


@each_decoder
@pytest.mark.parametrize(
    ("crop", "resize_px"),  # left, top, right and bottom, of 64x48
    [((0, 8, 0, 8), None), ((4, 0, 12, 0), 20), ((3, 5, 0, 0), None), ((0, 0, 7, 1), None), ((3, 5, 0, 0), 20)],
)
def test_what_the_container_crops_is_not_shown(
    decoder: Decoder, crop: tuple[int, int, int, int], resize_px: int | None, tmp_path: Path
) -> None:
    left, top, right, bottom = crop
    named = (*NAMED_BT709, "-color_range", "tv")
    path = clips.make_clip(tmp_path / "a.mkv", seconds=0.3, codec=FFV1, extra=named)
    data, expected = bytearray(path.read_bytes()), tmp_path / "expected.mkv"
    # What the container says of colours makes room for the crop.
    at = data.index(b"\x55\xb0")
    sides = zip((b"\x54\xcc", b"\x54\xbb", b"\x54\xdd", b"\x54\xaa"), crop, strict=True)
    elements = b"".join(name + b"\x81" + bytes([pixels]) for name, pixels in sides if pixels)
    put_element(data, at, 3 + (data[at + 2] & 0x7F), elements)
    cut = f"crop={64 - left - right}:{48 - top - bottom}:{left}:{top}:exact=1"
    unknown = "setparams=color_primaries=unknown:color_trc=unknown:colorspace=unknown"
    clips.run_ffmpeg("-i", f"file:{path}", "-vf", f"{cut},{unknown}", "-c:v", "ffv1", f"file:{expected}")
    path.write_bytes(data)
    ours, theirs = (
        run(decoder, file, DecodeOptions(EVERY_FRAME, resize_px=resize_px)) for file in (path, expected)
    )
    assert (ours.properties.width_px, ours.properties.height_px) == (64 - left - right, 48 - top - bottom)
    np.testing.assert_array_equal(ours.frames, theirs.frames)


@each_decoder
class TestClocks:
    def test_joined_transport_streams(self, decoder: Decoder, tmp_path: Path) -> None:
        # Each part has a grey of its own and a clock of its own.
        path = join(tmp_path / "a.ts", *make_greys(tmp_path, "a.ts", 0x20, 0x60, 0xA0, 0xE0, extra=("-g", "10")))
        raw = plain_times(path)
        assert len(raw) == 80 and max(raw) < 4
        greys = np.repeat([0x20, 0x60, 0xA0, 0xE0], 20)
        for sampling, step in ((EVERY_FRAME, 1), (Sampling(fps=5), 2), (Sampling(fps=1000), 1)):
            decoded = run(decoder, path, sampling)
            # The container promises one part's length.
            assert decoded.properties.duration_seconds == pytest.approx(2, abs=0.2)
            assert decoded.end == DecodeEnd("ok", duration_seconds=pytest.approx(8))
            np.testing.assert_allclose(decoded.times_seconds, raw[0] + np.arange(0, 80, step) / 10, atol=1e-6)
            np.testing.assert_allclose(decoded.frames.mean(axis=(1, 2, 3)), greys[::step], atol=3)
        for sampling in (Sampling(frames=8), Sampling(times_seconds=tuple(raw[0] + np.arange(8) + 0.5))):
            decoded = run(decoder, path, sampling)
            np.testing.assert_allclose(decoded.frames.mean(axis=(1, 2, 3)), greys[5::10], atol=3)
        # One that was not joined keeps its duration.
        for name in ("b.ts", "b.mkv", "b.mp4"):
            assert run(decoder, clips.make_clip(tmp_path / name), EVERY_FRAME).end == DecodeEnd("ok")

    def test_fragments_of_a_clock_that_began_long_ago(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", extra=FRAGMENTS)
        data = bytearray(path.read_bytes())
        (scale,) = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)
        at = -1
        while (at := data.find(b"tfdt", at + 1)) >= 0:
            assert data[at + 4] == 1  # 64 bits
            (began,) = struct.unpack_from(">Q", data, at + 8)
            struct.pack_into(">Q", data, at + 8, began + 50 * 3600 * scale)
        path.write_bytes(data)
        decoded = run(decoder, path, EVERY_FRAME)
        assert decoded.end == DecodeEnd("ok")
        assert decoded.properties.duration_seconds == pytest.approx(2.0, abs=0.2)
        np.testing.assert_allclose(decoded.times_seconds, plain_times(path), atol=1e-6)
        path.write_bytes(data[: len(data) * 2 // 3])
        assert run(decoder, path, EVERY_FRAME).end.status == "partial"

    def test_a_cut_file_whose_sound_lies_last(self, decoder: Decoder, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        clips.make_clip_with_sound(tmp_path / "src.mkv", seconds=5, sound_seconds=5)
        options = {"movflags": "faststart", "max_interleave_delta": "1"}
        with av.open(str(tmp_path / "src.mkv")) as source, av.open(str(path), "w", options=options) as out:
            made = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
            packets = sorted(
                (p for p in source.demux() if p.size), key=lambda packet: packet.stream.type == "audio"
            )
            num_sound_bytes = sum(packet.size for packet in packets if packet.stream.type == "audio")
            for packet in packets:
                packet.stream = made[packet.stream.index]
                out.mux(packet)
        path.write_bytes(path.read_bytes()[: -num_sound_bytes // 2])
        num_frames = clips.count_frames(path)
        assert num_frames >= 49
        assert len(run(decoder, path, EVERY_FRAME).times_seconds) == num_frames

    def test_an_index_that_a_live_stream_repeats(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", extra=FRAGMENTS)
        data = path.read_bytes()
        first = data.index(b"moof") - 4
        second = data.index(b"moof", first + 8) - 4
        path.write_bytes(data[:second] + data[:first] + data[second:])
        decoded = run(decoder, path, EVERY_FRAME)
        assert decoded.end == DecodeEnd("ok") and len(decoded.times_seconds) == clips.count_frames(path) == 20


@each_decoder
@pytest.mark.parametrize(
    ("name", "codec", "is_whole"),
    [
        ("a.mkv", clips.X264, True), ("a.webm", ("-c:v", "libvpx"), True), ("a.avi", ("-c:v", "mpeg4"), True),
        ("a.vob", ("-c:v", "mpeg2video"), True), ("a.gif", (), True),
        ("a.mp4", clips.X264, False), ("b.mp4", (*clips.X264, *FRAGMENTS), False),
        ("a.flv", clips.X264, False), ("a.wmv", ("-c:v", "wmv2"), False),
    ],
)  # fmt: skip
def test_other_joined_files(
    decoder: Decoder, name: str, codec: tuple[str, ...], is_whole: bool, tmp_path: Path
) -> None:
    """They are read whole, or the record says what was not read."""
    parts = make_greys(tmp_path, name, 0x20, 0xA0, codec=codec)
    assert [clips.count_frames(part) for part in parts] == [20, 20]
    decoded = run(decoder, join(tmp_path / name, *parts), EVERY_FRAME)
    greys = decoded.frames.mean(axis=(1, 2, 3))
    if is_whole:
        assert (decoded.end.status, decoded.end.error) == ("ok", "")
        np.testing.assert_allclose(greys, np.repeat([0x20, 0xA0], 20), atol=4)
    else:
        assert (decoded.end.status, decoded.end.cause) == ("partial", "truncated")
        assert "; 2 recordings were joined here, and not all of them can be read" in decoded.end.error
        np.testing.assert_allclose(greys[:20], np.repeat(0x20, 20), atol=4)
        assert len(greys) < 40


def make_ogg_parts(folder: Path, codec: str = "libtheora", sound: tuple[str, ...] = ()) -> list[Path]:
    """Write three clips of 20 frames; the second one is larger."""
    parts = []
    for number, size in enumerate(("64x48", "96x64", "64x48")):
        source = ("-f", "lavfi", "-i", f"testsrc2=size={size}:rate=10:duration=2", *sound[:4])
        parts.append(clips.draw(folder / f"{number}.ogv", *source, "-c:v", codec, *sound[4:], "-g", "5"))
    return parts


@each_decoder
class TestOgg:
    @pytest.mark.parametrize(("codec", "sound"), [("libtheora", ()), ("libtheora", VORBIS), ("libvpx", VORBIS)])
    def test_joined(self, decoder: Decoder, sound: tuple[str, ...], codec: str, tmp_path: Path) -> None:
        parts = make_ogg_parts(tmp_path, codec, sound)
        assert [clips.count_frames(part) for part in parts] == [20, 20, 20]
        path = join(tmp_path / "a.ogv", *parts)
        every = DecodeOptions(EVERY_FRAME, resize_px=16)
        first, whole, last = (run(decoder, file, every) for file in (parts[0], path, parts[2]))
        assert whole.end == DecodeEnd("ok", duration_seconds=pytest.approx(6, abs=0.2))
        np.testing.assert_allclose(whole.times_seconds, np.arange(60) / 10, atol=0.01)
        np.testing.assert_array_equal(whole.frames[:20], first.frames)
        np.testing.assert_array_equal(whole.frames[40:], last.frames)
        eight = run(decoder, path, DecodeOptions(Sampling(frames=8), resize_px=16, fast=bool(sound)))
        np.testing.assert_allclose(eight.times_seconds, (np.arange(8) + 0.5) * 6 / 8, atol=0.2)

    def test_a_cut(self, decoder: Decoder, tmp_path: Path) -> None:
        path, whole = tmp_path / "a.ogv", [part.read_bytes() for part in make_ogg_parts(tmp_path)]
        for number in range(3):
            cut = [data[: len(data) * 2 // 3] if n == number else data for n, data in enumerate(whole)]
            (tmp_path / "cut.ogv").write_bytes(cut[number])
            num_frames = clips.count_frames(tmp_path / "cut.ogv")
            assert 0 < num_frames < 20
            path.write_bytes(b"".join(cut))
            for file, count, where in (
                (tmp_path / "cut.ogv", num_frames, "the file is cut"),
                (path, 40 + num_frames, f"part {number + 1} of 3 is cut"),
            ):
                decoded = run(decoder, file, EVERY_FRAME)
                assert len(decoded.times_seconds) == count
                assert (decoded.end.status, decoded.end.cause) == ("partial", "truncated")
                assert decoded.end.error == f"decoded {(count - 1) / 10:.1f} s; {where}"
        (tmp_path / "cut.ogv").write_bytes(whole[0] + b"Og")  # within a page's first bytes
        assert run(decoder, tmp_path / "cut.ogv", EVERY_FRAME).end.error.endswith("; the file is cut")

    def test_a_part_that_gives_nothing(self, decoder: Decoder, tmp_path: Path) -> None:
        first, _, last = make_ogg_parts(tmp_path)
        sound = clips.draw(tmp_path / "sound.ogg", *VORBIS)
        decoded = run(decoder, join(tmp_path / "a.ogv", first, sound, last), EVERY_FRAME)
        assert (decoded.end.status, decoded.end.cause) == ("partial", "concealed_errors")
        assert len(decoded.times_seconds) == 40


def test_an_ogg_of_false_beginnings_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "a.ogv").write_bytes(b"OggS\0\2" * 10**5)
    signs_of_life: list[None] = []
    assert len(ogg_parts(tmp_path / "a.ogv", lambda: signs_of_life.append(None))) == 1
    assert 0 < len(signs_of_life) < 10**4


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(fps=3), Sampling(every_nth=7), Sampling(keyframes=True), Sampling(scenes=0.02),
        Sampling(times_seconds=(0.5, 2.55, 5.95)), Sampling(frames=5),
    ],
)  # fmt: skip
def test_both_decoders_take_the_same_frames_of_a_joined_ogg(sampling: Sampling, tmp_path: Path) -> None:
    path = join(tmp_path / "a.ogv", *make_ogg_parts(tmp_path))
    ours, theirs = (run(decoder, path, DecodeOptions(sampling, resize_px=16)) for decoder in DECODERS.values())
    np.testing.assert_allclose(ours.times_seconds, theirs.times_seconds, atol=1e-9)
    np.testing.assert_array_equal(ours.frames, theirs.frames)
    assert len(ours.times_seconds) > 2 and ours.end == theirs.end


def test_a_picture_that_stays_to_the_end_is_no_loss(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "a.ogv", source="color=c=red", seconds=4, codec=("-c:v", "libtheora"))
    assert run(pyav_decoder.decode, path, EVERY_FRAME).end == DecodeEnd("ok")


def make_hidden_frames(path: Path) -> Path:
    """Write VP8 with frames that are never shown: others refer to them."""
    source = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=4")
    codec = ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "25", "-arnr-maxframes", "7", "-g", "999")
    log = ("-b:v", "100k", "-passlogfile", str(path.with_suffix(".log")))
    for number in ("1", "2"):
        clips.run_ffmpeg(*source, *codec, *log, "-pass", number, f"file:{path}")
    return path


def make_tuned_in(path: Path) -> Path:
    """Write a transport stream that begins amid a group of pictures."""
    whole = clips.make_clip(path, seconds=10, codec=B_FRAMES, extra=("-g", "40", "-sc_threshold", "0"))
    data = whole.read_bytes()
    path.write_bytes(data[: 188 * 3] + data[188 * (len(data) // 188 * 20 // 100) :])
    return path


@each_decoder
@pytest.mark.parametrize(
    ("name", "make"),
    [
        *(("a.webm", make_hidden_frames), ("a.ts", make_tuned_in)),
        *(("b.ts", field_coded.write), ("b.mkv", field_coded.write)),
    ],
)
def test_packets_are_no_frames(
    decoder: Decoder, name: str, make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / name)
    shown = np.array(plain_times(path))
    with av.open(str(path)) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.size) > len(shown)
    end = shown[-1] + (shown[-1] - shown[-2])
    middles = shown[0] + (np.arange(8) + 0.5) * (end - shown[0]) / 8
    expected = shown[np.searchsorted(shown, middles + 1e-3, side="right") - 1]
    decoded = run(decoder, path, Sampling(frames=8))
    np.testing.assert_allclose(decoded.times_seconds, expected, atol=1e-6)
    # What is too much to be held back is decoded twice, to the same frames.
    monkeypatch.setattr(choice, "HELD_BYTES", 1)
    np.testing.assert_array_equal(run(decoder, path, Sampling(frames=8)).frames, decoded.frames)


def refuse(*_: object, **__: object) -> NoReturn:
    raise PermissionError(errno.EACCES, "Permission denied")


@each_decoder
class TestRefused:
    def test_without_permission(self, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", seconds=0.3)
        with monkeypatch.context() as patch:  # root may read everything
            for name in ("open", "stat"):
                patch.setattr(Path, name, refuse)
                assert failure(decoder, path) == "no_permission"
        assert run(decoder, path, EVERY_FRAME).end == DecodeEnd("ok")

    def test_a_name_that_is_too_long(self, decoder: Decoder, tmp_path: Path) -> None:
        assert failure(decoder, tmp_path / ("a" * 300 + ".mp4")) == "missing"

    def test_encrypted(self, decoder: Decoder, tmp_path: Path) -> None:
        key = ("-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "76a6c65c5ea762046bd749a2e632ccbb")
        key_id = ("-encryption_kid", "a7e61c373e219033c21091fa607bf3b8")
        assert failure(decoder, clips.make_clip(tmp_path / "a.mp4", extra=(*key, *key_id))) == "encrypted"

    def test_encrypted_matroska(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mkv", extra=("-metadata:s:v", "title=" + "x" * 60))
        data = bytearray(path.read_bytes())
        # The title makes room for ContentEncodings.
        encryption = b"\x50\x35\x80"
        encoding = b"\x62\x40" + bytes([0x80 | 4 + len(encryption)]) + b"\x50\x33\x81\x01" + encryption
        element = b"\x6d\x80" + bytes([0x80 | len(encoding)]) + encoding
        put_element(data, data.index(b"\x53\x6e\xbc" + b"x" * 60), 63, element)
        assert run(decoder, path, EVERY_FRAME).end == DecodeEnd("ok")
        path.write_bytes(data)
        assert failure(decoder, path) == "encrypted"

    def test_scrambled(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.ts", size="640x480")
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), 188):
            if (data[at + 1] & 31, data[at + 2]) == (1, 0):  # the video's packets
                data[at + 3] |= 0x80
        path.write_bytes(data)
        assert failure(decoder, path) == "encrypted"


def test_a_file_is_tried_again_when_it_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.make_clip(tmp_path / "a.mp4", seconds=0.3)
    found = path.stat()
    of_file = ("a", str(path), found.st_size, found.st_mtime_ns, "")
    record = VideoRecord(*of_file, math.nan, math.nan, 0, 0, 0, "", "pyav", "no_permission", "no")
    for may_read in (False, True):  # root may read everything
        monkeypatch.setattr(os, "access", lambda *_, may_read=may_read: may_read)
        assert bool(plan_videos([path], {"a": record}).todo) == may_read


def test_a_part_between_two_frames_is_the_frame_shown_then() -> None:
    frames, times = np.zeros((3, 1, 1, 3), np.uint8), np.array([0.0, 10.0, 100.0])
    for size in (1, 3):
        chunks = [FrameChunk(frames[at : at + size], times[at : at + size]) for at in range(0, 3, size)]
        for begin, end, shown in ((20, 99, 10), (1, 2, 0), (101, 102, 100), (10, 11, 10)):
            (chunk,) = _within(iter(chunks), (begin, end))
            assert chunk.frame_times_seconds.tolist() == [shown]
    late = FrameChunk(frames[:1], np.array([5.0]))
    assert [chunk.frame_times_seconds.tolist() for chunk in _within([late], (1.0, 2.0))] == [[5.0]]
