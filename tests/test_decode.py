"""Both decoders turn a file into the same frames with the same times, or fail with the same status."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import clips
import numpy as np
import pytest
from decoding import B_FRAMES, DECODERS, Decoded, each_decoder, failure, run

from svb.extract.decode import decoder as decode_module
from svb.extract.decode import ffmpeg_arguments, ffmpeg_decoder, pyav_decoder
from svb.extract.decode.choice import FrameChooser
from svb.extract.decode.decoder import DecodeEnd, Decoder, FrameChunk, VideoProperties, judge_end
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.sampling import Sampling

EVERY_FRAME = Sampling(fps=1000)
SAMPLINGS = {
    "fps": Sampling(fps=2),
    "frames": Sampling(frames=4),
    "every": EVERY_FRAME,
    "every nth": Sampling(every_nth=3),
    "keyframes": Sampling(keyframes=True),
    "scenes": Sampling(scenes=0.02),
    "times": Sampling(times_seconds=(0.5, 0.55, 1.0, 5.31, 99.0)),
}


def assert_same(path: Path, given: Sampling | DecodeOptions, mean_difference: float = 0.5) -> Decoded:
    pyav, ffmpeg = (run(decoder, path, given) for decoder in DECODERS.values())
    np.testing.assert_allclose(pyav.times_seconds, ffmpeg.times_seconds, rtol=0, atol=2e-6)
    difference = np.abs(pyav.frames.astype(np.int16) - ffmpeg.frames)
    assert difference.mean() < mean_difference and difference.max() <= 6 * mean_difference
    assert pyav.end.status == ffmpeg.end.status
    a, b = pyav.properties, ffmpeg.properties
    assert (a.width_px, a.height_px, a.rotation_degrees, a.codec) == (
        *(b.width_px, b.height_px, b.rotation_degrees, b.codec),
    )
    # ffmpeg prints rates and durations with two decimals.
    assert a.frame_rate == pytest.approx(b.frame_rate, abs=0.006)
    assert a.duration_seconds == pytest.approx(b.duration_seconds, abs=0.011, nan_ok=True)
    return pyav


def made(**options: Any) -> Callable[[Path], Path]:
    return partial(clips.make_clip, **options)


CLIPS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "h264": ("a.mp4", clips.make_clip),
    "h264 with B-frames": ("a.mp4", made(fps=29.97, codec=B_FRAMES)),
    "h265": ("a.mp4", made(codec=("-c:v", "libx265"))),
    "h265 10 bit": ("a.mkv", made(codec=("-c:v", "libx265", "-pix_fmt", "yuv420p10le"))),
    "av1": ("a.mkv", made(codec=("-c:v", "libaom-av1", "-cpu-used", "8"))),
    "xvid": ("a.avi", made(codec=("-c:v", "libxvid", "-bf", "2"))),
    "h264 with B-frames, mkv": ("a.mkv", made(fps=30, codec=("-c:v", "libx264", "-bf", "3", "-g", "12"))),
    "bare h264": ("a.h264", made(codec=B_FRAMES)),
    "bt709": ("a.mp4", made(filters="scale=out_color_matrix=bt709", extra=("-colorspace", "bt709"))),
    "full range": ("a.mp4", made(codec=("-c:v", "libx264", "-pix_fmt", "yuvj420p"))),
    "variable rate": ("a.mp4", clips.make_variable_rate_clip),
    "starts late, mp4": ("a.mp4", clips.make_late_clip),
    "starts late, mkv": ("a.mkv", clips.make_late_clip),
    "starts late, ts": ("a.ts", clips.make_late_clip),
    "anamorphic": ("a.mp4", clips.make_anamorphic_clip),
    "odd size": ("a.mkv", clips.make_odd_size_clip),
    "one frame": ("a.mp4", clips.make_one_frame_clip),
    "16x16": ("a.mp4", made(size="16x16")),
    "resized": ("a.ts", clips.make_resized_clip),
    "transparent": ("a.mov", clips.make_transparent_clip),
    "transparent gif": ("a.gif", partial(clips.make_transparent_clip, codec=("-c:v", "gif"))),
    "turned by 45": ("a.mp4", partial(clips.make_turned_clip, degrees=45)),
}
# What decoding with `fast` is compared on.
FAST = (
    "h264",
    "h264 with B-frames",
    "h264 with B-frames, mkv",
    "h265",
    "av1",
    "starts late, ts",
    "transparent gif",
)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize(
    ("kinds", "resize_px"),
    [
        (("fps", "frames", "every"), 32),
        pytest.param(("every nth", "keyframes", "scenes", "times"), 100, marks=pytest.mark.slow),
    ],
)
def test_decoders_agree(name: str, kinds: tuple[str, ...], resize_px: int, tmp_path: Path) -> None:
    file_name, make = CLIPS[name]
    path = make(tmp_path / file_name)
    for kind in kinds:
        # To find scenes ffmpeg lets its encoder bring frames of another size back to the first one's.
        mean_difference = 10.0 if (name, kind) == ("resized", "scenes") else 0.5
        assert assert_same(path, SAMPLINGS[kind], mean_difference).end == DecodeEnd("ok")
        if name in FAST:
            assert_same(path, DecodeOptions(SAMPLINGS[kind], fast=True))
    assert_same(path, DecodeOptions(Sampling(fps=1), resize_px=resize_px))


ZOO = (
    *("action.avi", "av1.mkv", "corrupted.mp4", "h265.mp4", "sintel.avi", "unordered.mov", "vid1.mp4"),
    *("rotate-0.mov", "rotate-90.mov", "rotate-180.mov", "rotate-270.mov"),
)


@pytest.mark.slow
@pytest.mark.skipif(not clips.VIDEO_ZOO.is_dir(), reason=f"no real footage: {clips.VIDEO_ZOO} is missing")
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("sampling", [kind for kind in SAMPLINGS if kind != "every"])
def test_decoders_agree_on_real_footage(name: str, sampling: str) -> None:
    decoded = assert_same(clips.VIDEO_ZOO / name, SAMPLINGS[sampling])
    assert decoded.end.status == ("partial" if name == "corrupted.mp4" else "ok")
    turned = {"rotate-90.mov": 270, "rotate-180.mov": 180, "rotate-270.mov": 90}
    assert decoded.properties.rotation_degrees == turned.get(name, 0)


def sizes_of_chunks(decoder: Decoder, path: Path) -> list[int]:
    decoded = decoder(path, DecodeOptions(EVERY_FRAME))
    return [len(chunk.frames) for chunk in decoded if isinstance(chunk, FrameChunk)]


@each_decoder
class TestEachDecoder:
    def test_colours_are_true(self, decoder: Decoder, tmp_path: Path) -> None:
        # This orange differs by 10 and more between the BT.601 and BT.709 matrices.
        path = clips.make_clip(
            tmp_path / "red.mp4",
            source="color=c=0xC83214",
            filters="scale=out_color_matrix=bt709:out_range=tv",
            extra=("-colorspace", "bt709", "-color_range", "tv", "-qp", "0"),
        )
        mean = run(decoder, path, Sampling(frames=1)).frames.mean(axis=(0, 1, 2))
        np.testing.assert_allclose(mean, (0xC8, 0x32, 0x14), atol=3)

    def test_pictures_are_upright_straight_and_of_square_pixels(self, decoder: Decoder, tmp_path: Path) -> None:
        for degrees in (0, 90, 180, 270):
            path = clips.make_turned_clip(tmp_path / "a.mp4", degrees)
            turned = run(decoder, path, Sampling(frames=1))
            lying = run(decoder, tmp_path / "upright-a.mp4", Sampling(frames=1)).frames[0].astype(np.int16)
            assert turned.properties.rotation_degrees == degrees
            # Chroma is interpolated along the other axis, hence not the same to the bit.
            assert np.abs(turned.frames[0] - np.rot90(lying, degrees // 90)).mean() < 3
        path = clips.make_turned_clip(tmp_path / "a.mp4", 0, hflip=True)
        mirrored = run(decoder, path, Sampling(frames=1)).frames[0]
        assert np.abs(mirrored - lying[:, ::-1]).mean() < 3
        properties = run(decoder, clips.make_anamorphic_clip(tmp_path / "wide.mp4"), Sampling(fps=1)).properties
        assert (properties.width_px, properties.height_px) == (85, 48)

    def test_times_are_the_files_own(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_late_clip(tmp_path / "a.mkv", start_seconds=4.7)
        times = run(decoder, path, EVERY_FRAME).times_seconds
        np.testing.assert_allclose(times, 4.7 + np.arange(20) / 10, atol=1e-9)
        times = run(decoder, path, Sampling(fps=1)).times_seconds
        np.testing.assert_allclose(times, [4.7, 5.7], atol=1e-9)
        # Matroska counts in milliseconds: frame 10 lies at 0.333, before the grid point it belongs to.
        path = clips.make_clip(tmp_path / "a.mkv", fps=30, seconds=3)
        times = run(decoder, path, Sampling(fps=3)).times_seconds
        np.testing.assert_allclose(times, np.arange(9) / 3, atol=1e-3)

    def test_frames_are_spread_over_the_decodable_part(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4")
        times = run(decoder, path, Sampling(frames=4)).times_seconds
        np.testing.assert_allclose(times, [0.2, 0.7, 1.2, 1.7], atol=1e-9)
        assert len(run(decoder, path, Sampling(frames=6000)).times_seconds) == 20
        resized = run(decoder, clips.make_resized_clip(tmp_path / "a.ts"), Sampling(fps=2))
        assert resized.frames.shape == (8, 48, 64, 3)  # every frame keeps the first one's size

    def test_chunks_are_bounded(self, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_module, "CHUNK_BYTES", 5 * 64 * 48 * 3)
        path = clips.make_clip(tmp_path / "a.mp4")
        assert sizes_of_chunks(decoder, path) == [5, 5, 5, 5]
        # By bytes 1,200 frames of 16x16 fit into one chunk; scaled up to a backbone's size they are 180 MB.
        monkeypatch.undo()
        path = clips.make_clip(tmp_path / "tiny.mp4", seconds=12, fps=100, size="16x16")
        assert sizes_of_chunks(decoder, path) == [512, 512, 176]

    def test_any_name_is_only_a_name(
        self, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        names = ("a b.mp4", "'q\" $x.mp4", "-i.mp4", "a:b=c.mp4", "100%d.mp4", "line\nbreak.mp4", "Видео 動画.mp4")
        for name in names:
            clips.make_clip(Path(name), seconds=0.5)
            assert run(decoder, Path(name), Sampling(frames=2)).end.status == "ok"

    def test_statuses(self, decoder: Decoder, tmp_path: Path) -> None:
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.mp4").write_text("not a video\n" * 50)
        clips.make_truncated_clip(tmp_path / "truncated.mp4", keeps_index=False)
        clips.make_sound(tmp_path / "sound.m4a")
        clips.make_song_with_cover(tmp_path / "song.mp3")
        expected = {
            "missing.mp4": "missing",
            "empty.mp4": "empty",
            "text.mp4": "unreadable",
            "truncated.mp4": "truncated",
            "sound.m4a": "no_video_stream",
            "song.mp3": "attached_picture",
        }
        assert {name: failure(decoder, tmp_path / name) for name in expected} == expected
        assert failure(decoder, tmp_path) == "unreadable"
        # A stream without a frame that can be decoded.
        path = clips.make_clip(tmp_path / "a.mkv", codec=("-c:v", "libxvid"))
        data = path.read_bytes()
        start = data.index(b"\x00\x00\x01\xb6")
        path.write_bytes(data[:start] + b"\x11" * (len(data) - start))
        assert failure(decoder, path) == "zero_frames"

    def test_the_last_frame_stands_in_for_what_does_not_decode(self, decoder: Decoder, tmp_path: Path) -> None:
        with mock.patch.object(Sampling, "spread", lambda *_: [1000]):
            decoded = run(decoder, clips.make_clip(tmp_path / "a.mp4"), Sampling(frames=1))
        np.testing.assert_allclose(decoded.times_seconds, [1.9], atol=1e-9)

    def test_sound_that_outlasts_the_picture_is_no_loss(self, decoder: Decoder, tmp_path: Path) -> None:
        for suffix in ("mp4", "mkv", "avi"):
            path = clips.make_clip_with_sound(tmp_path / f"a.{suffix}", seconds=1, sound_seconds=4)
            assert run(decoder, path, Sampling(fps=2)).end == DecodeEnd("ok")

    def test_closing_and_finishing_leave_nothing_behind(
        self, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decode_module, "CHUNK_BYTES", 1)
        path = clips.make_clip(tmp_path / "a.mp4", seconds=5, size="160x120")
        (tmp_path / "text.mp4").write_text("not a video")
        before = clips.open_files(), clips.child_processes()
        for items in (1, 2, 10_000):  # after the properties, after a chunk, and at the end
            decoding = decoder(path, DecodeOptions(EVERY_FRAME))
            for _ in itertools.islice(decoding, items):
                pass
            decoding.close()
            gc.collect()
            assert (clips.open_files(), clips.child_processes()) == before
        failure(decoder, tmp_path / "text.mp4")
        gc.collect()
        assert (clips.open_files(), clips.child_processes()) == before


@each_decoder
def test_what_is_transparent_is_seen_on_white(decoder: Decoder, tmp_path: Path) -> None:
    opaque = clips.make_clip(tmp_path / "opaque.mov", filters="format=rgba", codec=("-c:v", "qtrle"))
    seen = run(decoder, clips.make_transparent_clip(tmp_path / "a.mov"), EVERY_FRAME).frames
    assert (seen[:, :, :32] == 255).all()
    colours = run(decoder, opaque, EVERY_FRAME).frames[:, :, 32:]
    np.testing.assert_allclose(seen[:, :, 32:], (colours * (128 / 255) + 127), rtol=0, atol=0.6)


def test_webp_needs_ffmpeg_and_is_seen_on_white_too(tmp_path: Path) -> None:
    path = clips.make_animated_webp(tmp_path / "a.webp")
    assert failure(pyav_decoder.decode, path) in {"unreadable", "zero_frames"}
    times = run(ffmpeg_decoder.decode, path, EVERY_FRAME).times_seconds
    np.testing.assert_allclose(times, np.arange(10) / 5, atol=1e-9)
    codec = ("-c:v", "libwebp_anim", "-lossless", "1", "-pix_fmt", "bgra")
    decoded = run(ffmpeg_decoder.decode, clips.make_transparent_clip(path, codec), EVERY_FRAME)
    assert len(decoded.times_seconds) > 1
    assert (decoded.frames[:, :, :32] == 255).all() and (decoded.frames[:, :, 32:] < 255).any()


def test_selecting_thousands_of_positions_fits_into_an_argument() -> None:
    positions = range(0, 10_000_000, 2000)
    expression = ffmpeg_arguments.select_expression(Sampling(frames=5000), ffmpeg_arguments.Choice(positions))
    assert len(positions) == 5000
    assert len(expression) < 120_000
    targets = ffmpeg_arguments.Choice(targets_seconds=[number / 29.97 for number in range(100_000, 102_000)])
    assert len(ffmpeg_arguments.select_expression(Sampling(frames=2000), targets)) < 120_000
    assert ffmpeg_arguments.select_expression(Sampling(frames=5001), ffmpeg_arguments.Choice(range(5001))) == "1"


def test_a_clock_that_jumps_back_gives_no_frame_twice() -> None:
    chooser = FrameChooser(Path("a.mp4"), DecodeOptions(Sampling(frames=4)), positions=[0, 1, 2, 3])
    wanted = []
    for seconds in (5.0, 6.0, 0.0, 7.0):
        chooser.count(seconds)
        wanted.append(chooser.chooses(seconds))
    assert wanted == [True, True, False, True]
    assert (chooser.decoded, chooser.used) == (4, 3)


def test_a_slide_shown_for_long_is_no_loss() -> None:
    properties = VideoProperties(10.0, 1.0, 64, 48, 0, "h264")
    errors = decode_module.DecodeErrors()
    assert judge_end(properties, 6.0, errors, lambda: 10.0) == DecodeEnd("ok")
    assert judge_end(properties, 6.0, errors, lambda: 6.0) == DecodeEnd(
        "partial", "decoded 6.0 s of 10.0 s; the file ends", "truncated"
    )
