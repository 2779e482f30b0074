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
    help="Folder of runs and tables. [default: CONFIG's name without .toml]",
)
@click.option(
    "--jobs", type=int, help="Runs at a time, each with its share of the threads. [default: as CONFIG says, or 1]"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
@click.option("--dry-run", is_flag=True, help="List the runs and their commands; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ablate(config: Path, out: Path | None, jobs: int | None, device: str, dry_run: bool, as_json: bool) -> None:
    """Train the grid of options in CONFIG (TOML) over several seeds, and compare its cells with a baseline.

    Writes ablation.md, cells.csv, runs.csv and ablation.png beside the runs. Run it again to go on where it
    stopped: finished runs are kept. A run that fails does not stop the others, but the exit status is 1.

    \b
    svb ablate ablation.toml -o ablation/ --jobs 2
    svb ablate ablation.toml -o ablation/ --dry-run
    """
    from svb.retrieve import ablate as library
    from svb.retrieve.measure.ablation_report import as_json as report_as_json
    from svb.retrieve.measure.ablation_report import command_of, markdown

    out = out or Path(config.stem)
    if dry_run:
        ablation, planned = library.dry_run(config, out)
        rows = [
            {
                "cell": run.cell.name,
                "seed": run.seed,
                "baseline": run.cell == ablation.baseline,
                "finished": run.is_finished,
                "command": command_of(run),
            }
            for run in planned
        ]
        if as_json:
            print_json(rows)
            return
        click.echo(f"baseline: {ablation.baseline.name}; {ablation.checkpoint} checkpoint on {ablation.split}")
        for row in rows:
            click.echo(f"{row['cell']} seed {row['seed']}: {'finished' if row['finished'] else row['command']}")
        return
    say(f"training {config} to {out}")
    report = library.ablate(config, out, jobs=jobs, device=device)
    if as_json:
        print_json(report_as_json(report))
    else:
        click.echo(markdown(report), nl=False)
    say(
        f"wrote {', '.join(str(out / name) for name in (library.TABLE, library.CELLS, library.RUNS, library.PLOT))}"
    )
    if report.failed:
        name, error = next(iter(report.failed.items()))
        raise InputError(
            f"{len(report.failed)} runs failed, first {name}: {error} - the tables are of the others; mend it and "
            "run the same command again"
        )
    if report.is_collapsed:
        raise InputError(
            f"no run can be told from guessing - nothing was learned, and {out / library.TABLE} compares "
            "nothing: train longer, or at another learning_rate"
        )
