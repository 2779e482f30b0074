"""Frozen text encoders by name: `family:model[/weights]`, one file a family."""

from __future__ import annotations

import importlib
from typing import cast

import torch

from svb.data.weights import hash_weights
from svb.errors import UsageError
from svb.extract.names import split_name
from svb.extract.text_encoders.text_encoder import TextEncoder

FAMILIES = {
    "offline": "svb.extract.text_encoders.offline",
    "open_clip": "svb.extract.text_encoders.open_clip",
    "sentence_transformers": "svb.extract.text_encoders.sentence_transformers",
    "t5": "svb.extract.text_encoders.t5",
}
DEFAULT_TEXT_ENCODER = "open_clip:ViT-B-32/laion2b_s34b_b79k"


def load_text_encoder(name: str, device: torch.device) -> TextEncoder:
    """Load a text encoder, frozen, onto a device, in float32.

    A caption is encoded once and a query alone: float32 keeps both in the same space on every machine.

    Raises:
        UsageError: The family or model is unknown.
        InputError: A local model is missing or damaged.
        ModelUnavailableError: The weights would come from a hub that cannot be reached.
    """
    family, model, weights = split_name(name)
    if family not in FAMILIES:
        raise UsageError(f"unknown text encoder family {family!r} - expected one of {', '.join(FAMILIES)}")
    encoder = cast(TextEncoder, importlib.import_module(FAMILIES[family]).load(name, model, weights, device))
    encoder.weights_hash = hash_weights(encoder.module)
    encoder.module.eval().requires_grad_(False)
    return encoder
