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


Given = dict[str, Path]


@pytest.fixture
def given(clips_folder: Path, tmp_path: Path) -> Given:
    """Return what the commands take: videos, and a table of captions."""
    (tmp_path / "table.csv").write_text("video_id,caption\na,a dog\n")
    return {"extract": clips_folder, "captions": tmp_path / "table.csv"}


def test_no_videos(run_svb: RunSvb, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for name, *words in (
        ("nowhere", f"no such file or folder: {tmp_path}/nowhere", "give folders, video files or a list"),
        ("empty", "no videos in", "empty", "expected files such as .mp4"),
        ("other", "no videos in", "other", "expected files such as .mp4"),
    ):
        ran = run_svb("extract", tmp_path / name, "-o", tmp_path / "out", *TOY)
        assert_refused(ran, *words)
        assert not (tmp_path / "out").exists()


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

    def test_names_and_what_is_no_file(
        self, extract: Callable[..., Extracted], run_svb: RunSvb, tmp_path: Path
    ) -> None:
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
            "t\t",
        )
        folder, latin = tmp_path / "clips", os.fsdecode(b"caf\xe9.mp4")
        (folder / "deep.mp4").mkdir(parents=True)
        odd = (latin, "a.mp4", "a.mkv", "deep.mp4/a.mp4")
        for number, name in enumerate((*(f"{name}.mp4" for name in names), *odd)):
            clips.make_clip(folder / name, seconds=0.3)
            with (folder / name).open("ab") as file:  # what is alike would be decoded once
                file.write(bytes(number))
        (folder / "gone.mp4").symlink_to(tmp_path / "nowhere")
        os.mkfifo(folder / "pipe.mp4")
        done = extract(folder)
        expected = dict.fromkeys((*names, "caf\\udce9", "a", "a.mp4", "deep.mp4/a"), "ok")
        assert done.statuses == {**expected, "gone": "missing", "pipe": "unreadable"}
        assert "another video is already called 'a'" in done.stderr
        assert "nothing to do" in extract(folder).stderr
        assert "nothing to do" in extract(*(folder / f"{name}.mp4" for name in names)).stderr
        shutil.copy(folder / latin, folder / os.fsdecode(b"caf\xe9.mkv"))
        os.truncate(folder / latin, 0)
        statuses = extract(folder).statuses
        assert (statuses["caf\\udce9"], statuses["caf\\udce9.mkv"]) == ("empty", "ok")
        assert run_svb("info", tmp_path / "out", "--failures").exit_code == 0


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--fps", "0"), ["cannot sample 0.0 frames", "give a positive number"]),
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

    def test_options_that_do_not_parse(self, run_svb: RunSvb, clips_folder: Path, tmp_path: Path) -> None:
        for options, *words in (
            (("--fps", "fast"), "Invalid value for '--fps'", "'fast' is not a valid float"),
            (("--decoder", "vlc"), "Invalid value for '--decoder'", "'pyav', 'ffmpeg'"),
            (("--fsp", "1"), "No such option", "--fsp", "--fps"),
        ):
            ran = run_svb("extract", clips_folder, "-o", tmp_path / "out", *TOY, *options)
            assert ran.exit_code == 2 and not ran.stdout and not (tmp_path / "out").exists()
            assert all(word in ran.stderr.splitlines()[-1] for word in words), ran.stderr

    @pytest.mark.parametrize(("command", "option"), [("extract", "--backbone"), ("captions", "--text-encoder")])
    def test_weights_that_cannot_be_reached(
        self,
        command: str,
        option: str,
        given: Given,
        run_svb: RunSvb,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        ran = run_svb(command, given[command], "-o", tmp_path / "out", option, DEFAULT_MODEL)
        known = ("offline:efficientnet-lite0", "offline:minilm-l6", "open_clip:PE-Core-B-16/PATH")
        assert_refused(ran, "cannot be had here", *known)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("command", "option", "name", "words", "exit_code"),
        [
            ("extract", "--backbone", "open_clip:ViT-B-32/mine.pt",
             ["'mine.pt' is neither a file nor weights that open_clip knows", "laion2b_s34b_b79k"], 1),
            ("captions", "--text-encoder", "x:y", ["unknown text encoder family 'x'", "offline"], 2),
            ("captions", "--text-encoder", "offline:t5", ["expected offline:minilm-l6"], 2),
            ("captions", "--text-encoder", "sentence_transformers:{tmp}",
             ["holds no sentence-transformers model", "expected a folder that its save() wrote"], 1),
        ],
    )  # fmt: skip
    def test_names_of_no_network(
        self, command: str, option: str, name: str, words: list[str], exit_code: int,
        given: Given, run_svb: RunSvb, tmp_path: Path,
    ) -> None:  # fmt: skip
        ran = run_svb(command, given[command], "-o", tmp_path / "out", option, name.format(tmp=tmp_path))
        assert_refused(ran, *words, exit_code=exit_code)


class TestStores:
    @pytest.mark.parametrize("command", ["extract", "captions"])
    def test_the_output_cannot_be_written(
        self, command: str, given: Given, run_svb: RunSvb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.extract.captions.load_text_encoder", lambda *_: synthetic.make_text_encoder())
        (tmp_path / "file").write_text("mine")  # not even root can make a folder below a file
        options = TOY if command == "extract" else MINILM
        for out in (tmp_path / "file", tmp_path / "file" / "out.h5")[command == "captions" :]:
            ran = run_svb(command, given[command], *options, "-o", out)
            assert_refused(ran, "cannot use", str(tmp_path / "file"))
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_damaged_shard(self, run_svb: RunSvb, out: Path) -> None:
        shard = next((out / "shards").glob("*.h5"))
        shard.write_bytes(shard.read_bytes()[:5000])
        assert_refused(run_svb("info", out), "is not a whole shard", "run `svb extract` again")
        ran = run_svb("verify", out)
        assert ran.exit_code == 1 and "is not a whole shard" in ran.stdout and "Traceback" not in ran.stderr


def test_caption_tables(run_svb: RunSvb, tmp_path: Path) -> None:
    """How tables are read, test_captions tells."""
    table, out = tmp_path / "table.csv", tmp_path / "out.h5"
    for content, options, words in (
        ("id,text\na,b\n", (), ["no column video_id and no column caption, only id, text", "expected the header"]),
        ("video_id,caption\na,x\nb,\n", (), ["line 3: the caption is empty (1 such rows)", "--drop-empty"]),
        ("video_id,caption\na,\n", ("--drop-empty",), ["holds no captions"]),
    ):
        table.write_text(content)
        assert_refused(run_svb("captions", table, "-o", out, *MINILM, *options), str(table), *words)
        assert list(tmp_path.iterdir()) == [table]
    table.write_text("video_id,caption\na,a dog\nb,\nc,  \n")
    assert run_svb("captions", table, "-o", out, *MINILM, "--drop-empty").exit_code == 0
    described = json.loads(run_svb("info", out, "--json").stdout)
    assert described["captions"] == described["videos"] == 1
