"""Finds what is said in an index's videos: by its words, by its meaning, word for word where the query quotes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import InputError
from svb.retrieve.answer import Line, SearchRequest
from svb.retrieve.searching.catalog import SAMPLE_ROWS, Catalog
from svb.retrieve.searching.rank import EmbeddedRequest
from svb.retrieve.searching.results import FEWEST_ROWS, Spread
from svb.retrieve.searching.vectors import Piece, cut_into_pieces, scan
from svb.retrieve.searching.words import STOP_WORDS, Wanted, WordIndex, find_phrase, fold, marked, wanted_of
from svb.retrieve.stored.cues import Speech, open_speech

# The weight of the meaning beside that of the words. `benchmarks/speech.py` measures it.
MEANING_WEIGHT = 0.4
# As many windows as could be among the best by either way are scored by both.
CANDIDATES = 512
# What a line that is said word for word scores.
QUOTED = 1.0
# Another window of a video is shown if it has at least this share of the best one's score.
SHOWN_SHARE = 0.5
# The share of a query's words, by weight, that is hardly said by chance, or is worth a look.
STRONG_WORDS, FAIR_WORDS = 0.8, 0.5


@dataclass(frozen=True)
class _Place:
    """Cues that follow each other in a track: half-open."""

    begin: int
    end: int


@dataclass(frozen=True)
class Heard:
    """What a query found in the speech of an index.

    Attributes:
        found: Score and confidence of each video, by its row in the catalog, best first; a score of 1 is where
            chance ends.
        is_quoted: Whether the query quotes, so that no other video counts.
        notes: What the user should know.
    """

    found: Mapping[int, tuple[float, str]]
    is_quoted: bool
    notes: tuple[str, ...]
    _places: Mapping[int, Sequence[tuple[_Place, float]]]
    _search: SpeechSearch
    _texts: tuple[str, ...]

    def lines_of(self, video: int, most: int) -> list[Line]:
        """Return the best lines of a video."""
        return self._search.lines(self._places.get(video, ()), self._texts, most)


class SpeechSearch:
    """The speech of an index, opened for searching. Threads may share it.

    Args:
        folder: The index's folder.
        entry: The speech's entry in the manifest.
        catalog: The catalog of the index's videos.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], catalog: Catalog) -> None:
        self.languages: Sequence[str] = entry["languages"]
        self._catalog = catalog
        self._speech: Speech = open_speech(folder, entry)
        self._words = WordIndex(folder, entry["key"], self._speech)

    def ask(self, request: SearchRequest, embedded: EmbeddedRequest, allowed: NDArray[np.bool_] | None) -> Heard:
        """Return what is said that matches a request for a text.

        Args:
            request: The request.
            embedded: The request's texts, embedded.
            allowed: `(V,)`, the videos that count; None for all.

        Raises:
            InputError: Nothing is said in the language asked for.
            StoreError: The speech is damaged.
        """
        texts = (request.text or "", *request.plus)
        wanted = wanted_of(texts)
        counted = self._catalog.counted(allowed)
        for phrase in wanted_of(request.without).phrases:
            counted = counted.copy()
            counted[[*self._said(phrase, self._counted_windows(counted, None))]] = False
        selected = self._counted_windows(counted, request.language)
        if wanted.phrases:
            return self._quoted(wanted.phrases, texts, selected, request.k)
        words = self._words.scores(wanted.terms)
        held = selected[words.windows]
        windows, bm25, shares = words.windows[held], words.bm25[held], words.shares[held]
        best = np.argsort(-bm25, kind="stable")[:CANDIDATES]
        query = embedded.query_over(lambda: self._background)
        _, near = scan(self._pieces, query.positive, CANDIDATES, None if selected.all() else selected)
        candidates = np.union1d(windows[best], near)
        if not len(candidates):
            return self._heard({}, {}, texts)
        spread = Spread.of(query.scores(self._background), self._speech.num_windows)
        cosines = query.scores(self._speech.window_embeddings[candidates].astype(np.float32))
        # A candidate that says none of the words is not at its place; the last place is the one appended.
        place = np.searchsorted(windows, candidates)
        is_said = np.append(windows, -1)[place] == candidates
        share = np.where(is_said, np.append(shares, 0.0)[place], 0.0)
        # The best of N windows says by chance what a share of 1/N says; among normal scores it stands out by
        # sqrt(2 ln N). So this is on the scale of cosines and pictures, on which 1 is where chance ends.
        beyond = np.sqrt(share * words.weight / math.log(max(self._speech.num_windows, FEWEST_ROWS)))
        # A long query has some words in common with much; a line that answers it has most of them.
        scores = np.hypot(share * beyond, MEANING_WEIGHT * spread.share_of_chance(cosines))
        places: dict[int, list[tuple[_Place, float]]] = {}
        sure: dict[int, str] = {}
        for number in np.lexsort((candidates, -scores)).tolist():
            video = int(self._video_of_windows[candidates[number]])
            if video not in places:
                sure[video] = _confidence(float(share[number]), spread.confidence(float(cosines[number])))
            window = _Place(*self._speech.window_offsets[candidates[number] : candidates[number] + 2].tolist())
            places.setdefault(video, []).append((window, float(scores[number])))
        return self._heard(places, sure, texts)

    def lines(self, places: Sequence[tuple[_Place, float]], texts: Sequence[str], most: int) -> list[Line]:
        """Return what is said in some places, best first: the cues with the words asked for, or all of a window."""
        wanted, found = wanted_of(texts), list[Line]()
        for place, score in places:
            if len(found) == most or (found and score < SHOWN_SHARE * found[0].score):
                break
            cues = range(place.begin, place.end)
            spans = marked([self._speech.cues[cue] for cue in cues], wanted)
            hits = [cue for cue, marks in zip(cues, spans, strict=True) if marks] or list(cues)
            line = self._line(_Place(hits[0], hits[-1] + 1), wanted, score)
            if not any(_overlap(line, other) for other in found):
                found.append(line)
        return found

    def _line(self, place: _Place, wanted: Wanted, score: float) -> Line:
        text = " ".join(self._speech.cues[cue] for cue in range(place.begin, place.end))
        seconds = self._speech.cue_seconds[place.begin : place.end]
        track = int(np.searchsorted(self._speech.track_offsets, place.begin, side="right")) - 1
        is_timed = not np.isnan(seconds).any()
        return Line(
            text,
            float(seconds[:, 0].min()) if is_timed else None,
            float(seconds[:, 1].max()) if is_timed else None,
            self._speech.languages[track],
            score,
            marked([text], wanted)[0],  # once more: a phrase may go on in the next cue
        )

    def _quoted(
        self, phrases: Sequence[tuple[str, ...]], texts: tuple[str, ...], selected: NDArray[np.bool_], k: int
    ) -> Heard:
        """Return the videos in which all phrases are said word for word; more often is better."""
        found = [self._said(phrase, selected) for phrase in phrases]
        places = {
            video: [(place, QUOTED) for of_phrase in found for place in of_phrase[video]]
            for video in found[0]
            if all(video in of_phrase for of_phrase in found)
        }
        said = " and ".join(f'"{" ".join(phrase)}"' for phrase in phrases)
        notes = []
        if not places:
            notes.append(f"nobody says {said} - without the quotes, similar words count too")
        elif len(places) > k:
            notes.append(f"{said} is said in {len(places):,} videos - show all with -k {len(places)}")
        return self._heard(places, dict.fromkeys(places, "strong"), texts, is_quoted=True, notes=tuple(notes))

    def _said(self, phrase: tuple[str, ...], selected: NDArray[np.bool_]) -> dict[int, list[_Place]]:
        """Return where a phrase is said word for word, by video; it may begin in one cue and end in another."""
        speech = self._speech
        tracks: NDArray[np.int64] | None = None
        # Words that are in nearly every track tell nothing about which to read.
        for word in {word for word in phrase if word not in STOP_WORDS} or set(phrase):
            windows = self._words.windows_with(word)
            having = np.unique(self._track_of_windows[windows[selected[windows]]])
            tracks = having if tracks is None else np.intersect1d(tracks, having)
        found = dict[int, list[_Place]]()
        for track in [] if tracks is None else tracks.tolist():
            begin, end = speech.track_offsets[track : track + 2].tolist()
            texts = speech.cue_texts(begin, end)
            if not (joined := "\n".join(texts)).isascii():
                texts = [fold(text) for text in texts]
                joined = "\n".join(texts)
            matches = find_phrase(phrase, fold(joined) if joined.isascii() else joined)
            if matches:
                edges = np.cumsum([0, *(len(text) + 1 for text in texts)])
                spans = np.array(matches) - (0, 1)
                first, last = (np.searchsorted(edges, side, side="right") - 1 for side in spans.T)
                found.setdefault(int(self._video_of_tracks[track]), []).extend(
                    _Place(begin + a, begin + b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)
                )
        return found

    def _heard(
        self,
        places: Mapping[int, Sequence[tuple[_Place, float]]],
        sure: Mapping[int, str],
        texts: tuple[str, ...],
        *,
        is_quoted: bool = False,
        notes: tuple[str, ...] = (),
    ) -> Heard:
        # If all score the same, those that say it more often come first.
        best = sorted(
            places, key=lambda video: (-places[video][0][1], -len(places[video]) if is_quoted else 0, video)
        )
        return Heard(
            {video: (places[video][0][1], sure[video]) for video in best},
            is_quoted,
            notes,
            places,
            self,
            texts,
        )

    def _counted_windows(self, counted: NDArray[np.bool_], language: str | None) -> NDArray[np.bool_]:
        """Return `(W,)`, the windows of some videos in a language."""
        tracks = (self._video_of_tracks >= 0) & counted[self._video_of_tracks]
        if language is not None:
            asked = language.lower().replace("_", "-")
            held = [each == asked or each.startswith(f"{asked}-") for each in self._speech.languages]
            if not any(held):
                known = ", ".join(self.languages) or "none that is named"
                raise InputError(f"nothing is said in the language {language!r} - expected one of {known}")
            tracks &= np.array(held)
        return tracks[self._track_of_windows]

    @cached_property
    def _track_of_windows(self) -> NDArray[np.int64]:
        return self._speech.track_of_windows()

    @cached_property
    def _video_of_tracks(self) -> NDArray[np.int64]:
        """`(S,)` rows of the catalog, -1 for a video that the index no longer has."""
        rows = self._catalog.live_rows
        return np.array([rows.get(video_id, -1) for video_id in self._speech.video_ids], np.int64)

    @cached_property
    def _video_of_windows(self) -> NDArray[np.int64]:
        return self._video_of_tracks[self._track_of_windows]

    @cached_property
    def _pieces(self) -> list[Piece]:
        return cut_into_pieces(self._speech.window_embeddings, 0)

    @cached_property
    def _background(self) -> NDArray[np.float32]:
        """`(n, D)` of windows, always the same."""
        rows = np.arange(self._speech.num_windows)
        if len(rows) > SAMPLE_ROWS:
            rows = np.sort(np.random.default_rng(0).choice(len(rows), SAMPLE_ROWS, replace=False))
        background: NDArray[np.float32] = self._speech.window_embeddings[rows].astype(np.float32)
        return background


def _confidence(words: float, by_meaning: str) -> str:
    if words >= STRONG_WORDS:
        return "strong"
    return "fair" if words >= FAIR_WORDS and by_meaning == "weak" else by_meaning


def _overlap(line: Line, other: Line) -> bool:
    if line.begin_seconds is None or line.end_seconds is None:
        return line.text == other.text
    if other.begin_seconds is None or other.end_seconds is None:
        return False
    return line.begin_seconds < other.end_seconds and other.begin_seconds < line.end_seconds
