"""What is said: read from files beside and inside the videos, found by words, by meaning and word for word."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clips import draw, make_clip, run_ffmpeg
from conftest import RunSvb
from indexes import MOMENTS, Kept, files_of, fingerprint, index, touch
from serving import serving
from watching import browser, until, watch

from svb.errors import InputError, ModelUnavailableError, StoreError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.indexing.make_speech import read_streams
from svb.retrieve.indexing.verify_index import verify_index
from svb.retrieve.search import open_searcher
from svb.retrieve.searching.searcher import Searcher
from svb.retrieve.searching.words import wanted_of
from svb.retrieve.stored.cues import Cue, cut_into_windows
from svb.retrieve.stored.manifest import read_manifest
from svb.retrieve.transcribe import TranscribeConfig, transcribe

pytestmark = pytest.mark.usefixtures("words_encoder")

# What is said in which video, and in which file beside it: a phrase that goes on in the next cue, one that stays in
# its stem, another form of the words, the words far apart, accents, a script without spaces, markup, an encoding
# of old with times that overlap, jump back and run backwards.
SAID = {
    "clip000.en.srt": [(1, 3, "Welcome to the annual"), (3, 5, "budget of the company"), (30, 31, "a dog barks")],
    "clip000.de.srt": [(1, 5, "Willkommen zum jährlichen Haushalt")],
    "clip000.fr.vtt": [(1, 5, "Bienvenue au budget annuel")],
    "clip001.srt": [(0, 2, "Annual budgeting is hard"), (2, 4, "we were running and RUNNING")],
    "clip002.srt": [(0, 2, "the budget"), (2, 4, "is annual")],
    "clip003.srt": [(0, 2, "ANNUAL - BUDGET!"), (2, 4, "Café au lait")],
    "clip004.srt": [(0, 4, "今年の年次予算について")],
    "clip005.srt": [(0, 4, "&lt;img src=x onerror=alert(1)&gt; trampoline <script>alert(2)</script>")],
    "clip006.txt": "a note about zebras\n",
    "clip007.srt": [
        (5, 7, "größer als Walrosse"),
        (1, 3, "the walrus sings"),
        (2, 6, "Walrus and tuba overlap"),
        (9, 8, "never backwards"),
    ],
}
VIDEO = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=10:duration=5")
ENCODINGS = {"clip007.srt": "cp1252", "clip003.srt": "utf-16"}


def clock(seconds: float) -> str:
    return f"00:{int(seconds) // 60:02}:{int(seconds) % 60:02},000"


def subtitles(cues: Any) -> str:
    blocks = [f"{n}\n{clock(begin)} --> {clock(end)}\n{text}\n" for n, (begin, end, text) in enumerate(cues, 1)]
    return "\n".join(blocks)


@pytest.fixture(scope="module")
def spoken(indexed_run: Path, built_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield an index of `indexed_run` in which `SAID` is said. Not to be written to."""
    import synthetic

    folder = tmp_path_factory.mktemp("spoken")
    store = Path(shutil.copytree(indexed_run.parent / "features", folder / "features"))
    for number in range(8):
        touch(store, f"clip{number:03}", source_path=str(folder / f"clip{number:03}.mp4"))
    for name, cues in SAID.items():
        text = cues if isinstance(cues, str) else subtitles(cues)
        text = f"WEBVTT\n\n{text.replace(',', '.')}" if name.endswith("vtt") else text
        (folder / name).write_bytes(text.encode(ENCODINGS.get(name, "utf-8")))
    encoder = synthetic.make_text_encoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", lambda settings, device: encoder)
        yield index(indexed_run, folder / "index", store=store, sidecars=False, **MOMENTS)


def ask(index: Path, text: str, **options: Any) -> list[Any]:
    request = SearchRequest(text=text, fold=False, **options)
    return list(open_searcher(index).search(request).results)


