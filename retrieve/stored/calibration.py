"""How sure an answer to a text is: a rule that `svb index` fits and measures with captions of the index's own videos.

confidence/<key>/known.npy   (K, D) float16, captions that the model was trained with

The chance that a video is right is a logistic function of its score, of how close the query comes to a known
caption, and of how far the score is below the best of the index. The score alone tells little: a model scores what it
does not know nearly as high. How many others fit as well does not count, so common things may be strong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.retrieve.answer import CONFIDENCES
from svb.retrieve.stored.manifest import part_folder, publish_part
from svb.retrieve.stored.segment import open_array, require_sizes

# From this chance on an answer is strong, or fair.
LEAST_CHANCES = {"strong": 0.7, "fair": 0.35}
KNOWN = "known.npy"


@dataclass(frozen=True)
class Rule:
    """The chance that a video is right: 1 / (1 + exp(-(bias + score * s + known * c - gap * g))).

    Attributes:
        bias: See above.
        score: Weight of s, the video's score.
        known: Weight of c, the highest cosine of the query with a known caption.
        gap: Weight of g, by how much the best window of the index scores higher than the video; at least 0.
    """

    bias: float
    score: float
    known: float
    gap: float

    def chances(
        self, scores: NDArray[np.floating], closeness: NDArray[np.floating], gaps: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return the chances that `(n,)` videos are right."""
        logits = self.bias + self.score * scores + self.known * closeness - self.gap * gaps
        chances: NDArray[np.float64] = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
        return chances


@dataclass(frozen=True)
class Calibration:
    """A rule and the captions that it compares a query with.

    Attributes:
        rule: The rule.
        known_embeddings: `(K, D)` float16; there may be none.
    """

    rule: Rule
    known_embeddings: NDArray[np.float16]

    def closeness(self, queries: Sequence[NDArray[np.float32]]) -> float:
        """Return the highest cosine with a known caption, the mean over a request's texts, `(D,)` each."""
        if not len(self._known):
            return 0.0
        return float(np.mean([(self._known @ query).max() for query in queries]))

    def confidence(self, score: float, closeness: float, best_score: float) -> str:
        """Return the confidence of a video, one of `svb.retrieve.answer.CONFIDENCES`.

        Args:
            score: The video's.
            closeness: As `closeness` returns it.
            best_score: The highest of the index, or of a sample of it.
        """
        gap = max(0.0, best_score - score)
        return level_of(float(self.rule.chances(*(np.array([value]) for value in (score, closeness, gap)))[0]))

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
        measured: What it is worth, for people: `captions`, `auc`, `score_auc`, `error` and `levels`.
    """
    entry = publish_part(
        out, "confidence", lambda folder: np.save(folder / KNOWN, calibration.known_embeddings.astype(np.float16))
    )
    return {**entry, "rule": vars(calibration.rule), **measured}


def open_calibration(folder: Path, manifest: Mapping[str, Any]) -> Calibration | None:
    """Map the calibration of an index; None if it has none.

    Raises:
        StoreError: Its file is missing, or is not what was written as far as its size and header tell.
    """
    for entry in manifest.get("confidence", []):
        path = part_folder(folder, "confidence", entry)
        try:
            require_sizes(path, entry["sizes"])
            known = open_array(path / KNOWN)
            if known.ndim != 2 or known.shape[1] != manifest["embedding_size"]:
                raise ValueError(f"known captions of {known.shape}")
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(
                f"{path} is damaged ({error}) - run `svb index` again, which makes it again"
            ) from error
        return Calibration(Rule(**entry["rule"]), known)
    return None


def meanings_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what each confidence was measured to mean, for people; empty for an index without a calibration."""
    return {
        level: f"right in {100 * held['right']:.0f} % of {held['answers']:,} answers to "
        f"{entry['captions']:,} captions"
        if held["answers"]
        else f"none of {entry['captions']:,} captions had such an answer"
        for entry in manifest.get("confidence", [])
        for level, held in entry["levels"].items()
    }
