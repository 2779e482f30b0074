"""The losses, one file each."""

from __future__ import annotations

from svb.train.losses.cross_captioning import cross_captioning, embedding_distance
from svb.train.losses.info_nce import info_nce
from svb.train.losses.max_margin import max_margin

__all__ = ["cross_captioning", "embedding_distance", "info_nce", "max_margin"]
