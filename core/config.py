"""Options of config dataclasses, JSON schemas, fingerprints of settings, and default paths."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svb.errors import InputError, MismatchError

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def option(
    default: Any,
    *,
    flag: str | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    read: Callable[[str], Any] | None = None,
    **more: Any,
) -> Any:
    """Return a dataclass field with what the command line needs besides its name, type, default and documentation.

    Args:
        default: The field's default.
        flag: The option's name, where it is not the field's.
        choices: The values that are allowed.
        metavar: What the help shows in place of the value.
        read: Makes the value from the text on the command line.
        more: `hidden=True` for a field that is not an option; `both=True` for a switch that also has `--no-`;
            `alone=VALUE` for the value that the option has when it is given without one; `text=DEFAULT` for the
            default as it is typed, where `read` makes the value from it; `at_least=N` for the smallest number that
            is allowed.
    """
    said = {"flag": flag, "choices": tuple(choices), "metavar": metavar, "read": read, **more}
    return dataclasses.field(default=default, metadata=said)


def typed(field: dataclasses.Field[Any], value: Any) -> str:
    """Return a field's value as a user types it on the command line."""
    flag = field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"
    if value is True:
        return flag
    return " ".join(f"{flag} {one}" for one in (value if isinstance(value, tuple) else (value,)))


def described(config: type, name: str) -> str:
    """Return a field's entry under `Attributes:` in the docstring of its dataclass, as one line."""
    found = re.search(rf"^ +{name}: (.*?)(?=^ +\w+: |^ *$|\Z)", config.__doc__ or "", re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).replace("`", "").split()) if found else ""


def json_schema(shape: type, definitions: Mapping[type, str]) -> dict[str, Any]:
    """Return the JSON schema of a dataclass: its types, its documentation, and what `option` says of its fields.

    Args:
        shape: The dataclass.
        definitions: The names of the dataclasses to which its fields may refer, under `$defs` of the whole schema.
    """
    hints = typing.get_type_hints(shape)
    properties = {
        each.name: {
            "description": described(shape, each.name),
            **_field_schema(hints[each.name], each.metadata, definitions),
        }
        for each in dataclasses.fields(shape)
    }
    return {"type": "object", "required": [*properties], "additionalProperties": False, "properties": properties}


def _field_schema(hint: Any, said: Mapping[str, Any], definitions: Mapping[type, str]) -> dict[str, Any]:
    schema = {**_type_schema(hint, definitions), **said.get("schema", {})}
    if said.get("choices"):
        schema["enum"] = [*said["choices"], *([None] if type(None) in typing.get_args(hint) else [])]
    if said.get("at_least") is not None:
        schema["minimum"] = said["at_least"]
    return schema


def _type_schema(hint: Any, definitions: Mapping[type, str]) -> dict[str, Any]:
    kinds = typing.get_args(hint)
    if hint is Any:
        return {}
    if type(None) in kinds:
        schema = _type_schema(kinds[0], definitions)
        return (
            {**schema, "type": [schema["type"], "null"]}
            if "type" in schema
            else {"anyOf": [schema, {"type": "null"}]}
        )
    if typing.get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": _type_schema(kinds[1], definitions)}
    if typing.get_origin(hint) is tuple:
        length = {} if kinds[-1] is ... else {"minItems": len(kinds), "maxItems": len(kinds)}
        return {"type": "array", "items": _type_schema(kinds[0], definitions), **length}
    if dataclasses.is_dataclass(hint):
        return {"$ref": f"#/$defs/{definitions[typing.cast('type', hint)]}"}
    return {"type": _JSON_TYPES[hint]}


def canonical_json(value: Any) -> str:
    """Return JSON text that is equal for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of `settings` as canonical JSON."""
    import hashlib  # a client of a server that is open needs none of it

    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]


def differing_fields(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line a field that differs, as `name: stored 1, wanted 2`, nested names joined by dots."""
    lines: list[str] = []
    for key in sorted({*stored, *wanted}):
        have, want = stored.get(key), wanted.get(key)
        if isinstance(have, Mapping) and isinstance(want, Mapping):
            lines += differing_fields(have, want, f"{prefix}{key}.")
        elif have != want:
            lines.append(f"{prefix}{key}: stored {have!r}, wanted {want!r}")
    return lines


def require_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str, do_next: str) -> None:
    """Raise when two settings differ.

    Raises:
        MismatchError: Names every field that differs, and `do_next`.
    """
    lines = differing_fields(stored, wanted)
    if lines:
        raise MismatchError(f"{what} was made with other settings ({'; '.join(lines)}). {do_next}")


def default_path(variable: str, fallback: str) -> Path:
    """Return the path in the environment variable, or `fallback` in the working directory."""
    return Path(os.environ.get(variable) or fallback)


def newest_run() -> Path:
    """Return the run written last: `SVB_RUN`, or the newest folder under `./runs` that holds a config.json.

    Raises:
        InputError: There is none.
    """
    if os.environ.get("SVB_RUN"):
        return Path(os.environ["SVB_RUN"])
    found = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise InputError(
            "no run in runs/ - expected a folder with a config.json; "
            "train one with `svb train`, or name a run or a feature store"
        )
    return found[-1].parent
