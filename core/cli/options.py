"""A config dataclass -> the options of a command. The dataclass is the only place that describes them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from svb.config import described
from svb.errors import UsageError

Command = Callable[..., None]


def config_options(config: type) -> Callable[[Command], Command]:
    """Return a decorator that gives a command one option for each field of a dataclass.

    The help of an option is the field's entry under `Attributes:` in the class's docstring, its default is the
    field's, and `svb.config.option` gives the rest. The command gets the values under the fields'
    names, so `config(**values)` is all that it needs to call the library.
    """

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(config)
        for field in reversed(dataclasses.fields(config)):
            if not field.metadata.get("hidden"):
                command = _option(field, hints[field.name], described(config, field.name))(command)
        return command

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any, help_text: str) -> Callable[[Command], Command]:
    said = field.metadata
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    kind = _without_none(hint)
    multiple = typing.get_origin(kind) is tuple
    flag = said.get("flag") or f"--{field.name.replace('_', '-')}"
    arguments: dict[str, Any] = {"default": default, "help": help_text, "metavar": said.get("metavar")}
    if kind is bool and default is False and not said.get("both"):
        arguments["is_flag"] = True
    elif kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
        arguments["show_default"] = default is not None
    else:
        arguments["type"] = _type(said, typing.get_args(kind)[0] if multiple else kind)
        arguments["multiple"] = multiple
        arguments["show_default"] = default not in (None, ())
    if "text" in said:  # the default as it is typed, for the help
        arguments["default"] = said["text"]
    if "alone" in said:  # the value where the option is given without one
        arguments |= {"is_flag": False, "flag_value": said["alone"]}
    return click.option(flag, field.name, **arguments)


def _type(said: typing.Mapping[str, Any], kind: Any) -> Any:
    if said.get("choices"):
        return click.Choice(said["choices"])
    if said.get("read"):
        return _reader(said["read"])
    if said.get("at_least") is not None:
        return click.IntRange(min=said["at_least"])
    return click.Path(path_type=Path) if kind is Path else kind


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def reader(text: str) -> Any:
        try:
            return read(text)
        except UsageError as error:
            raise click.BadParameter(str(error)) from error

    return reader


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint
