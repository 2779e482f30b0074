from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import click
import jsonschema
import pytest
from clips import make_clip
from conftest import RunSvb
from PIL import Image

from svb.cli import cli, run
from svb.cli.search_options import part_of_file
from svb.cli.search_output import clock, printable
from svb.cli.thumbnails import CELLS, GAP, beside, cells_of, half_blocks, iterm, kind_of_terminal, kitty
from svb.errors import InputError
from svb.retrieve.answer import (
    CONFIDENCES,
    Answer,
    CaptionResult,
    Curve,
    Moment,
    SearchRequest,
    VideoResult,
    at_least,
)

SCHEMA = json.loads((Path(__file__).resolve().parents[1] / "docs" / "answer.schema.json").read_text("utf-8"))


class FakeSearcher:
    """Finds the same videos for every query, as many as are asked for and as sure."""

    opened: ClassVar[list[Path]] = []
    asked: ClassVar[list[SearchRequest]] = []
    videos: ClassVar[list[tuple[str, str, str]]] = []  # video_id, path, confidence

    def __init__(self, path: Path, device: str = "auto") -> None:
        self.opened.append(path)
        self.device = device

    def search(self, request: SearchRequest) -> Answer:
        self.asked.append(request)
        if request.text is not None and not request.text.strip():
            raise InputError("the query is empty - say what to look for")
        passing = [
            video
            for video in self.videos
            if request.min_confidence is None or at_least(video[2], request.min_confidence)
        ]
        results = [
            VideoResult(
                rank=rank,
                score=0.5 - rank / 100,
                confidence=confidence,
                video_id=video_id,
                key="0123456789abcdef",
                source_path=path,
                duration_seconds=None if rank == 2 else 75.5,
                moments=tuple(Moment(4 * n + 0.5, 4 * n + 2, 4 * n + 1.0, 0.4) for n in range(request.num_moments)),
                duplicates=("copy/of",) if rank == 1 else (),
                metadata={"place": "Rome", "year": 2020},
                size_bytes=1000 if video_id == "changed" else 0,
                curve=Curve((0.5, 1.5), (0.1, 0.2)) if request.with_curves else None,
            )
            for rank, (video_id, path, confidence) in enumerate(passing[: request.k], start=1)
        ]
        captions = [
            CaptionResult(1, 0.5, "a dog", "training", "v1"),
            CaptionResult(2, 0.4, "a \x1bcat", "subs", "", 61.0, 62.0),
        ]
        return Answer(
            request=request,
            results=tuple(results),
            captions=() if request.text is not None else tuple(captions),
            confidence=self.videos[0][2] if self.videos else "weak",
            num_videos=len(self.videos),
            num_moments=12_345,
            exact=request.exact,
            recall=None if request.exact else 0.994,
            generation=7,
            elapsed_seconds={"embed": 0.01, "scan": 0.02, "total": 0.03},
            notes=() if self.videos else ("--folder leaves nothing: none of the 9 videos passes",),
        )


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeSearcher]]:
    """Have every search answered by a fake, whose second video has gone."""
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setattr(FakeSearcher, "opened", [])
    monkeypatch.setattr(FakeSearcher, "asked", [])
    videos = [("deep/a", str(tmp_path / "a.mp4"), "fair"), ("b", str(tmp_path / "gone\n.mp4"), "weak")]
    monkeypatch.setattr(FakeSearcher, "videos", videos)
    library = ModuleType("svb.retrieve.search")
    library.Searcher = FakeSearcher  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.chdir(tmp_path)
    yield FakeSearcher


def asked_of(fake: type[FakeSearcher], run_svb: RunSvb, *arguments: object) -> SearchRequest:
    ran = run_svb("search", *arguments, "--index", "index")
    assert ran.exit_code == 0, ran.stderr
    (request,) = fake.asked
    return request


def test_options_become_the_request(fake: type[FakeSearcher], run_svb: RunSvb) -> None:
    given = "--plus x --plus y --not z -k 3 --by video --folder f --min-duration 1:30 --max-duration 2:00:00.5"
    given += " --after 2026-01-01 --before 2026-02-01 --where a=1 --where b~2 --no-fold --exact"
    request = asked_of(fake, run_svb, "a dog", *given.split(), "--moments", "2", "--captions", "0")
    assert request == SearchRequest(
        text="a dog",
        plus=("x", "y"),
        without=("z",),
        k=3,
        by="video",
        folders=("f",),
        min_duration_seconds=90.0,
        max_duration_seconds=7200.5,
        after="2026-01-01",
        before="2026-02-01",
        where=("a=1", "b~2"),
        fold=False,
        exact=True,
        num_moments=2,
        num_captions=0,
    )


