"""Descriptions: the JSON files that say what a store, run, checkpoint or index is.

Each carries a checksum of itself, so that an edited or damaged one is never believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svb.config import fingerprint
from svb.data.publish import publish_json
from svb.errors import InputError, StoreError

# The version of every format that has none of its own.
FORMAT_VERSION = 1


def publish_description(path: Path, description: Mapping[str, Any], format_version: int = FORMAT_VERSION) -> None:
    """Write a description with the format's version and its checksum, whole or not at all."""
    versioned = {"format_version": format_version, **description}
    publish_json(path, {**versioned, "checksum": fingerprint(versioned)})


def read_description(path: Path, *, kind: str, make: str, format_version: int = FORMAT_VERSION) -> dict[str, Any]:
    """Read a description and check it against its checksum.

    Args:
        path: The JSON file.
        kind: What the described folder is, with an article, such as `a run`.
        make: The command that makes one.
        format_version: The newest that the caller reads.

    Raises:
        InputError: There is no such file.
        StoreError: It is damaged, was edited, or is of a newer format.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} is not {kind} (it has no {path.name}) - make one with `{make}`")
    try:
        description: dict[str, Any] = json.loads(path.read_text("utf-8"))
        version, checksum = int(description["format_version"]), description.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}) - restore it, or move {path.parent} away and make another with `{make}`"
        ) from error
    if version > format_version:
        raise StoreError(f"{path} has format {version} - this svb reads up to {format_version}; upgrade svb")
    if checksum != fingerprint(description):
        raise StoreError(
            f"{path} was edited or damaged: its checksum does not match - undo the edit, restore it, or "
            f"move {path.parent} away and make another with `{make}`"
        )
    return description
