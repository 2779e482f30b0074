"""Times clip-video-encode's own function; `extract_others.py` runs it in the tool's environment.

Nothing of it is patched: it takes local weights where it is told a path. It reads up to 200 videos before the
first is encoded, and starts 12 processes that prepare images for every such block.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from resources_used import cpu_seconds


def main() -> None:
    from clip_video_encode import clip_video_encode

    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    out = Path(request["out"])

    def encode(paths: list[str]) -> tuple[float, float]:
        began, cpu_began = time.perf_counter(), cpu_seconds()
        # Two workers read, one a core, as two do for svb.
        clip_video_encode(
            paths, str(out), take_every_nth=request["every_nth"], frame_workers=2, pretrained=request["weights"]
        )
        return time.perf_counter() - began, cpu_seconds() - cpu_began

    # The lead-in comes last: files are named by position, and those of the clips are compared.
    start = encode(request["lead"])
    both = encode([*request["clips"], *request["lead"]])
    costs = {"wall_seconds": both[0] - start[0], "cpu_seconds": both[1] - start[1], "start_seconds": start[0]}
    (out / "measured.json").write_text(json.dumps(costs), "utf-8")


if __name__ == "__main__":
    main()
