"""Names of frozen networks, `family:model[/weights]`. Imports nothing heavy: a run with nothing to do is quick."""

from __future__ import annotations

from pathlib import Path

from svb.errors import UsageError

DEFAULT_BACKBONE = "open_clip:ViT-B-32/laion2b_s34b_b79k"


def split_name(name: str) -> tuple[str, str, str]:
    """Split `family:model/weights` into its three parts; `weights` is empty where none are named.

    `open_clip:local-dir:PATH` and `sentence_transformers:PATH` name a folder, `t5:OWNER/MODEL` a hub's model:
    their model is the whole rest.

    Raises:
        UsageError: There is no family or no model.
    """
    family, _, rest = name.partition(":")
    if not family or not rest:
        raise UsageError(f"{name!r} names no network - expected family:model or family:model/weights")
    if family in ("sentence_transformers", "t5") or rest.startswith("local-dir:"):
        return family, rest, ""
    model, _, weights = rest.partition("/")
    return family, model, weights


def absolute_name(name: str) -> str:
    """Return a network's name with the local file or folder in it made absolute, so that it holds everywhere."""
    family, model, weights = split_name(name)
    if family == "sentence_transformers":
        return f"{family}:{Path(model).absolute()}"
    if family == "t5":
        from svb.data.t5 import absolute_t5_name

        return f"{family}:{absolute_t5_name(model)}"
    if model.startswith("local-dir:"):
        return f"{family}:local-dir:{Path(model.removeprefix('local-dir:')).absolute()}"
    if weights and Path(weights).is_file():
        return f"{family}:{model}/{Path(weights).absolute()}"
    return name
