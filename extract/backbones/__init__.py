"""Frozen backbones by name: `family:model[/weights]`, one file a family.

A new family is a file here and a line in `FAMILIES`. The file has `load(name, model, weights) -> Backbone`, and may
name the packages whose versions are worth recording in `PACKAGES`. This module itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, cast

from svb.errors import UsageError
from svb.extract.names import DEFAULT_MODEL, absolute_model, split_family, split_weights

if TYPE_CHECKING:
    import torch

    from svb.extract.backbones.backbone import Backbone, Classifier

FAMILIES = {
    "offline": "svb.extract.backbones.offline",
    "open_clip": "svb.extract.backbones.open_clip",
    "torchvision": "svb.extract.backbones.torchvision",
    "timm": "svb.extract.backbones.timm",
}
DEFAULT_BACKBONE = DEFAULT_MODEL


def absolute_name(name: str) -> str:
    """Return a backbone's name with the local file or folder in it made absolute, so that it holds everywhere."""
    family, model = split_family(name)
    return f"{family}:{absolute_model(model)}"


def load_backbone(
    name: str, device: torch.device, dtype: torch.dtype, *, compile: bool = False, batch_size: int = 1
) -> Backbone:
    """Load a backbone, frozen, onto a device.

    Args:
        name: `family:model[/weights]`.
        device: Where it runs.
        dtype: The precision it computes in.
        compile: Compile it, for batches of `batch_size`.
        batch_size: B; of no use without `compile`.

    Raises:
        SvbError: It cannot be compiled here.
        UsageError: The family or model is unknown.
        InputError: A local weights file is missing or does not fit.
        ModelUnavailableError: The weights would come from a hub that cannot be reached.
    """
    from svb.data.weights import hash_weights
    from svb.extract.backbones.fold import fold_batch_norms

    backbone = _load(name)
    backbone.weights_hash = backbone.weights_hash or hash_weights(backbone.module)
    backbone.module.eval().requires_grad_(False)
    fold_batch_norms(backbone.module, backbone.input_shape)
    backbone.place(device, dtype, compile, batch_size)
    return backbone


def load_classifier(name: str) -> Classifier | None:
    """Return the layer from a backbone's features to named classes, or None where it has none.

    Raises:
        As `load_backbone`.
    """
    return _load(name).classifier


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that the families of some backbones name."""
    families = [_family(split_family(name)[0]) for name in names]
    packages = dict.fromkeys(package for family in families for package in getattr(family, "PACKAGES", ()))
    return {package: importlib.metadata.version(package) for package in packages}


def _load(name: str) -> Backbone:
    family, model = split_family(name)
    return cast("Backbone", _family(family).load(name, *split_weights(model)))


def _family(family: str) -> ModuleType:
    if family not in FAMILIES:
        raise UsageError(f"unknown backbone family {family!r} - expected one of {', '.join(FAMILIES)}")
    return importlib.import_module(FAMILIES[family])
