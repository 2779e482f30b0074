"""How sure an answer to a text is: a rule that `svb index` fits and measures with captions of its own videos.

confidence/<key>/words.json   how many training captions there are, and how many of them hold each content word
confidence/<key>/known.npy    (K, D) float16, embeddings of some training captions, or of the random texts

The chance that a video is right is a logistic function of its score, of how well the model knows the query, and
of how far the score is below the best of the index. The score alone tells little: a model scores what it has
never heard of nearly as high. It knows a query whose words are common in the captions that it learned from, and
that is close to one of them. How many others fit as well does not count against a video, and common things have
common words.

An index without such captions is asked random texts instead. Its rule knows only the score: an answer is strong if
it scores higher than the best answers to 99 % of these texts, and fair if it does so for 90 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.config import canonical_json
from svb.data.caption_words import content_words
from svb.errors import StoreError
from svb.retrieve.answer import CONFIDENCES
from svb.retrieve.stored.manifest import part_folder, publish_part
from svb.retrieve.stored.segment import open_array, require_sizes

# The chance from which an answer is strong, or fair.
LEAST_CHANCES = {"strong": 0.7, "fair": 0.3}
WORDS, KNOWN = "words.json", "known.npy"
# What an index can be calibrated with: an index that knew of fewer is calibrated anew.
RULES = ["captions", "random texts"]
# An answer of this level scores higher than the best answers to this share of random texts.
RANDOM_SHARES = {"strong": 0.99, "fair": 0.9}
_PLACES = {
    **{level: f"higher than the best answers to {100 * share:.0f} %" for level, share in RANDOM_SHARES.items()},
    "weak": f"no higher than the best answers to {100 * RANDOM_SHARES['fair']:.0f} %",
}
# A word that is in no caption counts as if it were in so many.
UNHEARD = 0.3


@dataclass(frozen=True)
class Rule:
    """The chance that a video is right: 1 / (1 + exp(-(bias + score * s + words * w + known * c - gap * g))).

    Attributes:
        bias: See above.
        score: Weight of s, the video's score; at least 0.
        words: Weight of w, how common the query's words are; at least 0.
        known: Weight of c, the highest cosine of the query with a training caption; at least 0.
        gap: Weight of g, by how much the best window of the index scores higher than the video; at least 0.
    """

    bias: float
    score: float
    words: float
    known: float
    gap: float

    def chances(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the chances that `(n,)` videos are right, of `(n, 4)` features: s, w, c and g."""
        logits = self.bias + features @ [self.score, self.words, self.known, -self.gap]
        chances: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
        return chances


@dataclass(frozen=True)
class Calibration:
    """A rule, and what it knows of the captions that the model was trained with.

    Attributes:
        rule: The rule.
        num_captions: How many captions there are; 0 if the rule comes from random texts.
        counts: How many of them hold each content word.
        known_embeddings: `(K, D)` float16 of some of them, or of the random texts; there may be none.
    """

    rule: Rule
    num_captions: int
    counts: Mapping[str, int]
    known_embeddings: NDArray[np.float16]

    def query(self, texts: Sequence[str], embeddings: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
        """Return how well the model knows a query: w and c of its texts, the mean where there are several."""
        knows = self.num_captions and len(self._known)
        closeness = [float((self._known @ each).max()) for each in embeddings] if knows else [0.0]
        return self.commonness(texts), sum(closeness) / len(closeness)

    def commonness(self, texts: Sequence[str]) -> float:
        """Return how common the content words of texts are: the mean log10 of the share of captions with a word."""
        shares = [self.counts.get(word, 0) for text in texts for word in sorted(content_words(text))] or [0]
        logs = [math.log10((count + UNHEARD) / (self.num_captions + 1)) for count in shares]
        return sum(logs) / len(logs)

    def confidence(self, score: float, query: tuple[float, float], best_score: float) -> str:
        """Return the confidence of a video, one of `svb.retrieve.answer.CONFIDENCES`.

        Args:
            score: The video's.
            query: The facts that `query` returns.
            best_score: The highest score of the index, or of a sample of it.
        """
        features = np.array([[score, *query, max(0.0, best_score - score)]])
        return level_of(float(self.rule.chances(features)[0]))

    @cached_property
    def _known(self) -> NDArray[np.float32]:
        return self.known_embeddings.astype(np.float32)


def level_of(chance: float) -> str:
    """Return the confidence of a video that is right by this chance."""
    return next((level for level, least in LEAST_CHANCES.items() if chance >= least), CONFIDENCES[-1])


def publish_calibration(out: Path, calibration: Calibration, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Write a calibration into an index and return its entry for the manifest, under `confidence`.

    Args:
        out: The index's folder.
        calibration: What to write.
        measured: What it is worth, for people: `captions`, `auc`, `score_auc`, `error` and `levels`; for a rule of
            random texts `random_texts`, how many there are, and `made_for`, the model's fingerprint.
    """
    held = canonical_json({"captions": calibration.num_captions, "counts": dict(calibration.counts)})

    def write(folder: Path) -> None:
        (folder / WORDS).write_text(held, "utf-8")
        np.save(folder / KNOWN, calibration.known_embeddings)

    entry = publish_part(out, "confidence", write)
    return {**entry, "rule": vars(calibration.rule), **measured}


def open_calibration(folder: Path, manifest: Mapping[str, Any]) -> Calibration | None:
    """Read the calibration of an index; None if it has none.

    Raises:
        StoreError: A file of it is missing or damaged.
    """
    for entry in manifest.get("confidence", []):
        path = part_folder(folder, "confidence", entry)
        try:
            require_sizes(path, entry["sizes"])
            held = json.loads((path / WORDS).read_text("utf-8"))
            known = open_array(path / KNOWN)
            if known.ndim != 2 or known.dtype != np.float16 or known.shape[1] != manifest["embedding_size"]:
                raise ValueError(f"{KNOWN} holds {known.shape} {known.dtype}")
            return Calibration(Rule(**entry["rule"]), held["captions"], held["counts"], known)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is damaged ({error}) - run `svb index` again, which makes it again"
            ) from error
    return None


def meanings_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what each confidence was measured to mean, for people; empty for an index without a calibration."""
    for entry in manifest.get("confidence", []):
        if "random_texts" in entry:
            return {
                level: f"scores {_PLACES[level]} of {entry['random_texts']} random texts" for level in CONFIDENCES
            }
        return {
            level: f"right in {100 * held['right']:.0f} % of {held['answers']:,} first answers, measured with "
            f"{entry['captions']:,} captions"
            if held["answers"]
            else f"no first answer to {entry['captions']:,} captions was"
            for level, held in entry["levels"].items()
        }
    return {}
