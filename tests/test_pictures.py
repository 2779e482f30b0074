"""Pictures of videos, clips cut out of them, and pictures and videos as queries."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import clips
import numpy as np
import pytest
import torch
from messages import heard
from numpy.typing import NDArray
from PIL import Image

from svb.data.feature_store import FeatureStore
from svb.errors import InputError
from svb.extract.backbones import FAMILIES
from svb.extract.config import ExtractConfig
from svb.extract.decode.decoder import FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.pyav_decoder import decode
from svb.extract.decode.sampling import Sampling
from svb.extract.run import extract
from svb.retrieve.answer import Answer, Moment, SearchRequest, VideoResult
from svb.retrieve.model import query_media
from svb.retrieve.model.embedder import Embedder
from svb.retrieve.model.query_media import embed_image, embed_video, read_picture
from svb.retrieve.model.torch_media import TorchMedia
from svb.retrieve.searching import cut, pictures
from svb.retrieve.searching.cut import cut_clip, cut_moments
from svb.retrieve.searching.pictures import begin_seconds, duration_seconds, frame_at, frames_at, strip
from svb.train.heads import mean_of_frames

CPU = torch.device("cpu")

# Every container and kind of stream in which finding a time is not the same.
MAKERS: dict[str, Callable[[Path], Path]] = {
    "one-keyframe.mp4": lambda path: clips.make_clip(path, seconds=4, extra=("-g", "600")),
    "many-keyframes.mp4": lambda path: clips.make_clip(path, seconds=4, extra=("-g", "5", "-bf", "2")),
    "late.mkv": clips.make_late_clip,
    "late.ts": clips.make_late_clip,
    "broadcast.ts": lambda path: clips.make_clip(path, seconds=6, extra=("-g", "15")),
    "variable.mkv": clips.make_variable_rate_clip,
    "packed.avi": lambda path: clips.make_clip(path, seconds=3, codec=("-c:v", "mpeg4", "-bf", "2")),
    "bare.h264": lambda path: clips.make_clip(path, seconds=2),
    "web.webm": lambda path: clips.make_clip(path, codec=("-c:v", "libvpx", "-deadline", "realtime")),
    "turned.mp4": lambda path: clips.make_turned_clip(path, 90),
    "anamorphic.mp4": clips.make_anamorphic_clip,
    "odd.mkv": clips.make_odd_size_clip,
    "see-through.mov": clips.make_transparent_clip,
    "one-frame.mp4": clips.make_one_frame_clip,
    "- [odd] %03d.mp4": lambda path: clips.make_clip(path, seconds=1),
}


class Clip(NamedTuple):
    path: Path
    frames: NDArray[np.uint8]
    times: NDArray[np.float64]


@pytest.fixture(scope="module", params=MAKERS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Clip:
    path = MAKERS[request.param](tmp_path_factory.mktemp("clip") / request.param)
    return Clip(path, *all_frames(path))


def all_frames(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return every frame and its time, decoded from the start: the slow way."""
    chunks = [c for c in decode(path, DecodeOptions(Sampling(every_nth=1))) if isinstance(c, FrameChunk)]
    return np.concatenate([c.frames for c in chunks]), np.concatenate([c.frame_times_seconds for c in chunks])


