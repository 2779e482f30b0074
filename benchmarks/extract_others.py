"""Is `svb extract` faster than other tools? `python benchmarks/extract_others.py`.

clip-video-encode and dinotool beside svb, each in an environment of its own, on two cores with the same random
ViT-B/32 in float32, in turn in every round; and how alike the features of the same frames are. Make an environment
for each, and name its Python with `--clip-video-encode` or `--dinotool`:

- clip-video-encode 1.3.0 cannot be installed as it is under Python 3.11: it asks for pyarrow below 8, which has no
  wheel there and does not build, and the webdataset that it asks for does not import. Without its pins:
  `pip install --no-deps clip-video-encode==1.3.0 video2numpy==2.3.0 webdataset==0.2.100`, then `pip install
  braceexpand fire youtube-dl requests opencv-python-headless`.
- dinotool 0.4.0: `pip install --no-deps dinotool==0.4.0`, then `pip install einops xarray opencv-python-headless`.

For the rest, so that they run the same network as fast, both read svb's environment: put the path of its
site-packages into a `.pth` file in theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CORES = 2
# clip-video-encode can wait for ever for a reader that has just ended.
PATIENCE_SECONDS = 900


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the costs in rounds of each set of clips, and their tables."""
    import torch

    shared.pin_to(CORES)
    torch.set_num_threads(CORES)
    lead = shared.make_clips(folder / "lead", shared.LEAD_IN, CORES)
    weights = random_weights(folder / "vit-b-32.pt")
    # The first run of these weights exports their graph, which is no part of the comparison.
    shared.extract_with(f"open_clip:ViT-B-32/{weights}", folder, workers=CORES)(lead)
    measured, tables = dict[str, Any](), list[str]()
    for name, clips, num_rounds in shared.clip_sets(folder, options):
        of_set = folder / f"set{len(tables)}"
        rounds, alike = measure_set(of_set, name, clips, lead, weights, num_rounds, options)
        measured[name] = rounds
        tables.append(f"{len(clips)} of {name}:\n\n" + shared.table_against(rounds, len(clips), alike))
    return measured, "\n\n".join(tables)


def measure_set(
    folder: Path,
    name: str,
    clips: Sequence[Path],
    lead: Sequence[Path],
    weights: Path,
    num_rounds: int,
    options: argparse.Namespace,
) -> tuple[list[dict[str, shared.Cost]], dict[str, str]]:
    """Return what each tool took in each round, and a column of how alike its features are to svb's."""
    named = {"clip-video-encode": options.clip_video_encode, "dinotool": options.dinotool}
    pythons = {tool: python for tool, python in named.items() if python}
    rounds, alike = list[dict[str, shared.Cost]](), {"": "cosine with svb's features: mean, lowest"}
    for number in range(num_rounds):
        print(f"{name}: round {number + 1} of {num_rounds}", file=sys.stderr)
        stores: list[Path] = []
        extract = shared.extract_with(f"open_clip:ViT-B-32/{weights}", folder, workers=CORES)
        _, cost = shared.cold_and_steady(lambda paths: stores.append(extract(paths)), lead, clips)  # noqa: B023
        taken, own = {"svb": cost}, rows_of_store(stores[1], clips)
        for tool, python in pythons.items():
            out = folder / f"{tool}-{number}"
            taken[tool] = drive(tool, python, clips, lead[:1], out, weights, frame_rate(clips[0]))
            mean, lowest = likeness(own, out)
            alike[tool] = f"{mean:.4f}, {lowest:.4f}"
        rounds.append(taken)
    return rounds, alike


def random_weights(path: Path) -> Path:
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), path)
    return path


def frame_rate(path: Path) -> int:
    """Return the frames a second of a clip, so that every tool takes one frame a second."""
    import av

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    assert rate is not None
    return round(rate)


def drive(
    tool: str,
    python: Path,
    clips: Sequence[Path],
    lead: Sequence[Path],
    out: Path,
    weights: Path,
    every_nth: int,
) -> shared.Cost:
    """Run a tool in its environment, which writes one file of features a clip, and return its costs."""
    out.mkdir(parents=True)
    request = {"tool": tool, "lead": [*map(str, lead)], "clips": [*map(str, clips)], "out": str(out)}
    request |= {"weights": str(weights), "every_nth": every_nth, "batch_size": shared.BATCH_SIZE}
    (out / "request.json").write_text(json.dumps(request), "utf-8")
    command = [python, Path(__file__).with_name("drive_others.py"), out / "request.json"]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, stdout=subprocess.DEVNULL)
    return shared.Cost(**json.loads((out / "measured.json").read_text("utf-8")))


def rows_of_store(store: Path, paths: Sequence[Path]) -> NDArray[np.float32]:
    """Return the features of some videos, one after the other."""
    import numpy as np

    from svb.data.feature_store import FeatureStore

    opened = FeatureStore(store)
    (name,) = opened.backbones
    by_path = {record.source_path: video_id for video_id, record in opened.records.items()}
    rows = [opened.rows_of(by_path[str(path)])[name].features for path in paths]
    return np.concatenate(rows).astype(np.float32)


def likeness(own: NDArray[np.float32], out: Path) -> tuple[float, float]:
    """Return the mean and lowest cosine of rows of the same frames, beyond what all frames have in common.

    A random network gives all frames nearly the same features: the mean row is taken off first.
    """
    import numpy as np

    theirs = np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"), key=lambda path: int(path.stem))])
    if own.shape != theirs.shape:
        return float("nan"), float("nan")
    ours, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (own, theirs))
    ours, others = (rows - rows.mean(axis=0) for rows in (ours, others))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(others, axis=1)
    cosine = (ours * others).sum(axis=1) / norms
    return float(cosine.mean()), float(cosine.min())


if __name__ == "__main__":
    shared.run_benchmark(
        __doc__,
        measure,
        rounds=(3, "how often everything is measured, in turn"),
        **shared.CLIP_SETS,
        clip_video_encode=(None, "the Python of its environment"),
        dinotool=(None, "the Python of its environment"),
    )
