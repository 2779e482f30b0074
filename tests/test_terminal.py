"""A terminal, pipe or disk that takes no more ends in one line that names what, never in a traceback."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svb.cli import run
from svb.cli.output import Meter

Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("command", "limit_bytes", "place"),
    [("train", 100, "config.json"), ("train", 3000, "best"), ("index", 1500, "")],
)
def test_a_full_disk_names_the_folder(
    command: str, limit_bytes: int, place: str, indexed_run: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """A limit on the size of files stands for the disk: no library can write a longer one to its end."""
    store, captions, out = indexed_run.parent / "features", indexed_run.parent / "captions.h5", tmp_path / "out"
    sources, options = {
        "train": ([store, captions], ["--epochs", "1", "--embedding-size", "16", "--decoder-size", "16"]),
        "index": ([indexed_run], ["--moment-seconds", "3"]),
    }[command]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        exit_code = run([command, *map(str, sources), "-o", str(out), *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert exit_code == 1 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith(f"svb: cannot use {out / place}")


@pytest.mark.parametrize(
    ("shell", "exit_code", "words"),
    [
        *((f'svb info "$1" {closed}', 0, "") for closed in (">&-", "<&-", "2>&-")),
        ('svb search --queries - --index "$1" <&-', 1, "svb: standard input is closed - name a file"),
        ('svb info "$1" > /dev/full', 1, "svb: cannot use standard output (No space left on device) - make room"),
    ],
)
def test_what_is_closed_or_full_in_a_shell(shell: str, exit_code: int, words: str, built_index: Path) -> None:
    command = ["bash", "-c", f'svb() {{ "{sys.executable}" -m svb "$@"; }}; {shell}', "bash", str(built_index)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == exit_code and ran.stderr.startswith(words)
    assert len(ran.stderr.splitlines()) == bool(words)


def test_a_reader_that_has_left_is_no_failed_search(built_index: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "svb", "info", str(built_index)]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, b"")


def test_progress_in_a_file_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter("videos")
    now_seconds = meter._bar.start_t
    meter._bar._time = lambda: now_seconds
    for done in range(1, 36):
        now_seconds += 1.0
        meter.update(done, 40, {"frames": 30 * done}, eta_seconds=100.0, notes=["queue 3"])
    meter.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("| ")[1].split(" [")[0] for line in lines] == [f"{n}/40 videos" for n in (10, 20, 30, 35)]
    assert all("<01:40, " in line and "frames/s, queue 3]" in line for line in lines)
