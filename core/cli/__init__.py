"""The command line: every command is a thin shell over a function of the library.

Results go to stdout, progress and messages to stderr. Exit status 0 is done, 1 failed, 2 wrong usage, 130
interrupted. Nothing ever prompts, and nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from types import FrameType

import click

from svb import __version__
from svb.errors import SvbError

# The module of each command, in the order in which data flows.
COMMANDS = {
    "extract": "svb.cli.extract:extract",
    "import": "svb.cli.import_:import_",
    "captions": "svb.cli.captions:captions",
    "train": "svb.cli.train:train",
    "evaluate": "svb.cli.evaluate:evaluate",
    "compare": "svb.cli.compare:compare",
    "ablate": "svb.cli.ablate:ablate",
    "explain": "svb.cli.explain:explain",
    "transcribe": "svb.cli.transcribe:transcribe",
    "index": "svb.cli.index:index",
    "search": "svb.cli.search:search",
    "serve": "svb.cli.serve:serve",
    "mcp": "svb.cli.mcp:mcp",
    "info": "svb.cli.info:info",
    "verify": "svb.cli.info:verify",
    "export": "svb.cli.export:export",
    "demo": "svb.cli.demo:demo",
}


class _AtFirstUse(MutableMapping[str, click.Command]):
    """Commands by name, each imported when it is used: importing all takes longer than a search."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> click.Command:
        module, _, attribute = self._places[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def __setitem__(self, name: str, command: click.Command) -> None:
        raise TypeError(f"add {name} to COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"take {name} out of COMMANDS")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


class _InOrder(click.Group):
    """Lists commands in the order the data flows."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, commands=_AtFirstUse(COMMANDS), context_settings={"help_option_names": ["-h", "--help"]})
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
    svb transcribe features/ -o transcripts/    what is said in every video
    svb index runs/x -o index/                  embeddings of every video and moment
    svb search "a dog catches a frisbee"        the nearest videos
    svb serve                                   the same in a browser, and for programs
    svb mcp                                     the same for agents
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors are one line on stderr, never a traceback."""
    _print_what_the_library_says()
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
    except SystemExit:  # click exits like this when the reader of our output is gone, as with `head`
        if not type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):  # click's own, which hides it
            raise
        _discard_output()
        return 128 + signal.SIGPIPE  # as a shell reports it; 1 would say that a search found nothing
    except OSError as error:
        place = error.filename or _place_of_output(error)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "make room there" if is_full else "fix that"
        click.echo(
            f"svb: cannot use{place and f' {place}'} ({error.strerror or error}) - {what} and run the same command "
            "again",
            err=True,
        )
        return 1
    return 0


def _place_of_output(error: OSError) -> str:
    """Return `standard output` if printing raised the error, which then names no file; else nothing."""
    import traceback

    if any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        _discard_output()
        return "standard output"
    return ""


def _discard_output() -> None:
    """Discard what stdout still holds back, so that it raises no error when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ToStderr(logging.Handler):
    """Prints a message of the library as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def _print_what_the_library_says() -> None:
    logger = logging.getLogger("svb")
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def main() -> None:
    """Run `svb` with the process's arguments and exit."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.excepthook = _thread_failed
    sys.exit(run())


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Report in one line that a library's own thread could not write to a disk or pipe."""
    if isinstance(failed.exc_value, OSError):
        click.echo(f"svb: a file cannot be written ({failed.exc_value.strerror or failed.exc_value})", err=True)
    else:
        threading.__excepthook__(failed)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _one_line(error: SvbError) -> str:
    return " ".join(str(error).split())
