"""Are the moments that a search names the right ones? `python benchmarks/moments.py`.

Clips are spliced into others' footage, so that their seconds are known; each clip's captions are the queries:

- `generated`: the val clips of `svb demo`, with a run trained on its other clips;
- `msrvtt`: the val clips of the small MSR-VTT beside the checkout, with a run trained on its train clips.

With `--run RUN --store STORE --table TABLE` your own: the features of some videos, and a table with the columns
`video_id, caption, start, end`, as ActivityNet Captions can be written.

Each query is asked of all videos at once, and of its own video alone. Measured are R@1 at an intersection over
union (IoU) of 0.5 and 0.7 between the first moment named and the clip, and `inside`: of the answers with the
right video, the share whose best second lies within the clip. Against two baselines: the whole video as the
answer, and fixed chunks of 30 seconds. Intervals are 95 %, by bootstrap over clips.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import shared

if TYPE_CHECKING:  # a decode worker imports the main module again, and must start fast
    import numpy as np
    from numpy.typing import NDArray

    from svb.retrieve.search import Searcher

    Method: TypeAlias = "Callable[[Searcher, Needle, NDArray[np.float32], bool], Found]"

CHUNK_SECONDS, CAPTIONS_A_CLIP, BOOTSTRAPS = 30.0, 5, 1000
CLIPS_A_VIDEO = {"generated": 25, "msrvtt": 20}


@dataclass(frozen=True)
class Needle:
    """A caption, and where what it says is to be seen: `[begin_seconds, end_seconds)` of a video."""

    video_id: str
    caption: str
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Found:
    """What a method answers with."""

    video_id: str
    begin_seconds: float
    end_seconds: float
    best_seconds: float


@dataclass(frozen=True)
class Set:
    """What is measured together."""

    run: Path
    store: Path
    needles: list[Needle]


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, dict[str, dict[str, list[float]]]], str]:
    """Return for each set and method its numbers, each with the ends of its interval, and their tables."""
    if options.table:
        sets = {"own": Set(options.run, options.store, read_needles(options.table))}
    else:
        sets = {name: make_set(name, folder / name, options) for name in options.sets.split(",")}
    lengths = [float(seconds) for seconds in options.window_seconds.split(",")]
    measured = {name: measure_set(held, folder / f"indexes-{name}", lengths) for name, held in sets.items()}
    return measured, "\n\n".join(f"{name}\n\n{table_of(rows)}" for name, rows in measured.items())


def make_set(name: str, folder: Path, options: argparse.Namespace) -> Set:
    """Train on a set's train clips, and splice its val clips."""
    from svb.cli.demo_clips import FPS, make_demo_clips
    from svb.extract.captions import captions as encode
    from svb.train.config import TrainConfig
    from svb.train.run import train

    if name == "generated":
        table, clips, frame_rate, fps = (
            make_demo_clips(folder, num_videos=options.videos),
            folder / "videos",
            FPS,
            2.0,
        )
    else:
        table, clips, frame_rate, fps = shared.MSRVTT_MINI / "captions.csv", shared.MSRVTT_MINI / "clips", 1, 1.0
    features = shared.extract_features([clips], folder / "features", shared.LITE0, fps=fps)
    captions = encode(table, folder / "captions.h5", text_encoder="offline:minilm-l6")
    config = TrainConfig(epochs=options.epochs, learning_rate=1e-3, batch_size=256)
    run = train(features, captions, folder / "run", config)
    texts: dict[str, list[str]] = defaultdict(list)
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "val":
                texts[row["video_id"]].append(row["caption"])
    needles = splice(clips, texts, folder / "spliced", CLIPS_A_VIDEO[name], frame_rate)
    store = shared.extract_features([folder / "spliced"], folder / "spliced_features", shared.LITE0, fps=fps)
    return Set(run, store, needles)


