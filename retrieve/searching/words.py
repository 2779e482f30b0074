"""Finds what is said by its words: SQLite's full-text search over the windows of an index's speech.

cache/words-<key>.sqlite   an FTS5 table without content, a row a window; made again from the speech if it is
                           missing or damaged. The key is that of the speech.

Words are stemmed (Porter's rules, made for English) and compared without case and accents. A query may hold words,
beginnings of stems (`budg*`) and "quoted phrases"; all else in it, such as the operators of FTS5, is words.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from svb.data.publish import ASIDE_PREFIX, published_file
from svb.retrieve.stored.cues import Speech

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOKENIZER = "porter unicode61"
# BM25 as FTS5 computes it: its least weight of a word.
LEAST_IDF = 1e-6
_STOP_WORDS = """
a an and are as at be been but by can could did do does for from had has have he her him his how i if in into is
it its me my no not of on or our she should so some than that the their them then there they this to us was we
were what when where which who will with would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

# Scripts without spaces: each letter is a word of its own.
_SINGLE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_SINGLE}]|(?:(?![{_SINGLE}])[^\W_]|[\u0300-\u036f])+")
_ASCII_TOKEN = re.compile("[a-z0-9]+")
_QUOTES = str.maketrans(dict.fromkeys("“”„‟«»", '"'))
_MARKS = re.compile("[\u0300-\u036f]")


@dataclass(frozen=True)
class Term:
    """Words that are looked for next to each other; if `is_prefix`, the last one is only a beginning."""

    words: tuple[str, ...]
    is_prefix: bool = False

    @property
    def match(self) -> str:
        """Return it in the language of FTS5."""
        return f'"{" ".join(self.words)}"{" *" if self.is_prefix else ""}'


@dataclass(frozen=True)
class Wanted:
    """What a query asks for: phrases that must be said word for word, and terms of which more is better."""

    phrases: tuple[tuple[str, ...], ...]
    terms: tuple[Term, ...]

    @property
    def match(self) -> str:
        """Return all of it in the language of FTS5, any of which matches."""
        return " OR ".join(term.match for term in (*map(Term, self.phrases), *self.terms))


def wanted_of(texts: Iterable[str]) -> Wanted:
    """Return what texts ask for; stop words count only if there is nothing else."""
    phrases, terms = list[tuple[str, ...]](), list[Term]()
    for text in texts:
        parts = text.translate(_QUOTES).split('"')
        # Every second part is quoted, except what follows a quote that is not closed.
        for number, part in enumerate(parts):
            if number % 2 and number < len(parts) - 1:
                phrase = tuple(word for word, _, _ in tokens_of(part))
                phrases += [phrase] if phrase else []
            else:
                terms += [term for chunk in part.split() for term in _terms_of(chunk)]
    telling = [term for term in terms if not (len(term.words) == 1 and term.words[0] in STOP_WORDS)]
    return Wanted(tuple(dict.fromkeys(phrases)), tuple(dict.fromkeys(telling or (() if phrases else terms))))


def _terms_of(chunk: str) -> list[Term]:
    words = tuple(word for word, _, _ in tokens_of(chunk))
    if len(words) > 1 and re.match(f"[{_SINGLE}]", words[0]):
        return [Term(words[begin : begin + 2]) for begin in range(len(words) - 1)]
    return [Term(words, chunk.rstrip('.,;:!?)"').endswith("*"))] if words else []


def tokens_of(text: str) -> list[tuple[str, int, int]]:
    """Return the words of a text as they are compared, and where each begins and ends."""
    found = ((fold(match[0]), *match.span()) for match in _TOKEN.finditer(text))
    return [token for token in found if token[0]]


def _words_of(text: str) -> str:
    if text.isascii():  # ten times as fast
        return " ".join(_ASCII_TOKEN.findall(text.lower()))
    return " ".join(word for word, _, _ in tokens_of(text))


