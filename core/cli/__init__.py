"""The command line: every command is a thin shell over a function of the library.

Results go to stdout, progress and messages to stderr. Exit status 0 is done, 1 failed, 2 wrong usage, 130
interrupted. Nothing ever prompts, and nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from svb._version import __version__
from svb.cli.ablate import ablate
from svb.cli.captions import captions
from svb.cli.compare import compare
from svb.cli.demo import demo
from svb.cli.evaluate import evaluate
from svb.cli.explain import explain
from svb.cli.export import export
from svb.cli.extract import extract
from svb.cli.import_ import import_
from svb.cli.index import index
from svb.cli.info import info, verify
from svb.cli.search import search
from svb.cli.train import train
from svb.errors import SvbError


class _InOrder(click.Group):
    """Lists commands in the order the data flows."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="svb")
def cli() -> None:
    """Find videos by text.

    \b
    svb extract VIDEOS... -o features/          frozen features of every video
    svb import SOURCE --backbone NAME           features that another tool made
    svb captions captions.csv -o captions.h5    frozen features of every caption
    svb train features/ captions.h5 -o runs/x   heads that bring both into one space
    svb evaluate runs/x                         retrieval metrics on a split
    svb compare runs/x runs/y                   which is better, and could it be chance
    svb ablate ablation.toml -o ablation/       a grid of options over several seeds
    svb explain runs/x "a dog runs"             from which videos a caption is rebuilt
    svb index runs/x -o index/                  embeddings of every video and moment
    svb search "a dog catches a frisbee"        the nearest videos
    """


for command in (
    extract,
    import_,
    captions,
    train,
    evaluate,
    compare,
    ablate,
    explain,
    index,
    search,
    info,
    verify,
    export,
    demo,
):
    cli.add_command(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors are one line on stderr, never a traceback."""
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="svb", standalone_mode=False)
    except SvbError as error:
        click.echo(f"svb: {_one_line(error)}", err=True)
        return error.exit_code
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("svb: interrupted - what was finished is kept; run the same command again to go on", err=True)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        reason = error.strerror or str(error)
        click.echo(f"svb: cannot use{place} ({reason}) - mend that and run the same command again", err=True)
        return 1
    return 0


def main() -> None:
    """Run `svb` with the process's arguments and exit."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _one_line(error: SvbError) -> str:
    return " ".join(str(error).split())
