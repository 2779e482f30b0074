"""`svb extract`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svb.cli.output import Meter, print_json, print_table, say
from svb.config import default_path
from svb.errors import UsageError

if TYPE_CHECKING:
    from svb.extract.progress import ExtractProgress


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
@click.option("--every-nth", type=int, help="Instead: frames 0, N, 2N and so on.")
@click.option("--keyframes", is_flag=True, help="Instead: the key frames; nothing else is decoded.")
@click.option(
    "--scenes",
    type=float,
    is_flag=False,
    flag_value=0.3,
    help="Instead: the first frame of each scene, by ffmpeg's score of change. [0 to 1; alone: 0.3]",
)
@click.option(
    "--times",
    type=click.Path(path_type=Path),
    help="Instead: a table (.csv, .parquet) with the columns video_id and time_seconds.",
)
@click.option(
    "--decoder",
    default="pyav",
    type=click.Choice(["pyav", "ffmpeg"]),
    show_default=True,
    help="pyav decodes in the worker and hands over to ffmpeg what it cannot read.",
)
@click.option("--fast-decode", is_flag=True, help="Skip frames that no other refers to; picked frames may move.")
@click.option("--hwaccel", help="A hardware decoder of ffmpeg's, such as cuda; with --decoder ffmpeg.")
@click.option(
    "--resize",
    default="device",
    type=click.Choice(["device", "decoder"]),
    show_default=True,
    help="decoder scales frames before they reach the backbones' device: less to move, other last bits.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="auto asks the device what is fast on it.",
)
@click.option("--compile", "compile_", is_flag=True, help="Compile the backbones with torch.compile.")
@click.option("--workers", type=int, help="Decode processes. [default: one a core]")
@click.option("--batch-size", default=32, show_default=True, help="Frames, or clips of frames, in a batch.")
@click.option(
    "--stall-seconds", default=120.0, show_default=True, help="Give up on a video that gives nothing for so long."
)
@click.option(
    "--time-limit",
    default=14400.0,
    show_default=True,
    help="Give up on a video that decodes for longer, in seconds; waiting for the backbones does not count.",
)
@click.option("--max-width", default=16384, show_default=True, help="Refuse wider video.")
@click.option("--max-height", default=16384, show_default=True, help="Refuse higher video.")
@click.option("--max-hours", default=48.0, show_default=True, help="Refuse longer video.")
@click.option("--max-streams", default=64, show_default=True, help="Refuse files with more streams.")
@click.option(
    "--on-partial",
    default="keep",
    type=click.Choice(["keep", "fail"]),
    show_default=True,
    help="What becomes of a video that decodes in part.",
)
@click.option(
    "--retry-failed",
    is_flag=False,
    flag_value="all",
    metavar="[=CODE,...]",
    help="Take up again videos that failed, all or those with these codes; `partial` is one too.",
)
@click.option("--prune", is_flag=True, help="Take videos out of the store whose files are gone.")
@click.option("--rank", type=int, help="Of several processes that fill one store, which this is. [from a launcher]")
@click.option("--world-size", type=int, help="How many processes there are. [from a launcher]")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Decode and compute on a Ray cluster: HOST:PORT of its head, auto, or local to start one on this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def extract(
    videos: tuple[Path, ...],
    out: Path | None,
    backbones: tuple[str, ...],
    fps: float | None,
    frames: int | None,
    every_nth: int | None,
    keyframes: bool,
    scenes: float | None,
    times: Path | None,
    decoder: str,
    fast_decode: bool,
    hwaccel: str | None,
    resize: str,
    device: str,
    precision: str,
    compile_: bool,
    workers: int | None,
    batch_size: int,
    stall_seconds: float,
    time_limit: float,
    max_width: int,
    max_height: int,
    max_hours: float,
    max_streams: int,
    on_partial: str,
    retry_failed: str | None,
    prune: bool,
    rank: int | None,
    world_size: int | None,
    ray: str | None,
    as_json: bool,
) -> None:
    """Extract frozen features of VIDEOS into a feature store.

    VIDEOS are folders (walked recursively), video files, or lists of them (.txt, .csv, .parquet). Run it again
    to go on where it stopped: what is in the store and has not changed is not decoded again.

    Under torchrun, Slurm or mpirun, or with --rank and --world-size, several processes fill one store together.
    With --ray, a Ray cluster does the work: decoders on its CPUs, backbones on its GPUs.

    \b
    svb extract clips/ -o features/ --backbone offline:efficientnet-lite0
    svb extract clips/ -o features/ --retry-failed=timeout,decoder_crash
    """
    from svb.data.feature_store import FeatureStore
    from svb.extract import run
    from svb.extract.decode.options import Limits
    from svb.extract.decode.sampling import Sampling
    from svb.extract.names import DEFAULT_BACKBONE

    asked: dict[str, Any] = {
        "fps": fps,
        "frames": frames,
        "every_nth": every_nth,
        "keyframes": keyframes or None,
        "scenes": scenes,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    sampling = Sampling(**given) if given else None
    out = out or default_path("SVB_FEATURES", "features")
    chosen = backbones or (DEFAULT_BACKBONE,)
    place = _rank(rank, world_size) if ray is None or rank is not None else None
    if ray is not None and workers is not None:
        raise UsageError(f"got --workers {workers} and --ray, which decodes on all CPUs - leave out --workers")
    if ray is not None:
        # Ray tells of workers that died on stdout, which is the summary's.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    say(f"extracting into {out} with {', '.join(chosen)}, {_describe(given, times)}{_as_one_of(place)}")
    meter = Meter("videos")
    try:
        run.extract(
            videos,
            out,
            backbones=chosen,
            sampling=sampling,
            times=times,
            decoder=decoder,
            fast_decode=fast_decode,
            hwaccel=hwaccel,
            resize=resize,
            limits=Limits(max_width, max_height, max_hours * 3600, max_streams),
            device=device,
            precision=precision,
            compile=compile_,
            num_workers=_own_cores() if workers is None else workers,
            batch_size=batch_size,
            stall_seconds=stall_seconds,
            time_limit_seconds=time_limit,
            keep_partial=on_partial == "keep",
            retry=_codes(retry_failed),
            prune=prune,
            rank=place,
            ray=ray,
            on_progress=lambda progress: _show(meter, progress),
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


def _show(meter: Meter, progress: ExtractProgress) -> None:
    meter.update(
        progress.videos_done,
        progress.num_videos,
        {"frames": progress.frames_done},
        eta_seconds=progress.eta_seconds,
        notes=[
            f"waiting {progress.decode_wait_share:.0%} for decode, {progress.device_wait_share:.0%} for the device",
            f"queue {progress.queue_depth}",
        ],
    )


def _describe(sampling: dict[str, Any], times: Path | None) -> str:
    if times is not None:
        return f"--times {times}"
    (name, value), *_ = sampling.items() or {"fps": 1}.items()
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value:g}")


def _codes(retry_failed: str | None) -> tuple[str, ...]:
    from svb.data.rows import FAILURES

    if retry_failed is None:
        return ()
    codes = tuple(code for code in retry_failed.split(",") if code)
    if codes == ("all",):
        return FAILURES
    if not set(codes) <= {*FAILURES, "partial"}:
        raise UsageError(
            f"--retry-failed got {retry_failed!r} - expected codes after a =, such as --retry-failed=timeout, or "
            "nothing: then put it last, behind VIDEOS"
        )
    return codes


def _rank(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    from svb.extract.together.leases import rank_and_world

    if rank is None and world_size is None:
        return rank_and_world()
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UsageError(
            f"got --rank {rank} and --world-size {world_size} - give both, the rank from 0 and below the world size"
        )
    return rank, world_size


def _as_one_of(place: tuple[int, int] | None) -> str:
    return "" if place is None else f", process {place[0] + 1} of {place[1]}"


def _own_cores() -> int:
    """Return how many cores this process may use, its share where a launcher started several on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // int(beside)) if beside.isdecimal() and int(beside) else cores
