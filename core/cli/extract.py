"""`svb extract`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from svb.cli.output import Meter, print_json, print_table, say
from svb.config import default_path

if TYPE_CHECKING:
    from svb.extract.sampling import Sampling


@click.command()
@click.argument("videos", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The feature store. [default: ./features]")
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    help="family:model[/weights]; repeat it for several, which share one decode. "
    "[default: open_clip:ViT-B-32/laion2b_s34b_b79k]",
)
@click.option("--fps", type=float, help="Frames a second, on the file's own clock. [default: 1]")
@click.option("--frames", type=int, help="Instead of --fps: this many frames, spread evenly.")
@click.option(
    "--decoder",
    default="pyav",
    type=click.Choice(["pyav", "ffmpeg"]),
    show_default=True,
    help="pyav decodes in the worker and hands over to ffmpeg what it cannot read.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="auto asks the device what is fast on it.",
)
@click.option("--workers", default=os.cpu_count() or 1, help="Decode processes. [default: one a core]")
@click.option("--batch-size", default=32, show_default=True, help="Frames, or clips of frames, in a batch.")
@click.option(
    "--stall-seconds", default=120.0, show_default=True, help="Give up on a video that gives nothing for so long."
)
@click.option("--retry-failed", is_flag=True, help="Take up again videos that failed.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def extract(
    videos: tuple[Path, ...],
    out: Path | None,
    backbones: tuple[str, ...],
    fps: float | None,
    frames: int | None,
    decoder: str,
    device: str,
    precision: str,
    workers: int,
    batch_size: int,
    stall_seconds: float,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Extract frozen features of VIDEOS into a feature store.

    VIDEOS are folders (walked recursively), video files, or lists of them (.txt, .csv, .parquet). Run it again
    to go on where it stopped: what is in the store and has not changed is not decoded again.

    \b
    svb extract clips/ -o features/ --backbone offline:efficientnet-lite0
    """
    from svb.data.feature_store import FeatureStore
    from svb.extract import run
    from svb.extract.backbones import DEFAULT_BACKBONE
    from svb.extract.sampling import Sampling

    sampling = Sampling(fps=1.0) if fps is None and frames is None else Sampling(fps=fps, frames=frames)
    out = out or default_path("SVB_FEATURES", "features")
    chosen = backbones or (DEFAULT_BACKBONE,)
    say(f"extracting into {out} with {', '.join(chosen)}, {_describe(sampling)}")
    meter = Meter("videos")
    try:
        run.extract(
            videos,
            out,
            backbones=chosen,
            sampling=sampling,
            decoder=decoder,
            device=device,
            precision=precision,
            num_workers=workers,
            batch_size=batch_size,
            stall_seconds=stall_seconds,
            retry_failed=retry_failed,
            on_progress=lambda progress: meter.update(
                progress.videos_done, progress.num_videos, {"frames": progress.frames_done}
            ),
            on_message=say,
        )
    finally:
        meter.close()
    counts = FeatureStore(out).status_counts()
    if as_json:
        print_json({"store": str(out), "videos": dict(counts)})
        return
    print_table(["status", "videos"], [[status, str(count)] for status, count in counts.most_common()])
    if set(counts) - {"ok"}:
        say(f"`svb info {out} --failures` says what was wrong with the others")


def _describe(sampling: Sampling) -> str:
    return f"--fps {sampling.fps:g}" if sampling.fps else f"--frames {sampling.frames}"
