"""The losses, one file each."""

from __future__ import annotations

from svb.train.losses.cross_captioning import cross_captioning, embedding_distance
from svb.train.losses.info_loob import info_loob
from svb.train.losses.info_nce import info_nce
from svb.train.losses.max_margin import max_margin
from svb.train.losses.relevant_pairs import relevant_pairs
from svb.train.losses.retrieved import retrieved
from svb.train.losses.soft_labels import soft_labels

__all__ = [
    "cross_captioning",
    "embedding_distance",
    "info_loob",
    "info_nce",
    "max_margin",
    "relevant_pairs",
    "retrieved",
    "soft_labels",
]
