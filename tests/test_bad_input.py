"""What users really bring: each odd input gets one clear line, the right exit code, and nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import clips
import numpy as np
import pytest
import synthetic
from conftest import Ran, RunSvb

from svb.data.feature_store import FeatureStore, verify_store
from svb.extract.names import DEFAULT_MODEL

pytestmark = pytest.mark.usefixtures("toy_backbones")

TOY = ("--backbone", "toy:frames", "--workers", "1")
MINILM = ("--text-encoder", "offline:minilm-l6")


def assert_refused(ran: Ran, *words: str, exit_code: int = 1) -> None:
    """Assert that a command ended with one line that says what, what was expected and what to do."""
    complaints = [line for line in ran.stderr.splitlines() if line.startswith("svb: ")]
    assert ran.exit_code == exit_code, ran
    assert len(complaints) == 1 and ran.stderr.splitlines()[-1] == complaints[0], ran.stderr
    assert "Traceback" not in ran.stderr and not ran.stdout
    for word in words:
        assert word in complaints[0], complaints[0]
    assert " - " in complaints[0] or "; " in complaints[0] or ". " in complaints[0]


def assert_wrong_usage(ran: Ran, *words: str) -> None:
    assert ran.exit_code == 2 and "Traceback" not in ran.stderr and not ran.stdout, ran
    for word in words:
        assert word in ran.stderr.splitlines()[-1], ran.stderr


class Extracted:
    """What a finished `svb extract --json` left behind."""

    def __init__(self, ran: Ran, out: Path) -> None:
        assert ran.exit_code == 0, ran
        assert "Traceback" not in ran.stderr
        assert verify_store(out) == []
        self.stderr = ran.stderr
        self.store = FeatureStore(out)
        assert json.loads(ran.stdout)["videos"] == dict(self.store.status_counts())
        self.statuses = {video_id: record.status for video_id, record in self.store.records.items()}


@pytest.fixture
def extract(run_svb: RunSvb, tmp_path: Path) -> Callable[..., Extracted]:
    def call(*arguments: object) -> Extracted:
        return Extracted(run_svb("extract", *arguments, "-o", tmp_path / "out", "--json", *TOY), tmp_path / "out")

    return call


class TestNoVideos:
    def test_no_such_path(self, run_svb: RunSvb, tmp_path: Path) -> None:
        ran = run_svb("extract", tmp_path / "nowhere", "-o", tmp_path / "out", *TOY)
        assert_refused(ran, f"no such file or folder: {tmp_path}/nowhere", "give folders, video files or a list")
        assert not (tmp_path / "out").exists()

    def test_an_empty_folder_and_one_of_other_things(self, run_svb: RunSvb, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for _ in range(2):
            ran = run_svb("extract", tmp_path / "empty", "-o", tmp_path / "out", *TOY)
            assert_refused(ran, "no videos in", "empty", "expected files such as .mp4")
            assert not (tmp_path / "out").exists()
            (tmp_path / "empty" / "notes.txt").touch()
        assert_wrong_usage(run_svb("extract"), "Missing argument 'VIDEOS...'")


class TestFiles:
    """One store per test; a bad file never costs the good ones."""

    def test_statuses(self, extract: Callable[..., Extracted], run_svb: RunSvb, tmp_path: Path) -> None:
        folder = tmp_path / "clips"
        folder.mkdir()
        (folder / "empty.mp4").touch()
        (folder / "text.mp4").write_text("not a video\n" * 50)
        clips.make_truncated_clip(folder / "no-index.mp4", keeps_index=False)
        clips.make_truncated_clip(folder / "cut.mp4", keeps_index=True)
        clips.make_rotten_clip(folder / "rotten.mp4")
        clips.make_sound(folder / "sound.m4a").rename(folder / "sound.mp4")
        clips.make_song_with_cover(folder / "song.mp3").rename(folder / "song.mp4")
        clips.make_one_frame_clip(folder / "one-frame.mp4")
        clips.make_clip(folder / "tiny.mp4", size="16x16")
        clips.make_odd_size_clip(folder / "odd.mkv")
        clips.make_turned_clip(folder / "turned.mp4", 270)
        clips.make_variable_rate_clip(folder / "variable.mp4")
        clips.make_late_clip(folder / "late.mkv")
        clips.make_anamorphic_clip(folder / "anamorphic.mp4")
        clips.make_animated_webp(folder / "moving.webp")
        done = extract(folder)
        assert done.statuses == {
            **{"empty": "empty", "text": "unreadable", "no-index": "truncated", "cut": "partial"},
            **{"rotten": "partial", "sound": "no_video_stream", "song": "attached_picture", "one-frame": "ok"},
            **{"tiny": "ok", "odd": "ok", "turned": "ok", "variable": "ok", "late": "ok", "anamorphic": "ok"},
            **{"moving": "ok", "upright-turned": "ok", "whole-cut": "ok", "whole-no-index": "ok"},
        }
        records = done.store.records
        for video_id, words in (
            ("empty", "has 0 bytes - copy or download it again"),
            ("text", "is not a video that can be read"),
            ("no-index", "moov atom not found"),
            ("cut", "s of 3.0 s; decode errors"),
            ("sound", "has no video stream - expected a video"),
            ("song", "has cover art but no video stream - expected a video, not music"),
        ):
            assert words in records[video_id].error
        sizes = {v: (records[v].width_px, records[v].height_px) for v in ("tiny", "odd", "turned", "anamorphic")}
        assert sizes == {"tiny": (16, 16), "odd": (68, 51), "turned": (48, 64), "anamorphic": (85, 48)}
        loaded = done.store.load("toy:frames", ["one-frame", "late"])
        np.testing.assert_allclose(loaded.times_seconds, [0, 4.7, 5.7], atol=1e-9)

        listed = run_svb("info", tmp_path / "out", "--failures", "--json")
        assert listed.exit_code == 0
        failures = {row["video_id"]: row for row in json.loads(listed.stdout)}
        assert set(failures) == {v for v, status in done.statuses.items() if status != "ok"}
        assert failures["empty"]["source_path"] == str(folder / "empty.mp4")
        again = run_svb("extract", folder, "-o", tmp_path / "out", *TOY)
        assert again.exit_code == 0 and "nothing to do" in again.stderr
        assert f"`svb info {tmp_path}/out --failures` says what was wrong" in again.stderr
        assert {v: r.status for v, r in FeatureStore(tmp_path / "out").records.items()} == done.statuses

    def test_names(self, extract: Callable[..., Extracted], tmp_path: Path) -> None:
        names = (
            "a b",
            'it\'s "quoted" $HOME',
            "line\nbreak",
            "Видео 動画 😀",
            "-v",
            "a@b",
            "100%d",
            "a..b",
            " ",
            "tab\t",
        )
        (tmp_path / "clips").mkdir()
        files = [clips.make_clip(tmp_path / "clips" / f"{name}.mp4", seconds=0.3) for name in names]
        for number, file in enumerate(files):  # what is alike would be decoded once
            file.write_bytes(file.read_bytes() + bytes(number))
        assert extract(tmp_path / "clips").statuses == dict.fromkeys(names, "ok")
        assert "nothing to do" in extract(tmp_path / "clips").stderr
        assert "nothing to do" in extract(*files).stderr

    def test_a_name_that_is_not_utf8(
        self, extract: Callable[..., Extracted], run_svb: RunSvb, tmp_path: Path
    ) -> None:
        folder = tmp_path / "clips"
        folder.mkdir()
        name = os.fsdecode(b"caf\xe9.mp4")
        clips.make_clip(folder / name, seconds=0.3)
        done = extract(folder)
        assert done.statuses == {"caf\\udce9": "ok"}
        assert "nothing to do" in extract(folder).stderr
        shutil.copy(folder / name, folder / os.fsdecode(b"caf\xe9.mkv"))
        done = extract(folder)
        assert done.statuses == {"caf\\udce9": "ok", "caf\\udce9.mkv": "ok"}
        assert "nothing to do" in extract(folder).stderr
        os.truncate(folder / name, 0)
        assert extract(folder).statuses["caf\\udce9"] == "empty"
        assert run_svb("info", tmp_path / "out", "--failures").exit_code == 0

    def test_what_shares_a_name_and_what_is_no_file(
        self, extract: Callable[..., Extracted], tmp_path: Path
    ) -> None:
        (tmp_path / "clips" / "deep.mp4").mkdir(parents=True)
        for name in ("a.mp4", "a.mkv", "deep.mp4/a.mp4"):
            clips.make_clip(tmp_path / "clips" / name, seconds=0.3)
        (tmp_path / "clips" / "gone.mp4").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "clips" / "pipe.mp4")
        done = extract(tmp_path / "clips")
        odd = {"deep.mp4/a": "ok", "gone": "missing", "pipe": "unreadable"}
        assert done.statuses == {"a": "ok", "a.mp4": "ok", **odd}
        assert "another video is already called 'a'" in done.stderr

    @pytest.mark.skipif(not clips.VIDEO_ZOO.is_dir(), reason=f"no real footage: {clips.VIDEO_ZOO} is missing")
    def test_the_zoo(self, extract: Callable[..., Extracted]) -> None:
        done = extract(clips.VIDEO_ZOO)
        names = {path.stem for path in clips.VIDEO_ZOO.iterdir()}
        assert done.statuses == {name: "partial" if name == "corrupted" else "ok" for name in names}
        upright = {done.store.records[f"rotate-{angle}"].width_px for angle in (0, 180)}
        turned = {done.store.records[f"rotate-{angle}"].height_px for angle in (90, 270)}
        assert len(upright) == len(turned) == 1


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--fps", "0"), ["cannot sample 0.0 frames", "give a positive number"]),
            (("--fps", "-1"), ["cannot sample -1.0 frames"]),
            (("--fps", "nan"), ["cannot sample nan frames"]),
            (("--frames", "0"), ["cannot sample 0 frames"]),
            (("--fps", "1", "--frames", "8"), ["got fps=1.0 and frames=8", "give exactly one"]),
            (("--workers", "0"), ["workers is 0", "expected at least 1"]),
            (("--batch-size", "0"), ["expected 1 to 4096"]),
            (("--stall-seconds", "0"), ["stall_seconds is 0.0", "expected more than 0"]),
            (("--stall-seconds", "nan"), ["stall_seconds is nan"]),
            (("--time-limit", "0"), ["time_limit_seconds is 0.0", "expected more than 0"]),
            (("--max-hours", "0"), ["lets no video in", "give more than 0"]),
            (("--retry-failed", "lost"), ["--retry-failed got 'lost'", "expected codes after a =, such as"]),
            (("--exclude", "raw/", "--exclude", "!"), ["--exclude got '!'", "expected a pattern as in"]),
            (("--rank", "1"), ["got --rank 1 and --world-size None", "give both"]),
            (("--rank", "2", "--world-size", "2"), ["the rank from 0 and below the world size"]),
            (("--fps", "1", "--times", "t.csv"), ["got both a sampling ({'fps': 1.0}) and times from t.csv"]),
            (("--hwaccel", "cuda"), ["cuda"]),
            (("--device", "abacus"), ["cannot use device 'abacus'", "try auto, cpu or cuda:0"]),
            (("--backbone", "nonsense:x"), ["unknown backbone family 'nonsense'", "offline, open_clip, torchvi"]),
            (("--backbone", "nonsense"), ["'nonsense' names no network", "expected family:model"]),
            (("--backbone", "offline:resnet"), ["no offline backbone", "expected offline:efficientnet-lite0"]),
            (("--backbone", "torchvision:resnet1"), ["no classifier 'resnet1'", "list_models()"]),
            (("--backbone", "timm:resnet1"), ["timm has no model 'resnet1'", "timm.list_models()"]),
            (("--backbone", "open_clip:ViT-B-3/openai"), ["no model 'ViT-B-3'", "ViT-B-32"]),
            (("--backbone", "open_clip:ViT-B-32"), ["names no weights", "laion2b_s34b_b79k", "local checkpoint"]),
        ],
    )
    def test_values_that_mean_nothing(
        self, options: tuple[str, ...], words: list[str], run_svb: RunSvb, clips_folder: Path, tmp_path: Path
    ) -> None:
        backbone = () if "--backbone" in options else TOY[:2]
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "out", *backbone, *options)
        assert_refused(ran, *words, exit_code=2)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--fps", "fast"), ["Invalid value for '--fps'", "'fast' is not a valid float"]),
            (("--frames", "2.5"), ["Invalid value for '--frames'"]),
            (("--decoder", "vlc"), ["Invalid value for '--decoder'", "'pyav', 'ffmpeg'"]),
            (("--precision", "int8"), ["Invalid value for '--precision'", "'bfloat16'"]),
            (("--fsp", "1"), ["No such option", "--fsp", "--fps"]),
        ],
    )
    def test_options_that_do_not_parse(
        self, options: tuple[str, ...], words: list[str], run_svb: RunSvb, clips_folder: Path, tmp_path: Path
    ) -> None:
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "out", *TOY, *options)
        assert_wrong_usage(ran, *words)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", [("extract", "--backbone"), ("captions", "--text-encoder")])
    def test_weights_that_cannot_be_reached(
        self,
        command: tuple[str, str],
        run_svb: RunSvb,
        clips_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        (tmp_path / "table.csv").write_text("video_id,caption\na,a dog\n")
        name, option = command
        given = clips_folder if name == "extract" else tmp_path / "table.csv"
        default = (option, DEFAULT_MODEL)
        ran = run_svb(name, given, "-o", tmp_path / "out", *default)
        assert_refused(
            ran,
            "cannot be had here",
            "offline:efficientnet-lite0",
            "offline:minilm-l6",
            "open_clip:PE-Core-B-16/PATH",
        )
        assert not (tmp_path / "out").exists()

    def test_weights_that_are_no_file(self, run_svb: RunSvb, clips_folder: Path, tmp_path: Path) -> None:
        name = "open_clip:ViT-B-32/mine.pt"
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "out", "--backbone", name)
        assert_refused(ran, "'mine.pt' is neither a file nor weights that open_clip knows", "laion2b_s34b_b79k")

    def test_unknown_text_encoders(self, run_svb: RunSvb, tmp_path: Path) -> None:
        (tmp_path / "table.csv").write_text("video_id,caption\na,a dog\n")
        arguments = ("captions", tmp_path / "table.csv", "-o", tmp_path / "out.h5", "--text-encoder")
        assert_refused(run_svb(*arguments, "x:y"), "unknown text encoder family 'x'", "offline", exit_code=2)
        assert_refused(run_svb(*arguments, "offline:t5"), "expected offline:minilm-l6", exit_code=2)
        ran = run_svb(*arguments, f"sentence_transformers:{tmp_path}")
        assert_refused(ran, "holds no sentence-transformers model", "expected a folder that its save() wrote")


class TestStores:
    def test_the_output_is_a_file(self, run_svb: RunSvb, clips_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "out", *TOY)
        assert_refused(ran, "cannot use", str(tmp_path / "out"))
        assert (tmp_path / "out").read_text() == "mine"

    @pytest.mark.parametrize("command", ["extract", "captions"])
    def test_the_output_cannot_be_written(
        self, command: str, run_svb: RunSvb, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.extract.captions.load_text_encoder", lambda *_: synthetic.make_text_encoder())
        (tmp_path / "file").touch()  # not even root can make a folder below a file
        (tmp_path / "table.csv").write_text("video_id,caption\na,a dog\n")
        out = tmp_path / "file" / "out.h5"
        given: tuple[object, ...] = (clips_folder, *TOY)
        if command == "captions":
            given = (tmp_path / "table.csv", *MINILM)
        assert_refused(run_svb(command, *given, "-o", out), "cannot use", str(tmp_path / "file"))

    def test_a_damaged_shard(self, run_svb: RunSvb, own_store: Path) -> None:
        shard = next((own_store / "shards").glob("*.h5"))
        shard.write_bytes(shard.read_bytes()[:5000])
        assert_refused(run_svb("info", own_store), "is not a whole shard", "run `svb extract` again")
        ran = run_svb("verify", own_store)
        assert ran.exit_code == 1 and "is not a whole shard" in ran.stdout and "Traceback" not in ran.stderr


class TestCaptionTables:
    @pytest.fixture
    def refuse(self, run_svb: RunSvb, tmp_path: Path) -> Callable[..., None]:
        def call(content: str | bytes, *words: str, name: str = "table.csv", options: tuple[str, ...] = ()) -> None:
            data = content.encode() if isinstance(content, str) else content
            (tmp_path / name).write_bytes(data)
            ran = run_svb("captions", tmp_path / name, "-o", tmp_path / "out.h5", *MINILM, *options)
            assert_refused(ran, f"{tmp_path}/{name}", *words)
            assert [path.name for path in tmp_path.iterdir()] == [name]
            (tmp_path / name).unlink()

        return call

    def test_what_is_refused(self, refuse: Callable[..., None]) -> None:
        """How tables are read in general, test_tables tells."""
        head = "video_id,caption,split\n"
        refuse("id,text\na,b\n", "no column video_id and no column caption, only id, text", "expected the header")
        refuse(b"video_id,caption\na,caf\xe9\n", "line 2: byte 0xe9 is not UTF-8", "save it as UTF-8")
        refuse("video_id,caption\na,a dog, running\n", "line 2: 3 fields where the header has 2", "quote captions")
        refuse("video_id,caption\n,a dog\n", "line 2: video_id is empty")
        refuse("video_id,caption\na,a\0dog\n", " NUL")  # Python 3.10 refuses it while reading the CSV
        refuse("video_id,caption,caption_id\na,x,1\nb,y,1\n", "caption_id '1' appears twice", "make every")
        refuse(f"{head}a,a dog,dev\n", "line 2: split is 'dev'", "expected one of train, val, test")
        refuse(f"{head}a,x,train\na,y,test\n", "'a' is in train and in test", "into one split")
        refuse("video_id,caption\n", "holds no captions", "expected rows with video_id, caption")
        refuse("video_id,caption\na,\n", "holds no captions", options=("--drop-empty",))
        refuse("\n\n", "holds no captions", name="table.jsonl")

    def test_empty_captions(self, refuse: Callable[..., None], run_svb: RunSvb, tmp_path: Path) -> None:
        table = "video_id,caption\na,a dog\nb,\nc,  \n"
        refuse(table, "line 3: the caption is empty (2 such rows)", "fill them in", "--drop-empty")
        (tmp_path / "table.csv").write_text(table)
        ran = run_svb("captions", tmp_path / "table.csv", "-o", tmp_path / "out.h5", *MINILM, "--drop-empty")
        assert ran.exit_code == 0
        described = json.loads(run_svb("info", tmp_path / "out.h5", "--json").stdout)
        assert described["captions"] == described["videos"] == 1
