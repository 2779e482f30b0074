"""LSMDC, the Large Scale Movie Description Challenge (Rohrbach et al., IJCV 2017): clips of films with sentences.

The protocol `challenge-1000` trains and chooses on the files of 2016 and tests on the 1,000 public clips of its
retrieval track, each with one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

from svb.data.datasets.official import Annotations, Document, KnownSplit, OfficialFile, read_a_file_each

_ORIGIN = "the Max Planck Institute for Informatics gives access to LSMDC 2016 on request"
FILES = {
    "train": OfficialFile(("LSMDC16_annos_training.csv",), _ORIGIN),
    "val": OfficialFile(("LSMDC16_annos_val.csv",), _ORIGIN),
    "test": OfficialFile(("LSMDC16_challenge_1000_publictect.csv",), _ORIGIN),
}
PROTOCOLS = {"challenge-1000": {"train": KnownSplit(), "val": KnownSplit(), "test": KnownSplit(1000)}}
_FIELDS = 6  # clip, start and end aligned, start and end extracted, sentence


def read(annotations: Annotations, protocol: str, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return each split's clips with their captions; see `svb.data.datasets.Dataset.read`."""
    return read_a_file_each(annotations, FILES, PROTOCOLS[protocol], splits, _captions)


def other_names(split: str, video_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return none: the clips' files have the names of the annotations, in a folder for each film."""
    return {}


def _captions(document: Document) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for line in document.lines():
        fields = line.split("\t")
        if len(fields) != _FIELDS:
            raise document.error(
                f"the line {line[:60]!r} has {len(fields)} fields between tabs, expected {_FIELDS}"
            )
        captions.setdefault(fields[0], []).append(fields[-1])  # some clips have several sentences
    return captions
