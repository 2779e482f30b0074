"""`svb evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from svb.cli.output import print_json, print_table
from svb.config import newest_run
from svb.errors import UsageError

if TYPE_CHECKING:
    from svb.retrieve.evaluate import Evaluation
    from svb.retrieve.measure.query_ranks import Graded


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "--captions",
    type=click.Path(path_type=Path),
    help="Caption features to measure on; with --similarities a caption table will do. [default: the run's own]",
)
@click.option("--store", type=click.Path(path_type=Path), help="Feature store of the run, if moved.")
@click.option("--backbone", help="Backbone to measure, if a store holds several.")
@click.option(
    "--split",
    default="val",
    type=click.Choice(["train", "val", "test"]),
    show_default=True,
    help="Split to measure.",
)
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="Checkpoint to measure. [default: best]")
@click.option(
    "--v2t",
    default="set",
    type=click.Choice(["set", "best"]),
    show_default=True,
    help="Rank a video's captions as one set among the videos' sets, or its best caption among all other videos' "
    "captions.",
)
@click.option(
    "--normalise",
    "normalise_by",
    multiple=True,
    type=click.Choice(["qb-norm", "dual-softmax"]),
    help="Also measure similarities normalised against hubs. qb-norm uses the train split, dual-softmax needs all "
    "queries at once. Repeatable.",
)
@click.option(
    "--relevance",
    multiple=True,
    metavar="SOURCE",
    help="Also measure nDCG, mAP@R and R-Precision by this relevance: words, verbs-nouns, synsets (each also with "
    ":mean), group, or a file of judgements. Repeatable.",
)
@click.option(
    "--similarities",
    type=click.Path(path_type=Path),
    help="Measure this matrix (.npy, captions by videos) instead of a run; needs --captions.",
)
@click.option(
    "--videos",
    type=click.Path(path_type=Path),
    help="File with the video_id of each column of --similarities, one a line. [default: in the captions' order]",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Leave out captions whose videos have no features, and say how many.",
)
@click.option(
    "--ranks", type=click.Path(path_type=Path), help="File for each query's rank (.npz). [default: RUN/ranks.npz]"
)
@click.option(
    "--beside",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Also measure this run, trained alike with --select-on test; needs --split test.",
)
@click.option("--device", default="auto", show_default=True, help="Device to compute on: auto, cpu, cuda:0, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    source: Path | None,
    captions: Path | None,
    store: Path | None,
    backbone: str | None,
    split: str,
    checkpoint: str | None,
    v2t: str,
    normalise_by: tuple[str, ...],
    relevance: tuple[str, ...],
    similarities: Path | None,
    videos: Path | None,
    allow_missing: bool,
    ranks: Path | None,
    beside: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure text-to-video and video-to-text retrieval of SOURCE on a split.

    SOURCE is a run [default: the newest in ./runs], or a feature store with --captions to measure zero-shot.

    \b
    svb evaluate runs/cross
    svb evaluate features/ --captions captions.h5
    svb evaluate runs/cross --checkpoint last --normalise qb-norm --normalise dual-softmax
    svb evaluate runs/cross --relevance words --relevance group
    svb evaluate runs/cross --split test --beside runs/cross-on-test
    svb evaluate --similarities similarity.npy --captions captions.csv --split test --relevance words
    """
    from svb.retrieve import evaluate as library

    on_test: Evaluation | None = None
    if similarities is not None:
        _refuse_options_of_runs(
            SOURCE=source,
            **{"--store": store, "--backbone": backbone, "--checkpoint": checkpoint, "--normalise": normalise_by},
            **{"--allow-missing": allow_missing, "--beside": beside},
        )
        if captions is None:
            raise UsageError(
                "--similarities does not name its captions and videos - name their caption table with --captions"
            )
        evaluation = library.evaluate_similarities(
            similarities,
            captions,
            split=split,
            videos=videos,
            v2t_convention=v2t,
            relevance=relevance,
            ranks=ranks,
        )
    else:
        if videos is not None:
            raise UsageError(f"--videos {videos} goes with --similarities - leave it out, or name a matrix")

        def measure(run: Path, ranks: Path | None) -> Evaluation:
            return library.evaluate(
                run,
                store=store,
                captions=captions,
                backbone=backbone,
                split=split,
                checkpoint=checkpoint,
                v2t_convention=v2t,
                normalise_by=normalise_by,
                relevance=relevance,
                allow_missing=allow_missing,
                ranks=ranks,
                device=device,
            )

        source = source or newest_run()
        if beside is not None:
            library.require_only_selection_differs(source, beside, split)
        evaluation = measure(source, ranks)
        on_test = measure(beside, None) if beside is not None else None
    if as_json:
        print_json({**evaluation.as_json(), **({"beside": on_test.as_json()} if on_test else {})})
        return
    if on_test:
        click.echo("Chosen on val:")
    _print(evaluation)
    if on_test:
        click.echo("\nChosen on test, as much of the field does:")
        _print(on_test)