@pytest.mark.parametrize(
    ("text", "videos"),
    [
        ('"annual budget"', {"clip000", "clip003"}),
        ('"Annual Budget" company', {"clip000", "clip003"}),
        ("“annual budget”", {"clip000", "clip003"}),
        ('"annual budget" "company"', {"clip000"}),
        ('"annual budgeting"', {"clip001"}),
        ('"budget annual"', set()),
        ('"cafe au lait"', {"clip003"}),
        ('"budget annuel"', {"clip000"}),
        ('"年次予算"', {"clip004"}),
        ('"about zebras"', {"clip006"}),
        ('"never said"', set()),
        ('"größer als"', {"clip007"}),
        ('"sings walrus and"', {"clip007"}),
        ('"never backwards"', set()),
    ],
)
def test_what_is_quoted_is_said_word_for_word_and_nothing_else_is_found(
    spoken: Path, text: str, videos: set[str]
) -> None:
    for where in ("both", "speech"):
        found = ask(spoken, text, search_in=where, k=80)
        assert {result.video_id for result in found} == videos
        assert all(result.why != "seen" and result.confidence == "strong" for result in found)


def test_a_phrase_that_is_not_wanted_leaves_its_videos_out(spoken: Path) -> None:
    found = ask(spoken, "annual", search_in="speech", without=('"annual budget"',), k=80)
    assert {"clip001", "clip002"} <= {result.video_id for result in found[:2]}
    assert not {"clip000", "clip003"} & {result.video_id for result in found}


@pytest.mark.parametrize(
    ("text", "video", "marked"),
    [
        ("running", "clip001", ["running", "RUNNING"]),
        ("run", "clip001", ["running", "RUNNING"]),
        ("budg* hard", "clip001", ["budgeting", "hard"]),
        ("tramp*", "clip005", ["trampoline"]),
        ("CAFE", "clip003", ["Café"]),
        ("予算", "clip004", ["予", "算"]),
        ("trampoline NEAR OR AND NOT", "clip005", ["trampoline"]),
        ('trampoline"', "clip005", ["trampoline"]),
        ("trampoline* ^ ( : { }", "clip005", ["trampoline"]),
        ("zebras", "clip006", ["zebras"]),
    ],
)
def test_words_find_their_line(spoken: Path, text: str, video: str, marked: list[str]) -> None:
    best = ask(spoken, text, search_in="speech")[0]
    assert (best.video_id, best.why) == (video, "said")
    line = best.lines[0]
    assert [line.text[begin:end] for begin, end in line.marks] == marked
    assert best.moments[0].kind == "said"
    if line.begin_seconds is not None:
        moment = best.moments[0]
        assert (moment.begin_seconds, moment.end_seconds) == (line.begin_seconds, line.end_seconds)


@pytest.mark.parametrize(
    "text",
    ["NEAR", "*", '"', '""', "the and of", "AND", "NEAR(a b, 5)", "-", "a*b*", "'", "^x", "x:y", "\ud7ff"],
)
def test_no_query_is_an_error(spoken: Path, text: str) -> None:
    assert ask(spoken, text, k=3)
    assert ask(spoken, text, search_in="picture", k=3)


def test_a_line_is_found_by_its_meaning(spoken: Path) -> None:
    # Nobody says the one word that is no stop word, and only the made-up encoder looks at the others.
    found = ask(spoken, "is we were and xyzzy", search_in="speech", k=1)[0]
    assert (found.video_id, found.why) == ("clip001", "said")
    assert "we were running" in found.lines[0].text and found.lines[0].marks == ()


def test_a_line_with_few_of_the_words_does_not_hide_what_is_seen(spoken: Path) -> None:
    for text in ("boat train annual", "car train running"):
        assert ask(spoken, text)[0].video_id == ask(spoken, text, search_in="picture")[0].video_id
    assert ask(spoken, "annual budget company")[0].why == "said"


def test_every_language_is_kept_shown_and_asked_for(spoken: Path) -> None:
    assert read_manifest(spoken)["speech"][0]["languages"] == ["de", "en", "fr"]
    for language, text in (("de", "haushalt"), ("en", "budget"), ("fr", "budget"), ("FR", "annuel")):
        best = ask(spoken, text, search_in="speech", language=language)
        assert [result.video_id for result in best] == ["clip000"]
        assert {line.language for line in best[0].lines} == {language.lower()}
    with pytest.raises(InputError, match="'xx' - expected one of de, en, fr"):
        ask(spoken, "budget", language="xx")


def test_pictures_alone_are_found_as_ever(spoken: Path, built_index: Path) -> None:
    for text in ("a dog", "boat train"):
        found, expected = ask(spoken, text, search_in="picture"), ask(built_index, text)
        assert [(r.video_id, r.score, r.moments, r.why) for r in found] == [
            (r.video_id, r.score, r.moments, "seen") for r in expected
        ]


