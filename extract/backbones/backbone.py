"""A frozen backbone as the pipeline sees it, whatever family it is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.device import precision_name
from svb.errors import UsageError


@dataclass(frozen=True)
class Classifier:
    """The last layer of a classifier: features to logits of named classes.

    Attributes:
        weight: `(classes, F)` float32.
        bias: `(classes,)` float32.
        class_names: One a row.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    class_names: list[str]


@dataclass
class Backbone:
    """A frozen network from frames, or from clips of frames, to features.

    Attributes:
        name: `family:model[/weights]`, the key in every store.
        module: `(B, 3, S, S)` -> `(B, F)`, or `(B, 3, clip_frames, S, S)` -> `(B, F)` for a clip backbone.
        image_size: S in pixels.
        feature_size: F.
        mean: Of each RGB channel, for values from 0 to 1.
        std: Of each RGB channel, for values from 0 to 1.
        clip_frames: How many frames one row is made of; 1 for a frame backbone.
        classifier: The layer that was cut off, where its classes have names.
        weights_hash: Of the module, or of the whole CLIP model it is a tower of, in the precision it is stored in.
    """

    name: str
    module: nn.Module
    image_size: int
    feature_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    clip_frames: int = 1
    classifier: Classifier | None = None
    weights_hash: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the network to a device and precision; convolutions run channels-last there."""
        self.device, self.dtype = device, dtype
        self.module.to(device=device, dtype=dtype)
        if self.clip_frames == 1:
            self.module.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of a batch.

        Args:
            images: `(B, 3, S, S)` or `(B, 3, clip_frames, S, S)` uint8, on any device.

        Returns:
            `(B, F)` float32 on the CPU.
        """
        shape = (1, 3, *[1] * (images.ndim - 2))
        mean = torch.tensor(self.mean, device=self.device).view(shape)
        std = torch.tensor(self.std, device=self.device).view(shape)
        pixels = images.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
        pixels = pixels.to(self.dtype)
        if self.clip_frames == 1:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: torch.Tensor = self.module(pixels).float().cpu()
        return features

    def settings(self) -> dict[str, Any]:
        """Return what shapes this backbone's rows, as stored and fingerprinted."""
        return {
            "weights_hash": self.weights_hash,
            "feature_size": self.feature_size,
            "image_size": self.image_size,
            "resize": "short side, antialiased bicubic on uint8, centre crop",
            "mean": list(self.mean),
            "std": list(self.std),
            "clip_frames": self.clip_frames,
            "precision": precision_name(self.dtype),
        }


def cut_classifier(module: nn.Module, class_names: list[str] | None) -> tuple[int, Classifier | None]:
    """Replace a network's last linear layer by nothing, so that it gives that layer's inputs.

    Args:
        module: Changed in place.
        class_names: Names of the classes; a layer of another size is not the named classes' layer.

    Returns:
        The feature size F and the layer that was cut, None where its classes have no names.

    Raises:
        UsageError: The network has no linear layer.
    """
    path, last = _last_linear(module)
    parent = module.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], nn.Identity())
    if class_names is None or len(class_names) != last.out_features:
        return last.in_features, None
    bias = last.bias if last.bias is not None else torch.zeros(last.out_features)
    classifier = Classifier(last.weight.detach().float().numpy(), bias.detach().float().numpy(), class_names)
    return last.in_features, classifier


def _last_linear(module: nn.Module) -> tuple[str, nn.Linear]:
    def linears() -> Iterator[tuple[str, nn.Linear]]:
        return ((path, child) for path, child in module.named_modules() if isinstance(child, nn.Linear))

    *_, last = [None, *linears()]
    if last is None:
        raise UsageError(f"{type(module).__name__} does not end in a linear layer - choose another model")
    return last


def imagenet_class_names() -> list[str]:
    """Return the 1,000 names of ImageNet's classes in their usual order, as torchvision ships them."""
    from torchvision.models import ResNet152_Weights

    names: list[str] = ResNet152_Weights.IMAGENET1K_V2.meta["categories"]
    return names
