"""torchvision's classifiers of frames (`torchvision:resnet152`) and of clips (`torchvision:r2plus1d_18`).

`torchvision:<model>` takes torchvision's default weights from its hub, `torchvision:<model>/<file>` those in
a local file, whose frames are prepared as for the default ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision
from torchvision.transforms._presets import ImageClassification, VideoClassification

from svb.data.weights import load_into, unavailable
from svb.errors import UsageError
from svb.extract.backbones.backbone import Backbone, cut_classifier
from svb.extract.backbones.transform import Transform, cannot_prepare, square_side

PACKAGES = ("torchvision",)

# The number of frames that each video classifier was trained on. torchvision gives it only in prose, and none for
# S3D: its number is that of its training script and paper, which evaluate on more.
CLIP_FRAMES = {
    **dict.fromkeys(("mc3_18", "r2plus1d_18", "r3d_18", "mvit_v1_b", "mvit_v2_s"), 16),
    **dict.fromkeys(("swin3d_t", "swin3d_s", "swin3d_b"), 32),
    "s3d": 64,
}


def load(name: str, model: str, weights: str) -> Backbone:
    """Load a classifier and cut off its last layer.

    Raises:
        UsageError: torchvision has no classifier of that name, or it does not end in a linear
            layer or pointwise convolution.
        InputError: A local weights file is missing or does not fit.
        ModelUnavailableError: The default weights cannot be downloaded.
    """
    if model not in [*torchvision.models.list_models(torchvision.models), *CLIP_FRAMES]:
        raise UsageError(f"torchvision has no classifier {model!r} - see torchvision.models.list_models()")
    default = torchvision.models.get_model_weights(model).DEFAULT
    module = torchvision.models.get_model(model, weights=None)
    if weights:
        load_into(module, Path(weights))
    else:
        try:
            module.load_state_dict(default.get_state_dict(check_hash=True))
        except Exception as error:  # urllib's, ssl's and the hub's errors have no common root
            raise unavailable(name, error) from error
    if hasattr(module, "transform_input"):
        # googlenet and inception_v3 were trained on other means than those their transforms subtract;
        # torchvision corrects it inside the network, but only where it loads the weights itself.
        module.transform_input = True
    feature_size, classifier = cut_classifier(module, default.meta["categories"])
    return Backbone(
        name,
        module,
        _transform(name, default.transforms()),
        feature_size,
        clip_frames=CLIP_FRAMES.get(model, 1),
        classifier=classifier,
    )


def _transform(name: str, preset: Any) -> Transform:
    if not isinstance(preset, ImageClassification | VideoClassification):
        raise cannot_prepare(name, f"torchvision's {type(preset).__name__}", "a preset for classification")
    resize = [int(side) for side in preset.resize_size]
    return Transform(
        square_side(name, preset.crop_size),
        tuple(preset.mean),
        tuple(preset.std),
        # One size is that of the short side, two are those of the whole frame.
        mode="shortest" if len(resize) == 1 else "squash",
        resize_px=(resize[0], resize[-1]),
        interpolation=preset.interpolation.value,
        # Video classifiers were trained without it; only the code of their preset says so.
        antialias=isinstance(preset, ImageClassification),
    )