def test_an_index_without_speech_says_how_to_add_it(built_index: Path, kept: Kept, tmp_path: Path) -> None:
    manifest = read_manifest(kept.out)  # as an older version wrote it
    del manifest["speech"], manifest["inputs"]["speech"], manifest["inputs"]["transcripts"]
    (kept.out / "manifest.json").write_text(json.dumps({**manifest, "checksum": fingerprint(manifest)}))
    for held in (built_index, kept.out):
        for options in ({"search_in": "speech"}, {"search_in": "both"}, {"language": "en"}):
            with pytest.raises(InputError, match="run `svb index` on it again"):
                ask(held, "a dog", **options)
        assert ask(held, "a dog")[0].why == "seen"
    touch(kept.store, "clip000", source_path=str(tmp_path / "clip000.mp4"))
    (tmp_path / "clip000.srt").write_text(subtitles([(1, 2, "a trampoline")]))
    kept.update()
    assert ask(kept.out, "trampoline", search_in="speech")[0].video_id == "clip000"


def another_database(path: Path) -> None:
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE made (windows INTEGER)")
    database.close()


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        another_database,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b"junk" * 1000),
        lambda path: path.write_bytes((whole := path.read_bytes())[:200] + b"\xff" * 8000 + whole[8200:]),
    ],
    ids=["gone", "another", "cut", "junk", "bits"],
)
def test_words_that_are_lost_are_made_again(spoken: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    own = Path(shutil.copytree(spoken, tmp_path / "index"))
    (words,) = (own / "cache").glob("words-*.sqlite")
    damage(words)
    assert not words.exists() or any("words-" in problem for problem in verify_index(own))
    assert ask(own, "trampoline", search_in="speech")[0].video_id == "clip005"
    assert verify_index(own) == []


def test_speech_follows_its_files(kept: Kept, tmp_path: Path) -> None:
    folder, transcripts = tmp_path / "videos", tmp_path / "transcripts"
    folder.mkdir()
    transcripts.mkdir()
    touch(kept.store, "clip000", source_path=str(folder / "clip000.mp4"))
    srt = folder / "clip000.srt"

    def said(**options: Any) -> list[str]:
        kept.update(**options)
        entry = read_manifest(kept.out)["speech"]
        return [] if not entry else [r.lines[0].text for r in ask(kept.out, "trampoline", search_in="speech", k=1)]

    assert said() == []
    srt.write_text(subtitles([(1, 2, "one trampoline")]))
    assert said() == ["one trampoline"]
    before = files_of(kept.out)
    kept.update()
    assert files_of(kept.out) == before
    srt.write_text(subtitles([(1, 2, "another trampoline")]))
    assert said() == ["another trampoline"]
    folder.rename(tmp_path / "not mounted")
    assert said() == ["another trampoline"]
    (tmp_path / "not mounted").rename(folder)
    vtt = "WEBVTT\nLanguage: en\n\n00:01.000 --> 00:02.000\nthe trampoline of a transcript\n"
    (transcripts / "clip001.vtt").write_text(vtt)
    said(transcripts=transcripts)
    srt.unlink()
    assert said() == ["the trampoline of a transcript"]
    assert read_manifest(kept.out)["speech"][0]["languages"] == ["en"]
    assert said(speech=False) == said(speech=True, no_transcripts=True) == []


@pytest.mark.parametrize("name", ["cue_utf8.npy", "window_embeddings.npy"])
def test_damaged_speech_is_named_and_made_again(
    spoken: Path, indexed_run: Path, tmp_path: Path, said: list[str], name: str
) -> None:
    own = Path(shutil.copytree(spoken, tmp_path / "index"))
    (file,) = (own / "speech").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-1])
    assert any(name in problem for problem in verify_index(own))
    with pytest.raises(StoreError, match="is damaged"):
        ask(own, "trampoline", search_in="speech")
    index(indexed_run, own, store=Path(read_manifest(own)["store"]))
    assert any("is damaged" in line and "making it again" in line for line in said)
    assert ask(own, "trampoline", search_in="speech")[0].video_id == "clip005"


def test_windows_end_after_ten_seconds_and_at_a_silence() -> None:
    cues = [Cue("a", 0, 4), Cue("b", 2, 9), Cue("c", 3, 3.5), Cue("d", 8, 12), Cue("e", 40, 70), Cue("f", 71, 72)]
    assert cut_into_windows(cues) == [3, 1, 1, 1]
    assert cut_into_windows([Cue("x" * 90), Cue("y" * 90), Cue("z" * 90)]) == [2, 1]
    assert cut_into_windows([]) == []


