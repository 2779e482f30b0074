"""Is a spoken line found, and does speech leave pictures alone? `python benchmarks/speech.py --run RUN`.

Videos of MSR-VTT mini, indexed by a run on it, say something as subtitles: seven topics each, a topic is two
sentences after each other. Two corpora of speech:

captions  two captions of a VATEX video are a topic: what is said looks like what is seen, the worst case
prose     two sentences of Python's own documentation: talk about something else

Queries, of which each has the videos that answer it:

words     one to three of the rarest words of a sentence that is said, in any order
quote     three words of a sentence as they follow each other, in quotes
meaning   a third caption of the same VATEX video, which nobody says
both      a caption of a video whose speech has another caption of it
seen      a caption of a video that shows it and says nothing like it

One half of the queries, by a hash of their text, is to choose the weights with; what is reported is of the
other. "Inside" is the share of queries whose first video is the right one and whose first line lies in the right
topic. The last part searches a million cues with random vectors: time and memory of `svb search`.
"""

from __future__ import annotations

import argparse
import ast
import collections
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shared

VATEX = Path(__file__).resolve().parents[2] / "shared" / "annotations" / "vatex" / "validation.jsonl"
TOPICS_A_VIDEO, NUM_VIDEOS = 7, 400
KINDS = {"captions": ("words", "quote", "meaning", "both", "seen"), "prose": ("words", "quote", "seen")}
BY_RANKS = ("reciprocal ranks", "", "")
MEANING_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8)
WHERE = ("picture", "speech", "both")
Span = tuple[float, float]
Hits = list[tuple[bool, bool]]


@dataclass(frozen=True)
class Asked:
    """A query of one of the docstring's kinds, and the videos that answer it, with when they say so if they do."""

    kind: str
    text: str
    right: Mapping[str, Sequence[Span]]

    @property
    def is_reported(self) -> bool:
        return hashlib.sha256(self.text.encode()).digest()[0] % 2 == 1


@dataclass(frozen=True)
class Topic:
    """What a video says from when to when, cue by cue, and another sentence for it, which nobody says."""

    video_id: str
    span: Span
    cues: Sequence[str]
    unsaid: str