def splice(
    clips: Path, texts: dict[str, list[str]], folder: Path, clips_a_video: int, frame_rate: int
) -> list[Needle]:
    """Join clips in random order into videos of `clips_a_video` each; return where each begins and ends."""
    import av

    def seconds_of(path: Path) -> float:
        """Return how long a clip is in a spliced video, which counts its frames."""
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.decode(video=0))
            rate = container.streams.video[0].average_rate
        assert rate == frame_rate, f"{path} has {rate} frames a second - expected {frame_rate}"
        return frames / frame_rate

    folder.mkdir()
    order = random.Random(0).sample(list(texts), len(texts))
    needles = []
    for number in range(max(1, len(order) // clips_a_video)):
        spliced_id, begin = f"spliced{number:03}", 0.0
        joined = order[number * clips_a_video : (number + 1) * clips_a_video]
        paths = [clips / f"{video_id}.mp4" for video_id in joined]
        join(paths, folder / f"{spliced_id}.mp4", frame_rate)
        for video_id, path in zip(joined, paths, strict=True):
            end = begin + seconds_of(path)
            needles += [Needle(spliced_id, caption, begin, end) for caption in texts[video_id][:CAPTIONS_A_CLIP]]
            begin = end
    return needles


def join(paths: Sequence[Path], out: Path, frame_rate: int) -> None:
    """Encode clips one after the other, each frame shown for `1 / frame_rate` seconds."""
    inputs = [word for path in paths for word in ("-i", f"file:{path}")]
    even = f"fps={frame_rate},scale=320:240,setsar=1,format=yuv420p,setpts=N/{frame_rate}/TB"
    chains = "".join(f"[{number}:v]{even}[v{number}];" for number in range(len(paths)))
    joined = "".join(f"[v{number}]" for number in range(len(paths)))
    x264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-r", frame_rate]
    graph = f"{chains}{joined}concat=n={len(paths)}:v=1"
    shared.ffmpeg(*inputs, "-filter_complex", graph, *x264, f"file:{out}")


def read_needles(table: Path) -> list[Needle]:
    """Read a table with the columns `video_id, caption, start, end`, in seconds."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Needle(row["video_id"], row["caption"], float(row["start"]), float(row["end"])) for row in rows]


def measure_set(held: Set, folder: Path, lengths: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """Return the numbers of each method."""
    from svb.retrieve.index import IndexConfig, index
    from svb.retrieve.search import Searcher

    def searcher(seconds: float, stride: float) -> Searcher:
        config = IndexConfig(store=held.store, moment_seconds=seconds, moment_stride_seconds=stride)
        return Searcher(index(held.run, folder / f"{seconds:g}", config))

    chunks = searcher(CHUNK_SECONDS, CHUNK_SECONDS)
    embeddings = {caption: chunks.embed_text(caption) for caption in {n.caption for n in held.needles}}
    methods: dict[str, tuple[Searcher, Method]] = {
        "the whole video": (chunks, whole_video),
        f"chunks of {CHUNK_SECONDS:g} s": (chunks, best_chunk),
    }
    for seconds in lengths:
        methods[f"svb, windows of {seconds:g} s"] = searcher(seconds, seconds / 2), best_moment
    return {
        name: numbers(
            held.needles,
            [find(opened, n, embeddings[n.caption], False) for n in held.needles],
            [find(opened, n, embeddings[n.caption], True) for n in held.needles],
        )
        for name, (opened, find) in methods.items()
    }


def whole_video(searcher: Searcher, needle: Needle, embedding: NDArray[np.float32], own: bool) -> Found:
    """Answer with the best video, or the needle's own, from its begin to its end."""
    import numpy as np

    catalog = searcher.catalog
    nearest = searcher.vectors.nearest(embedding, 1, by="video", allowed=None)[1]
    row = catalog.row_of(needle.video_id) if own else int(nearest[0])
    seconds = catalog.moment_seconds(np.arange(*catalog.moment_range(row)))
    begin, end = float(seconds[:, 0].min()), float(seconds[:, 1].max())
    return Found(catalog.video_id(row), begin, end, (begin + end) / 2)


def best_chunk(searcher: Searcher, needle: Needle, embedding: NDArray[np.float32], own: bool) -> Found:
    """Answer with the best window as it is, of all videos or of the needle's own."""
    import numpy as np

    catalog, allowed = searcher.catalog, None
    if own:
        allowed = np.zeros(catalog.num_videos, np.bool_)
        allowed[catalog.row_of(needle.video_id)] = True
    rows = searcher.vectors.nearest(embedding, 1, by="moment", allowed=allowed)[1]
    begin, end = catalog.moment_seconds(rows)[0].tolist()
    return Found(catalog.video_id(int(catalog.videos_of(rows)[0])), begin, end, (begin + end) / 2)


def best_moment(searcher: Searcher, needle: Needle, embedding: NDArray[np.float32], own: bool) -> Found:
    """Answer as svb does."""
    from svb.retrieve.answer import SearchRequest

    folders = (needle.video_id,) if own else ()
    request = SearchRequest(text=needle.caption, k=1, fold=False, folders=folders)
    result = searcher.search_embedding(embedding, request).results[0]
    moment = result.moments[0]
    return Found(result.video_id, moment.begin_seconds, moment.end_seconds, moment.best_seconds)


def numbers(needles: Sequence[Needle], of_all: list[Found], of_own: list[Found]) -> dict[str, list[float]]:
    """Return each column of the table by its title."""
    import numpy as np

    right = np.array([f.video_id == n.video_id for n, f in zip(needles, of_all, strict=True)])
    every, groups = np.ones(len(needles), np.bool_), group_of_each(needles)
    held = {"right video": percent(right, every, groups)}
    for where, found, counted in (("", of_all, right), ("own video: ", of_own, every)):
        ious = np.array([iou(n, f) for n, f in zip(needles, found, strict=True)])
        inside = np.array([is_inside(n, f) for n, f in zip(needles, found, strict=True)])
        for least in (0.5, 0.7):
            held[f"{where}R@1, IoU {least}"] = percent(ious >= least, every, groups)
        held[f"{where}inside"] = percent(inside, counted, groups)
    return held


def iou(needle: Needle, found: Found) -> float:
    if needle.video_id != found.video_id:
        return 0.0
    shared_seconds = min(needle.end_seconds, found.end_seconds) - max(needle.begin_seconds, found.begin_seconds)
    union = max(needle.end_seconds, found.end_seconds) - min(needle.begin_seconds, found.begin_seconds)
    return max(0.0, shared_seconds) / union


def is_inside(needle: Needle, found: Found) -> bool:
    return needle.video_id == found.video_id and needle.begin_seconds <= found.best_seconds < needle.end_seconds


def group_of_each(needles: Sequence[Needle]) -> NDArray[np.int64]:
    """Return a number a needle: captions of one clip are drawn together, being alike."""
    import numpy as np

    places = [(n.video_id, n.begin_seconds) for n in needles]
    number_of = {place: number for number, place in enumerate(dict.fromkeys(places))}
    return np.array([number_of[place] for place in places])


def percent(values: NDArray[np.bool_], counted: NDArray[np.bool_], groups: NDArray[np.int64]) -> list[float]:
    """Return the mean of the values that count, in percent, and the ends of its 95 % interval."""
    import numpy as np

    generator, num_groups = np.random.default_rng(0), int(groups.max()) + 1
    sums = np.bincount(groups, values & counted, num_groups), np.bincount(groups, counted, num_groups)
    drawn = generator.integers(num_groups, size=(BOOTSTRAPS, num_groups))
    means = sums[0][drawn].sum(axis=1) / np.maximum(1, sums[1][drawn].sum(axis=1))
    low, high = np.quantile(means, [0.025, 0.975])
    return [100 * float(sums[0].sum() / max(1, sums[1].sum())), 100 * float(low), 100 * float(high)]


def table_of(rows: dict[str, dict[str, list[float]]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [
        [name, *(f"{held[c][0]:.1f} ({held[c][1]:.1f} to {held[c][2]:.1f})" for c in columns)]
        for name, held in rows.items()
    ]
    return shared.table(["", *columns], lines)


if __name__ == "__main__":
    shared.run_benchmark(
        __doc__,
        measure,
        sets=("generated,msrvtt", "which sets, joined by commas"),
        window_seconds=("2,4,8", "lengths of svb's windows, joined by commas"),
        videos=(300, "clips of the generated set"),
        epochs=(30, "of training"),
        run=(None, "a run of your own"),
        store=(None, "the features of its videos"),
        table=(None, "video_id, caption, start, end"),
    )