def _refuse_options_of_runs(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} goes with a run or a store, and --similarities is neither - leave it out")


def _print(evaluation: Evaluation) -> None:
    from svb.train.config import selection_note

    what = f"{evaluation.model} {evaluation.source}"
    if evaluation.checkpoint:
        what += f", {evaluation.checkpoint} checkpoint (epoch {evaluation.epoch})"
    click.echo(what)
    click.echo(f"{evaluation.split}: {evaluation.num_captions} captions against {evaluation.num_videos} videos")
    missing = evaluation.missing
    if missing.captions:
        click.echo(
            f"left out: {missing.captions} of {missing.of_captions} captions and {missing.videos} of "
            f"{missing.of_videos} videos have no features, so this is not the whole split"
        )
    if selection_note(evaluation.selected_on):
        click.echo(selection_note(evaluation.selected_on))
    if evaluation.selected_on_split:
        click.echo("this split chose the checkpoint: to report numbers, use another split or --checkpoint last")
    names = ["R@1", "R@5", "R@10", "R@50", "MedR", "MeanR"]
    measured = {"": evaluation.metrics, **{f" {key}": one.metrics for key, one in evaluation.normalised.items()}}
    rows = [
        [f"{way}{method}", *(f"{metrics[f'{way}/{name}']:.1f}" for name in names)]
        for method, metrics in measured.items()
        for way in ("t2v", "v2t")
    ]
    print_table(["", *names], rows)
    click.echo(f"{evaluation.tie_rule}; v2t by {evaluation.v2t_convention}")
    for method, one in evaluation.normalised.items():
        uses = "needs all queries of the split at once, which a search never has"
        if one.bank_split:
            uses = f"bank: {one.bank_captions} captions and {one.bank_videos} videos of {one.bank_split}"
        click.echo(f"{method}: {one.description}; {uses}; scale {one.scale:.4g}, {one.scale_source}")
    for name, graded in evaluation.graded.items():
        _print_graded(name, graded)


def _print_graded(name: str, graded: Graded) -> None:
    from svb.train.graded_metrics import JUDGED, MEASURES, OF_OTHERS, RIGHT_FROM

    has_judgements = f"t2v/{JUDGED}" in graded.metrics
    measures = [*MEASURES, *([JUDGED] if has_judgements else [])]
    click.echo()
    rows = [
        [f"{way}{others} by {name}", *(_number(graded.metrics.get(f"{way}/{one}{others}")) for one in measures)]
        for way in ("t2v", "v2t", "both")
        for others in ("", OF_OTHERS)
    ]
    print_table(["", *measures], rows)
    click.echo(
        f"{name}: {graded.description}; mAP@R and R-Precision count a relevance of {RIGHT_FROM:g} or more as "
        "right; of others: without the own video or captions; both: over the queries of both directions"
    )
    for way, queries in (("t2v", "captions"), ("v2t", "videos")):
        counts = [
            (graded.left_out[f"{way}/{measure}{others}"], f"{measure}{others}")
            for others in ("", OF_OTHERS)
            for measure in ("nDCG", "R-Precision")
        ]
        said = ", ".join(f"{count} from {measure}" for count, measure in counts if count)
        if said:
            click.echo(f"left out, {way} {queries} with nothing relevant to find: {said}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
