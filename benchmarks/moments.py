"""Are the moments that a search names the right ones? `python benchmarks/moments.py --json moments.json`.

Two sets of needles, clips spliced into others' footage so that their seconds are known, each clip's captions being
the queries:

- `generated`: the val clips of `svb demo`, with a run trained on its other clips;
- `msrvtt`: the val clips of the small MSR-VTT beside the checkout, with a run trained on its train clips.

With `--run RUN --store STORE --table TABLE` one's own: the features of some videos, and a table with the columns
`video_id, caption, start, end`, as ActivityNet Captions can be written.

Each query is asked of all videos at once, and of its own video alone. Measured are R@1 at an intersection over
union (IoU) of 0.5 and 0.7 between the first moment named and the needle, and `inside`: of the answers with the
right video, the share whose best second lies within the needle. Against two baselines: the whole video as the
answer, and fixed chunks of 30 seconds. Intervals are 95 %, by bootstrap over needles.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from needles import Clip, Needle, read_needles, splice, write_needles
from numpy.typing import NDArray

if TYPE_CHECKING:  # a decode worker imports the main module again, and must start fast
    from svb.retrieve.search import Searcher

Embedding: TypeAlias = NDArray[np.float32]
MSRVTT_MINI = Path(__file__).resolve().parents[2] / "shared" / "msrvtt-mini"
CHUNK_SECONDS = 30.0
BACKBONE, TEXT_ENCODER = "offline:efficientnet-lite0", "offline:minilm-l6"
CLIPS_A_VIDEO = {"generated": 25, "msrvtt": 20}
CAPTIONS_A_NEEDLE = 5
BOOTSTRAPS = 1000


Method: TypeAlias = "Callable[[Searcher, str, Embedding, str | None], Found]"


@dataclass(frozen=True)
class Set:
    """What is measured together."""

    name: str
    run: Path
    store: Path
    needles: list[Needle]


@dataclass(frozen=True)
class Found:
    """What a method answers with."""

    video_id: str
    begin_seconds: float
    end_seconds: float
    best_seconds: float


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        measured = {held.name: measure(held, folder, options) for held in sets(folder, options)}
    for name, rows in measured.items():
        print(f"\n{name}\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n", "utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="generated,msrvtt", help="which sets, joined by commas")
    parser.add_argument("--folder", type=Path, help="where to work; what is there already is not made again")
    parser.add_argument("--moment-seconds", default="2,4,8", help="lengths of svb's windows, joined by commas")
    parser.add_argument("--videos", type=int, default=300, help="clips of the generated set")
    parser.add_argument("--epochs", type=int, default=30, help="of training")
    parser.add_argument("--run", type=Path, help="a run of one's own")
    parser.add_argument("--store", type=Path, help="the features of its videos")
    parser.add_argument("--table", type=Path, help="video_id, caption, start, end")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


def sets(folder: Path, options: argparse.Namespace) -> list[Set]:
    if options.table:
        return [Set("own", options.run, options.store, read_needles(options.table))]
    make: dict[str, Callable[[Path, argparse.Namespace], Set]] = {"generated": generated, "msrvtt": msrvtt}
    return [make[name](folder / name, options) for name in options.sets.split(",")]


def generated(folder: Path, options: argparse.Namespace) -> Set:
    from svb.cli.demo_clips import FPS, make_demo_clips

    captions = make_demo_clips(folder, num_videos=options.videos)
    run = trained(folder, folder / "videos", captions, 2.0, options)
    clips = clips_of(captions, lambda video_id: folder / "videos" / f"{video_id}.mp4")
    return spliced("generated", folder, run, clips, FPS, 2.0)


def msrvtt(folder: Path, options: argparse.Namespace) -> Set:
    captions = MSRVTT_MINI / "captions.csv"
    run = trained(folder, MSRVTT_MINI / "clips", captions, 1.0, options)
    clips = clips_of(captions, lambda video_id: MSRVTT_MINI / "clips" / f"{video_id}.mp4")
    return spliced("msrvtt", folder, run, clips, 1, 1.0)


def trained(folder: Path, videos: Path, captions: Path, fps: float, options: argparse.Namespace) -> Path:
    """Return a run on the train split."""
    from svb.extract.captions import captions as encode
    from svb.extract.config import ExtractConfig
    from svb.extract.run import extract
    from svb.train.config import TrainConfig
    from svb.train.run import train

    store = extract([videos], folder / "features", ExtractConfig(backbones=(BACKBONE,), fps=fps))
    features = folder / "captions.h5"
    if not features.exists():
        encode(captions, features, text_encoder=TEXT_ENCODER)
    config = TrainConfig(epochs=options.epochs, learning_rate=1e-3, batch_size=256)
    return train(store, features, folder / "run", config)


def clips_of(captions: Path, path_of: Callable[[str], Path]) -> list[Clip]:
    held: dict[str, list[str]] = defaultdict(list)
    with captions.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "val":
                held[row["video_id"]].append(row["caption"])
    return [Clip(path_of(video_id), tuple(texts[:CAPTIONS_A_NEEDLE])) for video_id, texts in held.items()]


def spliced(name: str, folder: Path, run: Path, clips: list[Clip], frame_rate: int, fps: float) -> Set:
    from svb.extract.config import ExtractConfig
    from svb.extract.run import extract

    if not (folder / "needles.csv").exists():
        needles = splice(
            clips, folder / "spliced", clips_a_video=CLIPS_A_VIDEO[name], frame_rate=frame_rate, seed=0
        )
        write_needles(needles, folder / "needles.csv")
    config = ExtractConfig(backbones=(BACKBONE,), fps=fps)
    store = extract([folder / "spliced"], folder / "spliced_features", config)
    return Set(name, run, store, read_needles(folder / "needles.csv"))


def measure(held: Set, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return for each method its numbers, each with the ends of its interval."""
    from svb.retrieve.index import index
    from svb.retrieve.indexing.index_config import IndexConfig
    from svb.retrieve.search import Searcher

    def searcher(seconds: float, stride: float) -> Searcher:
        out = folder / f"index-{held.name}-{seconds:g}"
        config = IndexConfig(store=held.store, moment_seconds=seconds, moment_stride_seconds=stride)
        return Searcher(index(held.run, out, config))

    chunks = searcher(CHUNK_SECONDS, CHUNK_SECONDS)
    embeddings = {caption: chunks.embed_text(caption) for caption in {n.caption for n in held.needles}}
    methods: dict[str, tuple[Searcher, Method]] = {
        "the whole video": (chunks, whole_video),
        f"chunks of {CHUNK_SECONDS:g} s": (chunks, best_chunk),
    }
    for seconds in map(float, options.moment_seconds.split(",")):
        methods[f"svb, windows of {seconds:g} s"] = searcher(seconds, seconds / 2), best_moment
    return {
        name: numbers(
            held.needles,
            [find(opened, n.caption, embeddings[n.caption], None) for n in held.needles],
            [find(opened, n.caption, embeddings[n.caption], n.video_id) for n in held.needles],
        )
        for name, (opened, find) in methods.items()
    }


