"""Each benchmark runs, on tiny sizes, and measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


# Tiny sizes of each, and how many rows its table has then.
SIZES: dict[str, tuple[dict[str, object], int]] = {
    "train.py": ({"videos": 200, "captions_a_video": 2, "feature_size": 64, "cross_repeats": 1, "repeats": 2}, 9),
    "extract_bound.py": ({"rounds": 1, "short": 2, "medium": 0, "long": 0, "msrvtt": 0}, 2),
    "extract_recipe.py": ({"rounds": 1, "videos": 2}, 3),
    "extract_growth.py": ({"videos": "20,40"}, 2),
    "search_growth.py": ({"windows": "2000,6000", "rounds": 2}, 2),
    "search_approximate.py": ({"windows": 20000}, 2),
    "moments.py": ({"sets": "generated", "videos": 180, "epochs": 10, "window_seconds": 2}, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_benchmark_measures_on_tiny_sizes_and_leaves_nothing_else_behind(name: str, tmp_path: Path) -> None:
    sizes, num_rows = SIZES[name]
    sizes = sizes | {"memory_videos": 100} if name == "train.py" else sizes
    words = [word for option, value in sizes.items() for word in (f"--{option.replace('_', '-')}", str(value))]
    out = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / name, *words, "--folder", tmp_path, "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [out]
    measured = json.loads(out.read_text())["measured"]
    assert done.stdout.count("\n| ") == num_rows + 1 or "No ffprobe" in done.stdout
    if name == "train.py":
        assert [len(epochs) for epochs in measured["cpu_seconds_an_epoch"].values()] == [2] * 7 + [1, 1]
        assert all(min(epochs) > 0 for epochs in measured["cpu_seconds_an_epoch"].values())
    elif name == "extract_bound.py":
        for row in measured:
            (taken,) = row["rounds"]
            # The others are differences: on so few clips, and beside other tests, they may be anything.
            assert taken["start"]["cpu_seconds"] > 0 and taken["backbone"]["cpu_seconds"] > 0
    elif name == "extract_growth.py":
        for row in measured:
            assert 0 < row["first"]["worker_peak_mib"] < row["first"]["main_peak_mib"]
    elif name == "moments.py":
        rows = measured["generated"]
        assert all(0 <= low <= mean <= high <= 100 for row in rows.values() for mean, low, high in row.values())
        # Clips last 2 to 4 s of some 75: neither a whole video nor a chunk can overlap one by half.
        assert rows["the whole video"]["own video: R@1, IoU 0.5"][0] == 0
        assert rows["svb, windows of 2 s"]["own video: R@1, IoU 0.5"][0] > 10


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
