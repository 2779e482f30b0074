"""Names of frozen networks, `family:model[/weights]`. Imports nothing heavy: a run with nothing to do is quick."""

from __future__ import annotations

from pathlib import Path

from svb.errors import UsageError

# What stands before a folder that holds a whole model: `family:local-dir:FOLDER`.
LOCAL_FOLDER = "local-dir:"

# The model whose two towers are the default backbone and text encoder; docs/extraction.md says why this one.
DEFAULT_MODEL = "open_clip:PE-Core-B-16/meta"


def split_family(name: str) -> tuple[str, str]:
    """Split `family:model` at the colon.

    Raises:
        UsageError: The family or the model is missing.
    """
    family, _, model = name.partition(":")
    if not family or not model:
        raise UsageError(f"{name!r} names no network - expected family:model or family:model/weights")
    return family, model


def split_weights(model: str) -> tuple[str, str]:
    """Split `model/weights` at the first slash; without weights they are empty. `local-dir:FOLDER` is all model."""
    if model.startswith(LOCAL_FOLDER):
        return model, ""
    before, _, weights = model.partition("/")
    return before, weights


def absolute_model(model: str) -> str:
    """Return a model's name with its local folder or weights file made absolute, so that it holds everywhere."""
    if model.startswith(LOCAL_FOLDER):
        return f"{LOCAL_FOLDER}{Path(model.removeprefix(LOCAL_FOLDER)).absolute()}"
    before, weights = split_weights(model)
    return f"{before}/{Path(weights).absolute()}" if weights and Path(weights).is_file() else model
