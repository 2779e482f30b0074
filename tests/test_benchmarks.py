"""The benchmarks run, and what they promise of memory holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_train_measures_itself_beside_a_data_loader(tmp_path: Path) -> None:
    sizes = {"videos": 200, "captions-a-video": 2, "feature-size": 64, "repeats": 2, "cross-repeats": 1}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "train.py", *options, "--folder", tmp_path, "--json", tmp_path / "out.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out.json").read_text())
    seconds = measured["cpu_seconds_an_epoch"]
    assert done.stdout.count("\n| ") == len(seconds) == 9
    assert all(epoch > 0 for epochs in seconds.values() for epoch in epochs)
    assert [len(epochs) for epochs in seconds.values()] == [2] * 7 + [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_extract_measures_itself_beside_its_bound_and_the_fields_recipe(tmp_path: Path) -> None:
    options = ["--quick", "--part", "bound,recipe,growth", "--folder", tmp_path, "--json", tmp_path / "out.json"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "extract.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out.json").read_text())
    bound = measured["bound"]
    clips = list(dict.fromkeys(row["clips"] for row in bound))
    # MSR-VTT's clips lie beside the checkout or nowhere; a third core and bfloat16 make more rows of each.
    assert [name for name in clips if name != "msrvtt-mini"] == ["15 s, 240p", "6 s, 720p"]
    assert {row["backbone"] for row in bound} == {"free:four-pixels", "offline:efficientnet-lite0"}
    for row in bound:
        (taken,) = row["rounds"]
        assert set(taken) == {"decode", "backbone", "svb", "start"}
        # The others are differences: on so few clips, and beside other tests, they may come out as anything.
        assert taken["start"]["cpu_seconds"] > 0 and taken["backbone"]["cpu_seconds"] > 0
    recipe = measured["recipe"]
    assert len(recipe["rounds"]) == (recipe["programs"]["ffprobe"] is not None)
    for taken in recipe["rounds"]:
        assert [name for name in taken if not name.startswith("svb, ")] == [
            "the recipe, one process",
            "the recipe, two processes of one thread",
        ]
        assert "svb, float32" in taken
    assert [row["videos"] for row in measured["growth"]] == [20, 40]
    for row in measured["growth"]:
        assert row["first"]["seconds_a_video"] > 0
        assert 0 < row["first"]["worker_peak_mib"] < row["first"]["main_peak_mib"]
        assert row["again"]["extract_seconds"] < row["first"]["extract_seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_cache_takes_hardly_more_memory_than_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from made_up_features import make_store
    from resources_used import memory_of_cache

    # A quarter of MSR-VTT: what a video takes beside its rows counts as much as in the whole.
    store = make_store(tmp_path / "features", videos=2500, frames=12, feature_size=512)
    memory = memory_of_cache(store)
    assert memory["disk_mib"] > 29
    assert memory["resident_mib"] > 15  # the measurement sees the cache at all
    assert memory["peak_mib"] < 1.5 * memory["disk_mib"]


def run_benchmark(name: str, *options: object) -> str:
    command = [sys.executable, BENCHMARKS / name, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_search_measures_how_an_index_grows_and_what_a_budget_gives(tmp_path: Path) -> None:
    sizes = ("--moments", "2000,6000", "--clustered", "20000", "--rounds", "2")
    out = tmp_path / "out.json"
    printed = run_benchmark(
        "search.py", "--part", "growth,approximate", *sizes, "--folder", tmp_path, "--json", out
    )
    measured = json.loads(out.read_text())
    assert [row["moments"] for row in measured["growth"]] == [2000, 6000]
    assert all(len(row[name]) == 2 for row in measured["growth"] for name in ("opening_ms", "query_ms"))
    assert [row["rows"] for row in measured["approximate"]] == [20000, 20000]
    assert printed.count("\n| ") == 2 + 2 + 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
def test_moments_are_measured_beside_whole_videos_and_chunks(tmp_path: Path) -> None:
    options = ("--sets", "generated", "--videos", "180", "--epochs", "5", "--moment-seconds", "2")
    out = tmp_path / "out.json"
    run_benchmark("moments.py", *options, "--folder", tmp_path / "work", "--json", out)
    rows = json.loads(out.read_text())["generated"]
    assert list(rows) == ["the whole video", "chunks of 30 s", "svb, windows of 2 s"]
    for numbers in rows.values():
        assert all(0 <= low <= mean <= high <= 100 for mean, low, high in numbers.values())
    # Clips last 2 to 4 s of some 75: neither a whole video nor a chunk can overlap one by half.
    assert rows["the whole video"]["own video: R@1, IoU 0.5"][0] == 0
    assert rows["svb, windows of 2 s"]["own video: R@1, IoU 0.5"][0] > 10