def fold(text: str) -> str:
    """Return a text without case and accents."""
    if text.isascii():
        return text.lower()
    return _MARKS.sub("", unicodedata.normalize("NFKD", text)).casefold()


def find_phrase(phrase: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Return where words stand next to each other in a folded text, as half-open intervals."""
    is_single = [bool(re.match(f"[{_SINGLE}]", word)) for word in phrase]
    pattern = re.escape(phrase[0])
    for number, word in enumerate(phrase[1:], start=1):
        pattern += r"[\W_]*" if is_single[number] or is_single[number - 1] else r"[\W_]+"
        pattern += re.escape(word)
    pattern += "" if is_single[-1] else r"(?![^\W_])"
    spans = [match.span() for match in re.finditer(pattern, text)]
    # A look behind at the pattern's begin would take many times as long.
    return [(a, b) for a, b in spans if is_single[0] or not a or not text[a - 1].isalnum()]


@dataclass(frozen=True)
class WordScores:
    """The W windows in which any of some terms is said.

    The weight of a term is about minus the logarithm of the share of windows that say it. So the weight of several
    is that of the share that would say all of them if each were said independently.

    Attributes:
        windows: `(W,)`, ascending.
        bm25: `(W,)`, divided by that of an average window that says every term once.
        shares: `(W,)`, the share of the terms that are said, by weight.
        weight: The weight of all terms together.
    """

    windows: NDArray[np.int64]
    bm25: NDArray[np.float64]
    shares: NDArray[np.float64]
    weight: float


class WordIndex:
    """The words of an index's speech. Threads may share it.

    Args:
        index: The index's folder.
        key: The key of its speech.
        speech: What is said.
    """

    def __init__(self, index: Path, key: str, speech: Speech) -> None:
        self._path = words_path(index, key)
        self._speech = speech
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def scores(self, terms: Sequence[Term]) -> WordScores:
        """Return in which windows any term is said, and how much of the terms."""
        found = [self._of_term(term) for term in terms]
        N = self._speech.num_windows
        # BM25's usual weight of a word, which is above zero however common it is.
        weights = [np.log1p((N - len(rows) + 0.5) / (len(rows) + 0.5)) for rows, _ in found]
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)])
        parts = [weight * frequency for weight, (_, frequency) in zip(weights, found, strict=True)]
        windows, place = np.unique(rows, return_inverse=True)
        scores = np.bincount(place, np.concatenate([np.empty(0), *parts]), len(windows))
        shares = np.bincount(place, np.repeat(weights, [len(rows) for rows, _ in found]), len(windows))
        total = max(sum(weights), LEAST_IDF)
        return WordScores(windows, scores / total, shares / total, float(total))

    def windows_with(self, word: str) -> NDArray[np.int64]:
        """Return the windows in which a word is said in any of its forms, ascending."""
        return np.sort(self._of_term(Term((word,)))[0])

    def _of_term(self, term: Term) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the windows that hold a term, and how often they say it: 1 is once in an average window."""
        held = self._ask(
            lambda database: database.execute(
                "SELECT rowid, bm25(words) FROM words WHERE words MATCH ?", [term.match]
            ).fetchall()
        )
        table = np.array(held, np.float64).reshape(-1, 2)
        N, n = self._speech.num_windows, len(table)
        idf = max(np.log((N - n + 0.5) / (n + 0.5)), LEAST_IDF) if n else 1.0
        return table[:, 0].astype(np.int64), -table[:, 1] / idf

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Return the answer to a question; a damaged file is made again once."""
        with self._lock:
            try:
                self._database = self._database or _opened(self._path, self._speech)
                return question(self._database)
            except sqlite3.DatabaseError as error:
                logger.warning(f"{self._path} is damaged ({error}): making it again")
                with contextlib.suppress(sqlite3.Error):
                    if self._database is not None:
                        self._database.close()
                self._database = _made_again(self._path, self._speech)
                return question(self._database)


def words_path(index: Path, key: str) -> Path:
    """Return where the words of a speech are kept."""
    return index / "cache" / f"words-{key}.sqlite"


def keep_words(index: Path, key: str, speech: Speech) -> None:
    """Make the words of a speech, unless they are there, and remove those of an earlier one; for the one writer."""
    path = words_path(index, key)
    if not path.is_file():
        _write(path, speech)
    for old in (*path.parent.glob("words-*.sqlite"), *path.parent.glob(f"{ASIDE_PREFIX}*.sqlite")):
        if old != path:
            old.unlink(missing_ok=True)


def words_problems(index: Path, key: str, speech: Speech) -> list[str]:
    """Return what is wrong with the words of a speech; reads all of them."""
    path = words_path(index, key)
    if not path.is_file():
        return []  # the next search makes them
    try:
        with contextlib.closing(_connected(path)) as database:
            (found,) = database.execute("PRAGMA integrity_check").fetchone()
            rows = _num_rows(database)
    except sqlite3.Error as error:
        found, rows = str(error), -1
    if found != "ok" or rows != speech.num_windows:
        return [
            f"{path} is damaged ({found}, {rows} of {speech.num_windows} windows) - remove it: it is made again"
        ]
    return []


def _opened(path: Path, speech: Speech) -> sqlite3.Connection:
    """Open the words; make them if they are missing or not those of the speech."""
    if path.is_file():
        database = _connected(path)
        if _num_rows(database) == speech.num_windows:
            return database
        database.close()
    return _made_again(path, speech)


def _made_again(path: Path, speech: Speech) -> sqlite3.Connection:
    try:
        _write(path, speech)
        return _connected(path)
    except OSError:  # the folder is read-only, or the disk is full
        database = sqlite3.connect(":memory:", check_same_thread=False)
        _fill(database, speech)
        return database


def _connected(path: Path) -> sqlite3.Connection:
    # Nobody writes to a file that has this name.
    uri = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    return sqlite3.connect(uri, uri=True, check_same_thread=False)


def _num_rows(database: sqlite3.Connection) -> int:
    rows = database.execute("SELECT max(windows) FROM made").fetchone()[0]
    return -1 if rows is None else int(rows)


def _write(path: Path, speech: Speech) -> None:
    with published_file(path) as aside, contextlib.closing(sqlite3.connect(aside)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        _fill(database, speech)


def _fill(database: sqlite3.Connection, speech: Speech) -> None:
    database.execute(f"CREATE VIRTUAL TABLE words USING fts5(text, content = '', tokenize = '{TOKENIZER}')")
    rows = enumerate(map(_words_of, speech.window_texts()))
    database.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", rows)
    database.execute("INSERT INTO words (words) VALUES ('optimize')")
    database.execute("CREATE TABLE made (windows INTEGER)")
    database.execute("INSERT INTO made VALUES (?)", [speech.num_windows])
    database.commit()


def marked(texts: Sequence[str], wanted: Wanted) -> list[tuple[tuple[int, int], ...]]:
    """Return where in each text the words that a query asks for are said, in any of their forms."""
    tokens = [tokens_of(text) for text in texts]
    spans: list[tuple[tuple[int, int], ...]] = [()] * len(texts)
    if not wanted.match:
        return spans
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"CREATE VIRTUAL TABLE shown USING fts5(text, tokenize = '{TOKENIZER}')")
        rows = enumerate(" ".join(word for word, _, _ in of_text) for of_text in tokens)
        database.executemany("INSERT INTO shown (rowid, text) VALUES (?, ?)", rows)
        found = database.execute(
            "SELECT rowid, highlight(shown, 0, '<', '>') FROM shown WHERE shown MATCH ?", [wanted.match]
        ).fetchall()
    for row, highlighted in found:
        inside, ours = False, list[tuple[int, int]]()
        for word, (_, begin, end) in zip(highlighted.split(" "), tokens[row], strict=True):
            inside |= word.startswith("<")
            if inside:
                ours.append((begin, end))
            inside &= not word.endswith(">")
        spans[row] = tuple(ours)
    return spans
