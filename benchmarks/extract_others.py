"""Two published tools beside svb, each in an environment of its own, with the same random ViT-B/32.

`clip-video-encode` 1.3.0 cannot be installed as it is under Python 3.11: it asks for pyarrow below 8, which has
no wheel there and does not build, and the webdataset that it asks for does not import. It is installed without
its pins, on svb's own torch, OpenCV and all, so that it runs the same network as fast; and once more as pip
installs it where `--python310` names a Python 3.10, with torch 1.13. `dinotool` 0.4.0 installs as it is; its
torch is svb's own version, so that is used, and xformers, accelerate, zarr and sentencepiece are left out: this
path through it imports none of them. Both read svb's environment through a .pth file, to save gigabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from extract_clips import FRAME_RATE, ClipSet
from extract_measure import BATCH_SIZE, Cost, cold_and_steady, extract_with, ours, pin_to, table_against
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore

HERE = Path(__file__).resolve().parent
CORES = 2
# clip-video-encode can wait for ever for a reader that has just ended.
PATIENCE_SECONDS = 900


@dataclass(frozen=True)
class Tool:
    """A tool of others: the driver that runs it, and what pip is given, in order."""

    name: str
    driver: str
    python: str
    installs: tuple[tuple[str, ...], ...]
    on_our_packages: bool = True


def tools(python310: str | None) -> Iterator[Tool]:
    """Yield what is compared."""
    unpinned = ("--no-deps", "clip-video-encode==1.3.0", "video2numpy==2.3.0", "webdataset==0.2.100")
    needed = ("braceexpand", "fire", "youtube-dl", "requests", "opencv-python-headless")
    driver = "drive_clip_video_encode.py"
    yield Tool("clip-video-encode 1.3.0", driver, sys.executable, (unpinned, needed))
    if python310:
        as_published = (("clip-video-encode==1.3.0",),)
        yield Tool("clip-video-encode 1.3.0, Python 3.10, torch 1.13", driver, python310, as_published, False)
    dinotool = (("--no-deps", "dinotool==0.4.0"), ("einops", "xarray", "opencv-python-headless"))
    yield Tool("dinotool 0.4.0", "drive_dinotool.py", sys.executable, dinotool)


def measure_others(
    clips: ClipSet, lead: Sequence[Path], folder: Path, environments: Path, rounds: int, python310: str | None
) -> dict[str, Any]:
    """Return the costs in rounds, how alike the features are, and the last words of what did not run."""
    pin_to(CORES)
    torch.set_num_threads(CORES)
    weights = random_weights(folder / "vit-b-32.pt")
    backbone = f"open_clip:ViT-B-32/{weights}"
    measured: dict[str, Any] = {"clips": clips.name, "videos": len(clips.paths), "failed": {}, "cosine": {}}
    running = []
    for tool in tools(python310):
        try:
            running.append((tool, make_environment(environments, tool)))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            measured["failed"][tool.name] = last_words(error)
    measured["rounds"] = [
        measure_round(running, clips, lead, folder / f"round{number}", weights, backbone, measured)
        for number in range(rounds)
    ]
    return measured


def measure_round(
    running: Sequence[tuple[Tool, Path]],
    clips: ClipSet,
    lead: Sequence[Path],
    folder: Path,
    weights: Path,
    backbone: str,
    measured: dict[str, Any],
) -> dict[str, Cost]:
    print(f"others, {clips.name}: {folder.name}", file=sys.stderr)
    folder.mkdir()
    taken: dict[str, Cost] = {}
    stores: list[Path] = []
    for name, precision in ours().items():
        run = extract_with(backbone, precision, folder, CORES)
        _, cost = cold_and_steady(lambda paths, run=run: stores.append(run(paths)), lead[:CORES], clips.paths)
        taken[name] = cost
    own = rows_of_store(stores[1], clips.paths)  # in float32, lead-in and clips
    for tool, python in running:
        try:
            taken[tool.name] = drive(tool, python, clips, lead[:1], folder, weights)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            measured["failed"][tool.name] = last_words(error)
            continue
        theirs = [np.load(folder / tool.driver / f"{number}.npy") for number in range(len(clips.paths))]
        measured["cosine"][tool.name] = likeness(own, theirs)
    return taken


def random_weights(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), path)
    return path


def make_environment(folder: Path, tool: Tool) -> Path:
    """Return the Python of a virtual environment with the tool, made where there is none yet."""
    environment = folder / tool.name.replace(" ", "-").replace(",", "")
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        print(f"others: installing {tool.name}", file=sys.stderr)
        quietly(tool.python, "-m", "venv", "--clear", environment)
        if tool.on_our_packages:
            ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
            theirs = Path(quietly(python, "-c", ask).strip())
            (theirs / "zz_svb.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
        for install in tool.installs:
            quietly(python, "-m", "pip", "install", "-q", *install)
        (environment / "complete").touch()
    return python


def quietly(*command: object) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    return done.stdout


def last_words(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"nothing came of it in {error.timeout:.0f} s"
    lines = [line.strip() for line in (error.stderr or "").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else str(error))


def drive(tool: Tool, python: Path, clips: ClipSet, lead: Sequence[Path], folder: Path, weights: Path) -> Cost:
    """Run a tool's driver, which writes one file of features a clip, and return the costs it took."""
    out = folder / tool.driver
    out.mkdir(exist_ok=True)
    request = {
        "lead": [str(path) for path in lead],
        "clips": [str(path) for path in clips.paths],
        "out": str(out),
        "weights": str(weights),
        "every_nth": FRAME_RATE,
        "batch_size": BATCH_SIZE,
    }
    (out / "request.json").write_text(json.dumps(request), "utf-8")
    quietly(python, HERE / tool.driver, out / "request.json")
    costs = json.loads((out / "measured.json").read_text("utf-8"))
    return Cost(costs["wall_seconds"], costs["cpu_seconds"])


def rows_of_store(store: Path, paths: Sequence[Path]) -> list[NDArray[np.float32]]:
    opened = FeatureStore(store)
    (name,) = opened.backbones
    by_path = {record.source_path: video_id for video_id, record in opened.records.items()}
    return [opened.rows_of(by_path[str(path)])[name].features.astype(np.float32) for path in paths]


def likeness(own: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Return the lowest and mean cosine of rows of the same frames, beyond what all frames have in common.

    A random network gives all frames nearly the same features: the mean row is taken off first.
    """
    if [len(rows) for rows in own] != [len(rows) for rows in theirs]:
        return {"lowest": float("nan"), "mean": float("nan")}
    ours, others = (directions(np.concatenate(rows)) for rows in (own, theirs))
    ours, others = ours - ours.mean(axis=0), others - others.mean(axis=0)
    cosine = (directions(ours) * directions(others)).sum(axis=1)
    return {"lowest": float(cosine.min()), "mean": float(cosine.mean())}


def directions(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def table_of_others(measured: dict[str, Any]) -> str:
    """Return a Markdown table: speed and cost beside svb's, and how alike the features are."""
    of_what = f"{measured['videos']} clips of {measured['clips']}"
    title = f"{of_what}, a random ViT-B/32, one frame a second, on {CORES} cores"
    alike = {name: f"{cosine['mean']:.4f}, {cosine['lowest']:.4f}" for name, cosine in measured["cosine"].items()}
    alike[""] = "cosine with svb: mean, lowest"
    failed = [f"{name} did not run: {words}" for name, words in measured["failed"].items()]
    return "\n\n".join([title, table_against(measured["rounds"], measured["videos"], alike), *failed])
