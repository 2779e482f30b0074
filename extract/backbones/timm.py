"""Any image model of timm: `timm:<model>` from its hub, `timm:<model>/<file>` with local weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config

from svb.data.weights import hub, load_state, unavailable
from svb.errors import InputError, UsageError
from svb.extract.backbones.backbone import Backbone, Classifier, imagenet_class_names
from svb.extract.backbones.transform import Transform, cannot_prepare, square_side

PACKAGES = ("timm",)


def load(name: str, model: str, weights: str) -> Backbone:
    """Load a model and cut off its classifier.

    Raises:
        UsageError: timm has no model of that name.
        InputError: A local weights file is missing or does not fit.
        ModelUnavailableError: The weights cannot be downloaded.
    """
    if not timm.is_model(model.partition(".")[0]):
        raise UsageError(f"timm has no model {model!r} - see timm.list_models()")
    overlay = {"file": weights} if weights else None
    if weights:
        load_state(Path(weights))  # names a missing or damaged file before timm meets it
    try:
        with hub():
            module: Any = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # a hub client's errors have no common root
        if weights:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{weights} does not fit timm's {model} ({reason}) - name its own model") from error
        raise unavailable(name, error) from error
    classifier = _classifier(module.get_classifier())
    module.reset_classifier(0)
    return Backbone(
        name,
        module,
        _transform(name, resolve_model_data_config(module)),
        int(module.head_hidden_size),
        classifier=classifier,
    )


# timm's crop modes, as `timm.data.transforms_factory.transforms_imagenet_eval` reads them.
CROP_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


def _transform(name: str, config: dict[str, Any]) -> Transform:
    size, mean, mode = square_side(name, config["input_size"][1:]), tuple(config["mean"]), config["crop_mode"]
    if mode not in CROP_MODES:
        raise cannot_prepare(name, f"the crop mode {mode!r}", " or ".join(CROP_MODES))
    scaled = math.floor(size / config["crop_pct"])
    return Transform(
        size,
        mean,
        tuple(config["std"]),
        mode=CROP_MODES[mode],
        resize_px=(scaled, scaled),
        interpolation=config["interpolation"],
        fill=tuple(round(255 * value) for value in mean) if mode == "border" else (0, 0, 0),
    )


def _classifier(layer: Any) -> Classifier | None:
    names = imagenet_class_names()
    if getattr(layer, "out_features", None) != len(names):
        return None
    return Classifier(layer.weight.detach().float().numpy(), layer.bias.detach().float().numpy(), names)