def test_no_options_are_the_defaults(fake: type[FakeSearcher], run_svb: RunSvb) -> None:
    assert asked_of(fake, run_svb, "a dog") == SearchRequest(text="a dog")
    assert fake.opened == [Path("index")]


def test_a_folder_that_is_there_is_looked_for_by_both_names(
    fake: type[FakeSearcher], run_svb: RunSvb, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    request = asked_of(fake, run_svb, "a dog", "--folder", "here", "--folder", "elsewhere")
    assert request.folders == ("here", "elsewhere", str(tmp_path / "here"))


def test_a_folder_may_be_where_we_are_or_beside_it(
    fake: type[FakeSearcher], run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    request = asked_of(fake, run_svb, "a dog", "--folder", ".", "--folder", "../there", "--folder", "../nowhere")
    assert request.folders == ("../nowhere", str(tmp_path / "here"), str(tmp_path / "there"))


@pytest.mark.parametrize(
    ("given", "file", "span"),
    [
        ("clip.mp4", "clip.mp4", None),
        ("clip.mp4@5-7.5", "clip.mp4", (5.0, 7.5)),
        ("clip.mp4@0:05-1:02:03.25", "clip.mp4", (5.0, 3723.25)),
        ("me@home.mp4", "me@home.mp4", None),
        ("me@home.mp4@1-2", "me@home.mp4", (1.0, 2.0)),
        ("there@1-2", "there@1-2", None),
        ("there@1-2@3-4", "there@1-2", (3.0, 4.0)),
        ("clip.mp4@5", "clip.mp4@5", None),
    ],
)
def test_a_part_of_a_video(given: str, file: str, span: tuple[float, float] | None, tmp_path: Path) -> None:
    (tmp_path / "there@1-2").write_text("")
    assert part_of_file(given) == (file, span)


def test_files_and_videos_of_the_index_are_queries(fake: type[FakeSearcher], run_svb: RunSvb) -> None:
    assert asked_of(fake, run_svb, "--video", "c.mp4@1-2") == SearchRequest(video="c.mp4", span_seconds=(1.0, 2.0))
    fake.asked.clear()
    assert asked_of(fake, run_svb, "--image", "p.png") == SearchRequest(image="p.png")
    fake.asked.clear()
    assert asked_of(fake, run_svb, "--like", "deep/a") == SearchRequest(like="deep/a")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a dog", "--image", "p.png"],
        ["--image", "p.png", "--video", "c.mp4"],
        ["a dog", "-k", "0"],
        ["a dog", "--moments", "0"],
        ["--video", "c.mp4@5-5"],
        ["a dog", "--min-duration", "long"],
        ["a dog", "--by", "frame"],
        ["a dog", "--min-confidence", "sure"],
        ["a dog", "--json", "--csv"],
        ["a dog", "--queries", "q.txt"],
        ["--queries", "q.txt", "--like", "v"],
    ],
)
def test_wrong_usage_exits_with_2_before_anything_is_opened(
    fake: type[FakeSearcher], run_svb: RunSvb, arguments: list[str]
) -> None:
    ran = run_svb("search", *arguments)
    assert (ran.exit_code, ran.stdout, fake.opened) == (2, "", [])
    assert "Traceback" not in ran.stderr


def test_the_table_and_what_is_said_of_it(run_svb: RunSvb) -> None:
    ran = run_svb("search", "a dog", "--moments", "2")
    assert ran.exit_code == 0
    assert ran.stdout.splitlines() == [
        "rank  score  confidence  moments                   video",
        "   1  0.490  fair        0:00.5-0:02  0:04.5-0:06  deep/a (+1 alike)",
        "   2  0.480  weak        0:00.5-0:02  0:04.5-0:06  b",
    ]
    assert ran.stderr.splitlines() == [
        "searching index",
        "compared 2 videos (12,345 moments) approximately (recall@10 0.994; --exact compares all), 0.03 s",
        f"note: no longer where it was extracted from: {Path.cwd()}/gone\ufffd.mp4 - `svb extract` it where it "
        "is now, then `svb index`",
    ]
    assert "12,345 moments) exactly, " in run_svb("search", "a", "--exact").stderr