@pytest.mark.slow
def test_a_hundred_thousand_cues(kept: Kept, tmp_path: Path) -> None:
    touch(kept.store, "clip000", source_path=str(tmp_path / "clip000.mp4"))
    cues = [f"{n}\n{clock(n % 3000)} --> {clock(n % 3000 + 2)}\na dog {n // 3000 % 5}\n" for n in range(100_000)]
    cues[77_777] = cues[77_777].replace("a dog", "the trampoline")
    (tmp_path / "clip000.srt").write_text("\n".join(cues))
    kept.update(sidecars=False)
    entry = read_manifest(kept.out)["speech"][0]
    assert entry["cues"] == 100_000
    best = ask(kept.out, '"the trampoline"', search_in="speech")
    assert [(result.video_id, result.lines[0].text) for result in best] == [("clip000", "the trampoline 0")]


class TestStreams:
    """Subtitles inside the file."""

    @pytest.fixture
    def srt(self, tmp_path: Path) -> Path:
        path = tmp_path / "said.srt"
        path.write_text(subtitles([(1, 2, "a <i>dog</i> barks"), (3, 4, "Ünïcode")]))
        return path

    @pytest.mark.parametrize(
        ("name", "codec"),
        [("a.mkv", "srt"), ("b.mkv", "ass"), ("c.mkv", "webvtt"), ("d.mp4", "mov_text"), ("e.webm", "webvtt")],
    )
    def test_streams_of_text(self, srt: Path, tmp_path: Path, name: str, codec: str) -> None:
        video = ("-c:v", "libvpx", "-deadline", "realtime") if name.endswith("webm") else ("-c:v", "libx264")
        clip = tmp_path / name
        source = (*VIDEO, "-i", str(srt), "-i", str(srt))
        maps = ("-map", "0:v", "-map", "1", "-map", "2", "-metadata:s:s:0", "language=eng")
        run_ffmpeg(*source, *maps, "-metadata:s:s:1", "language=ger", *video, "-c:s", codec, str(clip))
        streams = read_streams(clip)
        assert [(each.number, each.language) for each in streams] == [(1, "en"), (2, "de")]
        for each in streams:
            assert [cue.text for cue in each.cues] == ["a dog barks", "Ünïcode"]
            times = [(cue.begin_seconds, cue.end_seconds) for cue in each.cues]
            np.testing.assert_allclose(np.array(times, float), [(1, 2), (3, 4)], atol=0.05)

    def test_times_are_on_the_file_s_own_clock(self, srt: Path, tmp_path: Path) -> None:
        clip = tmp_path / "late.mkv"
        run_ffmpeg(*VIDEO, "-i", str(srt), "-c:v", "libx264", "-c:s", "srt", "-output_ts_offset", "10", str(clip))
        assert read_streams(clip)[0].cues[0].begin_seconds == pytest.approx(11, abs=0.05)

    def test_pictures_of_text_are_said_and_left_out(self, srt: Path, tmp_path: Path, kept: Kept) -> None:
        clip = tmp_path / "pictures.mkv"
        run_ffmpeg(*VIDEO, "-i", str(srt), "-c:v", "libx264", "-c:s", "srt", str(clip))
        # No encoder here makes pictures of text; the number of a codec is enough.
        held = clip.read_bytes()
        assert held.count(b"S_TEXT/UTF8") == 1
        clip.write_bytes(held.replace(b"S_TEXT/UTF8", b"S_HDMV/PGS\0"))
        touch(kept.store, "clip000", source_path=str(clip))
        kept.update()
        assert any("holds pictures (hdmv_pgs_subtitle), not text, and was left out" in line for line in kept.said)
        assert read_manifest(kept.out)["speech"][0]["cues"] == 0

    def test_files_without(self, tmp_path: Path) -> None:
        assert read_streams(make_clip(tmp_path / "a.mp4", seconds=1)) == []
        (tmp_path / "b.mp4").write_bytes(b"junk")
        for name in ("b.mp4", "gone.mp4"):
            with pytest.raises(InputError, match=name):
                read_streams(tmp_path / name)


