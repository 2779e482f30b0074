"""What the kinds of sampling mean, the times table that one of them reads, and the other ways to decode less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import clips
import numpy as np
import pandas as pd
import pytest
from decoding import B_FRAMES, DECODERS, each_decoder, run, times_of

from svb.errors import InputError, UsageError
from svb.extract.decode import decoder as decode_module
from svb.extract.decode import ffmpeg_process, pyav_decoder
from svb.extract.decode.choice import StretchList
from svb.extract.decode.decoder import DecodeEnd, DecodeError, Decoder, FrameChunk
from svb.extract.decode.ffmpeg_arguments import input_options
from svb.extract.decode.ffmpeg_process import require_hwaccel
from svb.extract.decode.options import DecodeOptions, resized
from svb.extract.decode.sampling import Sampling, read_times, shown_at

KINDS: dict[str, dict[str, Any]] = {
    "fps": {"fps": 2.0},
    "frames": {"frames": 4},
    "every_nth": {"every_nth": 3},
    "keyframes": {"keyframes": True},
    "scenes": {"scenes": 0.3},
    "times_seconds": {"times_seconds": [0.5, 1.25]},
}


class TestSettings:
    def test_they_read_back(self) -> None:
        for settings in KINDS.values():
            sampling = Sampling(**settings)
            assert sampling.settings() == settings
            assert Sampling(**json.loads(json.dumps(sampling.settings()))) == sampling
        # Those of old stores; times are sorted and unique.
        assert json.dumps(Sampling(fps=1).settings()) == '{"fps": 1.0}'
        assert json.dumps(Sampling(frames=3).settings()) == '{"frames": 3}'
        assert Sampling(times_seconds=(3, 1.5, 3.0)).times_seconds == (1.5, 3.0)

    def test_what_means_nothing(self) -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, "got no kind of sampling - give exactly one of fps, frames, every_nth, keyframes, scenes"),
            ({"fps": 1, "frames": 8}, "got fps=1 and frames=8 - give exactly one"),
            ({"keyframes": True, "scenes": 0.0}, "got keyframes=True and scenes=0.0"),
            ({"fps": 0}, "cannot sample 0 frames - give a positive number"),
            ({"fps": float("nan")}, "cannot sample nan frames"),
            ({"every_nth": 0}, "cannot sample 0 frames"),
            ({"every_nth": 1.5}, "cannot take every 1.5th frame - give a whole number"),
            ({"scenes": 1.5}, "a score of 1.5 - give a number from 0 to 1"),
            ({"scenes": float("nan")}, "a score of nan"),
            ({"times_seconds": ()}, "at the times [] - give at least one"),
            ({"times_seconds": (1.0, float("inf"))}, "at the times [1.0, inf]"),
        ]
        for kinds, words in cases:
            with pytest.raises(UsageError) as caught:
                Sampling(**kinds)
            assert words in str(caught.value)


class TestShownAt:
    def test_the_last_frame_at_or_before_as_a_slow_reading_says(self) -> None:
        assert [n for n, _ in shown_at((1.0995,), enumerate((1.0, 1.1, 1.2)))] == [1]  # a container rounds
        random = np.random.default_rng(0)
        for _ in range(200):
            times = np.unique(random.integers(0, 40, random.integers(1, 20))) / 4
            wanted = np.unique(random.integers(-8, 88, random.integers(1, 20))) / 8  # on frames and between
            expected = sorted({max(0, int((times <= seconds).sum()) - 1) for seconds in wanted})
            assert [position for position, _ in shown_at(wanted.tolist(), enumerate(times.tolist()))] == expected

    def test_a_clock_that_jumps_back_and_no_further_than_needed(self) -> None:
        frames = enumerate((5.0, 6.0, 0.0, 7.0))
        assert [position for position, _ in shown_at((0.5, 6.5, 7.0), frames)] == [0, 1, 3]
        frames = iter([(0, 0.0), (1, 1.0), (2, 2.0)])
        assert list(shown_at((0.5,), frames)) == [(0, 0.0)]
        assert next(frames) == (2, 2.0)


@each_decoder
class TestChoice:
    def test_every_nth(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", codec=B_FRAMES)
        assert times_of(decoder, path, Sampling(every_nth=7)) == [0, 0.7, 1.4]
        assert times_of(decoder, path, Sampling(every_nth=1000)) == [0]
        assert len(times_of(decoder, path, Sampling(every_nth=1))) == 20

    def test_keyframes(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", codec=B_FRAMES, extra=("-g", "8", "-sc_threshold", "0"))
        assert times_of(decoder, path, Sampling(keyframes=True)) == [0, 0.8, 1.6]
        # What was skipped is not missing.
        assert list(decoder(path, DecodeOptions(Sampling(keyframes=True))))[-1] == DecodeEnd("ok")
        # Of a codec that has no others.
        path = clips.make_clip(tmp_path / "a.mkv", codec=("-c:v", "mjpeg"))
        assert len(times_of(decoder, path, Sampling(keyframes=True))) == 20
        # Without any the first frame is used, as of what a tuner records that was switched on amid a broadcast.
        whole = clips.make_clip(tmp_path / "whole.mkv", codec=("-c:v", "mpeg4", "-g", "600"))
        path, drop = tmp_path / "none.mkv", ("-c", "copy", "-bsf:v", "noise=drop=key", "-copyinkf")
        clips.run_ffmpeg("-i", f"file:{whole}", *drop, f"file:{path}")
        times = times_of(decoder, path, Sampling(keyframes=True))
        assert len(times) == 1
        assert times == times_of(decoder, path, Sampling(every_nth=1))[:1]

    def test_scenes(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_scenes(tmp_path / "a.mp4", num_scenes=3, scene_seconds=1.0)
        assert times_of(decoder, path, Sampling(scenes=0.3)) == [0, 1, 2]
        assert times_of(decoder, path, Sampling(scenes=1.0)) == [0]
        assert times_of(decoder, path, DecodeOptions(Sampling(scenes=0.3), fast=True))[0] == 0
        path = clips.make_clip(tmp_path / "a.mp4", source="color=c=red")  # never changes
        assert times_of(decoder, path, Sampling(scenes=0.0)) == [0]

    def test_times(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_late_clip(tmp_path / "a.mkv", start_seconds=4.7)
        wanted = Sampling(times_seconds=(0.0, 4.75, 5.0, 5.05, 6.24, 6.25, 100.0))
        assert times_of(decoder, path, wanted) == [4.7, 5.0, 6.2, 6.6]
        path = clips.make_variable_rate_clip(tmp_path / "a.mp4")
        shown = times_of(decoder, path, Sampling(fps=1000))
        wanted = np.arange(0, 3, 0.15) + 0.01
        expected = sorted({max(seconds for seconds in shown if seconds <= time) for time in wanted})
        assert times_of(decoder, path, Sampling(times_seconds=tuple(wanted))) == expected

    def test_the_rest_of_a_file_is_judged_too(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_truncated_clip(tmp_path / "a.mp4", keeps_index=True)
        for kind, settings in KINDS.items():
            decoded = run(decoder, path, Sampling(**settings))
            assert decoded.end.status == "partial" and decoded.times_seconds[-1] < 2
            if kind in ("fps", "frames"):
                assert decoded.times_seconds[-1] > 0
                assert "s of 3.0 s; decode errors: 1, the last: " in decoded.end.error
        rotten = run(decoder, clips.make_rotten_clip(tmp_path / "b.mp4"), Sampling(fps=2))
        assert rotten.end.status == "partial" and "decode errors" in rotten.end.error
        assert times_of(decoder, path, Sampling(times_seconds=(2.9,)))[0] < 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_whatever_the_decoder_is_told_gets_out_and_leaves_nothing(
        self, decoder: Decoder, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", codec=B_FRAMES)
        options = DecodeOptions(Sampling(**KINDS[kind]))
        monkeypatch.setattr(decode_module, "heartbeat", heartbeat := mock.Mock())
        list(decoder(path, options))
        calls, before = heartbeat.call_count, (clips.open_files(), clips.child_processes())
        for fails_at in (1, calls // 2, calls):
            heartbeat.side_effect = [*[None] * (fails_at - 1), DecodeError("timeout", "too long")]
            with pytest.raises(DecodeError, match="too long"):
                list(decoder(path, options))
            assert (clips.open_files(), clips.child_processes()) == before


@each_decoder
class TestFast:
    def test_about_the_same_frames_and_fewer_decoded(self, decoder: Decoder, tmp_path: Path) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", seconds=4, fps=30, codec=B_FRAMES)
        for kind, settings in KINDS.items():
            sampling = Sampling(**settings)
            plain = times_of(decoder, path, sampling)
            fast = times_of(decoder, path, DecodeOptions(sampling, fast=True))
            nearest = [min(abs(moved - seconds) for moved in fast) for seconds in plain]
            assert 0 < len(fast) <= len(plain)
            # Of every third frame some fall together: of four frames about one is referred to by another.
            assert len(fast) >= (0.5 if kind == "every_nth" else 0.8) * len(plain)
            assert max(nearest) <= 4 / 30 + 1e-6
        every = Sampling(fps=1000)
        assert len(times_of(decoder, path, DecodeOptions(every, fast=True))) < 100
        assert len(times_of(decoder, path, every)) == 120
        assert list(decoder(path, DecodeOptions(every, fast=True)))[-1] == DecodeEnd("ok")
        path = clips.make_one_frame_clip(tmp_path / "one.mp4")
        for settings in KINDS.values():
            assert times_of(decoder, path, DecodeOptions(Sampling(**settings), fast=True)) == [0]


X264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-sc_threshold", "0", "-g", "10")
SPARSE = {
    "frames": Sampling(frames=3),
    "fps": Sampling(fps=0.2),
    "every_nth": Sampling(every_nth=55),
    "times": Sampling(times_seconds=(0.99, 7.0, 7.1, 99.0)),
}


def decoded_and_packets(path: Path, sampling: Sampling) -> tuple[list[object], int]:
    """Return all that is decoded, and of how many packets."""
    with mock.patch.object(pyav_decoder, "_decode_packet", wraps=pyav_decoder._decode_packet) as decode_packet:
        return list(pyav_decoder.decode(path, DecodeOptions(sampling))), decode_packet.call_count


class TestSkippedStretches:
    """What is decoded of a sparsely sampled video gives the frames that all of it would give."""

    @pytest.mark.parametrize(
        ("name", "extra", "skips"),
        [
            ("a.mp4", (), True),
            ("a.mkv", ("-bf", "3"), True),
            ("a.mov", ("-x264-params", "b-pyramid=strict:ref=6:bframes=5"), True),
            ("a.mp4", ("-x264-params", "open-gop=1:bframes=3"), False),
            ("a.mp4", ("-x264-params", "intra-refresh=1"), False),
            ("a.mp4", ("-g", "600"), False),
            ("late.mp4", ("-output_ts_offset", "3"), True),
            # Parameter sets in every key frame, as broadcasts have them.
            ("a.mkv", ("-bsf:v", "dump_extra"), True),
            ("a.ts", (), False),
        ],
        ids=str,
    )
    def test_they_change_nothing(
        self, name: str, extra: tuple[str, ...], skips: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = clips.make_clip(tmp_path / name, seconds=12, codec=X264, extra=extra)
        for kind, sampling in SPARSE.items():
            sparse, num_decoded = decoded_and_packets(path, sampling)
            with monkeypatch.context() as patch:
                patch.setattr(StretchList, "sorted_times_seconds", lambda _: [])
                whole, num_all = decoded_and_packets(path, sampling)
            assert num_all > 120
            assert (num_decoded < 60) if skips else (num_decoded == num_all), kind
            for ours, theirs in zip(sparse, whole, strict=True):
                if isinstance(ours, FrameChunk) and isinstance(theirs, FrameChunk):
                    np.testing.assert_array_equal(ours.frames, theirs.frames)
                    np.testing.assert_array_equal(ours.frame_times_seconds, theirs.frame_times_seconds)
                else:
                    assert ours == theirs

    @pytest.mark.parametrize("kind", SPARSE)
    def test_damage_where_it_is_looked_at(self, kind: str, tmp_path: Path) -> None:
        # With one bad second somewhere the same frames come as when all is decoded, as ffmpeg does.
        path = clips.make_clip(tmp_path / "a.mp4", seconds=12, codec=X264, extra=("-movflags", "+faststart"))
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 4])
        *_, end = pyav_decoder.decode(path, DecodeOptions(SPARSE[kind]))
        assert isinstance(end, DecodeEnd) and end.status == "partial"
        start = whole.index(b"mdat")
        for share in (0.05, 0.3, 0.55, 0.9):
            at = start + int(share * (len(whole) - start))
            path.write_bytes(whole[:at] + bytes(range(100)) * 30 + whole[at + 3000 :])
            ours, theirs = (times_of(decoder, path, SPARSE[kind]) for decoder in DECODERS.values())
            assert ours == theirs

    def test_what_does_not_come_out_as_listed_is_decoded_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = clips.make_clip(tmp_path / "a.mp4", seconds=12, codec=X264)
        expected = times_of(pyav_decoder.decode, path, SPARSE["frames"])
        plan = StretchList.plan

        def wrong_plan(stretches: StretchList, times_seconds: list[float]) -> object:
            made = plan(stretches, times_seconds)
            assert made is not None
            return replace(made, needed=frozenset(sorted(made.needed)[:2]))

        monkeypatch.setattr(StretchList, "plan", wrong_plan)
        monkeypatch.setattr(decode_module, "CHUNK_BYTES", 1)
        assert times_of(pyav_decoder.decode, path, SPARSE["frames"]) == expected


class TestResize:
    def test_sizes(self) -> None:
        sizes = [(640, 360), (360, 640), (64, 48), (224, 224), (801, 100), (800, 100)]
        expected = [(398, 224), (224, 398), (298, 224), (224, 224), (801, 100), (1792, 224)]
        assert [resized(*size, 224) for size in sizes] == expected
        assert [resized(*size, None) for size in sizes] == sizes

    @each_decoder
    @pytest.mark.parametrize(
        ("make", "displayed", "expected"),
        [
            (lambda path: clips.make_clip(path, size="640x360"), (640, 360), (99, 56)),
            (lambda path: clips.make_turned_clip(path, 90), (48, 64), (56, 74)),
            (clips.make_anamorphic_clip, (85, 48), (99, 56)),
            (lambda path: clips.make_clip(path, size="16x16"), (16, 16), (56, 56)),
            (lambda path: clips.make_clip(path, size="480x32"), (480, 32), (480, 32)),
        ],
    )
    def test_the_short_side(
        self, decoder: Decoder, make: Any, displayed: tuple[int, int], expected: tuple[int, int], tmp_path: Path
    ) -> None:
        decoded = run(decoder, make(tmp_path / "a.mp4"), DecodeOptions(Sampling(frames=1), resize_px=56))
        assert (decoded.properties.width_px, decoded.properties.height_px) == displayed
        assert decoded.frames.shape == (1, expected[1], expected[0], 3)


class TestHardware:
    def test_only_ffmpeg_has_it(self) -> None:
        with pytest.raises(UsageError, match="cannot resize frames to 0 px"):
            DecodeOptions(Sampling(fps=1), resize_px=0)
        with pytest.raises(UsageError, match=r"the decoder pyav cannot use .*'cuda'.* choose the decoder ffmpeg"):
            DecodeOptions(Sampling(fps=1), hwaccel="cuda")
        unknown = r"no hardware decoder 'abacus' - expected one of .*leave out --hwaccel, or set IMAGEIO_FFMPEG_EXE"
        with pytest.raises(UsageError, match=unknown):
            require_hwaccel("abacus")
        options = DecodeOptions(Sampling(fps=1), decoder="ffmpeg", hwaccel="cuda")
        assert input_options(options)["threads"] == 1  # workers share the cores

    def test_a_device_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = ("Hardware acceleration methods:\ncuda\nvaapi\n\n", 0)
        failed = ("[CUDA @ 0x1] Cannot load libcuda.so.1\nDevice creation failed: -1.\n", 255)
        monkeypatch.setattr(ffmpeg_process, "_ask", mock.Mock(side_effect=[known, failed]))
        with pytest.raises(UsageError) as caught:
            require_hwaccel("cuda")
        for words in ("Cannot load libcuda.so.1; Device creation", "knows cuda, vaapi", "leave out --hwaccel"):
            assert words in str(caught.value)


class TestTimesTable:
    def test_formats_and_orders_make_no_difference(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("video_id,time_seconds\nb,2\na,1.5\na,0\na,1.50\n")
        (tmp_path / "b.csv").write_text("time_seconds,note,video_id\n0,x,a\n-0.0,x,a\n1.5,y,a\n2.0,z,b\n")
        frame = pd.DataFrame({"video_id": ["a", "b", "a"], "time_seconds": [1.5, 2.0, 0.0]})
        frame.to_parquet(tmp_path / "c.parquet")
        frame.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
        tables = [read_times(tmp_path / name) for name in ("a.csv", "b.csv", "c.parquet", "d.jsonl")]
        assert tables[0].times_seconds == {"a": (0.0, 1.5), "b": (2.0,)}
        assert tables[0] == tables[1] == tables[2] == tables[3]
        (tmp_path / "a.csv").write_text("video_id,time_seconds\nb,2\na,1.5\n")
        assert read_times(tmp_path / "a.csv").content_hash != tables[0].content_hash

    def test_what_is_refused(self, tmp_path: Path) -> None:
        """How tables are read in general, test_captions tells."""
        path = tmp_path / "a.csv"
        for rows, words in (
            ("", "holds no times - expected rows with video_id,time_seconds"),
            ("a,1\n,1\n", "line 3: video_id is empty"),
            ("a,1\na,soon\n", "line 3: time_seconds is 'soon' - expected a number"),
            ("a,-1\n", "line 2: time_seconds is '-1'"),
            ("a,nan\n", "line 2: time_seconds is 'nan'"),
            ("a,inf\n", "line 2: time_seconds is 'inf'"),
            ("a,1,5\n", "line 2: 3 fields where the header has 2 - write decimals with a point"),
        ):
            path.write_text(f"video_id,time_seconds\n{rows}")
            with pytest.raises(InputError) as caught:
                read_times(path)
            assert words in str(caught.value) and str(path) in str(caught.value)
        pd.DataFrame({"video_id": ["a", "b"], "time_seconds": [1.0, None]}).to_parquet(tmp_path / "gap.parquet")
        with pytest.raises(InputError, match="row 2: time_seconds is ''"):
            read_times(tmp_path / "gap.parquet")
        with pytest.raises(InputError, match="no times table at"):
            read_times(tmp_path / "nowhere.csv")
