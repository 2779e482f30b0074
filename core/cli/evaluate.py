"""`svb evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from svb.cli.output import print_json, print_table, say
from svb.config import newest_run


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("--captions", type=click.Path(path_type=Path), help="Caption features. [default: the run's own]")
@click.option("--store", type=click.Path(path_type=Path), help="Feature store. [default: the run's own]")
@click.option("--backbone", help="Whose features, for a store that holds several.")
@click.option("--split", default="val", type=click.Choice(["train", "val", "test"]), show_default=True)
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="Of a run. [default: best]")
@click.option(
    "--v2t",
    default="set",
    type=click.Choice(["set", "best"]),
    show_default=True,
    help="How a video with several captions counts: its captions as one set among the videos' sets, or its best "
    "caption among all other videos' captions.",
)
@click.option("--allow-missing", is_flag=True, help="Leave out captions whose videos have no features.")
@click.option("--ranks", type=click.Path(path_type=Path), help="Write each query's rank here (.npz).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    source: Path | None,
    captions: Path | None,
    store: Path | None,
    backbone: str | None,
    split: str,
    checkpoint: str | None,
    v2t: str,
    allow_missing: bool,
    ranks: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure text-to-video and video-to-text retrieval of SOURCE on a split.

    SOURCE is a run [default: the newest in ./runs], or a feature store with --captions, which is measured
    zero-shot.

    \b
    svb evaluate runs/cross
    svb evaluate features/ --captions captions.h5
    """
    from svb.retrieve.evaluate import evaluate as measure

    source = source or newest_run()
    evaluation = measure(
        source,
        store=store,
        captions=captions,
        backbone=backbone,
        split=split,
        checkpoint=checkpoint,
        v2t_convention=v2t,
        allow_missing=allow_missing,
        ranks=ranks,
        device=device,
        on_message=say,
    )
    if as_json:
        print_json(evaluation.as_json())
        return
    what = f"{evaluation.model} {evaluation.source}"
    if evaluation.checkpoint:
        what += f", {evaluation.checkpoint} checkpoint (epoch {evaluation.epoch})"
    click.echo(what)
    missing = f", {evaluation.num_missing} captions left out: no features" if evaluation.num_missing else ""
    click.echo(
        f"{evaluation.split}: {evaluation.num_captions} captions against {evaluation.num_videos} videos{missing}"
    )
    if evaluation.selected_on_split:
        click.echo("the checkpoint was chosen on this split: use another split, or --checkpoint last, to report")
    names = ["R@1", "R@5", "R@10", "R@50", "MedR", "MeanR"]
    rows = [[way, *(f"{evaluation.metrics[f'{way}/{name}']:.1f}" for name in names)] for way in ("t2v", "v2t")]
    print_table(["", *names], rows)
    click.echo(f"{evaluation.tie_rule}; v2t by {evaluation.v2t_convention}")
