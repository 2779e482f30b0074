"""Batch norms folded into convolutions: the same features, in fewer passes over memory."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from svb.extract.backbones import load_backbone
from svb.extract.backbones.fold import FOLDABLE, fold_batch_norms


def settle(module: nn.Module) -> nn.Module:
    """Give the batch norms statistics such as training leaves: fresh ones change nothing."""
    generator = torch.Generator().manual_seed(1)
    for norm in batch_norms(module):
        norm.running_mean.normal_(0, 0.2, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d | nn.BatchNorm3d]:
    return [part for part in module.modules() if isinstance(part, FOLDABLE)]


@pytest.mark.parametrize(
    ("make", "shape", "left"),
    [
        (torchvision.models.resnet18, (3, 64, 64), 0),
        (torchvision.models.densenet121, (3, 64, 64), 62),  # norms before a convolution, and after a sum
        (torchvision.models.video.r2plus1d_18, (3, 4, 32, 32), 0),
        (lambda: timm.create_model("mobilenetv3_small_100"), (3, 64, 64), 0),
        (lambda: timm.create_model("tf_efficientnet_lite0"), (3, 64, 64), 0),  # convolutions that pad by themselves
        (lambda: timm.create_model("vit_tiny_patch16_224"), (3, 224, 224), 0),
    ],
    ids=["resnet18", "densenet121", "r2plus1d_18", "mobilenetv3", "efficientnet_lite0", "vit"],
)
def test_folding_changes_no_more_than_rounding(make: object, shape: tuple[int, ...], left: int) -> None:
    assert callable(make)
    module = settle(make())
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    expected, num_norms = module(images), len(batch_norms(module))
    assert fold_batch_norms(module, shape) == num_norms - left
    assert len(batch_norms(module)) == left
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Shared(nn.Module):
    """A convolution whose output is read beside its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        read = self.convolution(images)
        return torch.as_tensor(self.norm(read) + read)


class Twice(Shared):
    """A batch norm that two convolutions go through."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(self.convolution(images)) - self.norm(self.convolution(images.flip(-1))))


@pytest.mark.parametrize("make", [Shared, Twice])
def test_what_is_read_elsewhere_is_left_alone(make: type[nn.Module]) -> None:
    module = settle(make())
    before = copy.deepcopy(module)
    images = torch.randn(2, 3, 8, 8)
    assert fold_batch_norms(module, (3, 8, 8)) == 0
    assert len(batch_norms(module)) == 1
    assert torch.equal(module(images), before(images))


def test_a_backbone_is_folded_and_its_weights_hash_is_that_of_the_file() -> None:
    backbone = load_backbone("offline:efficientnet-lite0", torch.device("cpu"), torch.float32)
    assert not batch_norms(backbone.module)
    assert backbone.weights_hash == load_backbone(backbone.name, torch.device("cpu"), torch.bfloat16).weights_hash
