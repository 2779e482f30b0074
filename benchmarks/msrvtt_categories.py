"""Add MSR-VTT's categories: `python benchmarks/msrvtt_categories.py captions.csv videodatainfo.json out.csv`.

The official annotation file puts each video into one of 20 categories (music, sports, cooking, ...). They become
the column `group` of the caption table, so that `--relevance group` measures what no loss has seen: neither the
words of the captions nor their features made these groups.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd


def main() -> None:
    table_path, annotations, out = map(Path, sys.argv[1:])
    category = {video["video_id"]: video["category"] for video in json.loads(annotations.read_text())["videos"]}
    table = pd.read_csv(table_path)
    table["group"] = table["video_id"].map(category).map("category {}".format)
    table.to_csv(out, index=False)


if __name__ == "__main__":
    main()
