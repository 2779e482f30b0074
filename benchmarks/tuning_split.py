"""Put training videos aside for tuning: `python benchmarks/tuning_split.py captions.csv tuning.csv`.

Of a caption table with a train and a val split it keeps the training videos, 500 of them drawn by a fixed seed as
val. What is tuned on that table has never seen the real val split, on which results are reported.
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
    table.to_csv(Path(sys.argv[2]), index=False)


if __name__ == "__main__":
    main()
