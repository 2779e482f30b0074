"""Is a spoken line found, and does speech leave pictures alone? `python benchmarks/speech.py --run RUN`.

Videos of MSR-VTT mini, indexed by a run on it, say what captions of VATEX say: two captions of one VATEX video
after each other are a topic, seven topics are a video's speech (subtitles alone; cues of 3 to 6 s). Queries:

words     the three rarest words of a caption that is said, in any order
meaning   a third caption of the same VATEX video, which nobody says
seen      a caption of a val video of MSR-VTT: what the picture shows

R@1 is the share of queries whose first video is the right one, "inside" that of queries whose first moment lies in
the topic as well. The second part searches a million cues with random vectors: time and memory of `svb search`.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import shared

VATEX = Path(__file__).resolve().parents[2] / "shared" / "annotations" / "vatex" / "validation.jsonl"
TOPICS_A_VIDEO, NUM_VIDEOS = 7, 400
WORDS_WEIGHTS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0)
SPEECH_WEIGHTS = (0.0, 1.0, 1.25, 1.5, 1.75, 2.0)
OTHER_WAYS = ("sum, 1", "sum, 2", "reciprocal ranks")


@dataclass(frozen=True)
class Asked:
    """A query, the video that answers it, and when; the kind is one of the docstring's."""

    kind: str
    text: str
    video_id: str
    span: tuple[float, float] | None = None


def measure(folder: Path, options: argparse.Namespace) -> tuple[Any, str]:
    index, asked = make_index(folder, options)
    hits = sweep(index, asked, options.words_weight)
    spoken = [
        [_named(w), *(f"{100 * hits[kind, 'speech', w][n]:.1f}" for kind in ("words", "meaning") for n in (0, 1))]
        for w in WORDS_WEIGHTS
    ]
    both = [
        [
            str(w),
            *(f"{100 * hits[kind, 'both', w][n]:.1f}" for kind in ("words", "meaning", "seen") for n in (0, 1)),
        ]
        for w in (*SPEECH_WEIGHTS, *OTHER_WAYS)
    ]
    large = million(index, options)
    text = "\n\n".join(
        [
            "What is said, `--in speech`, percent:",
            shared.table(["weight of words", "words R@1", "inside", "meaning R@1", "inside"], spoken),
            f"Seen and said, R@1 and R@5 in percent, words with {options.words_weight:g}:",
            shared.table(["weight of speech", "words R@1", "R@5", "meaning R@1", "R@5", "seen R@1", "R@5"], both),
            f"{options.cues:,} cues, {large['windows']:,} windows: words {large['words_mib']:.0f} MiB, made in "
            f"{large['make_seconds']:.0f} s; vectors {large['vectors_mib']:.0f} MiB",
            shared.table(["query", "scan ms", "CPU-s of the process", "memory MiB"], large["rows"]),
        ]
    )
    return {"found": {" ".join(map(str, key)): value for key, value in hits.items()}, "large": large}, text


def _named(weight: float) -> str:
    return {0.0: "0 (meaning alone)", 1.0: "1 (words alone)"}.get(weight, f"{weight:g}")


def make_index(folder: Path, options: argparse.Namespace) -> tuple[Path, list[Asked]]:
    """Return an index of videos with speech, and queries."""
    from svb.data.caption_features import read_caption_features
    from svb.data.feature_store import FeatureStore
    from svb.data.feature_store_writer import FeatureStoreWriter
    from svb.retrieve.index import IndexConfig, index

    run = json.loads((options.run / "config.json").read_text("utf-8"))
    store, table = (
        FeatureStore(Path(run["paths"]["store"])),
        read_caption_features(Path(run["paths"]["captions"])).table,
    )
    rows = list(zip(table.video_ids, table.captions, table.splits, strict=True))
    val = sorted({video_id for video_id, _, split in rows if split == "val"})
    rest = sorted({video_id for video_id, _, split in rows if split == "train"})
    draw = random.Random(0)
    video_ids = sorted([*val, *draw.sample(rest, NUM_VIDEOS - len(val))])
    videos = folder / "videos"
    videos.mkdir()
    with FeatureStoreWriter(folder / "features", store.settings, {}) as writer:
        for video_id in video_ids:
            record = replace(store.records[video_id], source_path=str(videos / f"{video_id}.mp4"))
            writer.add(record, store.rows_of(video_id))
    asked = write_subtitles(videos, video_ids, draw)
    captions = [(caption, video_id) for video_id, caption, split in rows if split == "val"]
    asked += [Asked("seen", caption, video_id) for caption, video_id in draw.sample(captions, options.seen)]
    spoken = [[each for each in asked if each.kind == kind] for kind in ("words", "meaning")]
    asked = [each for of in spoken for each in of[: options.queries]] + [a for a in asked if a.kind == "seen"]
    config = IndexConfig(store=folder / "features", sidecars=False)
    return index(options.run, folder / "index", config), asked