def measure(folder: Path, options: argparse.Namespace) -> tuple[Any, str]:
    measured, texts = dict[str, Any](), list[str]()

    def tell(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        texts.append(f"{title}\n\n{shared.table(names, rows)}")
        print(texts[-1], end="\n\n", file=sys.stderr, flush=True)

    for corpus, kinds in KINDS.items():
        index, asked = make_index(folder, corpus, options)
        alone, together = tune(index, [each for each in asked if not each.is_reported])
        found, exact = report(index, [each for each in asked if each.is_reported])
        measured[corpus] = {"alone": alone, "together": together, "found": found, "exact": exact}
        ranked = [kind for kind in kinds if kind != "quote"]
        tell(
            f"{corpus}: what is said alone, R@1 / inside, half to choose with:",
            ["weight of the meaning", *ranked],
            alone,
        )
        names = ["weight of the meaning", "of the lesser", "speech times", *ranked]
        tell(f"{corpus}: seen and said, R@1 / R@10, half to choose with:", names, together)
        names = ["query", "queries", *(f"`--in {where}`" for where in WHERE)]
        tell(f"{corpus}: R@1 / R@10, half to report; {exact} quotes found all videos and no other:", names, found)
    measured["large"] = large = million(index, options)
    tell(
        f"{options.cues:,} cues, {large['windows']:,} windows: words {large['words_mib']:.0f} MiB, made in "
        f"{large['make_seconds']:.0f} CPU-s; vectors {large['vectors_mib']:.0f} MiB",
        ["query", "scan ms", "CPU-s of the process", "memory MiB"],
        large["rows"],
    )
    return measured, "\n\n".join(texts)


# --- videos that say something, and queries


def make_index(folder: Path, corpus: str, options: argparse.Namespace) -> tuple[Path, list[Asked]]:
    """Return an index of videos with speech, and queries in a random order; another corpus takes the index over."""
    from svb.data.caption_features import read_caption_features
    from svb.data.feature_store import FeatureStore
    from svb.data.feature_store_writer import FeatureStoreWriter
    from svb.retrieve.index import IndexConfig, index

    paths = json.loads((options.run / "config.json").read_text("utf-8"))["paths"]
    store, table = FeatureStore(Path(paths["store"])), read_caption_features(Path(paths["captions"])).table
    captions, train = collections.defaultdict[str, list[str]](list), set[str]()
    for video_id, caption, split in zip(table.video_ids, table.captions, table.splits, strict=True):
        if split == "val":
            captions[video_id].append(caption)
        elif split == "train":
            train.add(video_id)
    draw = random.Random(0)
    video_ids = sorted([*captions, *draw.sample(sorted(train), NUM_VIDEOS - len(captions))])
    videos = folder / "videos"
    if not videos.exists():
        videos.mkdir()
        with FeatureStoreWriter(folder / "features", store.settings, {}) as writer:
            for video_id in video_ids:
                record = replace(store.records[video_id], source_path=str(videos / f"{video_id}.mp4"))
                writer.add(record, store.rows_of(video_id))
    # Every second val video also says one of its captions; another one asks for it.
    says_own = sorted(captions)[::2] if "both" in KINDS[corpus] else []
    own = {video_id: draw.sample(captions[video_id], 2) for video_id in says_own}
    topics = write_subtitles(videos, video_ids, sentences(corpus, draw), own, draw)
    asked = [each for kind in KINDS[corpus] if kind != "seen" for each in queries(kind, topics, own, draw)]
    shown = [(caption, v) for v, of_video in captions.items() for caption in of_video if v not in own]
    asked += [Asked("seen", caption, {v: ()}) for caption, v in draw.sample(shown, len(shown))]
    counts = collections.Counter[str]()
    kept = []
    for each in asked:
        counts[each.kind] += 1
        if counts[each.kind] <= options.queries:
            kept.append(each)
    config = IndexConfig(store=folder / "features", sidecars=False)
    return index(options.run, folder / "index", config), kept


def sentences(corpus: str, draw: random.Random) -> list[tuple[str, str, str]]:
    """Return what topics say: two sentences, and one that nobody says, in a random order."""
    if corpus == "captions":
        with VATEX.open(encoding="utf-8") as file:
            held = [[" ".join(caption.split()) for caption in json.loads(line)["captions"]] for line in file]
        said = [(a, b, c) for a, b, c in (draw.sample(of_video, 3) for of_video in held)]
    else:
        found = list[str]()
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
            tree = ast.parse(path.read_bytes())
            nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
            for text in filter(None, map(ast.get_docstring, nodes)):
                found += re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        plain = [
            each
            for each in dict.fromkeys(found)
            if each.isascii() and not {*"<>&"} & {*each} and 5 <= len(_words(each)) <= 25
        ]
        said = [(a, b, "") for a, b in zip(plain[::2], plain[1::2], strict=False)]
    draw.shuffle(said)
    return said


def write_subtitles(
    videos: Path,
    video_ids: Sequence[str],
    said: Sequence[tuple[str, str, str]],
    own: Mapping[str, Sequence[str]],
    draw: random.Random,
) -> list[Topic]:
    """Write what videos say beside them."""
    from svb.retrieve.stored.cues import clock_of

    topics, left = [], iter(said)
    for video_id in video_ids:
        at, blocks = 0.0, ["WEBVTT"]
        of_video = list(itertools.islice(left, TOPICS_A_VIDEO))
        if video_id in own:
            of_video[3] = (own[video_id][0], of_video[3][1], "")
        for *cues, unsaid in of_video:
            begin = at
            for text in cues:
                end = at + draw.uniform(3, 6)
                blocks.append(f"{clock_of(at)} --> {clock_of(end)}\n{text}")
                at = end
            topics.append(Topic(video_id, (begin, at), cues, unsaid))
        (videos / f"{video_id}.en.vtt").write_text("\n\n".join(blocks) + "\n", "utf-8")
    return topics


def queries(
    kind: str, topics: Sequence[Topic], own: Mapping[str, Sequence[str]], draw: random.Random
) -> list[Asked]:
    """Return queries of one kind, in a random order."""
    words = [set(_words(" ".join(topic.cues))) for topic in topics]
    having = collections.defaultdict[str, set[int]](set)
    said = collections.defaultdict[str, list[str]](list)
    for number, topic in enumerate(topics):
        said[topic.video_id] += _words(" ".join(topic.cues))
        for word in words[number]:
            having[word].add(number)
    spoken = {video_id: f" {' '.join(of_video)} " for video_id, of_video in said.items()}
    asked = []
    for topic in topics:
        first = _words(topic.cues[0])
        if kind == "words":
            chosen = sorted(set(first), key=lambda word: (len(having[word]), word))[: draw.randint(1, 3)]
            draw.shuffle(chosen)
            right = collections.defaultdict[str, list[Span]](list)
            for number in set.intersection(*(having[word] for word in chosen)):
                right[topics[number].video_id].append(topics[number].span)
            asked.append(Asked(kind, " ".join(chosen), right))
        elif kind == "quote" and len(first) > 3:
            begin = draw.randrange(len(first) - 2)
            phrase = " ".join(first[begin : begin + 3])
            asked.append(Asked(kind, f'"{phrase}"', {v: () for v, text in spoken.items() if f" {phrase} " in text}))
        elif kind == "both" and topic.cues[0] == own.get(topic.video_id, [""])[0]:
            asked.append(Asked(kind, own[topic.video_id][1], {topic.video_id: [topic.span]}))
        elif kind == "meaning" and topic.unsaid:
            asked.append(Asked(kind, topic.unsaid, {topic.video_id: [topic.span]}))
    draw.shuffle(asked)
    return asked


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


# --- choosing the weights, and what comes of them


def tune(index: Path, asked: Sequence[Asked]) -> tuple[list[list[str]], list[list[str]]]:
    """Return rows of two tables: of what is said alone, and of both, by the weights in `said` and `fused`."""
    from svb.retrieve.answer import SearchRequest
    from svb.retrieve.search import open_searcher
    from svb.retrieve.searching import fused, said
    from svb.retrieve.searching.rank import EmbeddedRequest
    from svb.retrieve.searching.results import Spread, independent_rows

    searcher = open_searcher(index)
    catalog = searcher.catalog
    speech = said.SpeechSearch(index, searcher.manifest["speech"][0], catalog)
    moments = searcher.vectors.embeddings(np.arange(catalog.num_moments), by="moment")
    begins = np.array([catalog.moment_range(row)[0] for row in range(catalog.num_videos)])
    meaning, lesser = said.MEANING_WEIGHT, fused.LESSER_WEIGHT
    # The weight of the meaning, that of the lesser score, and what the scores of speech are multiplied by.
    ways = [*((each, lesser, 1.0) for each in MEANING_WEIGHTS), *((meaning, each, 1.0) for each in (0.0, 0.2, 0.5))]
    ways += [(meaning, lesser, 0.8), (meaning, lesser, 1.25)]
    alone, together = collections.defaultdict[Any, Hits](list), collections.defaultdict[Any, Hits](list)
    for each in (each for each in asked if each.kind != "quote"):
        embedded = EmbeddedRequest(searcher.embed_text(each.text))
        right = [row for row in map(catalog.row_of, each.right) if row is not None]
        pictures = moments @ embedded.main
        spread = Spread.of(pictures, independent_rows(catalog, "moment"))
        seen = spread.share_of_chance(np.maximum.reduceat(pictures, begins))
        scores = {}
        for weight in MEANING_WEIGHTS:
            said.MEANING_WEIGHT = weight
            heard = speech.ask(SearchRequest(text=each.text), embedded, None)
            first = next(iter(heard.found), None)
            inside = first in right and _is_inside(heard.lines_of(first, 1)[0], each.right[catalog.video_id(first)])
            alone[each.kind, weight].append((first in right, inside))
            scores[weight] = np.zeros(catalog.num_videos)
            scores[weight][list(heard.found)] = [score for score, _ in heard.found.values()]
        for way in ways:
            fused.LESSER_WEIGHT = way[1]
            together[each.kind, way].append(
                _first_and_ten(fused.joint_scores(seen, way[2] * scores[way[0]]), right)
            )
        ranks = ((-of).argsort(kind="stable").argsort(kind="stable") for of in (seen, scores[meaning]))
        together[each.kind, BY_RANKS].append(_first_and_ten(sum(1 / (61 + rank) for rank in ranks), right))
    said.MEANING_WEIGHT, fused.LESSER_WEIGHT = meaning, lesser
    kinds = list(dict.fromkeys(kind for kind, _ in alone))
    return (
        [[f"{weight:g}", *(_percents(alone[kind, weight]) for kind in kinds)] for weight in MEANING_WEIGHTS],
        [[*map(str, way), *(_percents(together[kind, way]) for kind in kinds)] for way in (*ways, BY_RANKS)],
    )


def _is_inside(line: Any, spans: Sequence[Span]) -> bool:
    return any(line.begin_seconds < end and line.end_seconds > begin for begin, end in spans)


def _first_and_ten(scores: Any, right: Sequence[int]) -> tuple[bool, bool]:
    """Return whether a right video is the best of `(V,)` scores, and among the ten best."""
    best = (-scores).argsort(kind="stable")[:10].tolist()
    return best[0] in right, not set(right).isdisjoint(best)


def _percents(hits: Hits) -> str:
    return " / ".join(f"{100 * sum(of) / len(hits):.1f}" for of in zip(*hits, strict=True))


def report(index: Path, asked: Sequence[Asked]) -> tuple[list[list[str]], str]:
    """Return R@1 and R@10 of each kind of query through the door that users take, and how many quotes are exact."""
    from svb.retrieve.answer import SearchRequest
    from svb.retrieve.search import open_searcher

    searcher = open_searcher(index)
    hits = collections.defaultdict[Any, Hits](list)
    exact = list[bool]()
    for each in asked:
        if each.kind == "quote":
            request = SearchRequest(text=each.text, k=NUM_VIDEOS, fold=False)
            exact.append({result.video_id for result in searcher.search(request).results} == set(each.right))
            continue
        for where in WHERE:
            request = SearchRequest(text=each.text, search_in=where, k=10, fold=False)
            found = [result.video_id for result in searcher.search(request).results]
            is_right = [video_id in each.right for video_id in found]
            hits[each.kind, where].append((any(is_right[:1]), any(is_right)))
    kinds = dict.fromkeys(kind for kind, _ in hits)
    rows = [
        [kind, str(len(hits[kind, "both"])), *(_percents(hits[kind, where]) for where in WHERE)] for kind in kinds
    ]
    return rows, f"{sum(exact)} of {len(exact)}"


# --- a million cues


def million(index: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Give an index a million cues, and return what searching them takes."""
    from svb.retrieve.searching.words import keep_words, words_path
    from svb.retrieve.stored.cues import Cue, Track, cut_into_windows, open_speech, publish_speech, speech_of
    from svb.retrieve.stored.manifest import commit, read_manifest

    manifest = read_manifest(index)
    held = open_speech(index, manifest["speech"][0])
    video_ids, draw = sorted(set(held.video_ids)), random.Random(1)
    texts = [text for said in sentences("captions", draw) for text in said[:2]]
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
    vectors = np.random.default_rng(0).standard_normal((num_windows, size), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    speech = speech_of(tracks, vectors.astype(np.float16), windows)
    entry = publish_speech(index, speech)
    commit(index, {**manifest, "generation": manifest["generation"] + 1, "speech": [entry]})
    cost = shared.cost_of(lambda: keep_words(index, entry["key"], speech))
    rows = []
    quote = " ".join(texts[0].split()[1:4])
    for text in ("trampoline", "a man plays the guitar on a stage", f'"{quote}"', "the"):
        command = [sys.executable, "-m", "svb", "search", text, "--in", "speech", "--index", str(index), "--json"]
        _run([*command, "--no-server"])  # the first one keeps the query's vector
        runs = [_run([*command, "--no-server"]) for _ in range(options.rounds)]
        rows.append([f"`{text}`", *(shared.spread([run[of] for run in runs]) for of in range(3))])
    return {
        "windows": num_windows,
        "words_mib": words_path(index, entry["key"]).stat().st_size / 2**20,
        "vectors_mib": speech.window_embeddings.nbytes / 2**20,
        "make_seconds": cost.cpu_seconds,
        "rows": rows,
    }


def _run(command: Sequence[str]) -> tuple[float, float, float]:
    """Run a search; return the milliseconds of its scan, and the CPU-seconds and MiB of the process.

    Its memory is watched while it runs: what wait4(2) tells of a program's peak counts the process that started it.
    """
    with tempfile.TemporaryFile() as out:
        process, peak = subprocess.Popen(command, stdout=out), 0.0
        while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
            peak = max(peak, shared.memory_mib("VmHWM", process.pid))
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(waited[1])
        out.seek(0)
        answer, usage = json.load(out), waited[2]
    return 1000 * answer["elapsed_seconds"]["scan"], usage.ru_utime + usage.ru_stime, peak


if __name__ == "__main__":
    shared.run_benchmark(
        __doc__,
        measure,
        run=(None, "a run on MSR-VTT mini, with its store and captions"),
        queries=(200, "queries of each kind, half of them to choose the weights with"),
        cues=(1_000_000, "cues of the last part"),
        rounds=(3, "rounds of each query of the last part"),
    )
