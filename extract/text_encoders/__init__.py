"""Frozen text encoders by name: `family:model[/weights]`, one file a family.

A new family is a file here and a line in `FAMILIES`. The file has `load(name, model, device) -> TextEncoder`, where
`model` is all that follows the colon. Two things are optional: `absolute_model(model)`, if a model may be a folder,
and `TOWER_OF_BACKBONE = True`, if every backbone of the same name has its text tower here. Neither this module nor
a family's file imports anything heavy before it loads a model.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, cast

from svb.errors import UsageError
from svb.extract import names
from svb.extract.names import DEFAULT_MODEL, split_family

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder

FAMILIES = {
    "offline": "svb.extract.text_encoders.offline",
    "open_clip": "svb.extract.text_encoders.open_clip",
    "sentence_transformers": "svb.extract.text_encoders.sentence_transformers",
    "t5": "svb.extract.text_encoders.t5",
}
DEFAULT_TEXT_ENCODER = DEFAULT_MODEL


def absolute_name(name: str) -> str:
    """Return a text encoder's name with its local folder or file made absolute, so that it holds everywhere."""
    family, model = split_family(name)
    return f"{family}:{getattr(_module(family), 'absolute_model', names.absolute_model)(model)}"


def tower_of(backbone: str) -> str | None:
    """Return the text encoder that shares a backbone's space, the other tower of its model; None without one."""
    return backbone if getattr(_module(split_family(backbone)[0]), "TOWER_OF_BACKBONE", False) else None


def load_text_encoder(name: str, device: torch.device) -> TextEncoder:
    """Load a text encoder, frozen, onto a device, in float32.

    Captions are encoded once, and a query is a single text: float32 keeps both in the same space on every machine.

    Raises:
        UsageError: The family or model is unknown.
        InputError: A local model is missing or damaged.
        ModelUnavailableError: The weights would come from a hub that cannot be reached.
    """
    from svb.data.weights import hash_weights

    family, model = split_family(name)
    module = _module(family)
    if module is None:
        raise UsageError(f"unknown text encoder family {family!r} - expected one of {', '.join(FAMILIES)}")
    encoder = cast("TextEncoder", module.load(name, model, device))
    encoder.weights_hash = hash_weights(encoder.module)
    encoder.module.eval().requires_grad_(False)
    return encoder


def _module(family: str) -> ModuleType | None:
    return importlib.import_module(FAMILIES[family]) if family in FAMILIES else None
