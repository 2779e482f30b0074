"""What `svb extract` costs beside what it could cost: `python benchmarks/extract.py --json extract.json`.

Parts, each in one run on the same clips, side by side in every round; speeds in videos per second on the clock
and in CPU-seconds per video, those of workers and ffmpeg included:

- `bound`: svb beside the slower of decoding alone (the same workers, frames thrown away) and the backbone alone
  (the same batches from memory, resized and normalised), with one worker and one thread on two cores, and on three
  where there are more. A backbone that costs nothing leaves decoding to decide, EfficientNet-lite0 decides itself;
- `recipe`: the field's own way, ffprobe, ffmpeg and PIL, on the same two cores;
- `others`: clip-video-encode and dinotool, in environments of their own;
- `growth`: 100 to 10,000 tiny videos, a second run with nothing to do, and memory.

Starting (imports, loading the model, starting and ending workers, the first batch) is not counted but given: a run
over lead-in clips alone, which fill a batch in no time, is taken from a run over them and the clips. That was
chosen over the time between the first video done and the last, which takes frames that were decoded ahead as free.

It takes about 20 minutes on two quiet cores; `--quick` less than two, for numbers that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

# Nothing heavy here: a decode worker imports the main module again, and must start as fast as `svb extract`'s.

PARTS = ("bound", "recipe", "others", "growth")
COUNTS = {"short": 16, "medium": 3, "long": 1, "msrvtt": 32}


def main() -> None:
    options = parse_options()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured, tables = measure(Path(folder), options)
    print("Numbers are median (lowest to highest).", *tables, sep="\n\n")
    if options.json:
        minutes = {"minutes": (time.monotonic() - began) / 60}
        everything = {"options": vars(options), "machine": machine(), **minutes, **measured}
        options.json.write_text(json.dumps(everything, indent=2, default=plain) + "\n", "utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="which parts, joined by commas")
    parser.add_argument("--rounds", type=int, default=3)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"clips of the {name} set; 0 leaves it out")
    parser.add_argument("--long-seconds", type=int, default=600, help="length of a clip of the long set")
    parser.add_argument("--long-rounds", type=int, default=1, help="rounds with the long set")
    parser.add_argument("--growth-videos", default="100,1000,10000", help="numbers of videos, joined by commas")
    parser.add_argument("--environments", type=Path, help="where other tools are installed, and kept for next time")
    parser.add_argument("--python310", help="a Python 3.10, where clip-video-encode installs as published")
    parser.add_argument("--folder", type=Path, help="where clips and stores are made and removed again")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    options = parser.parse_args()
    unknown = set(options.part.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))} - expected some of {','.join(PARTS)}")
    if options.short < 1:
        parser.error("--short 0: the recipe and the other tools are measured on the short clips - give at least 1")
    if options.quick:
        tiny = {"rounds": 1, "short": 2, "medium": 0, "msrvtt": 4, "long_seconds": 6, "growth_videos": "20,40"}
        vars(options).update(tiny)
    return options


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return what each part measured, and its table."""
    import extract_bound
    import extract_growth
    import extract_others
    import extract_recipe
    from extract_clips import make_clip_sets, make_lead_ins
    from extract_measure import BATCH_SIZE

    print("making clips", file=sys.stderr)
    counts = {name: getattr(options, name) for name in COUNTS}
    sets = list(make_clip_sets(folder, counts, options.long_seconds))
    lead = make_lead_ins(folder / "lead", 2, BATCH_SIZE)

    def bound() -> list[dict[str, Any]]:
        long = [clips for clips in sets if clips.name.endswith("720p")]
        usual = [clips for clips in sets if clips not in long]
        return [
            *extract_bound.measure_bound(usual, lead, folder, options.rounds),
            *extract_bound.measure_bound(long, lead, folder, options.long_rounds),
        ]

    def others() -> dict[str, Any]:
        environments = options.environments or folder / "environments"
        return extract_others.measure_others(sets[0], lead, folder, environments, options.rounds, options.python310)

    def growth() -> list[dict[str, Any]]:
        numbers = [int(count) for count in options.growth_videos.split(",")]
        return list(extract_growth.measure_growth(folder / "growth", numbers))

    parts: dict[str, tuple[Callable[[], Any], Callable[[Any], str]]] = {
        "bound": (bound, extract_bound.table_of_bound),
        "recipe": (
            lambda: extract_recipe.measure_recipe(sets[0], lead, folder, options.rounds),
            extract_recipe.table_of_recipe,
        ),
        "others": (others, extract_others.table_of_others),
        "growth": (growth, extract_growth.table_of_growth),
    }
    measured = {part: parts[part][0]() for part in PARTS if part in options.part.split(",")}
    return measured, [parts[part][1](found) for part, found in measured.items()]


def plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def machine() -> dict[str, Any]:
    import torch

    return {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
