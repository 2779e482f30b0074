"""A folder of three hundred strange files costs no run: each gets its record, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fuzz_corpus
import pytest
from extraction import contents, run

from svb.data.feature_store import FeatureStore, verify_store
from svb.data.rows import FAILURES, USABLE, VideoRecord
from svb.data.text import storable_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="watches a process in Linux's /proc"),
]

PROGRAM = Path(fuzz_corpus.__file__)
BACKBONES = ("toy:frames", "toy:clips")
# Of a run; on two cores that have nothing else to do one takes about ten seconds.
TIME_LIMIT_SECONDS = 300.0
# Torch alone has half of it; the corpus has frames of 4000x4000, of which 48 MB each are held.
PEAK_BYTES = 1.5 * 2**30
# While one worker takes another's place both have their pipes and memory.
FILES_OF_A_WORKER = 6
OWN_PROCESS = "SVB_FUZZ_RUN"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fuzz_corpus.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def extracted(corpus: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the store of the whole corpus, and how the process fared that made it."""
    out = tmp_path_factory.mktemp("store") / "out"
    return out, extract_watched(out, [corpus[0].parent])


def extract_watched(out: Path, videos: Sequence[Path], **options: object) -> dict[str, Any]:
    """Extract in a process of its own, in time and with nothing to complain of; return how it fared."""
    mark = f"{OWN_PROCESS}={uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, PROGRAM, out, json.dumps({"videos": [str(path) for path in videos], **options})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **dict([mark.split("=")])},
    )
    try:
        said, complained = process.communicate(timeout=TIME_LIMIT_SECONDS)
    finally:
        process.kill()
    assert (process.returncode, complained) == (0, b"")
    until = time.monotonic() + 10
    while (left := processes_with(mark)) and time.monotonic() < until:
        time.sleep(0.1)  # the tracker that multiprocessing starts ends after its parent
    assert not left
    fared: dict[str, Any] = json.loads(said)
    return fared


def processes_with(mark: str) -> list[str]:
    """Return the command lines of all processes that inherited an environment variable."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
    return found


def records_by_path(out: Path) -> dict[str, VideoRecord]:
    """Return a sound store's records by their files, one for each."""
    assert verify_store(out) == []
    store = FeatureStore(out)
    found = {record.source_path: record for record in store.records.values()}
    assert len(found) == len(store.records) == sum(len(shard.records) for shard in store.shards)
    return found


def assert_is_recorded(out: Path, videos: Iterable[Path]) -> Counter[str]:
    records = records_by_path(out)
    assert sorted(records) == sorted(storable_text(str(path)) for path in videos)
    statuses = Counter(record.status for record in records.values())
    assert set(statuses) <= {*USABLE, *FAILURES}
    # None is known to hang or to kill a decoder: should one of these come up, its video is worth a look.
    assert not {"decoder_crash", "timeout", "out_of_memory", "nonfinite_features"} & set(statuses), statuses
    return statuses


def good(corpus: Iterable[Path]) -> list[Path]:
    return [path for path in corpus if "-good-" in path.name]


def test_the_corpus_is_the_same_every_time(corpus: list[Path], tmp_path: Path) -> None:
    again = fuzz_corpus.make_corpus(tmp_path)
    assert len(corpus) == fuzz_corpus.NUM_FILES
    assert [path.name for path in again] == [path.name for path in corpus]
    for first, second in zip(corpus, again, strict=True):
        assert first.is_file() == second.is_file()
        assert not first.is_file() or first.read_bytes() == second.read_bytes()


def test_every_file_ends_with_one_record(corpus: list[Path], extracted: tuple[Path, dict[str, Any]]) -> None:
    statuses = assert_is_recorded(extracted[0], corpus)
    # A corpus of which all fails, or all decodes, would show nothing.
    assert statuses["ok"] > 100 and statuses["partial"] > 30 and statuses["unreadable"] > 20
    assert {"empty", "missing", "attached_picture", "over_limit", "truncated", "zero_frames"} <= set(statuses)


def test_nothing_is_left_open_or_running(extracted: tuple[Path, dict[str, Any]]) -> None:
    _, fared = extracted
    open_files = fared["open_files"]
    third = len(open_files) // 3
    assert third > 100
    # By the median: what a replaced worker has sent keeps its memory open until it is taken.
    assert statistics.median(open_files[-third:]) <= statistics.median(open_files[:third]) + FILES_OF_A_WORKER
    # One more: the pipe to multiprocessing's tracker, which lives as long as the process.
    assert fared["open_files_after"] <= fared["open_files_before"] + 1
    assert fared["frame_memories"] == 0
    assert all("resource_tracker" in command for command in fared["children"])
    assert fared["peak_bytes"] < PEAK_BYTES


def test_good_files_among_them_are_what_they_are_alone(
    corpus: list[Path], extracted: tuple[Path, dict[str, Any]], toy_backbones: None, tmp_path: Path
) -> None:
    among = contents(extracted[0])
    assert len(good(corpus)) > 15
    for path in good(corpus):
        run(path, tmp_path / path.name, *BACKBONES)
        assert verify_store(tmp_path / path.name) == []
        assert among[str(path)][0] == "ok"
        assert contents(tmp_path / path.name) == {str(path): among[str(path)]}


def test_neighbours_leave_every_file_alone(
    corpus: list[Path], extracted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    videos = [path for path in reversed(corpus) if path.exists()]
    extract_watched(tmp_path / "out", videos)
    assert_is_recorded(tmp_path / "out", videos)
    forwards, backwards = contents(extracted[0]), contents(tmp_path / "out")
    assert {path: content for path, content in backwards.items() if content != forwards[path]} == {}


def test_a_second_run_has_nothing_to_do(corpus: list[Path], extracted: tuple[Path, dict[str, Any]]) -> None:
    out, _ = extracted
    before = {path: path.read_bytes() for path in out.rglob("*.h5")}
    fared = extract_watched(out, [corpus[0].parent])
    assert fared["messages"] == [f"nothing to do: all {len(corpus)} videos are in {out}, unchanged"]
    assert {path: path.read_bytes() for path in out.rglob("*.h5")} == before


def test_without_partial_videos(corpus: list[Path], extracted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    extract_watched(tmp_path / "out", [corpus[0].parent], on_partial="fail")
    assert "partial" not in assert_is_recorded(tmp_path / "out", corpus)
    strict = records_by_path(tmp_path / "out")
    for path, record in records_by_path(extracted[0]).items():
        allowed = ("truncated", "concealed_errors") if record.status == "partial" else (record.status,)
        assert strict[path].status in allowed, path


def test_a_third_with_the_ffmpeg_program(corpus: list[Path], tmp_path: Path) -> None:
    videos = [path for path in corpus[::3] if path.exists()]
    fared = extract_watched(tmp_path / "out", videos, decoder="ffmpeg")
    statuses = assert_is_recorded(tmp_path / "out", videos)
    assert statuses["ok"] > 30 and statuses["partial"] > 10
    records = records_by_path(tmp_path / "out")
    assert {records[str(path)].status for path in good(videos)} == {"ok"}
    assert fared["frame_memories"] == 0 and fared["peak_bytes"] < PEAK_BYTES
