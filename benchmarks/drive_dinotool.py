"""Times dinotool's own video path; `extract_others.py` runs it in the tool's environment.

Patched: what loads a model from a hub gives the local ViT-B/32 with open_clip's own transform, and only once, not
for every video; and where dinotool would take every frame of a video, it is shown every n-th, each read as it
reads them, by a seek.
"""

from __future__ import annotations

import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from resources_used import cpu_seconds

MODEL = "hf-hub:timm/vit_base_patch32_clip_224.openai"


def main() -> None:
    import open_clip
    import pandas as pd
    from dinotool import cli, data

    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    out, every_nth = Path(request["out"]), request["every_nth"]

    @cache
    def local_model() -> tuple[Any, Any]:
        model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=request["weights"])
        return model, transform

    def create(name: str, return_transform: bool = True) -> Any:
        return local_model() if return_transform else local_model()[0]

    open_clip.create_model_from_pretrained = create
    read_frame = data.VideoFile.__getitem__
    data.VideoFile.__getitem__ = lambda video, index: read_frame(video, int(index) * every_nth)
    data.VideoFile.__len__ = lambda video: -(-video.frame_count // every_nth)

    def extract(path: str, name: str) -> None:
        config = cli.DinotoolConfig(
            path,
            str(out / name),
            model_name=MODEL,
            batch_size=request["batch_size"],
            save_features="frame",
            no_vis=True,
        )
        cli.DinotoolProcessor(config).run()

    began = time.perf_counter()
    extract(request["lead"][0], "lead")
    began, start, cpu_began = time.perf_counter(), time.perf_counter() - began, cpu_seconds()
    for number, path in enumerate(request["clips"]):
        extract(path, f"clip{number}")
    costs = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu_began}
    (out / "measured.json").write_text(json.dumps({**costs, "start_seconds": start}), "utf-8")
    save_as_numpy(pd, out, len(request["clips"]))


def save_as_numpy(pd: Any, out: Path, num_clips: int) -> None:
    import numpy as np

    for number in range(num_clips):
        parts = list((out / f"clip{number}.parquet").glob("part.*.parquet"))
        rows = pd.concat([pd.read_parquet(part) for part in parts]).sort_index()
        np.save(out / f"{number}.npy", rows.to_numpy(np.float32))


if __name__ == "__main__":
    main()