def whole_video(searcher: Searcher, caption: str, embedding: Embedding, video_id: str | None) -> Found:
    catalog = searcher.catalog
    nearest = searcher.vectors.nearest(embedding, 1, by="video", allowed=None)[1]
    row = catalog.row_of(video_id) if video_id else int(nearest[0])
    seconds = catalog.moment_seconds(np.arange(*catalog.moment_range(row)))
    begin, end = float(seconds[:, 0].min()), float(seconds[:, 1].max())
    return Found(catalog.video_id(row), begin, end, (begin + end) / 2)


def best_chunk(searcher: Searcher, caption: str, embedding: Embedding, video_id: str | None) -> Found:
    catalog, allowed = searcher.catalog, None
    if video_id:
        allowed = np.zeros(catalog.num_videos, np.bool_)
        allowed[catalog.row_of(video_id)] = True
    rows = searcher.vectors.nearest(embedding, 1, by="moment", allowed=allowed)[1]
    begin, end = catalog.moment_seconds(rows)[0].tolist()
    return Found(catalog.video_id(int(catalog.videos_of(rows)[0])), begin, end, (begin + end) / 2)


def best_moment(searcher: Searcher, caption: str, embedding: Embedding, video_id: str | None) -> Found:
    from svb.retrieve.answer import SearchRequest

    request = SearchRequest(text=caption, k=1, fold=False, folders=(video_id,) if video_id else ())
    result = searcher.search_embedding(embedding, request).results[0]
    moment = result.moments[0]
    return Found(result.video_id, moment.begin_seconds, moment.end_seconds, moment.best_seconds)


def numbers(needles: Sequence[Needle], of_all: list[Found], of_one: list[Found]) -> dict[str, list[float]]:
    right = np.array([f.video_id == n.video_id for n, f in zip(needles, of_all, strict=True)])
    held: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {"right video": (right * 1.0, right | True)}
    for where, found, counted in (("", of_all, right), ("own video: ", of_one, right | True)):
        ious = np.array([iou(n, f) for n, f in zip(needles, found, strict=True)])
        inside = np.array([is_inside(n, f) for n, f in zip(needles, found, strict=True)])
        held[f"{where}R@1, IoU 0.5"] = (ious >= 0.5) * 1.0, right | True
        held[f"{where}R@1, IoU 0.7"] = (ious >= 0.7) * 1.0, right | True
        held[f"{where}inside"] = inside * 1.0, counted
    groups = group_of_each(needles)
    return {name: percent(values, counted, groups) for name, (values, counted) in held.items()}


def iou(needle: Needle, found: Found) -> float:
    if needle.video_id != found.video_id:
        return 0.0
    shared = min(needle.end_seconds, found.end_seconds) - max(needle.begin_seconds, found.begin_seconds)
    union = max(needle.end_seconds, found.end_seconds) - min(needle.begin_seconds, found.begin_seconds)
    return max(0.0, shared) / union


def is_inside(needle: Needle, found: Found) -> bool:
    return needle.video_id == found.video_id and needle.begin_seconds <= found.best_seconds < needle.end_seconds


def group_of_each(needles: Sequence[Needle]) -> NDArray[np.int64]:
    """Return a number a needle: captions of one clip are drawn together, being alike."""
    places = [(n.video_id, n.begin_seconds) for n in needles]
    numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
    return np.array([numbers[place] for place in places])


def percent(values: NDArray[np.float64], counted: NDArray[np.bool_], groups: NDArray[np.int64]) -> list[float]:
    """Return the mean of the values that count, in percent, and the ends of its 95 % interval."""
    random, num_groups = np.random.default_rng(0), int(groups.max()) + 1
    sums = np.bincount(groups, values * counted, num_groups), np.bincount(groups, counted, num_groups)
    drawn = random.integers(num_groups, size=(BOOTSTRAPS, num_groups))
    means = sums[0][drawn].sum(axis=1) / np.maximum(1, sums[1][drawn].sum(axis=1))
    low, high = np.quantile(means, [0.025, 0.975])
    return [100 * float(sums[0].sum() / max(1, sums[1].sum())), 100 * float(low), 100 * float(high)]


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, held in rows.items():
        cells = [f"{held[c][0]:.1f} ({held[c][1]:.1f} to {held[c][2]:.1f})" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