class TestTranscribe:
    """With a stand-in for the model alone; loading it and all else is real."""

    @pytest.fixture
    def heard(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str | None]]:
        """Return what the model hears: seconds of sound, and the language it is told."""
        calls: list[tuple[int, str | None]] = []

        class WhisperModel:
            def __init__(self, name: str, device: str, device_index: int) -> None:
                if name == "gone":
                    raise ValueError("no model.bin")

            def transcribe(self, sound: Any, language: str | None, **options: Any) -> Any:
                calls.append((round(len(sound) / 16000), language))
                loud = np.flatnonzero(np.abs(sound) > 0.01)
                begin = loud[0] / 16000 if len(loud) else 0.0
                segments = [SimpleNamespace(start=begin, end=begin + 1, text=" a dog --> <b>barks</b>\n\n now ")]
                return iter(segments if len(loud) else []), SimpleNamespace(language="en")

        package = ModuleType("faster_whisper")
        package.WhisperModel = WhisperModel  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "faster_whisper", package)
        return calls

    @pytest.fixture
    def videos(self, tmp_path: Path) -> Path:
        folder = tmp_path / "videos"
        (folder / "deep").mkdir(parents=True)
        picture = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=10:duration=3")
        tone = ("-f", "lavfi", "-i", "sine=440:duration=2")
        late = ("-itsoffset", "1", *tone)
        draw(folder / "deep" / "a.mkv", *picture, *late, "-output_ts_offset", "5")
        make_clip(folder / "silent.mp4", seconds=1)
        (folder / "broken.mp4").write_bytes(b"junk")
        return folder

    def test_each_video_has_a_record(self, videos: Path, tmp_path: Path, heard: list[Any], run_svb: RunSvb) -> None:
        out = tmp_path / "transcripts"
        ran = run_svb("transcribe", videos, "-o", out, "--model", "tiny")
        assert ran.exit_code == 0 and ran.stdout == f"{out}\n"
        assert "1 transcribed, 1 say nothing, 1 failed" in ran.stderr
        files = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.vtt")}
        assert sorted(files) == ["broken.vtt", "deep/a.vtt", "silent.vtt"]
        assert "Language: en\n" in files["deep/a.vtt"]
        # The tone begins a second after the picture, which begins at 5 s.
        assert "00:00:06.0" in files["deep/a.vtt"]
        assert "a dog --&gt; &lt;b&gt;barks&lt;/b&gt; now" in files["deep/a.vtt"]
        statuses = {
            name: json.loads(text.partition("NOTE svb\n")[2].partition("\n")[0])["status"]
            for name, text in files.items()
        }
        assert statuses == {"broken.vtt": "failed", "deep/a.vtt": "ok", "silent.vtt": "silent"}
        assert not list(videos.rglob("*.vtt"))

    def test_a_second_run_does_what_is_left(self, videos: Path, tmp_path: Path, heard: list[Any]) -> None:
        out = tmp_path / "transcripts"
        transcribe([videos], out)
        before, calls = files_of(out), len(heard)
        transcribe([videos], out)
        assert files_of(out) == before and len(heard) == calls
        (out / "deep" / "a.vtt").unlink()
        transcribe([videos], out)
        assert len(heard) == calls + 1
        transcribe([videos], out, TranscribeConfig(language="de"))
        assert heard[-1][1] == "de"
        run_ffmpeg("-f", "lavfi", "-i", "sine=440:duration=2", "-c:a", "aac", str(videos / "broken.mp4"))
        transcribe([videos], out, TranscribeConfig(language="de"))
        assert '"status": "ok"' in (out / "broken.vtt").read_text()

    def test_a_decoder_that_crashes_is_a_failure(
        self, videos: Path, tmp_path: Path, heard: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "ffmpeg"
        program.write_text("#!/bin/sh\nkill -SEGV $$\n")
        program.chmod(0o755)
        monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
        transcribe([videos / "deep"], tmp_path / "out")
        assert '"status": "failed"' in (tmp_path / "out" / "a.vtt").read_text()

    def test_errors(self, videos: Path, tmp_path: Path, heard: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ModelUnavailableError, match="'gone' cannot be loaded"):
            transcribe([videos], tmp_path / "out", TranscribeConfig("gone"))
        with pytest.raises(InputError):
            transcribe([tmp_path / "nothing"], tmp_path / "out")
        monkeypatch.setitem(sys.modules, "faster_whisper", None)
        with pytest.raises(ModelUnavailableError, match=r"pip install '\.\[speech\]'"):
            transcribe([videos], tmp_path / "out")


class TestDoors:
    """The command line and the server."""

    def test_the_command_line_shows_the_line(self, spoken: Path, run_svb: RunSvb) -> None:
        ran = run_svb("search", '"annual budget"', "--index", spoken, "-k", 1)
        assert ran.exit_code == 0
        header, row, line = ran.stdout.splitlines()[:3]
        assert header.split() == ["rank", "score", "confidence", "why", "moments", "video"]
        assert row.split()[2:4] == ["strong", "said"]
        assert line.strip() in (
            '0:01 "Welcome to the annual budget of the company" [en]',
            '0:00 "ANNUAL - BUDGET!"',
        )
        assert "is said in 2 videos - show all with -k 2" in ran.stderr
        ran = run_svb("search", '"never said"', "--index", spoken)
        assert ran.exit_code == 1 and 'nobody says "never said"' in ran.stderr
        ran = run_svb("search", "trampoline", "--index", spoken, "--in", "speech", "--csv", "-k", 1)
        assert ran.stdout.splitlines()[0].endswith(",moment_score,kind,line")
        assert ",said,<img src=x onerror=alert(1)> trampoline alert(2)" in ran.stdout
        ran = run_svb("search", "budget", "--index", spoken, "--language", "fr")
        assert 'Bienvenue au budget annuel" [fr]' in ran.stdout and ran.stdout.count("said") == 1
        ran = run_svb("search", "--like", "clip000", "--in", "speech", "--index", spoken)
        assert ran.exit_code == 2 and "only a text" in ran.stderr

    def test_the_server_answers_alike(self, spoken: Path, tmp_path: Path) -> None:
        own = Path(shutil.copytree(spoken, tmp_path / "index"))
        with serving(own, open_searcher=lambda previous: Searcher(own, previous=previous)) as served:
            client = served.client
            held = client.get("/api/index").json()
            assert held["has_speech"] and held["languages"] == ["de", "en", "fr"]
            answer = client.post("/api/search", json={"text": "trampoline", "search_in": "speech", "k": 1}).json()
            (found,) = answer["results"]
            assert (found["video_id"], found["why"]) == ("clip005", "said")
            assert found["lines"][0]["text"] == "<img src=x onerror=alert(1)> trampoline alert(2)"
            bad = client.post("/api/search", json={"text": "x", "search_in": "nowhere"})
            assert bad.status_code == 400


def test_what_a_query_asks_for() -> None:
    wanted = wanted_of(['state-of-the-art "annual budget" the bud* "', "plus"])
    assert wanted.phrases == (("annual", "budget"),)
    assert [(term.words, term.is_prefix) for term in wanted.terms] == [
        (("state", "of", "the", "art"), False),
        (("bud",), True),
        (("plus",), False),
    ]
    assert [term.words for term in wanted_of(["to be or not to be"]).terms] == [("to",), ("be",), ("or",), ("not",)]


def test_the_page_shows_lines_as_text_and_marks_them_on_the_curve(
    spoken: Path, tmp_path: Path, run_svb: RunSvb
) -> None:
    page_file = tmp_path / "found.html"
    query = "trampoline img 年次"
    ran = run_svb("search", query, "--in", "speech", "--index", spoken, "--no-fold", "-k", 4, "--html", page_file)
    assert ran.exit_code == 0
    with browser() as chromium:
        page = chromium.new_page()
        problems = watch(page, lambda sent: sent.startswith(("file:", "data:")))
        page.goto(page_file.as_uri())
        until(page, "document.querySelectorAll('.card').length === 4")
        cards = page.evaluate(
            "[...document.querySelectorAll('.card')].map(card => [card.querySelector('.why').textContent,"
            "[...card.querySelectorAll('.line q')].map(q => q.textContent),"
            "[...card.querySelectorAll('mark')].map(mark => mark.textContent),"
            "card.querySelectorAll('.peak.said').length])"
        )
        assert page.evaluate("document.querySelectorAll('main img[src=x], main script').length") == 0
        page.close()
    by_line = {lines[0]: (why, marks, peaks) for why, lines, marks, peaks in cards}
    why, marks, peaks = by_line["<img src=x onerror=alert(1)> trampoline alert(2)"]
    assert (why, marks, peaks) == ("said", ["img", "trampoline"], 1)
    assert by_line["今年の年次予算について"][1] == ["年", "次"]
    assert problems == []
