"""Which videos an extraction takes, and the ids that they get and keep."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import clips
import numpy as np
import pandas as pd
import pytest
from extraction import features, run, statuses

from svb.data.feature_store import FeatureStore
from svb.errors import InputError
from svb.extract.config import ExtractConfig
from svb.extract.plan import plan_videos

pytestmark = pytest.mark.usefixtures("toy_backbones")


def ids(*inputs: Path) -> list[str]:
    return [video.video_id for video in plan_videos(list(inputs), {}).todo]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


class TestLists:
    def test_of_paths(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("clips/a.mp4\r\n\n/abs/b.c.mp4\nnew\u2028line.mp4\n", "utf-8")
        plan = plan_videos([tmp_path / "list.txt"], {})
        assert [(video.video_id, str(video.path)) for video in plan.todo] == [
            ("clips/a", f"{tmp_path}/clips/a.mp4"),
            ("abs/b.c", "/abs/b.c.mp4"),
            ("new\u2028line", f"{tmp_path}/new\u2028line.mp4"),
        ]
        # Comments and quotes, which may also be names.
        touch(tmp_path, "#1.mp4", "'q'")
        lines = ("# clips", "#1.mp4", "  #2.mp4", '"a b.mp4"', "'c.mp4'", "'q'", " d.mp4")
        (tmp_path / "list.txt").write_text("\n".join(lines))
        assert ids(tmp_path / "list.txt") == ["#1", "a b", "c", "'q'", " d"]

    def test_of_ids_too(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("video_id,path\nx,a.mp4\n,b.mp4\n")
        pd.DataFrame({"path": ["a.mp4", "b.mp4"], "video_id": ["x", None]}).to_parquet(tmp_path / "list.parquet")
        assert ids(tmp_path / "list.csv") == ids(tmp_path / "list.parquet") == ["x", "b"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("l.csv", b"file\na.mp4\n", "no column path - expected the header path"),
            ("l.csv", b"path,video_id\n,x\n", r"row 1: the path is '' - expected a video's"),
            ("l.csv", b"path\n\xff.mp4\n", "is not UTF-8 - save the list as UTF-8"),
            ("l.parquet", b"text", "not a readable list of videos"),
            ("l.txt", b"..\n/\n", "row 2: the path is '/'"),
            ("a.m3u8", b"", "is a playlist"),
        ],
    )
    def test_what_cannot_be_used(self, name: str, content: bytes, words: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            ids(tmp_path / name)

    def test_files_that_are_missing_are_recorded_once(self, clips_folder: Path, tmp_path: Path) -> None:
        long = "a" * 300  # which no file can be called
        with pytest.raises(InputError, match="no such file or folder"):
            ids(tmp_path / f"{long}.mp4")
        (tmp_path / "list.txt").write_text(f"{clips_folder}/a.mp4\ngone.mp4\n{long}.mp4\n")
        run(tmp_path / "list.txt", tmp_path / "out")
        assert sorted(statuses(tmp_path / "out").values()) == ["missing", "missing", "ok"]
        assert statuses(tmp_path / "out")[long] == "missing"
        assert run(tmp_path / "list.txt", tmp_path / "out")[-1].startswith("nothing to do")


class TestIds:
    def test_two_files_that_would_share_one(self, tmp_path: Path) -> None:
        touch(tmp_path, "x/a.mkv", "x/a.mp4", "y/a.mp4")
        plan = plan_videos([tmp_path / "x", tmp_path / "y"], {})
        assert [video.video_id for video in plan.todo] == ["a", "a.mp4", "a.mp4~2"]
        assert len(plan.messages) == 2
        assert f"another video is already called 'a': {tmp_path}/x/a.mp4 becomes 'a.mp4'" in plan.messages

    def test_the_same_file_twice_is_one_video(self, clips_folder: Path) -> None:
        inputs = (clips_folder / "a.mp4", clips_folder, clips_folder / "deep" / ".." / "a.mp4")
        assert ids(*inputs) == ["a", "b", "c", "deep/d"]

    def test_a_table_of_times_may_spell_accents_otherwise(self, tmp_path: Path) -> None:
        touch(tmp_path, "cafe\u0301.mp4")
        (video,) = plan_videos([tmp_path], {}, times_seconds={"caf\u00e9": (1.0,)}).todo
        assert video.times_seconds == (1.0,)

    def test_one_stays_with_its_file(self, tmp_path: Path) -> None:
        for name in ("a.mp4", "b.mp4"):
            clips.make_clip(tmp_path / name, seconds=0.3)
        run(tmp_path, tmp_path / "out")
        before = features(tmp_path / "out")
        clips.make_clip(tmp_path / "a.avi", seconds=0.3, filters="hflip")  # sorts before a.mp4
        run(tmp_path, tmp_path / "out")
        after = features(tmp_path / "out")
        assert set(after) == {"a", "b", "a.avi"}
        np.testing.assert_array_equal(after["a"], before["a"])

    def test_a_listed_file_that_is_gone_keeps_its_features_and_its_id(self, tmp_path: Path) -> None:
        clips.make_clip(tmp_path / "a.mp4", seconds=0.3)
        (tmp_path / "list.txt").write_text("a.mp4\n")
        run(tmp_path / "list.txt", tmp_path / "out")
        (tmp_path / "new").mkdir()
        (tmp_path / "a.mp4").rename(tmp_path / "new" / "a.mp4")
        messages = run(tmp_path / "list.txt", tmp_path / "out")
        assert FeatureStore(tmp_path / "out").video_ids == ["a"]
        assert any("files are gone" in message and "kept" in message for message in messages)
        plan = plan_videos([tmp_path / "new", tmp_path / "list.txt"], FeatureStore(tmp_path / "out").records)
        assert [video.video_id for video in plan.todo] == ["a.mp4"]

    def test_a_newcomer_does_not_take_that_of_a_video_whose_disk_is_away(self, tmp_path: Path) -> None:
        for folder, source in (("d1", "testsrc2"), ("d2", "smptebars")):
            (tmp_path / folder).mkdir()
            clips.make_clip(tmp_path / folder / "a.mp4", seconds=0.3, source=source)
        run(tmp_path / "d1", tmp_path / "out")
        (tmp_path / "d1").rename(tmp_path / "away")
        # What was moved, and is the same to the byte, keeps its id.
        for folder in ("d2", "away"):
            run(tmp_path / folder, tmp_path / "out")
            assert FeatureStore(tmp_path / "out").video_ids == ["a", "a.mp4"]


class TestFolders:
    def test_what_one_holds_beside_videos(self, tmp_path: Path) -> None:
        folder = tmp_path / "v"
        names = [
            *("a.mp4", "a.webp", "still.webp", "old.gif", ".hidden.mp4", ".Trash-1000/files/b.mp4", "@eaDir/a.mp4"),
            *("$RECYCLE.BIN/c.mp4", "lost+found/d.mp4", "raw/.stversions/e.mp4", "raw/f.mp4", "raw/keep/g.mp4"),
            *("raw/proxy-h.mp4", "app.ts", "app.mts", "empty.ts", "i.dav", "j.xyz", "k.wtv"),
        ]
        touch(folder, *names)
        for name in ("app.ts", "app.mts"):
            (folder / name).write_text("export const größe: number = 1;\n" * 200, "utf-8")
        clips.make_clip(folder / "stream.ts", seconds=0.3)

        def planned(**rules: object) -> tuple[set[str], list[str]]:
            plan = plan_videos([folder], {}, rules=ExtractConfig(**rules).folder_rules)
            return {str(video.path.relative_to(folder)) for video in plan.todo}, plan.messages

        shown = {"a.mp4", "still.webp", "old.gif", "empty.ts", "stream.ts", "i.dav", "k.wtv"}
        raw = {"raw/f.mp4", "raw/keep/g.mp4", "raw/proxy-h.mp4"}
        videos, messages = planned()
        assert videos == shown | raw
        assert messages == [
            f"{folder}: ignored 4 files that are not videos by their suffix (.xyz 1, .webp of a video's name 1, "
            ".mts of text 1, .ts of text 1)",
            f"{folder}: left out 6 hidden files and folders ($RECYCLE.BIN, .Trash-1000, @eaDir, lost+found, "
            ".hidden.mp4, ...); --hidden takes them",
        ]
        hidden = {name for name in names if name.endswith(".mp4")}
        assert planned(hidden=True)[0] == shown | raw | hidden
        assert planned(suffixes=("xyz",))[0] == shown | raw | {"j.xyz"}
        videos, messages = planned(exclude=("raw/*", "!raw/keep", "*.webp", "/i.*"))
        assert videos == (shown - {"still.webp", "i.dav"}) | {"raw/keep/g.mp4"}
        assert messages[-1] == f"{folder}: left out 5 files and folders by --exclude"
        assert planned(exclude=("raw/",))[0] == shown

    def test_a_closed_one_does_not_end_the_run(
        self, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scandir, stat = os.scandir, Path.stat

        def closed(path: str | Path = ".") -> object:  # root may look into everything
            if str(path).endswith("deep"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        def refused(path: Path, **options: bool) -> os.stat_result:
            if path.parent.name == "deep":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return stat(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", closed)
            patch.setattr(Path, "stat", refused)
            messages = run(folder, out, prune=True)
            assert any(f"cannot look into 1 folders ({folder}/deep): Permission denied" in m for m in messages)
            with pytest.raises(InputError, match="cannot read the folder"):
                ids(folder / "deep")
        assert statuses(out)["deep/d"] == "ok"  # it may well be there
