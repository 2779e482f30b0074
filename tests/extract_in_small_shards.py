"""A program that test_chaos kills: `svb extract` with a shard after every two videos.

python extract_in_small_shards.py VIDEOS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from svb.data import feature_store_writer
from svb.extract.backbones import FAMILIES
from svb.extract.run import extract

if __name__ == "__main__":
    feature_store_writer.SHARD_VIDEOS = 2
    FAMILIES["toy"] = "toy_backbone"
    extract(
        [Path(sys.argv[1])],
        Path(sys.argv[2]),
        backbones=("toy:frames", "toy:clips"),
        precision="float32",
        num_workers=2,
        batch_size=4,
    )
