"""Each benchmark runs, on tiny sizes, and measures what it says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


def run_benchmark(folder: Path, name: str, **options: object) -> tuple[Any, str]:
    """Return what a benchmark measured and what it printed; it leaves nothing else behind."""
    words = [word for option, value in options.items() for word in (f"--{option.replace('_', '-')}", str(value))]
    out = folder / "out.json"
    command = [sys.executable, BENCHMARKS / name, *words, "--folder", folder, "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["out.json"]
    return json.loads(out.read_text())["measured"], done.stdout


@pytest.mark.slow
def test_a_cache_takes_hardly_more_memory_than_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shared import make_store, run_child

    # A quarter of MSR-VTT: what a video takes beside its rows counts as much as in the whole.
    settings = {"weights_hash": "none", "feature_size": 512, "precision": "float32"}
    store = make_store(tmp_path / "features", "made_up:frames", settings, videos=2500, frames=12)
    memory = run_child("train.py", "--load", store)
    assert memory["disk_mib"] > 29
    assert memory["resident_mib"] > 15  # the measurement sees the cache at all
    assert memory["peak_mib"] < 1.5 * memory["disk_mib"]


def test_query_pooling_is_the_weighted_mean_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import torch
    import torch.nn.functional as F
    from query_pooling import CrossAttention, Softmax, similarities

    torch.manual_seed(0)
    captions, frames = F.normalize(torch.randn(4, 6), dim=1), torch.randn(5, 6)
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, False]])
    videos = (frames[:1], frames[1:3], frames[3:])
    found = similarities(Softmax(0.2), captions, frames, mask)
    for row, caption in enumerate(captions):
        for column, video in enumerate(videos):
            weights = (F.normalize(video, dim=1) @ caption / 0.2).softmax(dim=0)
            assert float(found[row, column]) == pytest.approx(
                float(F.normalize(weights @ video, dim=0) @ caption), abs=1e-5
            )
    # It starts as the mean.
    means = torch.stack([F.normalize(video.mean(dim=0), dim=0) for video in videos])
    torch.testing.assert_close(similarities(CrossAttention(6), captions, frames, mask), captions @ means.T)


@pytest.mark.slow
def test_train_is_measured_beside_a_data_loader(tmp_path: Path) -> None:
    sizes = {"videos": 200, "captions_a_video": 2, "feature_size": 64, "repeats": 2, "cross_repeats": 1}
    measured, printed = run_benchmark(tmp_path, "train.py", **sizes, memory_videos=100)
    seconds = measured["cpu_seconds_an_epoch"]
    assert printed.count("\n| ") == len(seconds) + 1 == 10
    assert all(epoch > 0 for epochs in seconds.values() for epoch in epochs)
    assert [len(epochs) for epochs in seconds.values()] == [2] * 7 + [1, 1]


@pytest.mark.slow
def test_extract_is_measured_beside_its_bound(tmp_path: Path) -> None:
    sizes = {"rounds": 1, "short": 2, "medium": 0, "long": 0, "msrvtt": 0}
    measured, printed = run_benchmark(tmp_path, "extract_bound.py", **sizes)
    assert [row["backbone"] for row in measured] == ["free:four-pixels", "offline:efficientnet-lite0"]
    assert printed.count("\n| ") == 1 + 2
    for row in measured:
        (taken,) = row["rounds"]
        assert set(taken) == {"decode", "backbone", "svb", "start"}
        # The others are differences: on so few clips, and beside other tests, they may come out as anything.
        assert taken["start"]["cpu_seconds"] > 0 and taken["backbone"]["cpu_seconds"] > 0


@pytest.mark.slow
def test_extract_is_measured_beside_the_usual_recipe(tmp_path: Path) -> None:
    measured, printed = run_benchmark(tmp_path, "extract_recipe.py", rounds=1, videos=2)
    names = ["the recipe, one process", "the recipe, two processes of one thread each", "svb"]
    assert [list(taken) for taken in measured] in ([names], []) and (measured or "No ffprobe" in printed)


@pytest.mark.slow
def test_extract_is_measured_as_a_store_grows(tmp_path: Path) -> None:
    measured, _ = run_benchmark(tmp_path, "extract_growth.py", videos="20,40")
    assert [row["videos"] for row in measured] == [20, 40]
    for row in measured:
        assert row["first"]["seconds_a_video"] > 0
        assert 0 < row["first"]["worker_peak_mib"] < row["first"]["main_peak_mib"]


@pytest.mark.slow
def test_search_is_measured_as_an_index_grows_and_within_a_budget(tmp_path: Path) -> None:
    measured, printed = run_benchmark(tmp_path, "search_growth.py", windows="2000,6000", rounds=2)
    assert [row["windows"] for row in measured] == [2000, 6000] and printed.count("\n| ") == 1 + 2
    assert all(len(row[name]) == 2 for row in measured for name in ("opening_ms", "query_ms"))
    (tmp_path / "out.json").unlink()
    measured, printed = run_benchmark(tmp_path, "search_approximate.py", windows=20000)
    assert [row["rows"] for row in measured] == [20000, 20000] and printed.count("\n| ") == 1 + 2


@pytest.mark.slow
def test_moments_are_measured_beside_whole_videos_and_chunks(tmp_path: Path) -> None:
    options = {"sets": "generated", "videos": 180, "epochs": 10, "window_seconds": 2}
    rows = run_benchmark(tmp_path, "moments.py", **options)[0]["generated"]
    assert list(rows) == ["the whole video", "chunks of 30 s", "svb, windows of 2 s"]
    for numbers in rows.values():
        assert all(0 <= low <= mean <= high <= 100 for mean, low, high in numbers.values())
    # Clips last 2 to 4 s of some 75: neither a whole video nor a chunk can overlap one by half.
    assert rows["the whole video"]["own video: R@1, IoU 0.5"][0] == 0
    assert rows["svb, windows of 2 s"]["own video: R@1, IoU 0.5"][0] > 10


@pytest.mark.slow
def test_the_ten_minutes_on_a_gpu_pass_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--patience", "20", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    steps = {step["step"]: step["status"] for step in json.loads(out.read_text())["steps"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[s, name] for name, s in steps.items()]
    # These mean something on a GPU only.
    assert {name for name, status in steps.items() if status == "SKIP"} == {"out_of_memory", "waits", "nvdec"}
    assert len(steps) == 16
    # A step that hangs is ended, and is a failure with a line of its own.
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--patience", "0", "--only", "squares"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout.startswith("FAIL  squares "), done.stdout