def test_a_file_that_has_changed_is_told(
    fake: type[FakeSearcher], run_svb: RunSvb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSearcher, "videos", [("changed", str(tmp_path / "a.mp4"), "fair")])
    assert run_svb("search", "a").stderr.splitlines()[-1] == (
        f"note: changed since it was extracted, and may show something else: {tmp_path}/a.mp4 - `svb extract` it "
        "again, then `svb index`"
    )


@pytest.mark.parametrize("part", ["3", "0:03-", "a-b", ""])
def test_half_a_part_of_a_video_is_told(run_svb: RunSvb, part: str) -> None:
    ran = run_svb("search", "--video", f"a.mp4@{part}")
    assert ran.exit_code == 2
    assert (
        f"--video got {part!r} after a.mp4@ - expected the part's begin and end, such as a.mp4@0:05-" in ran.stderr
    )


@pytest.mark.parametrize(("option", "value"), [("-k", "0"), ("--moments", "0"), ("--captions", "-1")])
def test_a_number_out_of_range_is_named_as_it_was_typed(run_svb: RunSvb, option: str, value: str) -> None:
    ran = run_svb("search", "a", option, value)
    assert ran.exit_code == 2 and f"'{option}': {value} is not in the range" in ran.stderr


def test_captions_answer_a_video_first(run_svb: RunSvb) -> None:
    lines = run_svb("search", "--video", "c.mp4").stdout.splitlines()
    assert lines[:3] == [
        "rank  score  caption  pool      of video  at",
        "   1  0.500  a dog    training  v1",
        "   2  0.400  a \ufffdcat   subs                1:01",
    ]
    assert lines[3] == "" and lines[4].split() == ["rank", "score", "confidence", "moments", "video"]


