"""`svb compare`."""

from __future__ import annotations

from pathlib import Path

import click

from svb.cli.output import print_json, print_table, say


@click.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(run_a: Path, run_b: Path, as_json: bool) -> None:
    """Tell whether RUN_B is better than RUN_A, query by query, from the ranks that svb evaluate wrote.

    Each side is a run, a folder of runs that differ only in their seeds, or a file of ranks (svb evaluate --ranks).

    \b
    svb compare runs/none runs/cross
    svb compare ablation/runs/variant=none ablation/runs/variant=cross
    """
    from svb.retrieve.compare import compare as compare_runs
    from svb.retrieve.measure.paired import difference_texts
    from svb.train.config import selection_note

    comparison = compare_runs(run_a, run_b)
    if as_json:
        print_json(comparison.as_json())
        return
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        seeds = f", seed{'s' * (len(side.seeds) > 1)} {' '.join(map(str, side.seeds))}" if side.checkpoints else ""
        checkpoint = f", {' and '.join(sorted(set(side.checkpoints)))} checkpoint" if side.checkpoints else ""
        click.echo(f"{name}: {side.path}{seeds}{checkpoint}")
    queries = comparison.a.ranks[0].queries
    click.echo(f"{queries.split}: {len(queries.caption_ids)} captions against {len(queries.video_ids)} videos")
    if comparison.selected_on_test:
        click.echo(selection_note("test"))
    if comparison.selected_on_split:
        click.echo("this split chose a checkpoint: to report numbers, use --checkpoint last or another split")
    print_table(
        ["", "A", "B", "B - A", "95 % over videos", "p", "95 % over seeds", "p"],
        [
            [d.metric.replace("/", " "), f"{d.a:.1f}", f"{d.b:.1f}", *difference_texts(d)]
            for d in comparison.differences
        ],
    )
    for name in comparison.relevances_of_one_side:
        say(f"only some of these runs were measured by {name} - to compare by it, evaluate all with --relevance")
    if len(comparison.a.ranks) == 1:
        say("one pair of runs cannot tell whether other trainings would show the difference: compare several seeds")
