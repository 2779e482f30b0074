"""The demo: clips that ffmpeg makes, and the whole path through the command line on them."""

import csv
import dataclasses
import shutil
import sys
from pathlib import Path

import av
import pytest
from conftest import RunSvb

from svb.cli import demo_clips
from svb.cli.demo_clips import make_demo_clips, plan_demo_clips
from svb.errors import MismatchError, SvbError, UsageError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert make_demo_clips(folder, num_videos=6) == folder / "captions.csv"
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_table_names_the_files_that_are_there(demo: Path) -> None:
    with (demo / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ids = {path.relative_to(demo / "videos").with_suffix("").as_posix() for path in demo.rglob("*.mp4")}
    assert {row["video_id"] for row in rows} == ids and all("/" in video_id for video_id in ids)
    assert list(rows[0]) == ["video_id", "split", "caption"] and len(rows) == 6 * 5
    assert {row["split"] for row in rows} == {"train", "val"}


def test_every_clip_decodes_to_its_planned_length(demo: Path) -> None:
    for clip in plan_demo_clips(6, 0):
        with av.open(str(demo / "videos" / f"{clip.video_id}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == clip.num_frames
        assert 2 * demo_clips.FPS <= len(frames) <= 4 * demo_clips.FPS
        assert frames[0].shape == (demo_clips.HEIGHT, demo_clips.WIDTH, 3)


def test_same_seed_same_bytes_and_others_in_the_same_folder_are_refused(demo: Path, tmp_path: Path) -> None:
    make_demo_clips(tmp_path, num_videos=6)
    with pytest.raises(MismatchError, match=r'"seed": 0.*"seed": 1'):
        make_demo_clips(tmp_path, num_videos=6, seed=1)
    assert contents(tmp_path) == contents(demo)


def test_second_run_does_only_what_is_missing(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder)
    first, second, *_ = (folder / "videos" / f"{clip.video_id}.mp4" for clip in plan_demo_clips(6, 0))
    whole = first.read_bytes()
    # What a kill leaves: half a clip under its temporary name, and no table.
    first.rename(first.with_name(first.name + ".part"))
    first.with_name(first.name + ".part").write_bytes(whole[:100])
    (folder / "captions.csv").unlink()
    kept = second.stat().st_mtime_ns
    progress: list[tuple[int, int]] = []
    make_demo_clips(folder, num_videos=6, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(5, 6), (6, 6)]
    assert second.stat().st_mtime_ns == kept
    assert contents(folder) == contents(demo)


VALUES = {
    "object": demo_clips.OBJECTS,
    "colour": demo_clips.COLOURS,
    "motion": demo_clips.MOTIONS,
    "background": demo_clips.BACKGROUNDS,
}


def test_both_splits_show_every_value() -> None:
    for seed in range(5):
        clips = plan_demo_clips(300, seed)
        assert len({clip.video_id for clip in clips}) == 300
        assert len({tuple(getattr(clip, name) for name in VALUES) for clip in clips}) == 300
        assert sum(clip.split == "val" for clip in clips) == 50
        for split in ("train", "val"):
            shown = [clip for clip in clips if clip.split == split]
            assert {name: {getattr(clip, name) for clip in shown} for name in VALUES} == {
                name: set(values) for name, values in VALUES.items()
            }


def test_every_background_can_be_drawn(tmp_path: Path) -> None:
    clip = dataclasses.replace(plan_demo_clips(2, 0)[0], num_frames=2)
    clips = [dataclasses.replace(clip, background=value, video_id=f"all/{value}") for value in VALUES["background"]]
    demo_clips._render_missing(clips, tmp_path, lambda done, total: None)
    assert {path.stem for path in tmp_path.rglob("*.mp4")} == {*VALUES["background"]}


def test_impossible_numbers_are_refused_and_a_failure_of_ffmpeg_leaves_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such generator')\n")
    broken.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(broken))
    for num_videos in (0, 1, 10_000):
        with pytest.raises(UsageError, match=str(num_videos)):
            make_demo_clips(tmp_path, num_videos=num_videos)
    with pytest.raises(SvbError, match="no such generator"):
        make_demo_clips(tmp_path / "demo", num_videos=2)
    assert not [*(tmp_path / "demo").rglob("captions.csv"), *(tmp_path / "demo").rglob("*.mp4")]


@pytest.mark.slow
def test_the_demo_goes_from_clips_to_answers_and_is_not_done_twice(run_svb: RunSvb, tmp_path: Path) -> None:
    arguments = ["demo", "-o", str(tmp_path / "demo"), "--videos", "40", "--epochs", "2"]
    first = run_svb(*arguments)
    assert first.exit_code == 0, first
    headings = ("zero-shot ConSE", "best checkpoint", "rank  score  confidence  moments", "rank  score  caption")
    for words in ("ok          40", *headings):
        assert words in first.stdout
    assert first.stdout.count("$ svb search") == 4
    assert (tmp_path / "demo" / "index" / "manifest.json").is_file()
    second = run_svb(*arguments)
    assert second.exit_code == 0, second
    assert second.stderr.count("nothing to do") == 3  # extract, captions and train
