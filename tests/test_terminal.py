"""A terminal, pipe or disk that takes no more ends in one line that names what, never in a traceback."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from svb.cli.output import Meter

SVB = [sys.executable, "-m", "svb"]


def allow_small_files(limit_bytes: int) -> Callable[[], None]:
    """Stand in for a full disk: a longer file cannot be written to its end, whatever library writes it."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))


def last_line(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    return ran.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("limit_bytes", "place"), [(100, "run/config.json"), pytest.param(3000, "run/best", marks=pytest.mark.slow)]
)
def test_a_full_disk_in_train_names_the_folder(
    limit_bytes: int, place: str, indexed_run: Path, tmp_path: Path
) -> None:
    store, captions, out = indexed_run.parent / "features", indexed_run.parent / "captions.h5", tmp_path / "run"
    options = ["-o", str(out), "--epochs", "1", "--embedding-size", "16"]
    ran = subprocess.run(
        [*SVB, "train", str(store), str(captions), *options],
        capture_output=True, text=True, check=False, preexec_fn=allow_small_files(limit_bytes),
    )  # fmt: skip
    assert last_line(ran).startswith(f"svb: cannot use {tmp_path}/{place} (")


def test_a_full_disk_in_index_names_the_folder(indexed_run: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [*SVB, "index", str(indexed_run), "-o", str(tmp_path / "index"), "--moment-seconds", "3"],
        capture_output=True, text=True, check=False, preexec_fn=allow_small_files(1500),
    )  # fmt: skip
    assert last_line(ran).startswith(f"svb: cannot use {tmp_path}/index/")


class TestClosed:
    """`sh` closes or fills what a command reads and writes."""

    def run(self, shell: str, path: Path) -> subprocess.CompletedProcess[str]:
        command = f'svb() {{ "{sys.executable}" -m svb "$@"; }}; {shell}'
        return subprocess.run(
            ["bash", "-c", command, "bash", str(path)], capture_output=True, text=True, check=False, timeout=300
        )

    def test_a_reader_that_has_left_is_no_failed_search(self, indexed_run: Path) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        ran = subprocess.run([*SVB, "info", str(indexed_run)], stdout=writer, stderr=subprocess.PIPE, check=False)
        os.close(writer)
        assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, b"")

    @pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-"])
    def test_closed_streams(self, closed: str, indexed_run: Path) -> None:
        ran = self.run(f'svb info "$1" {closed}', indexed_run)
        assert ran.returncode == 0 and ran.stderr == ""

    def test_queries_from_a_closed_stdin(self, tmp_path: Path) -> None:
        ran = self.run('svb search --queries - --index "$1" <&-', tmp_path)
        assert ran.returncode == 1 and "svb: standard input is closed - name a file" in ran.stderr

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
    def test_a_full_disk_under_the_output(self, indexed_run: Path) -> None:
        ran = self.run('svb info "$1" > /dev/full', indexed_run)
        assert ran.stderr == (
            "svb: cannot use standard output (No space left on device) - make room there and run the same command "
            "again\n"
        )


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
