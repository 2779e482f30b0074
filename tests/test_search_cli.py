"""`svb search` with a searcher that always finds the same: what it asks for, prints, says, writes and refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import jsonschema
import pytest
from clips import make_clip
from conftest import RunSvb

from svb.cli import run
from svb.cli.search import part_of_file
from svb.cli.search_output import clock, printable
from svb.errors import InputError
from svb.retrieve.answer import (
    Answer,
    CaptionResult,
    Curve,
    Moment,
    SearchRequest,
    VideoResult,
    answer_schema,
    at_least,
)

SCHEMA = json.loads((Path(__file__).resolve().parents[1] / "docs" / "answer.schema.json").read_text("utf-8"))


class FakeSearcher:
    """Finds the same videos for every query, as many as are asked for and as sure."""

    opened: ClassVar[list[Path]] = []
    asked: ClassVar[list[SearchRequest]] = []
    videos: ClassVar[list[tuple[str, str, str]]] = []  # video_id, path, confidence
    took: ClassVar[dict[str, float]] = {"embed": 0.01, "load": 0.0, "scan": 0.02, "total": 0.03}

    def __init__(self, path: Path, device: str = "auto") -> None:
        self.opened.append(path)
        self.device = device

    def search(self, request: SearchRequest) -> Answer:
        self.asked.append(request)
        if request.text is not None and not request.text.strip():
            raise InputError("the query is empty - say what to look for")
        if len((request.text or "").split()) > 9:
            raise InputError(f"the query has {len((request.text or '').split())} words - make it shorter")
        least = request.min_confidence or "weak"
        passing = [video for video in self.videos if at_least(video[2], least)]
        moments = tuple(Moment(4 * n + 0.5, 4 * n + 2, 4 * n + 1.0, 0.4) for n in range(request.num_moments))
        curve = Curve((0.5, 1.5), (0.1, 0.2)) if request.with_curves else None
        results = [
            VideoResult(
                *(rank, 0.5 - rank / 100, confidence, video_id, "0123456789abcdef", path),
                *(None if rank == 2 else 75.5, moments, ("copy/of",) if rank == 1 else ()),
                *({"place": "Rome", "year": 2020}, curve, 1000 if video_id == "changed" else 0),
            )
            for rank, (video_id, path, confidence) in enumerate(passing[: request.k], start=1)
        ]
        captions = (
            CaptionResult(1, 0.5, "a dog", "training", "v1"),
            CaptionResult(2, 0.4, "a \x1bcat", "subs", "", 61.0, 62.0),
        )
        return Answer(
            request=request,
            results=tuple(results),
            captions=() if request.text is not None else captions,
            confidence=self.videos[0][2] if self.videos else "weak",
            num_videos=len(self.videos),
            num_windows=12_345,
            exact=request.exact,
            recall=None if request.exact else 0.994,
            generation=7,
            elapsed_seconds=self.took,
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
    library.open_searcher = FakeSearcher  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.chdir(tmp_path)
    yield FakeSearcher


def asked_of(fake: type[FakeSearcher], run_svb: RunSvb, *arguments: object) -> SearchRequest:
    fake.asked.clear()
    ran = run_svb("search", *arguments, "--index", "index")
    assert ran.exit_code == 0, ran.stderr
    (request,) = fake.asked
    return request


def test_options_become_the_request(fake: type[FakeSearcher], run_svb: RunSvb) -> None:
    values: dict[str, Any] = {"plus": ("x", "y"), "without": ("z",), "k": 3, "by": "video", "folders": ("f",)}
    values |= {"min_duration_seconds": 90.0, "max_duration_seconds": 7200.5, "after": "2026-01-01"}
    values |= {"before": "2026-02-01", "where": ("a=1", "b~2"), "min_confidence": "weak", "fold": False}
    values |= {"exact": True, "search_in": "both", "language": "en", "num_moments": 2, "num_captions": 0}
    given = (
        "--plus x --plus y --not z -k 3 --by video --folder f --min-duration 1:30 --max-duration 2:00:00.5 --after "
        "2026-01-01 --before 2026-02-01 --where a=1 --where b~2 --min-confidence weak --no-fold --exact --in both "
        "--language en --moments 2 --captions 0 dog"
    )
    for arguments, request in (
        (given, SearchRequest(text="dog", **values)),
        ("dog", SearchRequest(text="dog")),
        ("--video c.mp4@1-2", SearchRequest(video="c.mp4", span_seconds=(1.0, 2.0))),
        ("--image p.png", SearchRequest(image="p.png")),
        ("--like deep/a", SearchRequest(like="deep/a")),
    ):
        assert asked_of(fake, run_svb, *arguments.split()) == request
    # A field is either an option, or it is the query, comes with --video, or comes with --html.
    assert {*values, "text", "image", "video", "span_seconds", "like", "with_curves"} == {*request.__dict__}
    assert {*fake.opened} == {Path("index")}


def test_a_folder_that_exists_is_looked_for_by_both_names(
    fake: type[FakeSearcher], run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    request = asked_of(fake, run_svb, "a dog", "--folder", "here", "--folder", "elsewhere")
    assert request.folders == ("here", "elsewhere", str(here))
    monkeypatch.chdir(here)
    request = asked_of(fake, run_svb, "a dog", "--folder", ".", "--folder", "../there", "--folder", "../nowhere")
    assert request.folders == ("../nowhere", str(here), str(there))


def test_a_part_of_a_video(tmp_path: Path) -> None:
    (tmp_path / "there@1-2").write_text("")
    for given, file, span in (
        ("clip.mp4", "clip.mp4", None),
        ("clip.mp4@5-7.5", "clip.mp4", (5.0, 7.5)),
        ("clip.mp4@0:05-1:02:03.25", "clip.mp4", (5.0, 3723.25)),
        ("me@home.mp4", "me@home.mp4", None),
        ("me@home.mp4@1-2", "me@home.mp4", (1.0, 2.0)),
        ("there@1-2", "there@1-2", None),
        ("there@1-2@3-4", "there@1-2", (3.0, 4.0)),
        ("clip.mp4@5", "clip.mp4@5", None),
    ):
        assert part_of_file(given) == (file, span)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "the query is empty - expected exactly one of a text, an image, a video"),
        ("a --image p.png", "the query is text and image"),
        ("--image p.png --video c.mp4", "the query is image and video"),
        ("a -k 0", "'-k': 0 is not in the range"),
        ("a --moments 0", "'--moments': 0 is not in the range"),
        ("a --captions -1", "'--captions': -1 is not in the range"),
        ("a --min-duration long", "'--min-duration': 'long' is not a time - expected seconds, m:ss or h:mm:ss"),
        ("a --by frame", "'--by': 'frame' is not one of"),
        ("a --min-confidence sure", "'--min-confidence': 'sure' is not one of"),
        ("a --json --csv", "--json and --csv exclude each other"),
        ("a --queries q.txt", "--queries is a file of queries"),
        ("--queries q.txt --like v", "--queries is a file of queries"),
        ("a --html .", "--html got ., a folder - name the file"),
        ("a --cut a.mp4", "--cut got a.mp4, which is not a folder"),
        ("a --otio x.aaf", "--otio got x.aaf - expected a file that ends in .otio, .edl, .fcpxml"),
        ("a --otio x.otio --handles soon", "'--handles': 'soon' is not a time"),
        ("a --otio x.otio --handles 2000000s", "the handles are 2e+06 s - expected 0 or more, and less than 1e6"),
        ("a --handles 1s", "got --handles 1s without --otio - give both, or neither"),
        ("--video c.mp4@5-5", "the span is 5 to 5 s - expected 0 <= start < end"),
        *((f"--video a.mp4@{part}", f"got {part!r} after a.mp4@ - expected") for part in ("3", "0:03-", "a-b", "")),
    ],
)
def test_wrong_usage_exits_with_2_before_anything_is_opened(
    fake: type[FakeSearcher], run_svb: RunSvb, arguments: str, said: str
) -> None:
    ran = run_svb("search", *arguments.split())
    assert (ran.exit_code, ran.stdout, fake.opened) == (2, "", [])
    assert said in ran.stderr and "Traceback" not in ran.stderr


def test_the_tables_and_what_is_said_of_them(
    fake: type[FakeSearcher], run_svb: RunSvb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run_svb("search", "a dog", "--moments", "2")
    assert ran.exit_code == 0
    assert ran.stdout.splitlines() == [
        "rank  score  confidence  moments                   video",
        "   1  0.490  fair        0:00.5-0:02  0:04.5-0:06  deep/a (+1 alike)",
        "   2  0.480  weak        0:00.5-0:02  0:04.5-0:06  b",
    ]
    assert ran.stderr.splitlines() == [
        "searching index",
        "compared 2 videos (12,345 windows) approximately (recall@10 0.994; --exact compares every row), 0.03 s",
        f"note: no longer where it was extracted from: {Path.cwd()}/gone\ufffd.mp4 - `svb extract` it where it "
        "is now, then `svb index`",
    ]
    assert "12,345 windows) exactly, " in run_svb("search", "a", "--exact").stderr
    monkeypatch.setattr(fake, "took", {"embed": 5.1, "load": 4.8, "scan": 0.04, "total": 5.14})
    took = "exactly, 5.14 s (5.10 s to embed the query, of which 4.80 s to load the model; 0.04 s to scan)\n"
    assert took in run_svb("search", "a", "--exact").stderr
    monkeypatch.setattr(fake, "took", {"embed": 0.1, "load": 0.0, "scan": 1.25, "total": 1.35})
    assert "1.35 s (0.10 s to embed the query; 1.25 s to scan)\n" in run_svb("search", "a").stderr
    # Captions answer a video first.
    lines = run_svb("search", "--video", "c.mp4").stdout.splitlines()
    assert lines[:4] == [
        "rank  score  caption  pool      of video  at",
        "   1  0.500  a dog    training  v1",
        "   2  0.400  a \ufffdcat   subs                1:01",
        "",
    ]
    assert lines[4].split() == ["rank", "score", "confidence", "moments", "video"]
    monkeypatch.setattr(fake, "videos", [("changed", str(tmp_path / "a.mp4"), "fair")])
    assert run_svb("search", "a").stderr.splitlines()[-1] == (
        f"note: changed since it was extracted, and may show something else: {tmp_path}/a.mp4 - `svb extract` it "
        "again, then `svb index`"
    )


def test_json_holds_to_the_schema(run_svb: RunSvb) -> None:
    for arguments in (["a dog"], ["--video", "c.mp4@1-2"], ["a dog", "--where", "a=1", "-k", "1"]):
        held = json.loads(run_svb("search", *arguments, "--json").stdout)
        jsonschema.validate(held, SCHEMA)
        assert json.loads(json.dumps(Answer.from_json(held).as_json())) == held
    without = {name: value for name, value in held.items() if name != "recall"}
    moments = [{**held["results"][0], "moments": []}]
    for damaged in ({**held, "more": 1}, {**held, "confidence": "sure"}, without, {**held, "results": moments}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(damaged, SCHEMA)


def test_the_schema_is_the_one_of_the_classes() -> None:
    assert answer_schema() == SCHEMA, "run python -m svb.retrieve.answer > docs/answer.schema.json"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for name, shape in SCHEMA["$defs"].items():
        assert all(held["description"] for held in shape["properties"].values()), name
    request = SCHEMA["$defs"]["request"]
    for wrong in ({}, {"text": "a", "like": "b"}, {"text": "a", "k": 0}, {"text": "a", "by": "x"}, {"txt": "a"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, request)
    jsonschema.validate({"video": "a.mp4", "span_seconds": [1, 2.5], "by": None, "plus": ["x"]}, request)


def test_csv_has_a_row_per_moment(run_svb: RunSvb) -> None:
    ran = run_svb("search", 'a, "dog"', "--csv", "--moments", "2")
    rows = list(csv.DictReader(io.StringIO(ran.stdout)))
    places = [(row["rank"], row["moment"], row["begin_seconds"]) for row in rows]
    assert places == [("1", "1", "0.5"), ("1", "2", "4.5"), ("2", "1", "0.5"), ("2", "2", "4.5")]
    assert rows[0]["query"] == 'a, "dog"' and rows[2]["duration_seconds"] == ""


def test_paths_are_those_of_the_file_system(
    fake: type[FakeSearcher], monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    first, second = (path.encode() for _, path, _ in fake.videos)
    for option, end in (("--paths", b"\n"), ("--paths0", b"\0")):
        assert run(["search", "a dog", option]) == 0
        assert capfdbinary.readouterr().out == first + end + second + end
    # Also a name that is not UTF-8; a table prints no sequence that a terminal would obey.
    monkeypatch.setattr(fake, "videos", [("x\udcff\x1b[2J", os.fsdecode(b"/v/x\xff.mp4"), "fair")])
    assert run(["search", "a dog", "--paths"]) == 0
    assert capfdbinary.readouterr().out == b"/v/x\xff.mp4\n"
    assert run(["search", "a dog"]) == 0
    assert b"\x1b" not in capfdbinary.readouterr().out
    assert printable("a\x1b[2Jb\n\udcffc ü猫") == "a\ufffd[2Jb\ufffd\ufffdc ü猫"


def test_many_queries_open_the_index_once(
    fake: type[FakeSearcher], run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("q.txt").write_text("\ufeffa dog\n\n  ein Hünd  \r\nthree", "utf-8")
    held = json.loads(run_svb("search", "--queries", "q.txt", "--json", "-k", "1").stdout)
    jsonschema.validate(held, SCHEMA)
    assert [answer["request"]["text"] for answer in held] == ["a dog", "ein Hünd", "three"]
    assert len(fake.opened) == 1
    lines = run_svb("search", "--queries", "q.txt", "-k", "1").stdout.splitlines()
    assert lines[0] == "a dog" and lines[3:5] == ["", "ein Hünd"]
    assert run_svb("search", "--queries", "q.txt", "--csv", "-k", "1", "--moments", "1").stdout.count("\n") == 4
    # One query of a file is a list, too.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a dog\n")))
    assert len(json.loads(run_svb("search", "--queries", "-", "--json").stdout)) == 1
    for content, words in ((b"\n \n", "holds no query"), (b"a\xff", "is not UTF-8"), (None, "cannot be read")):
        Path("q.txt").unlink() if content is None else Path("q.txt").write_bytes(content)
        ran = run_svb("search", "--queries", "q.txt")
        assert ran.exit_code == 1 and f"svb: q.txt {words}" in ran.stderr


def test_a_query_of_a_list_that_is_refused_is_named(run_svb: RunSvb, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(f"a dog\n{'word ' * 400}\na cat\n")
    ran = run_svb("search", "--queries", "q.txt")
    assert (ran.exit_code, ran.stdout) == (1, "")
    (line,) = (line for line in ran.stderr.splitlines() if line.startswith("svb: "))
    assert line.startswith("svb: query 2 of 3, 'word word") and "word ...': the query has 400 words" in line
    assert len(line) < 200


def test_an_answer_that_is_empty_or_weak_names_the_nearest(
    run_svb: RunSvb, fake: type[FakeSearcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run_svb("search", "a dog", "--min-confidence", "strong", "--json")
    assert ran.exit_code == 1 and json.loads(ran.stdout)["results"] == []
    nearest = "no confident match; nearest: deep/a at 0:00.5-0:02 (0.490, "
    assert ran.stderr.splitlines()[-1] == f"svb: {nearest}fair)"
    assert fake.asked[-1] == SearchRequest(text="a dog", k=1)
    assert run_svb("search", "a dog", "--min-confidence", "fair").exit_code == 0
    monkeypatch.setattr(fake, "videos", [(video, path, "weak") for video, path, _ in fake.videos])
    num_asked = len(fake.asked)
    ran = run_svb("search", "a dog")
    assert ran.exit_code == 0 and f"{nearest}weak)" in ran.stderr and len(fake.asked) == num_asked + 1
    monkeypatch.setattr(fake, "videos", [])
    ran = run_svb("search", "a dog", "--folder", "f")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "svb: nothing found - --folder leaves nothing: none of the 9 videos passes" in ran.stderr
    ran = run_svb("search", " ")
    assert (ran.exit_code, ran.stderr.splitlines()[-1]) == (1, "svb: the query is empty - say what to look for")


def test_the_page_is_written_with_curves(run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, Path, Path]] = []

    def write_report(answers: Any, out: Path, index: Path, on_progress: Any) -> Path:
        if out.name == "full.html":
            raise OSError(28, "No space left on device")
        on_progress(2, 2)
        written.append((answers, out, index))
        return out

    monkeypatch.setattr("svb.retrieve.page.page.write_report", write_report)
    ran = run_svb("search", "a dog", "--html", "page.html", "--index", "index")
    ((answers, *where),) = written
    assert where == [Path("page.html"), Path("index")] and "wrote page.html" in ran.stderr
    assert answers[0].results[0].curve is not None
    ran = run_svb("search", "a dog", "--html", "full.html")
    assert ran.exit_code == 1 and ran.stderr.splitlines()[-1] == (
        "svb: full.html cannot be written (No space left on device) - make room for it, or name another file"
    )


def test_moments_are_cut(run_svb: RunSvb, tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", seconds=3)
    cut = ("search", "a dog", "--moments", "1", "--cut")
    ran = run_svb(*cut, "cuts")
    assert ran.exit_code == 0, ran.stderr
    (clip,) = Path("cuts").iterdir()
    assert clip.name == "01-deep_a-0.5-2.0.mp4"
    assert "not cut: " in ran.stderr and "cuts holds 1 of 2 clips" in ran.stderr
    before = clip.stat().st_mtime_ns
    assert "exists and is kept" in run_svb(*cut, "cuts").stderr and clip.stat().st_mtime_ns == before
    (tmp_path / "a.mp4").unlink()
    ran = run_svb(*cut, "others")
    assert ran.exit_code == 1 and "svb: none of the 2 moments could be cut" in ran.stderr


def test_moments_are_put_on_a_timeline(run_svb: RunSvb, fake: type[FakeSearcher], tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", seconds=3, fps=25)
    ran = run_svb("search", "a dog", "--moments", "1", "--otio", "found.edl", "--handles", "0.2s")
    assert ran.exit_code == 0, ran.stderr
    assert "wrote found.edl" in ran.stderr and "note: left out of the timeline: " in ran.stderr
    written = Path("found.edl").read_text()
    assert "C        00:00:00:07 00:00:02:05 01:00:00:00 01:00:01:23" in written
    assert "* LOC: 00:00:01:00 GREEN   a dog (0.400, fair)" in written
    (tmp_path / "a.mp4").unlink()
    ran = run_svb("search", "a dog", "--otio", "other.edl")
    assert ran.exit_code == 1 and "a.mp4 is no longer there" in ran.stderr and not Path("other.edl").exists()


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


def test_clock() -> None:
    times = {0: "0:00", 4.04: "0:04", 59.96: "1:00", 61.5: "1:01.5", 3723: "1:02:03", 36000.25: "10:00:00.2"}
    assert {seconds: clock(seconds) for seconds in times} == times


def test_a_server_is_asked_unless_a_device_is_named(run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []

    def answer(request: SearchRequest) -> Answer | None:
        return replace(FakeSearcher(Path("x")).search(request), generation=8) if request.text == "a" else None

    def running(index: Path) -> Any:
        looked.append(index)
        return SimpleNamespace(url="http://127.0.0.1:9", search=answer)

    monkeypatch.setattr("svb.cli.client.running_server", running)
    for arguments, generation in (
        (("a",), 8),
        (("b",), 7),  # a server that does not answer is done without
        (("a", "--no-server"), 7),
        (("a", "--device", "cpu"), 7),
    ):
        ran = run_svb("search", *arguments, "--json", "--index", "i")
        assert json.loads(ran.stdout)["generation"] == generation
        assert ("by the server at http://127.0.0.1:9" in ran.stderr) == (generation == 8)
    assert looked == [Path("i")] * 2
