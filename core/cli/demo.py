"""`svb demo`."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

import click

from svb.cli.output import Meter, say
from svb.errors import SvbError

BACKBONE, TEXT_ENCODER = "offline:efficientnet-lite0", "offline:minilm-l6"
QUERIES = ("a green heart in front of a checkerboard", "something yellow that gets bigger", "a red star")


@click.command()
@click.option(
    "-o",
    "--out",
    default=Path("demo"),
    type=click.Path(path_type=Path),
    show_default=True,
    help="Folder to work in.",
)
@click.option("--videos", default=300, show_default=True, help="Number of clips to make.")
@click.option("--epochs", default=30, show_default=True, help="Number of epochs to train.")
@click.option("--seed", default=0, show_default=True, help="Seed of the clips and of the training.")
@click.pass_context
def demo(ctx: click.Context, out: Path, videos: int, epochs: int, seed: int) -> None:
    """Run the whole pipeline on generated clips, from extraction to search.

    ffmpeg makes the clips, so no footage and no download are needed. Each step prints the command that does the
    same. A second run only does what is missing.

    \b
    svb demo
    """
    from svb.cli.demo_clips import make_demo_clips

    began = time.monotonic()
    say(f"making {videos} clips in {out / 'videos'}")
    meter = Meter("clips")
    try:
        table = make_demo_clips(out, num_videos=videos, seed=seed, on_progress=meter.update)
    finally:
        meter.close()
    features, captions = out / "features", out / "captions.h5"
    run, index = out / "run", out / "index"
    steps: list[list[str | Path]] = [
        ["extract", out / "videos", "-o", features, "--backbone", BACKBONE, "--fps", "2"],
        ["captions", table, "-o", captions, "--text-encoder", TEXT_ENCODER],
        ["evaluate", features, "--captions", captions],
        [
            "train",
            features,
            captions,
            "-o",
            run,
            "--epochs",
            str(epochs),
            "--learning-rate",
            "1e-3",
            "--seed",
            str(seed),
        ],
        ["evaluate", run],
        ["index", run, "-o", index],
    ]
    steps += [["search", query, "--index", index, "-k", "3"] for query in QUERIES]
    steps += [["search", "--video", _first_clip(out / "videos"), "--index", index, "-k", "3", "--captions", "3"]]
    for step in steps:
        arguments = [str(argument) for argument in step]
        click.echo(f"\n$ svb {shlex.join(arguments)}")
        _run(ctx, arguments)
    click.echo(f"\ndone in {time.monotonic() - began:.0f} s on {os.cpu_count()} cores")
    click.echo(f'next: svb search "a purple ring" --index {index}')
    click.echo(f"or in a browser: svb serve --index {index}")


def _run(ctx: click.Context, arguments: list[str]) -> None:
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    command = root.command.commands[arguments[0]]
    with command.make_context(arguments[0], arguments[1:], parent=root) as step:
        command.invoke(step)


def _first_clip(folder: Path) -> Path:
    clips = sorted(folder.rglob("*.mp4"))
    if not clips:
        raise SvbError(f"no clips in {folder} - remove it and run the demo again")
    return clips[0]