def write_subtitles(videos: Path, video_ids: Sequence[str], draw: random.Random) -> list[Asked]:
    from svb.retrieve.stored.cues import clock_of

    topics = []
    with VATEX.open(encoding="utf-8") as file:
        for line in file:
            captions = [" ".join(caption.split()) for caption in json.loads(line)["captions"]]
            topics.append(draw.sample(captions, 3))
    draw.shuffle(topics)
    counts = collections.Counter(word for said in topics for text in said[:2] for word in set(_words(text)))
    asked = []
    for number, video_id in enumerate(video_ids):
        at, blocks = 0.0, ["WEBVTT"]
        for said in topics[number * TOPICS_A_VIDEO : (number + 1) * TOPICS_A_VIDEO]:
            begin = at
            for text in said[:2]:
                end = at + draw.uniform(3, 6)
                blocks.append(f"{clock_of(at)} --> {clock_of(end)}\n{text}")
                at = end
            rarest = sorted(set(_words(said[0])), key=lambda word: (counts[word], word))[:3]
            draw.shuffle(rarest)
            asked.append(Asked("words", " ".join(rarest), video_id, (begin, at)))
            asked.append(Asked("meaning", said[2], video_id, (begin, at)))
        (videos / f"{video_id}.en.vtt").write_text("\n\n".join(blocks) + "\n", "utf-8")
    draw.shuffle(asked)
    return asked


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def sweep(
    index: Path, asked: Sequence[Asked], fixed_weight: float
) -> dict[tuple[str, str, float | str], tuple[float, float]]:
    """Return two shares by kind of query, where, and weight or way.

    Of speech alone, where weights of words are tried, R@1 and the share whose first line is inside the topic; of
    both together, with one weight of words, R@1 and R@5.
    """
    import numpy as np

    from svb.retrieve.answer import SearchRequest
    from svb.retrieve.search import open_searcher
    from svb.retrieve.searching import said
    from svb.retrieve.searching.rank import EmbeddedRequest
    from svb.retrieve.searching.results import Spread, independent_rows

    searcher = open_searcher(index)
    catalog = searcher.catalog
    speech = said.SpeechSearch(index, searcher.manifest["speech"][0], catalog)
    moments = searcher.vectors.embeddings(np.arange(catalog.num_moments), by="moment")
    begins = np.array([catalog.moment_range(row)[0] for row in range(catalog.num_videos)])
    hits = collections.defaultdict[tuple[str, str, float | str], list[tuple[bool, bool]]](list)
    for each in asked:
        request, embedded = SearchRequest(text=each.text), EmbeddedRequest(searcher.embed_text(each.text))
        right, pictures = catalog.row_of(each.video_id), moments @ embedded.main
        spread = Spread.of(pictures, independent_rows(catalog, "moment"))
        seen = spread.share_of_chance(np.maximum.reduceat(pictures, begins))
        for weight in WORDS_WEIGHTS if each.kind != "seen" else (fixed_weight,):
            said.WORDS_WEIGHT = weight
            heard = speech.ask(request, embedded, None)
            first = next(iter(heard.found), None)
            (line,) = heard.lines_of(first, 1) if first is not None else (None,)
            inside = bool(
                line is not None
                and each.span is not None
                and line.begin_seconds < each.span[1]
                and line.end_seconds > each.span[0]
            )
            hits[each.kind, "speech", weight].append((first == right, first == right and inside))
            if weight == fixed_weight:
                scores = np.zeros(catalog.num_videos)
                for row, (score, _) in heard.found.items():
                    scores[row] = score
        for way in (*SPEECH_WEIGHTS, *OTHER_WAYS):
            best = (-_together(way, seen, scores)).argsort(kind="stable")[:5].tolist()
            hits[each.kind, "both", way].append((best[0] == right, right in best))
    return {key: (_mean(a for a, _ in of), _mean(b for _, b in of)) for key, of in hits.items()}


