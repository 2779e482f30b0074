"""Names of indexes.py that tests of searching use."""

from indexes import clustered, make_segment, publish_segment, random_segment, units

__all__ = ["clustered", "make_segment", "publish_segment", "random_segment", "units"]
