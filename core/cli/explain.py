"""`svb explain`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("caption", required=False)
@click.option("--video", help="Video to explain: a file, or a video_id in the store.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the page. [default: RUN/explain]")
@click.option("-k", default=5, show_default=True, help="Number of support videos to show.")
@click.option(
    "--support-size",
    type=int,
    help="Number of training videos to draw as support set; 0 takes all. [default: the run's batch size]",
)
@click.option("--captions", type=click.Path(path_type=Path), help="Caption features of the run, if moved.")
@click.option("--store", type=click.Path(path_type=Path), help="Feature store of the run, if moved.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Checkpoint to explain.",
)
@click.option("--device", default="auto", show_default=True, help="Device to compute on: auto, cpu, cuda:0, ...")
def explain(
    run: Path,
    caption: str | None,
    video: str | None,
    out: Path | None,
    k: int,
    support_size: int | None,
    captions: Path | None,
    store: Path | None,
    checkpoint: str,
    device: str,
) -> None:
    """Show from which videos RUN rebuilds a CAPTION, with which weights, and what its decoder makes of them.

    Writes a page, index.html, which needs no other file. It shows the support videos with the largest weights as
    strips of frames, what the decoder rebuilds from their mixture, and the support weights of the four variants
    over one batch as heat maps.

    \b
    svb explain runs/cross "a man plays a guitar"
    svb explain runs/cross --video clip.mp4
    """
    from svb.retrieve.explain import explain as write_explanation

    page = write_explanation(
        run,
        caption,
        video=video,
        out=out,
        k=k,
        support_size=support_size,
        store=store,
        captions=captions,
        checkpoint=checkpoint,
        device=device,
    )
    click.echo(page)