@pytest.mark.parametrize("arguments", [["a dog"], ["--video", "c.mp4@1-2"], ["a dog", "--where", "a=1", "-k", "1"]])
def test_json_holds_to_the_schema(run_svb: RunSvb, arguments: list[str]) -> None:
    held = json.loads(run_svb("search", *arguments, "--json").stdout)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(held, SCHEMA)
    assert Answer.from_json(held).as_json()["request"] == held["request"] or arguments != ["a dog"]
    for damaged in (
        {**held, "more": 1},
        {**held, "confidence": "sure"},
        {name: value for name, value in held.items() if name != "recall"},
        {**held, "results": [{**held["results"][0], "moments": []}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(damaged, SCHEMA)


def test_the_schema_has_every_field_of_the_answer() -> None:
    shapes = SCHEMA["$defs"]
    for name, shape in (
        ("answer", Answer),
        ("request", SearchRequest),
        ("result", VideoResult),
        ("moment", Moment),
        ("curve", Curve),
        ("caption", CaptionResult),
    ):
        fields = shape.__dataclass_fields__
        assert set(shapes[name]["properties"]) == set(fields)
        assert name == "request" or set(shapes[name]["required"]) == set(fields)
        for field, held in fields.items():
            if "default" in shapes[name]["properties"][field]:
                assert shapes[name]["properties"][field]["default"] == held.default
    assert tuple(shapes["confidence"]["enum"]) == CONFIDENCES


def test_csv_has_a_row_a_moment(run_svb: RunSvb) -> None:
    ran = run_svb("search", 'a, "dog"', "--csv", "--moments", "2")
    rows = list(csv.DictReader(io.StringIO(ran.stdout)))
    assert [(row["rank"], row["moment"], row["begin_seconds"]) for row in rows] == [
        ("1", "1", "0.5"),
        ("1", "2", "4.5"),
        ("2", "1", "0.5"),
        ("2", "2", "4.5"),
    ]
    assert rows[0]["query"] == 'a, "dog"' and rows[2]["duration_seconds"] == ""


def test_paths_are_those_of_the_file_system(run_svb: RunSvb, fake: type[FakeSearcher], tmp_path: Path) -> None:
    first, second = (path for _, path, _ in fake.videos)
    assert run_svb("search", "a dog", "--paths").stdout == f"{first}\n{second}\n"
    assert run_svb("search", "a dog", "--paths0").stdout == f"{first}\0{second}\0"


def test_a_name_that_is_no_utf8_comes_out_as_it_is(
    fake: type[FakeSearcher], monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(fake, "videos", [("x\udcff\x1b[2J", os.fsdecode(b"/v/x\xff.mp4"), "fair")])
    assert run(["search", "a dog", "--paths"]) == 0
    assert capfdbinary.readouterr().out == b"/v/x\xff.mp4\n"
    assert run(["search", "a dog"]) == 0
    assert b"\x1b" not in capfdbinary.readouterr().out


def test_many_queries_open_the_index_once(fake: type[FakeSearcher], run_svb: RunSvb, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("\ufeffa dog\n\n  ein Hünd  \r\nthree", "utf-8")
    ran = run_svb("search", "--queries", "q.txt", "--json", "-k", "1")
    held = json.loads(ran.stdout)
    jsonschema.validate(held, SCHEMA)
    assert [answer["request"]["text"] for answer in held] == ["a dog", "ein Hünd", "three"]
    assert len(fake.opened) == 1
    lines = run_svb("search", "--queries", "q.txt", "-k", "1").stdout.splitlines()
    assert lines[0] == "a dog" and lines[3:5] == ["", "ein Hünd"]
    assert run_svb("search", "--queries", "q.txt", "--csv", "-k", "1", "--moments", "1").stdout.count("\n") == 4


def test_one_query_of_a_file_is_a_list_too(run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a dog\n")))
    assert len(json.loads(run_svb("search", "--queries", "-", "--json").stdout)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\n \n", "holds no query"), (b"a\xff", "is not UTF-8"), (None, "cannot be read")],
)
def test_queries_that_cannot_be_read(run_svb: RunSvb, content: bytes | None, words: str) -> None:
    if content is not None:
        Path("q.txt").write_bytes(content)
    ran = run_svb("search", "--queries", "q.txt")
    assert ran.exit_code == 1 and f"svb: q.txt {words}" in ran.stderr


def test_a_query_of_a_list_that_is_refused_is_named(
    run_svb: RunSvb, fake: type[FakeSearcher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    search = fake.search

    def refuse(self: FakeSearcher, request: SearchRequest) -> Answer:
        if len(request.text or "") > 40:
            raise InputError("the query has 402 tokens, toy reads 256 - make it shorter")
        return search(self, request)

    monkeypatch.setattr(fake, "search", refuse)
    (tmp_path / "q.txt").write_text(f"a dog\n{'word ' * 400}\na cat\n")
    ran = run_svb("search", "--queries", "q.txt")
    assert (ran.exit_code, ran.stdout) == (1, "")
    (line,) = (line for line in ran.stderr.splitlines() if line.startswith("svb: "))
    assert line.startswith("svb: query 2 of 3, 'word word") and "word ...': the query has 402 tokens" in line
    assert len(line) < 200


@pytest.mark.parametrize(("option", "words"), [("--html", "a folder - name the file"), ("--cut", "is no folder")])
def test_where_nothing_can_be_written_is_said_before_searching(
    run_svb: RunSvb, fake: type[FakeSearcher], tmp_path: Path, option: str, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    ran = run_svb("search", "a dog", option, "folder" if option == "--html" else "a.mp4")
    assert ran.exit_code == 2 and words in ran.stderr.splitlines()[-1] and not fake.opened


def test_nothing_sure_enough_exits_with_1_and_names_the_nearest(run_svb: RunSvb, fake: type[FakeSearcher]) -> None:
    ran = run_svb("search", "a dog", "--min-confidence", "strong", "--json")
    assert ran.exit_code == 1
    assert json.loads(ran.stdout)["results"] == []
    assert ran.stderr.splitlines()[-1] == ("svb: no confident match; nearest: deep/a at 0:00.5-0:02 (0.490, fair)")
    assert fake.asked[-1] == SearchRequest(text="a dog", k=1)
    assert run_svb("search", "a dog", "--min-confidence", "fair").exit_code == 0


def test_filters_that_leave_nothing_exit_with_1(
    run_svb: RunSvb, fake: type[FakeSearcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "videos", [])
    ran = run_svb("search", "a dog", "--folder", "f")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "svb: nothing found - --folder leaves nothing: none of the 9 videos passes" in ran.stderr


def test_weak_answers_are_called_so(
    run_svb: RunSvb, fake: type[FakeSearcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "videos", [(video, path, "weak") for video, path, _ in fake.videos])
    ran = run_svb("search", "a dog")
    assert ran.exit_code == 0 and "no confident match; nearest: deep/a at" in ran.stderr
    assert len(fake.asked) == 1


def test_an_empty_query_is_one_line(run_svb: RunSvb) -> None:
    ran = run_svb("search", " ")
    assert (ran.exit_code, ran.stderr.splitlines()[-1]) == (1, "svb: the query is empty - say what to look for")


def test_the_page_is_written_with_curves(
    run_svb: RunSvb, fake: type[FakeSearcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[Any, Path, Path]] = []

    def write_report(answers: Any, out: Path, index: Path, on_progress: Any) -> Path:
        on_progress(2, 2)
        written.append((answers, out, index))
        return out

    report = ModuleType("svb.retrieve.page.report")
    report.write_report = write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "svb.retrieve.page.report", report)
    ran = run_svb("search", "a dog", "--html", "page.html", "--index", "index")
    ((answers, out, index),) = written
    assert (out, index, "wrote page.html" in ran.stderr) == (Path("page.html"), Path("index"), True)
    assert answers[0].results[0].curve is not None


def test_moments_are_cut(run_svb: RunSvb, fake: type[FakeSearcher], tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", seconds=3)
    ran = run_svb("search", "a dog", "--moments", "1", "--cut", "cuts")
    assert ran.exit_code == 0, ran.stderr
    assert [path.name for path in Path("cuts").iterdir()] == ["01-deep_a-0.5-2.0.mp4"]
    assert "not cut: " in ran.stderr and "cuts holds 1 of 2 clips" in ran.stderr
    before = (tmp_path / "cuts" / "01-deep_a-0.5-2.0.mp4").stat().st_mtime_ns
    ran = run_svb("search", "a dog", "--moments", "1", "--cut", "cuts")
    assert "is there already and is kept" in ran.stderr
    assert (tmp_path / "cuts" / "01-deep_a-0.5-2.0.mp4").stat().st_mtime_ns == before
    (tmp_path / "a.mp4").unlink()
    ran = run_svb("search", "a dog", "--moments", "1", "--cut", "others")
    assert ran.exit_code == 1 and "svb: none of the 2 moments could be cut" in ran.stderr


def test_a_full_disk_is_what_ends_the_cutting(
    run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_clip(tmp_path / "a.mp4", seconds=3)
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(
        "#!/bin/sh\necho '[mp4] Could not write header: No space left on device' >&2\n"
        "echo '[mp4] Nothing was written into output file' >&2\nexit 228\n"
    )
    ffmpeg.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(ffmpeg))
    ran = run_svb("search", "a dog", "--moments", "1", "--cut", "cuts")
    assert ran.exit_code == 1 and "svb verify" not in ran.stderr
    assert "svb: cannot use cuts (No space left on device)" in ran.stderr.splitlines()[-1]
    assert not list((tmp_path / "cuts").iterdir())


def test_a_page_that_cannot_be_written_is_named(run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_report(answers: Any, out: Path, index: Path, on_progress: Any) -> Path:
        raise OSError(28, "No space left on device")

    report = ModuleType("svb.retrieve.page.report")
    report.write_report = write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "svb.retrieve.page.report", report)
    ran = run_svb("search", "a dog", "--html", "page.html")
    assert ran.exit_code == 1
    assert ran.stderr.splitlines()[-1] == (
        "svb: page.html cannot be written (No space left on device) - make room for it, or name another file"
    )


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, "none"),
        ({"TERM": "xterm-256color"}, "none"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"COLORTERM": "truecolor"}, "blocks"),
        ({"COLORTERM": "24bit"}, "blocks"),
        ({"COLORTERM": "24bit", "NO_COLOR": "1"}, "none"),
        ({"COLORTERM": "yes"}, "none"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "none"),
    ],
)
def test_what_a_terminal_can(environment: dict[str, str], kind: str) -> None:
    assert kind_of_terminal(environment) == kind


def test_half_blocks_have_the_colours_of_the_picture() -> None:
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 2, 4, 4))
    assert half_blocks(picture, 1, 1) == ["\x1b[38;2;255;0;0;48;2;0;0;255m\u2580\x1b[0m"]
    assert [line.count("\u2580") for line in half_blocks(picture, 7, 3)] == [7, 7, 7]


@pytest.mark.parametrize(("size", "cells"), [((320, 180), (18, 5)), ((90, 160), (6, 5)), ((900, 90), (18, 1))])
def test_pictures_keep_their_proportions(size: tuple[int, int], cells: tuple[int, int]) -> None:
    assert cells_of(Image.new("RGB", size), "kitty") == cells


def test_the_graphics_protocols(tmp_path: Path) -> None:
    picture = Image.effect_noise((160, 90), 90).convert("RGB")
    sequences = kitty(picture, 18, 5).split("\x1b\\")
    assert sequences.pop() == "" and len(sequences) > 2
    assert sequences[0].startswith("\x1b_Ga=T,f=100,c=18,r=5,C=1,q=2,m=1;")
    assert all(part.startswith("\x1b_Gm=1;") for part in sequences[1:-1])
    assert sequences[-1].startswith("\x1b_Gm=0;") and max(map(len, sequences)) < 4200
    data = "".join(part.split(";", 1)[1] for part in sequences)
    assert decoded(data).size == (160, 90)
    inline = iterm(picture, 18, 5)
    assert inline.startswith("\x1b]1337;File=inline=1;size=") and inline.endswith("\x07")
    assert decoded(inline[:-1].split(":", 1)[1]).size == (160, 90)


def decoded(data: str) -> Image.Image:
    import base64

    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("num_lines", [1, 9])
def test_a_block_has_room_for_picture_and_text(kind: str, num_lines: int) -> None:
    lines = [f"line {number}" for number in range(num_lines)]
    height = max(num_lines, CELLS[kind][1])
    for picture in (Image.new("RGB", (160, 90)), Image.new("RGB", (90, 160)), None):
        block = beside(picture, lines, kind)
        assert all(line in block for line in lines)
        # iTerm2 and kitty make room first, and go up again.
        made = height if picture is not None and kind in {"kitty", "iterm"} else 0
        assert block.count("\n") - made == height


def test_pictures_come_in_a_terminal_alone(
    fake: type[FakeSearcher], run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_clip(tmp_path / "a.mp4", seconds=3)
    assert "\x1b" not in run_svb("search", "a dog", "--thumbnails", "blocks").stdout
    monkeypatch.setattr(sys.modules["svb.cli.search"], "_thumbnails", lambda asked: asked)
    shown = run_svb("search", "a dog", "--thumbnails", "blocks", "--moments", "2").stdout
    header, *lines = shown.splitlines()
    columns, rows = CELLS["blocks"]
    assert header.split() == ["rank", "score", "confidence", "video"]
    assert len(lines) == 2 * rows and lines[0].endswith("   1  0.490  fair        deep/a (+1 alike)")
    assert lines[0].count("\u2580") == round(2 * rows * 64 / 48)
    # The second video has gone: its place is empty.
    assert lines[rows] == f"{' ' * (columns + GAP)}   2  0.480  weak        b"
    assert lines[rows + 2].strip() == "0.400  0:04.5-0:06"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (4.04, "0:04"), (59.96, "1:00"), (61.5, "1:01.5"), (3723, "1:02:03"), (36000.25, "10:00:00.2")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert printable("a\x1b[2Jb\n\udcffc ü猫") == "a\ufffd[2Jb\ufffd\ufffdc ü猫"


def test_a_server_is_asked_unless_a_device_is_named(
    fake: type[FakeSearcher], run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []

    class Answering:
        url = "http://127.0.0.1:9"

        def search(self, request: SearchRequest) -> Answer | None:
            return replace(FakeSearcher(Path("x")).search(request), generation=8) if request.text == "a" else None

    def running(index: Path) -> Answering:
        looked.append(index)
        return Answering()

    monkeypatch.setattr("svb.cli.client.running_server", running)
    ran = run_svb("search", "a", "--json", "--index", "i")
    assert json.loads(ran.stdout)["generation"] == 8 and "by the server at http://127.0.0.1:9" in ran.stderr
    # One that does not answer is done without.
    ran = run_svb("search", "b", "--json", "--index", "i")
    assert json.loads(ran.stdout)["generation"] == 7 and "by the server" not in ran.stderr
    assert looked == [Path("i"), Path("i")]
    assert json.loads(run_svb("search", "a", "--json", "--no-server").stdout)["generation"] == 7
    assert json.loads(run_svb("search", "a", "--json", "--device", "cpu").stdout)["generation"] == 7
    assert len(looked) == 2


def test_every_field_of_a_request_can_be_asked_for() -> None:
    names = {parameter.name for parameter in cli.commands["search"].params if isinstance(parameter, click.Option)}
    made = {"text", "span_seconds", "with_curves"}  # of the argument, of --video, for --html
    assert set(SearchRequest.__dataclass_fields__) - made <= names
