"""Mean and standard deviation of several runs' metrics: `python benchmarks/spread.py runs/cross-*`.

The last checkpoint of every run is measured, so nothing was chosen by the split that is reported.
"""

import argparse
import statistics
from pathlib import Path

from svb.retrieve.evaluate import evaluate

COLUMNS = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MedR", "v2t/R@1", "v2t/R@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--checkpoint", default="last", choices=["best", "last"])
    options = parser.parse_args()
    results = [evaluate(run, split=options.split, checkpoint=options.checkpoint).metrics for run in options.runs]
    print(f"| {len(results)} runs | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    cells = []
    for column in COLUMNS:
        values = [result[column] for result in results]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}")
    print(f"| {options.runs[0].name.rstrip('0123456789').rstrip('-')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
