"""The whole path through the command line, on clips that ffmpeg makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunSvb


@pytest.mark.slow
def test_the_demo_goes_from_clips_to_answers_and_is_not_done_twice(run_svb: RunSvb, tmp_path: Path) -> None:
    arguments = ["demo", "-o", str(tmp_path / "demo"), "--videos", "40", "--epochs", "2"]
    first = run_svb(*arguments)
    assert first.exit_code == 0, first
    assert "ok          40" in first.stdout
    for heading in (
        "zero-shot ConSE",
        "best checkpoint",
        "rank  score  confidence  moments",
        "rank  score  caption",
    ):
        assert heading in first.stdout
    assert first.stdout.count("$ svb search") == 4
    assert (tmp_path / "demo" / "index" / "manifest.json").is_file()
    second = run_svb(*arguments)
    assert second.exit_code == 0, second
    assert second.stderr.count("nothing to do") == 3  # extract, captions and train
