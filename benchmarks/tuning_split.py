"""Put training videos aside for tuning: `python benchmarks/tuning_split.py captions.csv tuning.csv [CAPTIONS]`.

Of a caption table with a train and a val split it keeps the training videos, 500 of them drawn by a fixed seed as
val. What is tuned on that table has never seen the real val split, on which results are reported. With a number of
CAPTIONS only so many of each val video are kept, the first ones: graded measures take the square of it in time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

NUM_VIDEOS = 500


def main() -> None:
    table = pd.read_csv(sys.argv[1])
    table = table[table["split"] == "train"]
    videos = np.random.default_rng(7).permutation(sorted(set(table["video_id"])))[:NUM_VIDEOS]
    table.loc[table["video_id"].isin(videos), "split"] = "val"
    if len(sys.argv) > 3:
        place = table.groupby("video_id").cumcount()
        table = table[(table["split"] == "train") | (place < int(sys.argv[3]))]
    table.to_csv(Path(sys.argv[2]), index=False)


if __name__ == "__main__":
    main()