def _together(way: float | str, seen: Any, said: Any) -> Any:
    """Return the scores of all videos from both of theirs: as svb has them, with a weight, or in another way."""
    from svb.retrieve.searching import fused

    if isinstance(way, float):
        fused.SPEECH_WEIGHT = way
        return fused.fuse(seen, said)
    if way.startswith("sum"):
        return seen + float(way.split()[1]) * said
    return sum(1 / (61 + (-each).argsort(kind="stable").argsort(kind="stable")) for each in (seen, said))


def _mean(values: Any) -> float:
    held = list(values)
    return sum(held) / len(held)


def million(index: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Give an index a million cues, and return what searching them takes."""
    import numpy as np

    from svb.retrieve.searching.words import keep_words, words_path
    from svb.retrieve.stored.cues import Cue, Track, cut_into_windows, open_speech, publish_speech, speech_of
    from svb.retrieve.stored.manifest import commit, read_manifest

    manifest = read_manifest(index)
    held = open_speech(index, manifest["speech"][0])
    texts, video_ids, draw = held.cues.tolist(), sorted(set(held.video_ids)), random.Random(1)
    each = options.cues // len(video_ids)
    tracks = [
        Track(
            video_id,
            f"/videos/{video_id}.srt",
            "en",
            "sidecar",
            (1, 1),
            [Cue(draw.choice(texts), 3.0 * n, 3.0 * n + 3) for n in range(each)],
        )
        for video_id in video_ids
    ]
    windows = [cut_into_windows(track.cues) for track in tracks]
    num_windows, size = sum(map(len, windows)), held.window_embeddings.shape[1]
    vectors = np.random.default_rng(0).normal(size=(num_windows, size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    speech = speech_of(tracks, vectors.astype(np.float16), windows)
    entry = publish_speech(index, speech)
    commit(index, {**manifest, "generation": manifest["generation"] + 1, "speech": [entry]})
    began = time.perf_counter()
    keep_words(index, entry["key"], speech)
    made_seconds = time.perf_counter() - began
    rows = []
    for text in ("trampoline", "a man plays the guitar on a stage", '"plays the guitar"', "the"):
        command = [sys.executable, "-m", "svb", "search", text, "--in", "speech", "--index", str(index), "--json"]
        scans, cpus = [], []
        for _ in range(options.rounds + 1):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([*command, "--no-server"], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            scans.append(1000 * json.loads(done.stdout)["elapsed_seconds"]["scan"])
            cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        rows.append([f"`{text}`", shared.spread(scans[1:]), shared.spread(cpus[1:]), f"up to {memory:.0f}"])
    path = words_path(index, entry["key"])
    return {
        "windows": num_windows,
        "words_mib": path.stat().st_size / 2**20,
        "vectors_mib": speech.window_embeddings.nbytes / 2**20,
        "make_seconds": made_seconds,
        "rows": rows,
    }


if __name__ == "__main__":
    shared.run_benchmark(
        __doc__,
        measure,
        run=(None, "a run on MSR-VTT mini, with its store and captions"),
        queries=(150, "queries of each kind"),
        seen=(400, "queries for what is seen"),
        words_weight=(0.8, "weight of words in the second table"),
        cues=(1_000_000, "cues of the last part"),
        rounds=(3, "rounds of each query of the last part"),
    )
