"""`svb extract`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svb.cli.options import config_options
from svb.cli.output import Meter, print_json, print_table, say
from svb.config import default_path
from svb.extract.config import ExtractConfig

if TYPE_CHECKING:
    from svb.extract.progress import ExtractProgress


@click.command()
@click.argument("videos", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Feature store to fill. [default: ./features]")
@config_options(ExtractConfig)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def extract(videos: tuple[Path, ...], out: Path | None, as_json: bool, **options: Any) -> None:
    """Extract frozen features of VIDEOS into a feature store.

    VIDEOS are folders (walked recursively), video files, or lists of them (.txt, .csv, .parquet). Run it again
    to go on where it stopped: what is in the store and has not changed is not decoded again. More videos go into a
    store with the settings that it was made with.

    Under torchrun, Slurm or mpirun, or with --rank and --world-size, several processes fill one store together.
    With --devices all, one command runs a process on each GPU of this machine. With --ray, a Ray cluster does the
    work: decoders on its CPUs, backbones on its GPUs.

    \b
    svb extract clips/ -o features/ --backbone offline:efficientnet-lite0
    svb extract more/ -o features/
    svb extract clips/ -o features/ --retry-failed=timeout,decoder_crash
    """
    from svb.data.feature_store import FeatureStore
    from svb.extract import run

    out = out or default_path("SVB_FEATURES", "features")
    config = run.settled(videos, out, _with_launcher(ExtractConfig(**options)))
    if config.ray is not None:
        # Ray tells of workers that died on stdout, which is the summary's.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    say(f"extracting into {out} with {', '.join(config.backbones)}, {_sampling(config)}{_as_one_of(config)}")
    meter = Meter("videos")
    try:
        run.extract(videos, out, config, on_progress=lambda progress: _show(meter, progress))
    finally:
        meter.close()
    counts = FeatureStore(out).status_counts()
    if as_json:
        print_json({"store": str(out), "videos": dict(counts)})
        return
    print_table(["status", "videos"], [[status, str(count)] for status, count in counts.most_common()])
    if set(counts) - {"ok"}:
        say(f"`svb info {out} --failures` says what was wrong with the others")


def _with_launcher(config: ExtractConfig) -> ExtractConfig:
    """Return the options with the rank that a launcher tells this process, unless they have one."""
    from svb.extract.together.leases import rank_and_world

    if config.ray is not None or config.place is not None or (place := rank_and_world()) is None:
        return config
    return replace(config, rank=place[0], world_size=place[1])


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


def _sampling(config: ExtractConfig) -> str:
    if config.times is not None:
        return f"--times {config.times}"
    ((name, value),) = config.decode_options.sampling.settings().items()
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value:g}")


def _as_one_of(config: ExtractConfig) -> str:
    return "" if config.place is None else f", process {config.place[0] + 1} of {config.place[1]}"