def test_the_frame_shown_at_a_time_is_found(clip: Clip) -> None:
    path, frames, times = clip
    height, width = frames.shape[1:3]
    gap = float(np.diff(times).min()) if len(times) > 1 else 0.1
    for row in sorted({0, len(times) // 3, len(times) // 2, len(times) - 2, len(times) - 1} & {*range(len(times))}):
        for seconds in (times[row], times[row] + 0.4 * gap):
            picture = np.asarray(frame_at(path, float(seconds), height))
            assert (picture == frames[row]).all(), (path.name, row, seconds)
    assert (np.asarray(frame_at(path, -100, height)) == frames[0]).all()
    assert (np.asarray(frame_at(path, 1e6, height)) == frames[-1]).all()
    rows = (len(times) - 1, 0, len(times) // 2, 0)  # many come in their order
    found = frames_at(path, [float(times[row]) for row in rows], height)
    assert all((np.asarray(picture) == frames[row]).all() for picture, row in zip(found, rows, strict=True))
    expected = 0.0 if path.suffix in {".mkv", ".webm"} else times[0]  # Matroska counts otherwise
    assert begin_seconds(path) == pytest.approx(expected, abs=0.11)  # packed AVI shows its first frame one later
    # Pictures are as high as asked, and never enlarged.
    assert frame_at(path, float(times[0]), 2000).size == (width, height)
    small = frame_at(path, float(times[0]), 20)
    assert small.size == (int(width * 20 / height), 20) and small.mode == "RGB"
    exact = np.asarray(Image.fromarray(frames[0]).resize(small.size, Image.Resampling.BICUBIC), np.float64)
    assert np.abs(np.asarray(small, np.float64) - exact).mean() < 6


def test_a_strip_has_a_cell_a_time(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    path, frames, times = clip
    height, width = frames.shape[1:3]
    wanted = np.linspace(times[0], times[-1], 4).tolist()
    assert Image.open(io.BytesIO(strip(path, wanted, 24))).format == "JPEG"
    monkeypatch.setattr(pictures, "as_jpeg", lambda picture: picture.tobytes())  # without JPEG's losses
    sheet = np.frombuffer(strip(path, wanted, 24), np.uint8).reshape(24, -1, 3)
    assert sheet.shape[1] % 4 == 0 and abs(sheet.shape[1] / 4 - 24 * width / height) <= 1
    tolerance = (wanted[-1] - wanted[0]) / 6
    cells = np.split(sheet, 4, axis=1)
    for cell, seconds in zip(cells, wanted, strict=True):
        shown = max(time for time in times if time <= seconds + 1e-3)
        near = [float(time) for time in times if shown - tolerance <= time <= shown]
        small = [picture.resize((cell.shape[1], 24)) for picture in frames_at(path, near, 24)]
        assert any((cell == np.asarray(picture)).all() for picture in small), (path.name, seconds)


def test_damage_is_passed_over(tmp_path: Path) -> None:
    rotten = clips.make_rotten_clip(tmp_path / "rotten.mp4")
    assert len({picture.size for picture in frames_at(rotten, [0.0, 1.5, 2.9], 48)}) == 1
    half = clips.make_truncated_clip(tmp_path / "half.mp4", keeps_index=True)
    assert frame_at(half, 2.9, 48).size == (64, 48)


def test_what_is_no_video_is_an_input_error(tmp_path: Path) -> None:
    for name, text in (("notes", "no video at all"), ("empty", ""), ("list", "#EXTM3U\nfile:///etc/hostname\n")):
        (tmp_path / f"{name}.mp4").write_text(text)
    song = clips.make_song_with_cover(tmp_path / "song.mp3")
    lost = clips.make_truncated_clip(tmp_path / "lost.mp4", keeps_index=False)
    files = (*(tmp_path / f"{name}.mp4" for name in ("notes", "empty", "list")), tmp_path, song, lost)
    asks: tuple[Callable[[Path], object], ...] = (
        *(lambda path: frame_at(path, 0, 48), lambda path: strip(path, [0], 48), duration_seconds, begin_seconds),
    )
    for ask in asks:
        for path in files:
            with pytest.raises(InputError, match=r"cannot (show|tell)"):
                ask(path)
        with pytest.raises(InputError, match=r"gone\.mp4 does not exist"):
            ask(tmp_path / "gone.mp4")


def test_limits_and_time_limits_hold(clips_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clips_folder / "a.mp4"
    for times, height in (([], 48), ([float("nan")], 48), ([0.0], 0), ([0.0], 100_000)):
        with pytest.raises(InputError, match="expected"):
            frames_at(clip, times, height)
    with pytest.raises(InputError, match="takes too long"):
        frame_at(clip, 0.5, 48, time_limit_seconds=0)
    with pytest.raises(InputError, match=r"a strip of 1200 frames of 64x48 px is too wide"):
        strip(clip, [0.5] * 1200, 48)
    assert duration_seconds(clips_folder / "deep" / "d.avi") == pytest.approx(4)  # of the header
    limits = dataclasses.replace(DecodeOptions(Sampling(fps=1)).limits, max_width_px=32)
    monkeypatch.setattr(pictures, "Limits", lambda: limits)
    with pytest.raises(InputError, match="expected a width of at most 32"):
        frame_at(clip, 0.5, 48)


def test_a_clip_begins_and_ends_where_it_should(clip: Clip, tmp_path: Path) -> None:
    path, frames, times = clip
    first, last = len(times) // 3, max(len(times) // 3 + 1, 2 * len(times) // 3)
    end = float(times[last]) if last < len(times) else float(times[-1]) + 0.1
    made = cut_clip(path, float(times[first]), end, tmp_path / "out" / "clip.mp4")
    cut_frames, cut_times = all_frames(made)
    height, width = frames.shape[1:3]
    if path.suffix != ".mov":  # a clip does not lay on white what was transparent
        # Encoding changes a frame a little, and pads odd sides; the next frame differs much more.
        assert np.abs(cut_frames[0][:height, :width].astype(float) - frames[first]).mean() < 12, path.name
    assert cut_times[0] == pytest.approx(0, abs=0.05)
    expected = max(end - float(times[first]), cut.MIN_CLIP_SECONDS)
    assert cut_times[-1] <= expected and len(cut_frames) >= min(last, len(times)) - first - 1
    assert [made.name for made in (tmp_path / "out").iterdir()] == ["clip.mp4"]


def test_a_clip_has_the_sound(tmp_path: Path) -> None:
    import av

    source = clips.make_clip_with_sound(tmp_path / "s.mp4", seconds=6, sound_seconds=6)
    with av.open(str(cut_clip(source, 2.0, 4.0, tmp_path / "clip.mp4"))) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert container.duration == pytest.approx(2e6, abs=1e5)


def test_what_cannot_be_cut_leaves_nothing(
    tmp_path: Path, clips_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, clip = tmp_path / "out" / "clip.mp4", clips_folder / "a.mp4"
    (tmp_path / "notes.mp4").write_text("no video at all")
    for path, begin, end, words in (
        (tmp_path / "notes.mp4", 1, 2, r"notes\.mp4 gave no clip from 1\.0 to 2\.0 s \(.*Invalid data"),
        (tmp_path / "gone.mp4", 1, 2, r"gone\.mp4 does not exist"),
        (clip, 90, 92, r"gave no clip from 90\.0 to 92\.0 s \(there is no frame\)"),
    ):
        with pytest.raises(InputError, match=words):
            cut_clip(path, begin, end, out)
    monkeypatch.setattr(cut, "TIME_LIMIT_SECONDS", 0.0)
    monkeypatch.setattr(cut, "TIME_LIMIT_PER_SECOND", 0.0)
    with pytest.raises(InputError, match=r"took more than 0 s and was stopped"):
        cut_clip(clip, 0.1, 0.5, out)
    assert not list(out.parent.glob("*"))


def answer(video_id: str, source: Path, num_moments: int = 2, **state: int) -> Answer:
    moments = (Moment(0.0, 0.5, 0.2, 0.4), Moment(0.5, 1.0, 0.7, 0.3))[:num_moments]
    found = VideoResult(1, 0.4, "fair", video_id, "0123456789abcdef", str(source), 1.0, moments, **state)
    return Answer(SearchRequest(text="a"), (found,), (), "fair", 1, 2, True, None, 1, {"total": 0.0})


def test_clips_are_named_after_what_was_found(tmp_path: Path, clips_folder: Path) -> None:
    said = heard()
    answers = [answer("../../etc/ü b", clips_folder / "a.mp4"), answer("...", clips_folder / "a.mp4")]
    made = cut_moments(answers, tmp_path / "out")
    assert said == [] and sorted(made) == sorted((tmp_path / "out").iterdir())
    assert [path.name for path in made] == [
        "q1-01-etc_ü_b-012345-0.0-0.5.mp4",
        "q1-01-etc_ü_b-012345-0.5-1.0.mp4",
        "q2-01-012345-0.0-0.5.mp4",
        "q2-01-012345-0.5-1.0.mp4",
    ]
    (longest,) = cut_moments([answer("猫" * 500, clips_folder / "a.mp4")], tmp_path / "long")[:1]
    assert longest.is_file()


def test_a_file_that_is_not_what_was_indexed_is_not_cut(tmp_path: Path, clips_folder: Path) -> None:
    source = Path(shutil.copy2(clips_folder / "a.mp4", tmp_path / "a.mp4"))
    size, mtime_ns = source.stat().st_size, source.stat().st_mtime_ns
    wanted = [answer("a", source, 1, size_bytes=size, mtime_ns=mtime_ns)]
    said = heard()
    source.write_bytes(source.read_bytes() + b"more")
    os.utime(source, ns=(mtime_ns, mtime_ns))
    assert cut_moments(wanted, tmp_path / "out") == []
    assert f"not cut: {source} has changed since it was indexed ({size + 4:,} bytes, was {size:,}) - " in said[0]
    source.unlink()
    assert cut_moments(wanted, tmp_path / "out") == []
    assert f"not cut: {source} is no longer there" in said[1]
    shutil.copy2(clips_folder / "a.mp4", source)
    assert len(cut_moments(wanted, tmp_path / "out")) == 1 and len(said) == 2


# --- a picture or a video as a query


def make_media(store: Path, backbone: str) -> TorchMedia:
    """Return the model that averages a store's frames."""
    return media_of({"kind": "mean", "max_frames": 64, "video": FeatureStore(store).video_settings(backbone)})


def media_of(model: dict[str, Any]) -> TorchMedia:
    return TorchMedia(Embedder(model, mean_of_frames, lambda rows: rows, {}), CPU)


@pytest.fixture(scope="module")
def toy(clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a store of toy features of frames and of windows, of the clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", "toy_backbone")
        out = tmp_path_factory.mktemp("toy") / "features"
        options = {"fps": 5, "precision": "float32", "workers": 1, "batch_size": 4}
        yield extract([clips_folder], out, ExtractConfig(("toy:frames", "toy:clips"), **options))


def rows_of(store: Path, backbone: str, video_id: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    loaded = FeatureStore(store).load(backbone, [video_id])
    return loaded.features.astype(np.float64), loaded.times_seconds


def mean_of(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("backbone", ["toy:frames", "toy:clips"])
@pytest.mark.parametrize("span", [None, (1.0, 2.0), (0.0, 100.0), (1.05, 1.15), (3.9, 3.95)])
def test_a_part_of_a_video_is_the_rows_that_lie_in_it(
    toy: Path, clips_folder: Path, backbone: str, span: tuple[float, float] | None
) -> None:
    found = embed_video(clips_folder / "deep" / "d.avi", span, make_media(toy, backbone))
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    rows, times = rows_of(toy, backbone, "deep/d")
    begin, end = span or (0.0, 100.0)
    inside = (times >= begin - 1e-3) & (times < end - 1e-3)
    if not inside.any():
        distance = np.maximum(begin - times, times - end).clip(0)
        inside = np.arange(len(times)) == distance.argmin()
    np.testing.assert_allclose(found, mean_of(rows[inside]), atol=2e-3)


def test_what_cannot_be_a_query_is_refused(toy: Path, clips_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no video at all")
    Image.new("RGB", (64, 48)).save(tmp_path / "frame.png")
    frames, windows = make_media(toy, "toy:frames"), make_media(toy, "toy:clips")
    for name in ("notes.mp4", "gone.mp4"):
        with pytest.raises(InputError, match=rf"{name} cannot be used as a video"):
            embed_video(tmp_path / name, None, frames)
    for media in (frames, windows):
        with pytest.raises(InputError, match=r"begins at 9 s, and .*d\.avi lasts until 4\.0 s - expected"):
            embed_video(clips_folder / "deep" / "d.avi", (9.0, 12.0), media)
    for media in (windows, make_media(toy, "toy:frames+toy:clips")):
        with pytest.raises(InputError, match=r"toy:clips looks at 4 frames at a time and cannot tell what"):
            embed_image(tmp_path / "frame.png", media)
    video = frames.model["video"]
    imported = {**video, "backbone_settings": {**video["backbone_settings"], "imported": True}}
    media = media_of({"video": imported})
    for embed in (embed_image, lambda file, *rest: embed_video(file, None, *rest)):
        with pytest.raises(InputError, match="were imported and cannot be computed of"):
            embed(tmp_path / "x.png", media)


def test_only_the_frames_of_a_part_are_computed(
    toy: Path, clips_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = list[int](), query_media._within

    def seen_within(*given: Any) -> Iterator[FrameChunk]:
        for chunk in real(*given):
            seen.append(len(chunk.frames))
            yield chunk

    monkeypatch.setattr(query_media, "_within", seen_within)
    found = embed_video(clips_folder / "deep" / "d.avi", (1.0, 2.0), make_media(toy, "toy:frames+toy:clips"))
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    embed_video(clips_folder / "deep" / "d.avi", (1.0, 2.0), make_media(toy, "toy:frames"))
    assert seen[-1] == 5


def test_a_picture_is_a_video_of_one_frame(toy: Path, clips_folder: Path, tmp_path: Path) -> None:
    frame_at(clips_folder / "deep" / "d.avi", 0.0, 48).save(tmp_path / "frame.png")
    media = make_media(toy, "toy:frames")
    found = embed_image(tmp_path / "frame.png", media)
    rows, _ = rows_of(toy, "toy:frames", "deep/d")
    np.testing.assert_allclose(found, mean_of(rows[:1]), atol=2e-3)
    # A decoder that scales hands over small frames: a picture is scaled alike.
    video = media.model["video"]
    for size in ({"resize_px": 20}, {"resize_px": [20, 24], "interpolation": "bilinear"}):
        scaling = {**video, "decoder": {**video["decoder"], **size}}
        scaled = embed_image(tmp_path / "frame.png", media_of({**media.model, "video": scaling}))
        assert np.linalg.norm(scaled) == pytest.approx(1, abs=1e-5) and found @ scaled > 0.95
        assert (found != scaled).any()


def test_pictures_are_turned_and_laid_on_white(tmp_path: Path) -> None:
    lying = Image.new("RGB", (40, 20), (255, 0, 0))
    lying.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "phone.png", exif=exif)
    upright = read_picture(tmp_path / "phone.png")
    assert upright.shape == (40, 20, 3)
    assert upright[0, 0].tolist() == [0, 0, 255] and upright[-1, -1].tolist() == [255, 0, 0]
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 255).all()


def test_pictures_of_any_mode(tmp_path: Path) -> None:
    single: dict[str, tuple[Any, int]] = {"1": (1, 255), "L": (200, 200), "I;16": (40_000, 156), "I": (40_000, 156)}
    grey = Image.new("RGB", (5, 3), (200, 200, 200))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"):
        value, expected = single.get(mode, (None, 200))
        path = tmp_path / ("x.tif" if mode in {"CMYK", "I", "I;16"} else "x.png")
        (Image.new(mode, (5, 3), value) if mode in single else grey.convert(mode)).save(path)
        picture = read_picture(path)
        assert picture.shape == (3, 5, 3) and picture.dtype == np.uint8
        assert picture[0, 0].mean() == pytest.approx(expected, abs=5), mode


@pytest.mark.parametrize(("highest", "expected"), [(200, 200), (60_000, 234), (2**31 - 1, 255)])
def test_grey_of_many_bits_is_seen_as_it_is_meant(tmp_path: Path, highest: int, expected: int) -> None:
    values = np.array([[0, highest]], np.int32)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    assert read_picture(tmp_path / "x.tiff")[0, :, 0].tolist() == [0, expected]
    if highest < 2**16:
        Image.frombytes("I;16B", (2, 1), values.astype(">u2").tobytes()).save(tmp_path / "b.tiff")
        assert read_picture(tmp_path / "b.tiff")[0, :, 0].tolist() == [0, highest >> 8]


@pytest.mark.parametrize("mode", ["RGB", "P", "1", "I;16", "LA"])
def test_a_huge_picture_is_scaled_down_before_it_is_copied_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("svb.retrieve.model.query_media.MAX_PICTURE_PIXELS", 1000)
    halves = Image.new("L", (90, 60), 0)
    halves.paste(255, (0, 0, 90, 30))
    if mode == "I;16":
        halves = Image.fromarray(np.array(halves).astype(np.uint16) * 257)
    halves = halves if mode in {"1", "I;16"} else halves.convert("RGB" if mode == "P" else mode)
    (halves.convert(mode) if mode in {"1", "P"} else halves).save(tmp_path / "huge.png")
    picture = read_picture(tmp_path / "huge.png")
    assert picture.shape == (20, 30, 3)  # by the smallest whole number that makes it 1000 pixels or less
    assert (picture[:10] == 255).all() and (picture[10:] == 0).all()


def test_what_is_no_picture_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.png").write_text("no picture at all")
    (tmp_path / "empty.png").write_text("")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    refused = "cannot be used as a picture"
    for name in ("notes.png", "empty.png", "page.eps", "half.png"):
        with pytest.raises(InputError, match=rf"{name} {refused} .* - expected one of JPEG, PNG"):
            read_picture(tmp_path / name)
    gone = (tmp_path / "gone.png", r"gone\.png does not exist - expected a picture")
    for path, words in (gone, (tmp_path, refused)):
        with pytest.raises(InputError, match=words):
            read_picture(path)
    for limit in (3000, 1000):  # PIL warns of the one and refuses the other
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=r"whole\.png is too large a picture .* make it smaller"):
            read_picture(tmp_path / "whole.png")
