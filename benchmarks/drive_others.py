"""Times another tool's own function; `extract_others.py` runs it in the tool's environment.

Nothing of clip-video-encode is patched: it takes local weights where it is told a path. It reads up to 200 videos
before the first is encoded, and starts 12 processes that prepare images for every such block.

dinotool is patched: what loads a model from a hub gives the local ViT-B/32 with open_clip's own transform, and
only once, not for every video; and where dinotool would take every frame of a video, it is shown every n-th, each
read as it reads them, by a seek.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import shared

MODEL = "hf-hub:timm/vit_base_patch32_clip_224.openai"


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    out = Path(request["out"])
    encode = {"clip-video-encode": clip_video_encode, "dinotool": dinotool}[request["tool"]](request, out)
    start = shared.cost_of(lambda: encode(request["lead"], "lead"))
    # The lead-in comes last: files are named by position, and those of the clips are compared.
    cost = shared.cost_of(lambda: encode([*request["clips"], *request["lead"]], "")) - start
    if request["tool"] == "dinotool":
        save_as_numpy(out)
    for path in out.glob("*.npy"):
        if int(path.stem) >= len(request["clips"]):
            path.unlink()
    measured = {"wall_seconds": cost.wall_seconds, "cpu_seconds": cost.cpu_seconds}
    (out / "measured.json").write_text(json.dumps(measured), "utf-8")


def clip_video_encode(request: dict[str, Any], out: Path) -> Callable[[Sequence[str], str], None]:
    from clip_video_encode import clip_video_encode

    def encode(paths: Sequence[str], prefix: str) -> None:
        # Two workers read, one a core, as two do for svb.
        every_nth, weights = request["every_nth"], request["weights"]
        clip_video_encode(paths, str(out), take_every_nth=every_nth, frame_workers=2, pretrained=weights)

    return encode


def dinotool(request: dict[str, Any], out: Path) -> Callable[[Sequence[str], str], None]:
    import open_clip
    from dinotool import cli, data

    every_nth = request["every_nth"]

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

    def encode(paths: Sequence[str], prefix: str) -> None:
        for number, path in enumerate(paths):
            options = {"model_name": MODEL, "batch_size": request["batch_size"], "save_features": "frame"}
            cli.DinotoolProcessor(
                cli.DinotoolConfig(path, str(out / f"{prefix}{number}"), **options, no_vis=True)
            ).run()

    return encode


def save_as_numpy(out: Path) -> None:
    import numpy as np
    import pandas as pd

    for folder in out.glob("[0-9]*.parquet"):
        rows = pd.concat([pd.read_parquet(part) for part in folder.glob("part.*.parquet")]).sort_index()
        np.save(out / f"{folder.stem}.npy", rows.to_numpy(np.float32))


if __name__ == "__main__":
    main()
