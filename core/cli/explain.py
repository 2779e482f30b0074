"""`svb explain`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("caption", required=False)
@click.option("--video", help="Explain what this video shows: a file, or a video_id of the store.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write to. [default: RUN/explain]")
@click.option("-k", default=5, show_default=True, help="Support videos to show.")
@click.option(
    "--support-size",
    type=int,
    help="Training videos drawn as support set, 0 for all. [default: the run's batch size]",
)
@click.option("--captions", type=click.Path(path_type=Path), help="Caption features. [default: the run's own]")
@click.option("--store", type=click.Path(path_type=Path), help="Feature store. [default: the run's own]")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
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
    """Show from which videos RUN would rebuild a CAPTION, with what weights, and what its decoder makes of them.

    Writes a page, index.html, and the same as a picture, explain.png: the support videos that weigh most as
    strips of frames, what was rebuilt from their mixture, and the support weights of the four variants over one
    batch as heat maps.

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
