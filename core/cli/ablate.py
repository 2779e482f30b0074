"""`svb ablate`."""

from __future__ import annotations

from pathlib import Path

import click

from svb.cli.output import print_json, say
from svb.errors import InputError


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for runs and tables. [default: CONFIG's name without .toml]",
)
@click.option(
    "--jobs", type=int, help="Number of runs at a time, which share the threads. [default: CONFIG's, or 1]"
)
@click.option("--device", default="auto", show_default=True, help="Device to train on: auto, cpu, cuda:0, ...")
@click.option("--dry-run", is_flag=True, help="List the runs and their commands, and train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ablate(config: Path, out: Path | None, jobs: int | None, device: str, dry_run: bool, as_json: bool) -> None:
    """Train the grid of options in CONFIG (TOML) over several seeds, and compare its cells with a baseline.

    Writes ablation.md, cells.csv, runs.csv and ablation.png beside the runs. Repeat the command to continue where
    it stopped: finished runs are kept. A failed run does not stop the others, but the exit status is 1.

    \b
    svb ablate ablation.toml -o ablation/ --jobs 2
    svb ablate ablation.toml -o ablation/ --dry-run
    """
    from svb.retrieve import ablate as library
    from svb.retrieve.measure import ablation_report

    out = out or Path(config.stem)
    if dry_run:
        _print_plan(config, out, device, as_json)
        return
    say(f"training {config} to {out}")
    report = library.ablate(config, out, jobs=jobs, device=device)
    if as_json:
        print_json(ablation_report.as_json(report))
    else:
        click.echo(ablation_report.markdown(report), nl=False)
    say(
        f"wrote {', '.join(str(out / name) for name in (library.TABLE, library.CELLS, library.RUNS, library.PLOT))}"
    )
    if report.failed:
        name, error = next(iter(report.failed.items()))
        raise InputError(
            f"{len(report.failed)} runs failed, first {name}: {error} - the tables cover the others; fix the cause "
            "and run the same command again"
        )
    if report.is_collapsed:
        raise InputError(
            f"no run can be told from guessing - nothing was learned, so {out / library.TABLE} compares nothing: "
            "train longer, or change learning_rate"
        )


def _print_plan(config: Path, out: Path, device: str, as_json: bool) -> None:
    from svb.retrieve.ablate import dry_run

    ablation, planned = dry_run(config, out, device=device)
    if as_json:
        rows = [
            {
                "cell": run.cell.name,
                "seed": run.seed,
                "baseline": run.cell == ablation.baseline,
                "finished": run.is_finished,
                "command": run.command,
            }
            for run in planned
        ]
        print_json(rows)
        return
    click.echo(f"baseline: {ablation.baseline.name}; {ablation.checkpoint} checkpoint on {ablation.split}")
    for run in planned:
        click.echo(f"{run.name}: {'finished' if run.is_finished else run.command}")
